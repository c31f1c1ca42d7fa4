"""Draft heads: gradients, answers that survive a kill, training that resumes, guesses that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm import LLM, SamplingParams
from localllm.backend.protocol import Batch, Chunk
from localllm.backend.reference import ReferenceBackend
from localllm.checkpoint.tensor import Dense
from localllm.errors import CheckpointError, InvalidRequest
from localllm.models.draft_head import DraftHead, head_spec, no_vocabulary
from localllm.spec.weights import weight_shapes
from localllm.train.draft_config import DraftHeadConfig, DraftProgress, resumed_config
from localllm.train.draft_data import Answer, Answers, StateFile, States, generate, states_of
from localllm.train.draft_head import train_draft_head
from localllm.train.draft_network import (
    EMBEDDING_NORM,
    FROM_EMBEDDING,
    FROM_HIDDEN,
    HIDDEN_NORM,
    Arrays,
    Network,
    Target,
    Texts,
    initial,
    positions,
)
from localllm.train.draft_optimizer import Optimizer, orthogonal
from localllm.train.draft_prompts import built_in, read_prompts
from tests.tiny_model import write_tiny_model

SPEC = head_spec(
    8, heads=4, kv_heads=2, head_dim=4, inner=12, rope_theta=100.0, eps=1e-5, context=64
)


def some_texts(random: np.random.Generator, count: int = 2, length: int = 7) -> Texts:
    wanted = np.zeros((count, length), bool)
    wanted[0, 2:-1], wanted[1:, 1:-3] = True, True
    states = random.normal(size=(count, length, 8))
    return Texts(states, random.normal(size=(count, length, 8)), wanted)


def some_weights(random: np.random.Generator, dtype: type = np.float64) -> Arrays:
    return {
        name: (array + random.normal(0, 0.3, array.shape)).astype(dtype)
        for name, array in initial(SPEC, 1.3, 0).items()
    }


@given(
    seed=st.integers(0, 99),
    steps=st.integers(1, 4),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_gradients_are_those_of_the_loss(seed, steps, softcap, scale) -> None:
    """Against differences, in float64."""
    random = np.random.default_rng(seed)
    weights, texts = some_weights(random), some_texts(random)
    network, target = Network(SPEC, weights), Target(random.normal(size=(9, 8)), scale, softcap)

    def loss(gradients: Arrays | None = None) -> float:
        return network.run(
            target, texts, steps=steps, closeness=0.3, decay=0.8, gradients=gradients
        ).loss

    gradients = {name: np.zeros_like(array) for name, array in weights.items()}
    loss(gradients)
    for name, array in weights.items():
        place = tuple(random.integers(0, size) for size in array.shape)
        kept = array[place]
        array[place] = kept + 1e-5
        above = loss()
        array[place] = kept - 1e-5
        below = loss()
        array[place] = kept
        assert gradients[name][place] == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-6)


def test_the_network_trained_is_the_one_that_drafts() -> None:
    """Guess after guess, what it learns from is what the engine's layer computes."""
    random = np.random.default_rng(0)
    weights, texts = some_weights(random, np.float32), some_texts(random, length=9)
    texts = replace(
        texts,
        states=texts.states.astype(np.float32),
        embeddings=texts.embeddings.astype(np.float32),
    )
    network = Network(SPEC, weights)
    kept = network.guesses(texts, 3)

    layer = {n: Dense(a, "float32") for n, a in weights.items() if n in weight_shapes(SPEC)}
    layer |= no_vocabulary(8)
    backend = ReferenceBackend(SPEC, layer.items(), num_blocks=4)

    def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * gain

    for text, at in ((0, 4), (1, 3)):  # guesses that begin with the model's state there
        states = texts.states[text, : at + 1]
        start = 0
        for step in range(3):
            rows = range(start, at + step + 1)
            following = texts.embeddings[text, list(rows)]
            fused = normed(states, weights[HIDDEN_NORM]) @ weights[FROM_HIDDEN].T
            fused += normed(following, weights[EMBEDDING_NORM]) @ weights[FROM_EMBEDDING].T
            chunk = Chunk(
                np.zeros(len(rows), np.int32), start, np.arange(4), (), 1, embeddings=fused
            )
            hidden = np.empty_like(fused)
            backend.forward(Batch((chunk,)), hidden)
            assert np.allclose(hidden[-1], kept[step][text, at + step], atol=1e-4)
            states, start = hidden[-1:], at + step + 1


