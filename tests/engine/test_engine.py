"""The engine's promises, on a model whose answers depend on every cached position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.engine import Engine, Finished, Request, Token
from localllm.errors import InvalidRequest, OutOfMemoryPlan, PromptTooLong
from localllm.machine import Memory
from localllm.sampling import Sampler, SamplingParams
from tests.engine.toy import VOCAB, ToyBackend, next_logits

EOS = frozenset({3})


def engine_of(backend: ToyBackend, context: int | None = None, **settings) -> Engine:
    return Engine(backend, context=context or backend.num_blocks * backend.block_size, **settings)


def run_all(engine: Engine, requests: list[Request]) -> dict[int, tuple[list[int], Finished]]:
    """Every request's tokens and last event, by its place in the list."""
    ids = {engine.add(request): place for place, request in enumerate(requests)}
    tokens: dict[int, list[int]] = {place: [] for place in ids.values()}
    ends: dict[int, Finished] = {}
    for _ in range(10_000):
        if not engine.busy:
            break
        for event in engine.step():
            place = ids[event.request_id]
            assert place not in ends, "an event came after the last one"
            if isinstance(event, Token):
                tokens[place].append(event.draw.token_id)
            else:
                ends[place] = event
    assert not engine.busy
    return {place: (tokens[place], ends[place]) for place in tokens}


def expected(request: Request, context: int) -> list[int]:
    """The same request in a plain loop without any cache."""
    sampler = Sampler(request.params, request.token_ids, VOCAB, request.stop_ids)
    sequence, answer = list(request.token_ids), []
    limit = request.params.max_tokens or context
    while len(answer) < limit and len(sequence) < context:
        token = sampler.draw(next_logits(np.array(sequence)), len(sequence)).token_id
        if token in request.stop_ids:
            break
        sequence.append(token)
        answer.append(token)
    return answer


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20).map(tuple)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    seed=st.integers(0, 1000),
    ignore_eos=st.booleans(),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
requests = st.builds(Request, prompts, params, st.just(EOS))


@given(
    st.lists(requests, min_size=1, max_size=6),
    st.integers(8, 40),
    st.integers(1, 5),
    st.integers(1, 24),
)
def test_an_answer_does_not_depend_on_what_runs_beside_it(batch, num_blocks, max_batch, step_rows):
    backend = ToyBackend(num_blocks=num_blocks)
    engine = engine_of(backend, max_batch=max_batch, step_rows=step_rows)
    answers = run_all(engine, batch)
    for place, request in enumerate(batch):
        assert answers[place][0] == expected(request, engine.context)
    assert engine.cache.in_use == 0, "every block is free again"
    assert all(sum(rows) <= max(step_rows, max_batch) for rows in backend.steps)


def test_a_long_prefill_does_not_hold_up_a_running_answer():
    backend = ToyBackend(num_blocks=64)
    engine = engine_of(backend, step_rows=8)
    first = engine.add(Request((1, 2), SamplingParams(max_tokens=30, temperature=0)))
    engine.step()
    engine.add(Request(tuple([5] * 60), SamplingParams(max_tokens=1, temperature=0)))
    for _ in range(6):
        assert any(isinstance(e, Token) and e.request_id == first for e in engine.step())


def test_a_step_takes_the_rows_that_suit_the_backend_and_fewer_beside_a_running_answer():
    backend = ToyBackend(num_blocks=400)
    backend.step_rows = 512
    engine = engine_of(backend)
    engine.add(Request(tuple([5] * 600), SamplingParams(max_tokens=30, temperature=0)))
    engine.step()
    engine.step()
    assert backend.steps == [[512], [88]]
    engine.add(Request(tuple([6] * 600), SamplingParams(max_tokens=1, temperature=0)))
    engine.step()
    assert backend.steps[-1] == [1, 127]


def test_logits_of_a_large_vocabulary_are_asked_for_in_smaller_steps(monkeypatch):
    monkeypatch.setattr("localllm.engine.engine.STEP_LOGITS", 10 * VOCAB)
    backend = ToyBackend()
    engine = engine_of(backend)
    logits = engine.logits([1] * 25)
    assert backend.steps == [[10], [10], [5]]
    assert np.array_equal(logits[24], next_logits(np.array([1] * 25)))


def test_logits_that_memory_cannot_hold_are_refused_before_any_step(monkeypatch):
    monkeypatch.setattr("localllm.engine.engine.memory", lambda: Memory(4000, 25 * VOCAB * 4))
    engine = engine_of(ToyBackend())
    assert engine.logits([1] * 25).shape == (25, VOCAB)
    steps = len(engine.backend.steps)
    with pytest.raises(OutOfMemoryPlan, match="logits of 26 tokens"):
        engine.logits([1] * 26)
    assert len(engine.backend.steps) == steps


def test_requests_wait_when_the_pool_is_promised_and_come_in_order():
    engine = engine_of(ToyBackend(num_blocks=4))  # 16 positions
    long = SamplingParams(max_tokens=10, temperature=0)
    ids = [engine.add(Request((1, 2, i), long)) for i in range(3)]
    finished = []
    while engine.busy:
        finished += [e.request_id for e in engine.step() if isinstance(e, Finished)]
    assert finished == ids


