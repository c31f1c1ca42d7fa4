"""Beam search: what it searches, what it obeys, and how it shares an engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localllm.engine import Engine, Request
from localllm.sampling import SamplingParams
from tests.engine.test_engine import EOS
from tests.engine.test_promises import Plan, Run, beam_oracle
from tests.engine.toy import VOCAB, ToyBackend, next_logits

PROMPT = (1, 2, 4)


def answers(params: SamplingParams, engine: Engine | None = None) -> Run:
    engine = engine or Engine(ToyBackend(64), context=60)
    return Run(engine, [Plan(Request(PROMPT, params, EOS), 0, None, None)])()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_more_beams_than_the_batch_has_places_take_turns(batch):
    params = SamplingParams(max_tokens=3, beams=4, n=4, temperature=0)
    run = answers(params, Engine(ToyBackend(64), context=60, max_batch=batch))
    assert [run.tokens(i) for i in range(4)] == beam_oracle(PROMPT, 4, 3)


@pytest.mark.parametrize("blocks", [15, 17, 20])
@pytest.mark.parametrize("rows", [1, 3])
def test_beams_that_the_pool_cannot_hold_together_give_way_to_each_other(blocks, rows):
    params = SamplingParams(max_tokens=9, beams=4, n=2, temperature=0, logprobs=1)
    prompt = tuple(range(21))
    plan = Plan(Request(prompt, params, EOS), 0, None, None)
    wanted = Run(Engine(ToyBackend(200), context=400), [plan])()
    small = Engine(ToyBackend(blocks), context=4 * blocks, max_batch=3, step_rows=rows)
    run = Run(small, [plan, replace(plan, arrival=2)])()
    for request in range(4):
        assert run.draws[request] == wanted.draws[request % 2]
    assert small.cache.in_use == 0


def test_bias_penalties_and_min_tokens_apply_as_to_samples():
    def first(**changes) -> list[int]:
        return answers(SamplingParams(max_tokens=4, beams=2, temperature=0, **changes)).tokens(0)

    assert first(logit_bias={7: 100.0}) == [7] * 4
    assert len(set(first(logit_bias={7: 20.0, 8: 15.0}, presence_penalty=100.0))) == 4
    end = next(iter(EOS))
    assert first(logit_bias={end: 100.0}) == []
    assert len(first(logit_bias={end: 100.0}, min_tokens=3)) == 3


def test_log_probabilities_are_the_models_own_with_the_likeliest_beside_them():
    run = answers(SamplingParams(max_tokens=2, beams=2, logit_bias={7: 100.0}, logprobs=3))
    row = next_logits(np.array(PROMPT)).astype(np.float64)
    row -= np.log(np.exp(row).sum())
    draw = run.draws[0][0]
    assert draw.logprob == pytest.approx(row[7])
    assert [token for token, _ in draw.top] == list(np.argsort(-row)[:3])


def test_an_answer_keeps_its_rank_when_a_better_one_was_cancelled():
    params = SamplingParams(max_tokens=6, beams=3, n=3, temperature=0)
    wanted = answers(params)
    engine = Engine(ToyBackend(64), context=60)
    run = Run(engine, [Plan(Request(PROMPT, params, EOS), 0, 2, None)])()
    assert run.ends[0].receipt.stopped_by == "cancelled"
    assert run.ends[0].receipt.generated_tokens == 0
    for place in (1, 2):
        assert run.tokens(place) == wanted.tokens(place)
    assert engine.cache.in_use == 0


def test_a_beam_is_no_request_that_could_be_ended_or_forked():
    engine = Engine(ToyBackend(64), context=60)
    first = engine.add(Request(PROMPT, SamplingParams(max_tokens=6, beams=3), EOS))
    for _ in range(3):
        engine.step()
    inner = [s.id for s in engine.scheduler.running if s.id != first]
    assert inner
    assert all(engine.end(beam) is None for beam in inner)
    engine.close()
    assert not engine.busy
    assert engine.cache.in_use == 0


GOLDEN = json.loads((Path(__file__).parents[1] / "golden/beams.json").read_text())


class Table(ToyBackend):
    """The next token's logits depend on the last two tokens only, as in the golden file."""

    def _logits(self, prefix: np.ndarray) -> np.ndarray:
        return table_logits(int(prefix[-2]) if len(prefix) > 1 else 0, int(prefix[-1]))


def table_logits(before: int, last: int) -> np.ndarray:
    """float32 [V]."""
    return np.random.default_rng([before, last]).normal(scale=2, size=VOCAB).astype(np.float32)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_the_answers_are_those_of_transformers(case):
    params = SamplingParams(
        max_tokens=case["max_tokens"],
        beams=case["beams"],
        n=case["n"],
        length_penalty=case["length_penalty"],
        logprobs=0,
    )
    request = Request(tuple(case["prompt"]), params, frozenset(case["eos"]))
    run = Run(Engine(Table(200), context=400), [Plan(request, 0, None, None)])()
    assert [run.tokens(place) for place in range(case["n"])] == case["answers"]