class TestOptimizer:
    def test_a_matrix_becomes_nearly_orthogonal(self) -> None:
        random = np.random.default_rng(0)
        for shape in ((24, 60), (60, 24)):
            matrix = random.normal(size=shape).astype(np.float32)
            u, _, v = np.linalg.svd(matrix, full_matrices=False)
            values = np.diag(u.T @ orthogonal(matrix) @ v.T)
            assert 0.6 < values.min() <= values.max() < 1.3

    def test_it_finds_the_least_of_a_bowl(self) -> None:
        random = np.random.default_rng(0)
        wanted = {"m": random.normal(size=(8, 5)), "v": random.normal(size=5)}
        weights = {name: np.zeros(array.shape, np.float32) for name, array in wanted.items()}
        optimizer = Optimizer(weights, 0.1, 400, 0.0)
        for step in range(400):
            gradients = {n: (weights[n] - wanted[n]).astype(np.float32) for n in wanted}
            optimizer.update(gradients, step)
        for name, array in wanted.items():
            assert np.allclose(weights[name], array, atol=0.02)


class TestAnswers:
    def test_a_torn_last_line_does_not_count(self, tmp_path: Path) -> None:
        journal = Answers(tmp_path / "answers.jsonl")
        journal.append([Answer(0, (1, 2), (3,)), Answer(1, (4,), (5, 6))])
        whole = journal.path.read_bytes()
        journal.path.write_bytes(whole[:-7])
        assert list(journal.read()) == [0]
        journal.rewrite(list(journal.read().values()))
        journal.append([Answer(1, (4,), (5, 6))])
        assert journal.path.read_bytes() == whole

    def test_damage_elsewhere_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        path.write_text('{"n": 0}\n{"n": 1, "prompt": [1], "answer": [2]}\n')
        with pytest.raises(CheckpointError, match=":1: is damaged"):
            Answers(path).read()

    def test_states_know_their_answers(self) -> None:
        states = States(
            np.zeros((10, 2), np.float16),
            np.arange(10, 20),
            np.array([0, 6]),
            np.array([5, 4]),
            np.array([3, 1]),
        )
        assert states.drawn.tolist() == [12, 13, 14, 16, 17, 18, 19]

    @pytest.mark.parametrize("kv_tokens", [4096, 192])
    def test_states_kept_are_those_that_would_be_computed(
        self, tiny: Path, tmp_path: Path, kv_tokens: int
    ) -> None:
        """To the bit, with sequences that give way to others and come back (192) as well."""
        journal = Answers(tmp_path / "answers.jsonl")
        with LLM(str(tiny), threads=1, kv_tokens=kv_tokens, context=96) as llm:
            file = StateFile(tmp_path, llm.spec.hidden)
            answers = generate(
                llm,
                [f"word {n}" for n in range(9)],
                journal,
                file,
                tokens=600,
                max_tokens=30,
                temperature=0.8,
                seed=1,
                progress=lambda done, total: None,
            )
            asked: list[int] = []
            states = states_of(llm, answers, journal, file, lambda _, total: asked.append(total))
            assert set(asked) == {0}, "nothing is computed again"
            wanted = [
                llm.pump.alone(lambda engine, ids=ids: engine.states(ids))
                for ids in ([*a.prompt, *a.tokens[:-1]] for a in answers)
            ]
            for text, (answer, own) in enumerate(zip(answers, wanted, strict=True)):
                rows = states.rows(text)
                assert np.array_equal(states.states[rows], own.astype(np.float16))
                assert states.following[rows].tolist() == [*answer.prompt, *answer.tokens][1:]

            # As a kill leaves it that came before the last states were on the disk.
            size = file.path.stat().st_size
            file.path.write_bytes(file.path.read_bytes()[: size // 2 + 1])
            again = states_of(llm, answers, journal, file, lambda _, total: asked.append(total))
            assert 0 < asked[-1] < states.lengths.sum()
            for text, own in enumerate(wanted):
                rows = again.rows(text)
                assert np.array_equal(again.states[rows], own.astype(np.float16))
            known = journal.read()
            assert all(known[a.number].at == s for a, s in zip(answers, again.starts, strict=True))

    def test_a_value_too_large_for_16_bits_widens_the_file(self, tmp_path: Path) -> None:
        file = StateFile(tmp_path, 2)
        small = np.arange(10, dtype=np.float32).reshape(5, 2)
        assert file.append([small[:2], small[2:]]) == 0
        assert file.append([np.array([[1e6, -1.0]], np.float32)]) == 5
        found = StateFile(tmp_path, 2).array()
        assert found.dtype == np.float32
        assert found.tolist() == [*small.tolist(), [1e6, -1.0]]
        assert [path.name for path in tmp_path.iterdir()] == ["states.float32"]

    def test_a_torn_row_does_not_count(self, tmp_path: Path) -> None:
        file = StateFile(tmp_path, 2)
        file.append([np.ones((3, 2), np.float32)])
        with file.path.open("ab") as torn:
            torn.write(b"x")
        assert file.rows == 3
        assert file.append([np.zeros((1, 2), np.float32)]) == 3
        assert file.array().tolist() == [[1, 1]] * 3 + [[0, 0]]


class TestPrompts:
    def test_those_built_in_are_different_and_the_same_each_time(self) -> None:
        found = built_in(3)
        assert len(set(found)) == len(found) > 1000
        assert found == built_in(3) != built_in(4)

    def test_a_file_may_mix_text_and_json(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        lines = [
            "plain words",
            json.dumps({"prompt": "a prompt"}),
            json.dumps({"messages": [{"role": "user", "content": "a message"}]}),
            "",
            "plain words",
        ]
        path.write_text("\n".join(lines))
        assert read_prompts(path) == ["plain words", "a prompt", "a message"]

    @pytest.mark.parametrize("line", ["{broken", '{"text": "x"}', '{"prompt": "  "}'])
    def test_a_line_that_is_neither_is_named(self, line: str, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(f"fine\n{line}\n")
        with pytest.raises(InvalidRequest, match=":2: "):
            read_prompts(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("draft") / "model")


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> DraftHeadConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"word {n} and {n * n}" for n in range(24)))
    return DraftHeadConfig(
        str(tiny),
        tmp_path / "head",
        prompts=prompts,
        held_out=3,
        tokens=900,
        max_tokens=24,
        inner=24,
        vocabulary=128,
        candidates=96,
        alone=0.5,
        batch=4,
        epochs=3.0,
        learning_rate=3e-3,
        save_every=5,
        threads=1,
    )


def test_a_head_is_trained_fits_and_changes_no_answer(config: DraftHeadConfig) -> None:
    seen: list[DraftProgress] = []
    report = train_draft_head(config, seen.append)
    assert report is not None
    assert report.measured is not None
    assert report.measured.same, "a guess must never change an answer"
    assert {progress.stage for progress in seen} == {"answers", "states", "training", "measuring"}
    losses = [p.loss for p in seen if p.stage == "training" and p.loss is not None]
    assert losses[len(losses) // 2 - 1] < losses[0]  # of the first guess alone
    assert json.loads((config.out / "report.json").read_text())["steps"] == report.steps
    head = DraftHead.load(config.out, hidden=32, vocab_size=260)
    assert head.tokens is not None
    assert len(head.tokens) == 128
    with LLM(config.model, draft_head=config.out, threads=1) as llm:
        for params in (
            SamplingParams(max_tokens=30, temperature=0, speculation="head"),
            SamplingParams(max_tokens=30, temperature=1.0, seed=5, speculation="head"),
        ):
            ours = llm.generate("some words", params)
            plain = llm.generate("some words", replace(params, speculation="off"))
            assert ours.token_ids == plain.token_ids


def test_it_learns_what_can_be_learned(tmp_path: Path) -> None:
    """A model that repeats itself is guessed right almost always."""
    random = np.random.default_rng(1)
    tokens, length = 12, 40
    matrix = random.normal(size=(tokens, 8)).astype(np.float32)
    embeddings = random.normal(size=(tokens, 8)).astype(np.float32)
    cycle = (np.arange(4)[:, None] * 3 + np.arange(length)) % tokens
    wanted = np.ones(cycle.shape, bool)
    wanted[:, -1] = False
    # A state draws the token after it, which is also what follows.
    texts = Texts(2 * matrix[(cycle + 1) % tokens], embeddings[(cycle + 1) % tokens], wanted)
    weights = initial(SPEC, 2.0, 0)
    network, optimizer = Network(SPEC, weights), Optimizer(weights, 0.02, 250, 0.0)
    shares = []
    for step in range(250):
        gradients = {name: np.zeros_like(array) for name, array in weights.items()}
        sums = network.run(
            Target(matrix), texts, steps=3, closeness=0.1, decay=1.0, gradients=gradients
        )
        optimizer.update(gradients, step)
        shares.append(sums.hits[2] / sums.tries[2])
    assert shares[0] < 0.3
    assert shares[-1] > 0.95


def test_a_run_that_was_stopped_ends_with_the_same_head(
    config: DraftHeadConfig, tmp_path: Path
) -> None:
    train_draft_head(config, measure=False)
    stopped = replace(config, out=tmp_path / "other")
    for at in (1, 4, 7):
        steps = 0

        def stop(limit: int = at) -> bool:
            nonlocal steps
            steps += 1
            return steps == limit

        again = replace(stopped, resume=stopped.out.exists())
        assert train_draft_head(again, measure=False, should_stop=stop) is None
    assert train_draft_head(replace(stopped, resume=True), measure=False) is not None
    for name in ("draft_head.safetensors", "draft_head.json"):
        assert (stopped.out / name).read_bytes() == (config.out / name).read_bytes()


def test_threads_change_no_bit(config: DraftHeadConfig, tmp_path: Path) -> None:
    config = replace(config, batch=11)  # parts of four texts, and a smaller one
    train_draft_head(config, measure=False)
    other = replace(config, out=tmp_path / "other", threads=3)
    train_draft_head(other, measure=False)
    name = "draft_head.safetensors"
    assert (other.out / name).read_bytes() == (config.out / name).read_bytes()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_is_the_sum_of_its_parts(steps: int) -> None:
    random = np.random.default_rng(4)
    weights, texts = some_weights(random), some_texts(random, count=5, length=9)
    network, target = Network(SPEC, weights), Target(random.normal(size=(9, 8)))

    def run(some: Texts, gradients: Arrays) -> float:
        return network.run(
            target,
            some,
            steps=steps,
            closeness=0.3,
            decay=0.8,
            gradients=gradients,
            counts=positions(texts.wanted, steps),
        ).loss

    whole, parts = ({n: np.zeros_like(a) for n, a in weights.items()} for _ in range(2))
    loss = run(texts, whole)
    assert loss == pytest.approx(sum(run(texts.some(s), parts) for s in (slice(2), slice(2, 5))))
    for name, gradient in whole.items():
        assert np.allclose(gradient, parts[name])


def test_a_folder_is_not_taken_over(config: DraftHeadConfig) -> None:
    with pytest.raises(InvalidRequest, match="no run to resume"):
        train_draft_head(replace(config, resume=True))
    assert train_draft_head(config, measure=False, should_stop=lambda: True) is None
    with pytest.raises(InvalidRequest, match="begun here"):
        train_draft_head(config)
    with pytest.raises(InvalidRequest, match="another learning_rate"):
        train_draft_head(replace(config, resume=True, learning_rate=1.0))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"tokens": 0}, "tokens"), ({"batch": 0}, "batch"), ({"decay": -1.0}, "decay")],
)
def test_settings_that_make_no_sense_are_named(changes, named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=named):
        DraftHeadConfig("model", tmp_path, **changes)


def test_too_few_prompts_are_told(config: DraftHeadConfig) -> None:
    with pytest.raises(InvalidRequest, match="too few"):
        train_draft_head(replace(config, held_out=24))
    with pytest.raises(InvalidRequest, match="too few tokens"):
        train_draft_head(replace(config, temperature=0.0, tokens=100_000), measure=False)


def test_a_run_is_resumed_from_its_folder_alone(config: DraftHeadConfig) -> None:
    assert train_draft_head(config, measure=False, should_stop=lambda: True) is None
    found = resumed_config(config.out, threads=1)
    assert found == replace(config, resume=True, save_every=found.save_every)
    assert train_draft_head(found, measure=False) is not None
    with pytest.raises(InvalidRequest, match="no run to resume"):
        resumed_config(config.out / "elsewhere")
