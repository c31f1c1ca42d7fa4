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
from localllm.engine.draft_head import DraftHead
from localllm.errors import CheckpointError, InvalidRequest
from localllm.train.draft_data import Answer, Answers, States
from localllm.train.draft_head import (
    DraftHeadConfig,
    DraftProgress,
    resumed_config,
    train_draft_head,
)
from localllm.train.draft_network import Network, Target, initial, run
from localllm.train.draft_prompts import built_in, read_prompts
from tests.tiny_model import write_tiny_model


@given(
    seed=st.integers(0, 99),
    steps=st.integers(1, 4),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_gradients_are_those_of_the_loss(seed, steps, softcap, scale) -> None:
    """Against differences, in float64."""
    random = np.random.default_rng(seed)
    hidden, inner, tokens, count = 4, 6, 7, 3
    start = initial(hidden, inner, (1.0, 0.1), seed)
    start.outside[:] = random.normal(0, 0.3, start.outside.shape)
    network = Network(*(array.astype(np.float64) for array in start.arrays()))
    target = Target(random.normal(size=(tokens, hidden)), scale, softcap)
    states = random.normal(size=(count, steps + 1, hidden))
    embeddings = random.normal(size=(count, steps, hidden)) * 0.1

    def loss(gradients: Network | None = None) -> float:
        return run(
            network, target, states, embeddings, closeness=0.3, decay=0.8, gradients=gradients
        ).loss

    gradients = Network(*(np.zeros_like(array) for array in network.arrays()))
    loss(gradients)
    for array, gradient in zip(network.arrays(), gradients.arrays(), strict=True):
        place = tuple(random.integers(0, size) for size in array.shape)
        kept = array[place]
        array[place] = kept + 1e-5
        above = loss()
        array[place] = kept - 1e-5
        below = loss()
        array[place] = kept
        assert gradient[place] == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-6)


def test_the_network_trained_is_the_one_that_drafts() -> None:
    """One step of it is `DraftHead.advance`, so the loss at K = 1 is that of the engine's guess."""
    random = np.random.default_rng(0)
    network = initial(8, 16, (1.0, 0.2), 0)
    network.outside[:] = random.normal(0, 0.2, network.outside.shape)
    states = random.normal(size=(5, 2, 8)).astype(np.float32)
    embeddings = random.normal(size=(5, 1, 8)).astype(np.float32) * np.float32(0.2)
    guess = DraftHead(*network.arrays()).advance(states[:, 0], embeddings[:, 0])
    far = replace_first(states, guess)
    target = Target(random.normal(size=(11, 8)).astype(np.float32))
    still = Network(network.norm, network.inside, np.zeros_like(network.outside))
    one = run(network, target, states, embeddings, closeness=0.5, decay=1.0).loss
    other = run(still, target, far, embeddings, closeness=0.5, decay=1.0).loss
    assert one == pytest.approx(other, rel=1e-5)


def replace_first(states: np.ndarray, first: np.ndarray) -> np.ndarray:
    changed = states.copy()
    changed[:, 0] = first
    return changed


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

    def test_anchors_never_reach_into_the_next_answer(self) -> None:
        starts = np.array([0, 4, 5, 9])
        states = States(np.zeros((9, 2), np.float16), np.zeros(9, np.int32), starts)
        assert states.anchors(2, range(3)).tolist() == [0, 1, 5, 6]
        assert states.anchors(9, range(3)).tolist() == []


class TestPrompts:
    def test_those_built_in_are_different_and_the_same_each_time(self) -> None:
        found = built_in(500, 3)
        assert len(set(found)) == 500
        assert found == built_in(500, 3) != built_in(500, 4)

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
        batch=64,
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
    assert losses[-1] < losses[0]
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
    hidden, tokens = 16, 12
    matrix = random.normal(size=(tokens, hidden)).astype(np.float32)
    cycle = np.arange(64) % tokens
    states = (matrix[(cycle + 1) % tokens] * 2).astype(np.float32)  # what draws the next token
    embeddings = random.normal(size=(tokens, hidden)).astype(np.float32)
    network = initial(hidden, 64, (1.4, 1.0), 0)
    target = Target(matrix)
    places = np.arange(60)[:, None] + np.arange(4)
    drawn = embeddings[(cycle[places[:, :-1]] + 1) % tokens]
    m = [np.zeros_like(array) for array in network.arrays()]
    first = run(network, target, states[places], drawn, closeness=0.1, decay=1.0)
    for _ in range(150):
        gradients = Network(*(np.zeros_like(array) for array in network.arrays()))
        last = run(
            network, target, states[places], drawn, closeness=0.1, decay=1.0, gradients=gradients
        )
        for array, gradient, mean in zip(network.arrays(), gradients.arrays(), m, strict=True):
            mean *= np.float32(0.9)
            mean += gradient
            array -= np.float32(0.01) * mean
    assert first.hits[2] < 0.3 * first.positions
    assert last.hits[2] > 0.95 * last.positions


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
