"""A draft head guesses what its page says, follows its sequences, and changes no answer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from localllm.backend.protocol import Batch
from localllm.backend.reference import ReferenceBackend
from localllm.checkpoint.safetensors import SafetensorsFile, write_safetensors
from localllm.engine import Engine, Request
from localllm.engine.drafters import HeadDrafter
from localllm.errors import CheckpointError
from localllm.models.draft_head import DraftHead
from localllm.sampling import SamplingParams
from tests.backend import oracle
from tests.backend.random_models import dense, llama, random_weights
from tests.engine.heads import random_head
from tests.engine.test_speculation import answers, eager
from tests.engine.toy import ToyBackend, toy_head

PROMPT = (1, 2, 4, 7, 2)


def greedy(prompt=PROMPT, tokens: int = 24, **params) -> Request:
    return Request(prompt, SamplingParams(max_tokens=tokens, temperature=0.0, **params))


class TestFollowing:
    """The toy's head is right wherever it has seen a text from its beginning; see `ToyLayer`."""

    def test_a_head_that_knows_is_always_right(self, monkeypatch):
        eager(monkeypatch)
        backend = ToyBackend(64)
        engine = Engine(backend, context=200, drafters=[toy_head(backend, 64)])
        drafted, accepted = answers(engine, [greedy(speculation="head") for _ in range(3)])
        assert accepted == 3 * 21  # of 24 tokens all but those that the three steps drew
        assert len(backend.steps) == 3

        plain, none = answers(engine, [greedy(speculation="off")])
        assert drafted == 3 * plain
        assert none == 0

    def test_after_wrong_guesses_it_goes_on_from_the_models_states(self, monkeypatch):
        eager(monkeypatch)
        backend = ToyBackend(64)
        engine = Engine(backend, context=200, drafters=[toy_head(backend, 64, doubt=0.4)])
        requests = [greedy((n, 2, 4), 40, speculation="head") for n in range(4)]
        drafted, accepted = answers(engine, requests)
        assert drafted == answers(engine, [replace(r, params=off(r)) for r in requests])[0]
        assert accepted > 4 * 15

    def test_what_came_from_the_cache_has_no_states_and_is_done_without(self, monkeypatch):
        eager(monkeypatch)
        backend = ToyBackend(64)
        engine = Engine(backend, context=200, drafters=[toy_head(backend, 64)])
        long = tuple(range(20))
        first, accepted = answers(engine, [greedy(long, speculation="head")])
        assert backend.layer is not None
        backend.layer.logits.clear()
        again, late = answers(engine, [greedy(long, speculation="head")])
        assert first == again
        assert late < 4 < accepted  # it has not seen how the text begins, and guesses on

    def test_a_small_pool_of_its_own_breaks_nothing(self, monkeypatch):
        eager(monkeypatch)
        backend = ToyBackend(200)
        engine = Engine(backend, context=200, drafters=[toy_head(backend, 9)])
        requests = [greedy((n, 2, 4), 30, speculation="head") for n in range(6)]
        drafted, accepted = answers(engine, requests)
        assert drafted == answers(engine, [replace(r, params=off(r)) for r in requests])[0]
        assert accepted > 0

    def test_of_a_long_prompt_it_takes_the_end(self, monkeypatch):
        eager(monkeypatch)
        monkeypatch.setattr("localllm.engine.drafters._WINDOW", 16)
        backend = ToyBackend(64)
        drafter = toy_head(backend, 64)
        engine = Engine(backend, context=200, step_rows=10, drafters=[drafter])
        answers(engine, [greedy(tuple(range(25)) * 2, 2, speculation="off")])
        rows: list[int] = []
        run = drafter._layer.forward

        def watched(batch, hidden=None):
            rows.append(sum(len(chunk.token_ids) for chunk in batch.chunks))
            return run(batch, hidden)

        monkeypatch.setattr(drafter._layer, "forward", watched)
        answers(engine, [greedy(tuple(range(1, 26)) * 2, 6, speculation="head")])
        assert 10 <= rows[0] <= 16


def off(request: Request) -> SamplingParams:
    return replace(request.params, speculation="off")


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + 1e-5) * gain