@pytest.mark.parametrize(
    ("params", "reason", "by"),
    [
        (SamplingParams(max_tokens=3, temperature=0), "length", "max_tokens"),
        (SamplingParams(max_tokens=None, temperature=0), "length", "context"),
        (SamplingParams(max_tokens=500, temperature=0), "length", "context"),
        (SamplingParams(temperature=0, logit_bias={3: 100.0}), "stop", "eos"),
        (
            SamplingParams(temperature=0, logit_bias={9: 100.0}, stop_token_ids=[9]),
            "stop",
            "stop token",
        ),
        (
            SamplingParams(temperature=0, logit_bias={3: 100.0}, ignore_eos=True, max_tokens=4),
            "length",
            "max_tokens",
        ),
    ],
)
def test_an_answer_says_why_it_ended(params, reason, by):
    engine = engine_of(ToyBackend(num_blocks=8))
    bias = dict(params.logit_bias) or {3: -100.0}
    params = SamplingParams(**{**params.__dict__, "logit_bias": bias})
    tokens, end = run_all(engine, [Request((1, 2, 4), params, EOS)])[0]
    assert (end.reason, end.receipt.stopped_by) == (reason, by)
    assert end.receipt.generated_tokens == len(tokens)
    assert end.receipt.prompt_tokens == 3
    assert not set(tokens) & ({3} if by == "eos" else {9} if by == "stop token" else set())


def test_the_receipt_counts_blocks_and_time():
    engine = engine_of(ToyBackend(num_blocks=8))
    params = SamplingParams(max_tokens=7, seed=11, ignore_eos=True)
    _, end = run_all(engine, [Request((1, 2, 4), params, EOS)])[0]
    receipt = end.receipt
    assert receipt.peak_kv_blocks == 3  # 9 cached positions in blocks of 4
    assert receipt.seed == 11
    assert receipt.time_to_first_token is not None
    assert receipt.total_time >= receipt.time_to_first_token >= receipt.queue_time >= 0
    assert receipt.decode_tokens_per_second is not None


def test_one_failing_step_fails_its_requests_and_the_next_ones_run():
    backend = ToyBackend()
    engine = engine_of(backend)
    backend.fail_on = 7
    bad = run_all(engine, [Request((7, 1), SamplingParams(temperature=0))])[0][1]
    assert bad.reason == "cancelled"
    assert "the toy broke" in str(bad.error)
    backend.fail_on = None
    good = Request((7, 1), SamplingParams(temperature=0, max_tokens=5))
    assert run_all(engine, [good])[0][0] == expected(good, engine.context)
    assert engine.cache.in_use == 0


@given(cancelled=st.sets(st.integers(0, 12), max_size=6))
def test_a_cancelled_step_changes_no_answer(cancelled):
    requests = [
        Request((1, 2, 4, 5, 6), SamplingParams(max_tokens=6, temperature=0)),
        Request((7, 1), SamplingParams(max_tokens=8, seed=5)),
    ]
    backend = ToyBackend(num_blocks=32)
    wanted = run_all(engine_of(backend, step_rows=4), requests)
    backend = ToyBackend(num_blocks=32)
    backend.cancel_steps = cancelled
    got = run_all(engine_of(backend, step_rows=4), requests)
    assert [got[i][0] for i in range(2)] == [wanted[i][0] for i in range(2)]
    backend.cancel_steps = {len(backend.steps)}
    assert len(engine_of(backend).logits([1, 2, 3])) == 3


def test_ending_a_request_frees_its_blocks_at_once_and_leaves_the_others_alone():
    engine = engine_of(ToyBackend(num_blocks=32))
    stay = Request((1, 2), SamplingParams(max_tokens=8, temperature=0))
    ids = [engine.add(r) for r in (Request((5,) * 9, SamplingParams(max_tokens=50)), stay)]
    engine.step()
    free = engine.cache.available
    assert engine.end(ids[0]).reason == "cancelled"
    assert engine.cache.available == free + 3
    assert engine.end(ids[0]) is None
    tokens = []
    while engine.busy:
        tokens += [e.draw.token_id for e in engine.step() if isinstance(e, Token)]
    assert tokens == expected(stay, engine.context)[1:]


def test_a_prompt_that_cannot_be_run_is_refused_before_it_queues():
    engine = engine_of(ToyBackend(num_blocks=4), context=10)
    cases = [
        ((), InvalidRequest, "empty"),
        ((1, VOCAB), InvalidRequest, f"token {VOCAB} at index 1"),
        ((-1,), InvalidRequest, "token -1"),
        ((1,) * 10, PromptTooLong, "10 tokens"),
    ]
    for ids, kind, words in cases:
        with pytest.raises(kind, match=words):
            engine.add(Request(ids, SamplingParams()))
    assert not engine.busy


def test_logits_of_every_position_whatever_the_chunks():
    ids = [1, 5, 2, 9, 9, 4, 0]
    for step_rows in (1, 3, 100):
        engine = engine_of(ToyBackend(), step_rows=step_rows, max_batch=1)
        logits = engine.logits(ids)
        assert logits.dtype == np.float32
        assert np.array_equal(logits, [next_logits(np.array(ids[: i + 1])) for i in range(7)])
        assert engine.cache.in_use == 0