def test_it_computes_what_its_page_says(monkeypatch):
    eager(monkeypatch)
    spec = llama()
    backend = ReferenceBackend(spec, dense(random_weights(spec)).items(), num_blocks=9)
    head = random_head(spec.hidden)
    layer = ReferenceBackend(head.spec, head.weights.items(), num_blocks=9)
    engine = Engine(backend, context=64, drafters=[HeadDrafter(head, backend, layer)])
    seen: list[tuple[Batch, np.ndarray]] = []
    run = layer.forward

    def watched(batch, hidden):
        result = run(batch, hidden)
        seen.append((batch, hidden.copy()))
        return result

    monkeypatch.setattr(layer, "forward", watched)
    (tokens,), _ = answers(engine, [greedy(tokens=5, speculation="head")])

    text = [*PROMPT, *tokens]
    states = engine.states(text)
    batch, guessed = seen[0]
    (chunk,) = batch.chunks
    assert chunk.start == 0
    fused = (
        rms_norm(states[:5], head.hidden_norm) @ head.from_hidden.to_float32().T
        + rms_norm(backend.embed(text[1:6]), head.embedding_norm)
        @ head.from_embedding.to_float32().T
    )
    assert np.allclose(chunk.embeddings, fused, atol=1e-5)
    # The oracle takes tokens and gives logits: those of rows that are the inputs, by a head that
    # changes nothing.
    whole = replace(head.spec, vocab_size=spec.hidden, tied_head=False)
    rows = np.zeros((spec.hidden, spec.hidden))
    rows[:5] = fused
    weights = {name: weight.to_float32() for name, weight in head.weights.items()}
    weights |= {"embed.weight": rows, "head.weight": np.eye(spec.hidden)}
    wanted = oracle.logits(whole, weights, np.arange(5), 5)
    assert np.allclose(guessed, wanted, atol=1e-4)


class TestFile:
    def test_what_is_saved_is_read_again(self, tmp_path):
        head = random_head(64, tokens=np.array([1, 5, 90]))
        head.save(tmp_path)
        again = DraftHead.load(tmp_path, hidden=64, vocab_size=96)
        assert again.spec == head.spec
        assert np.array_equal(again.tokens, head.tokens)
        for name, weight in head.weights.items():
            assert np.array_equal(again.weights[name].to_float32(), weight.to_float32())
        assert np.array_equal(again.from_hidden.to_float32(), head.from_hidden.to_float32())

    def test_one_that_does_not_fit_is_refused_by_name(self, tmp_path):
        random_head(64, tokens=np.array([1, 5, 90])).save(tmp_path)
        with pytest.raises(CheckpointError, match="hidden states of 64, the model's have 32"):
            DraftHead.load(tmp_path, hidden=32, vocab_size=96)
        with pytest.raises(CheckpointError, match="guesses token 90 of a vocabulary of 80"):
            DraftHead.load(tmp_path, hidden=64, vocab_size=80)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"heads": 3}, "no sizes of an attention layer"),
            ({"heads": 1 << 40}, "heads must be 1"),
            ({"inner": 2.5}, "inner must be 1"),
            ({"eps": 0}, "eps must be a positive number"),
            ({"rope_theta": float("nan")}, "rope_theta must be"),
            ({"version": 1}, "version 1; this release reads 2"),
            ({"format": "other"}, "not a draft head"),
        ],
    )
    def test_damaged_settings_are_refused(self, tmp_path, changes, message):
        random_head(64).save(tmp_path)
        path = tmp_path / "draft_head.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(CheckpointError, match=message):
            DraftHead.load(tmp_path, hidden=64, vocab_size=96)

    def test_damaged_weights_are_refused(self, tmp_path):
        random_head(64).save(tmp_path)
        path = tmp_path / "draft_head.safetensors"
        file = SafetensorsFile(path)
        tensors = {name: np.array(file.dense(name).to_float32()) for name in file.tensors}
        file.close()
        changed = {**tensors, "hidden_norm.weight": np.full(64, np.nan, np.float32)}
        write_safetensors(path, changed)
        with pytest.raises(CheckpointError, match=r"hidden_norm\.weight holds NaN"):
            DraftHead.load(tmp_path, hidden=64, vocab_size=96)
        write_safetensors(path, {**tensors, "fuse.hidden.weight": np.ones((64, 2), np.float32)})
        with pytest.raises(CheckpointError, match=r"fuse.hidden.weight has the shape \(64, 2\)"):
            DraftHead.load(tmp_path, hidden=64, vocab_size=96)
        del tensors["layers.0.attn.q.weight"]
        write_safetensors(path, tensors)
        with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.q\.weight"):
            DraftHead.load(tmp_path, hidden=64, vocab_size=96)
