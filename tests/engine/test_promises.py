"""Whatever happens in the engine, each request's answer is the one it has alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.engine import Engine, Finished, Request, Token
from localllm.engine.drafters import DraftModel
from localllm.engine.speculative import Drafter
from localllm.sampling import SamplingParams
from tests.engine.test_engine import EOS, expected
from tests.engine.toy import VOCAB, ToyBackend, toy_head
from tests.examples import examples

thorough = settings(
    deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples(150)
)


class MemoryTier:
    """A disk that is a dict: as slow as `delay` steps, and now and then it loses something."""

    def __init__(self, backend: ToyBackend, delay: int = 1, loses: int = 0) -> None:
        self.backend, self.delay, self.loses = backend, delay, loses
        self.kept: dict[tuple[int, bytes], np.ndarray] = {}
        self.pending: list[tuple[int, int, int, bytes]] = []
        self.loads = 0

    def has(self, group: int, name: bytes) -> bool:
        return (group, name) in self.kept

    def load(self, group: int, name: bytes) -> np.ndarray | None:
        self.loads += 1
        if self.loses and self.loads % self.loses == 0:
            self.kept.pop((group, name))
        return self.kept.get((group, name))

    def save(self, group: int, name: bytes, content: np.ndarray) -> None:
        self.kept[group, name] = content

    def offer(self, group: int, block: int, name: bytes) -> bool:
        if (group, name) in self.kept or len(self.pending) >= 6:
            return False
        self.pending.append((self.delay, group, block, name))
        return True

    def finished(self) -> list[tuple[int, int]]:
        waiting = [(delay - 1, *rest) for delay, *rest in self.pending]
        self.pending = [item for item in waiting if item[0] > 0]
        done = [item for item in waiting if item[0] <= 0]
        for _, group, block, name in done:
            states = group == len(self.backend.group_blocks)
            read = (
                self.backend.read_state(block) if states else self.backend.read_block(group, block)
            )
            self.kept[group, name] = read
        return [(group, block) for _, group, block, _ in done]


@dataclass
class Plan:
    """What one request asks, when it comes, and when it is ended, if before its time."""

    request: Request
    arrival: int
    end_at: int | None
    fork_at: int | None


@dataclass
class Setting:
    num_blocks: int
    max_batch: int
    step_rows: int
    window: int | None
    drafters: tuple[str, ...]
    disk: str | None
    states: int = 0
    cancelled: frozenset[int] = field(default_factory=frozenset)

    def engine(self) -> Engine:
        backend = ToyBackend(self.num_blocks, window=self.window, state_slots=self.states)
        backend.cancel_steps = set(self.cancelled)
        drafters: list[Drafter] = []
        if "model" in self.drafters:
            drafters.append(DraftModel(ToyBackend(12, doubt=0.3)))
        if "head" in self.drafters:
            drafters.append(toy_head(backend, 12, doubt=0.3))
        tiers = {
            "fine": MemoryTier(backend),
            "slow": MemoryTier(backend, delay=7),
            "lossy": MemoryTier(backend, loses=3),
        }
        return Engine(
            backend,
            context=4 * self.num_blocks,
            max_batch=self.max_batch,
            step_rows=self.step_rows,
            drafters=drafters,
            draft_rows=8,
            disk=tiers.get(self.disk or ""),
        )


# Few beginnings, so that prompts share prefixes; a small alphabet, so that text repeats itself.
prompts = st.builds(
    lambda head, length, tail: ((head * 13, head, 5, 9, 5, 9) * 6)[:length] + tuple(tail),
    st.integers(0, 1),
    st.integers(0, 24),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.4, 1.3]),
    seed=st.integers(0, 1000),
    ignore_eos=st.booleans(),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {5: 4.0, 9: 4.0}]),
    speculation=st.sampled_from(["auto", "off"]),
    n=st.sampled_from([1, 1, 1, 3]),
    logprobs=st.sampled_from([None, 2]),
)
plans = st.builds(
    Plan,
    st.builds(
        Request,
        prompts,
        params,
        st.just(EOS),
        priority=st.integers(0, 2),
        reuse=st.sampled_from([True, True, False]),
    ),
    st.integers(0, 12),
    st.sampled_from([None, None, None, 3, 9]),
    st.sampled_from([None, None, 2, 6]),
)
engine_settings = st.builds(
    Setting,
    num_blocks=st.integers(12, 40),
    max_batch=st.integers(1, 5),
    step_rows=st.integers(1, 24),
    window=st.sampled_from([None, 3, 9]),
    drafters=st.sampled_from([(), ("model",), ("head",), ("model", "head")]),
    disk=st.sampled_from([None, "fine", "slow", "lossy"]),
    states=st.sampled_from([0, 2, 3, 5, 12, 40]),
    cancelled=st.frozensets(st.integers(0, 20), max_size=3),
)


class Run:
    """Drives an engine through plans, keeping what each request got."""

    def __init__(self, engine: Engine, plans: list[Plan]) -> None:
        self.engine, self.plans = engine, plans
        self.requests: dict[int, Request] = {}
        self.draws: dict[int, list] = {}
        self.ends: dict[int, Finished] = {}
        self.forks = 0

    def __call__(self) -> Run:
        step = 0
        last = max(plan.arrival for plan in self.plans)
        ids: dict[int, int] = {}
        while self.engine.busy or step <= last:
            for place, plan in enumerate(self.plans):
                if plan.arrival == step:
                    ids[place] = self.add(plan.request)
                age = step - plan.arrival
                if plan.end_at is not None and age == plan.end_at:
                    self.end(ids[place])
                if plan.fork_at is not None and age == plan.fork_at and ids[place] not in self.ends:
                    self.fork(ids[place])
            for event in self.engine.step():
                self.take(event)
            self.check_blocks()
            step += 1
            assert step < 20_000, "the engine makes no progress"
        return self

    def add(self, request: Request) -> int:
        first = self.engine.add(request)
        for sample in range(request.samples):
            seed = request.params.seed
            params = replace(request.params, n=1, seed=None if seed is None else seed + sample)
            self.requests[first + sample] = replace(request, params=params)
            self.draws[first + sample] = []
        return first

    def fork(self, request_id: int) -> None:
        child = self.engine.fork(request_id)
        self.forks += 1
        self.requests[child] = self.requests[request_id]
        self.draws[child] = list(self.draws[request_id])

    def end(self, request_id: int) -> None:
        finished = self.engine.end(request_id)
        if finished is not None:
            self.take(finished)

    def take(self, event: Token | Finished) -> None:
        assert event.request_id not in self.ends, "an event came after the last one"
        if isinstance(event, Token):
            self.draws[event.request_id].append(event.draw)
        else:
            self.ends[event.request_id] = event

    def check_blocks(self) -> None:
        for group, pool in enumerate(self.engine.cache.pools):
            pool.check()
            held: dict[int, int] = {}
            for sequence in self.engine.scheduler.running:
                for block in sequence.table.tables[group]:
                    if block >= 0:
                        held[block] = held.get(block, 0) + 1
            for block, users in held.items():
                assert pool.users(block) >= users
        self.check_states()
        assert len(self.engine.scheduler.running) <= self.engine.scheduler.max_batch
        assert all(not s.table.blocks for s in self.engine.scheduler.waiting)

    def check_states(self) -> None:
        states = self.engine.cache.states
        if states is None:
            return
        states.pool.check()
        held: dict[int, int] = {}
        for sequence in self.engine.scheduler.running:
            slot = sequence.table.states.slot
            if slot is not None:
                held[slot] = held.get(slot, 0) + 1
        for slot, users in held.items():
            assert states.pool.users(slot) >= users

    def tokens(self, request_id: int) -> list[int]:
        return [draw.token_id for draw in self.draws[request_id]]


@thorough
@given(st.lists(plans, min_size=1, max_size=6), engine_settings)
def test_every_answer_is_the_one_the_request_has_alone(plans, setting):
    engine = setting.engine()
    run = Run(engine, plans)()
    assert set(run.ends) == set(run.requests), "every request ends"
    for request_id, request in run.requests.items():
        wanted = expected(request, engine.context)
        got, end = run.tokens(request_id), run.ends[request_id]
        assert end.error is None
        if end.receipt.stopped_by == "cancelled":
            wanted = wanted[: len(got)]
        assert got == wanted
        assert end.receipt.accepted_tokens <= end.receipt.drafted_tokens
    engine.close()
    for _ in range(10):
        engine.cache.collect()
    assert engine.cache.in_use == 0, "every block is free or kept for reuse"
    states = engine.cache.states
    assert states is None or states.pool.in_use == 0, "every state is free or kept for reuse"


@thorough
@given(st.lists(plans, min_size=1, max_size=4), engine_settings)
def test_logprobs_are_the_same_too(plans, setting):
    plain = Setting(400, 1, 200, None, (), None)
    want = [replace(p.request, params=replace(p.request.params, n=1, logprobs=2)) for p in plans]
    plans = [replace(plan, request=request) for plan, request in zip(plans, want, strict=True)]
    run = Run(setting.engine(), plans)()
    for request_id, request in run.requests.items():
        off = replace(request.params, speculation="off")
        alone = Run(plain.engine(), [Plan(replace(request, params=off), 0, None, None)])()
        got, wanted = run.draws[request_id], alone.draws[0]
        whole = run.ends[request_id].receipt.stopped_by != "cancelled"
        limit = len(got) if not whole or setting.num_blocks < 100 else len(wanted)
        assert got[:limit] == wanted[:limit]


@thorough
@given(prompts, st.integers(1, 4), st.integers(1, 8), st.integers(1, 24))
def test_prompt_logprobs_are_those_of_the_logits(prompt, max_batch, max_tokens, step_rows):
    params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=3)
    setting = Setting(16, max_batch, step_rows, None, (), None)
    run = Run(setting.engine(), [Plan(Request(prompt, params), i, None, None) for i in range(3)])()
    logits = setting.engine().logits(prompt).astype(np.float64)
    rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for end in run.ends.values():
        assert end.prompt_logprobs is not None
        assert [d.token_id for d in end.prompt_logprobs] == list(prompt[1:])
        for draw, row in zip(end.prompt_logprobs, rows, strict=False):
            assert draw.logprob == pytest.approx(row[draw.token_id])
            assert len(draw.top) == 3


def test_a_second_request_reuses_what_the_first_computed():
    engine = Engine(ToyBackend(64), context=128)
    prompt = tuple(range(20)) + tuple(range(10))
    run = Run(
        engine, [Plan(Request(prompt, SamplingParams(max_tokens=4, temperature=0)), 0, None, None)]
    )()
    answer = tuple(run.tokens(0))
    again = Request((*prompt, *answer, 7, 8), SamplingParams(max_tokens=3, temperature=0))
    engine_steps = len(engine.backend.steps)
    second = Run(engine, [Plan(again, 0, None, None)])()
    receipt = second.ends[1].receipt
    assert receipt.cached_tokens == 32  # of 36, in blocks of 4: 33 positions were computed before
    assert receipt.cache_stop == "the last tokens are always computed"
    assert engine.backend.steps[engine_steps] == [4]
    assert second.tokens(1) == expected(again, 128)


def test_a_fork_copies_nothing_until_it_writes_into_a_shared_block():
    backend = ToyBackend(64)
    engine = Engine(backend, context=200)
    parent = engine.add(
        Request(tuple(range(30)), SamplingParams(max_tokens=20, temperature=1, seed=1))
    )
    engine.step()
    in_use = engine.cache.in_use
    child = engine.fork(parent, seed=2)
    assert (backend.copies, engine.cache.in_use) == (0, in_use)
    engine.step()
    assert backend.copies == 1  # block 7 holds positions 28 and 29 of both
    engine.end(parent)
    engine.end(child)
    assert engine.cache.in_use == 0


def test_windows_free_what_has_left_them():
    backend = ToyBackend(64, window=8)
    engine = Engine(backend, context=200, step_rows=8)
    engine.add(Request(tuple(range(31)) * 4, SamplingParams(max_tokens=5, temperature=0)))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.cache.pools[1].in_use)
    assert most <= 5  # 8 + 8 positions in blocks of 4, one of them begun before
    assert engine.cache.pools[0].evictions == 0


def test_logits_of_a_long_text_need_no_more_of_a_window_than_a_request_does():
    small = ToyBackend(64, window=8, window_blocks=8)
    engine = Engine(small, context=200, step_rows=8, max_batch=1)
    ids = tuple(i % 31 for i in range(150))
    roomy = Engine(ToyBackend(64, window=8), context=200, step_rows=8)
    assert np.array_equal(engine.logits(ids), roomy.logits(ids))
    assert engine.cache.in_use == 0


def test_a_low_priority_request_gives_way_and_still_ends():
    engine = Engine(ToyBackend(12), context=48, max_batch=4)
    low = [
        engine.add(Request((i,) * 9, SamplingParams(max_tokens=30, temperature=0), priority=5))
        for i in range(3)
    ]
    for _ in range(4):
        engine.step()
    high = engine.add(Request((9,) * 20, SamplingParams(max_tokens=12, temperature=0), priority=0))
    order, receipts = [], {}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                order.append(event.request_id)
                receipts[event.request_id] = event.receipt
    assert order.index(high) < order.index(low[2])
    assert sum(receipts[i].preemptions for i in low) >= 1
    assert receipts[high].preemptions == 0


def test_one_bad_row_fails_its_own_request_only():
    backend = ToyBackend(64)
    engine = Engine(backend, context=100)
    good = Request((1, 2), SamplingParams(max_tokens=9, temperature=0))
    ids = [
        engine.add(good),
        engine.add(Request((VOCAB - 1, 4), SamplingParams(max_tokens=9, temperature=0))),
    ]
    backend.fail_on = VOCAB - 1
    run = Run(engine, [])
    run.draws = {i: [] for i in ids}
    for _ in range(30):
        for event in engine.step():
            run.take(event)
    assert "the toy broke" in str(run.ends[ids[1]].error)
    assert run.ends[ids[0]].error is None
    assert run.tokens(ids[0]) == expected(good, 100)


def test_events_tell_what_went_on_and_a_slow_reader_loses_the_oldest():
    engine = Engine(ToyBackend(64), context=100)
    watch, slow = engine.events.watch(), engine.events.watch(capacity=2)
    Run(
        engine,
        [
            Plan(
                Request((5, 9, 5, 9, 5, 9), SamplingParams(max_tokens=9, temperature=0, n=2)),
                0,
                None,
                None,
            )
        ],
    )()
    kinds = [type(event).__name__ for event in watch.take()]
    assert kinds[:3] == ["Queued", "Started", "Forked"]
    assert kinds.count("Ended") == 2
    assert "StepDone" in kinds
    assert len(slow.take()) == 2
    assert slow.dropped == len(kinds) - 2
    engine.events.unwatch(slow)
    assert watch.take() == []


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beam_search_finds_what_a_search_over_everything_finds(beams):
    prompt = (1, 2, 4)
    params = SamplingParams(max_tokens=3, beams=beams, n=beams, temperature=0)
    run = Run(
        Engine(ToyBackend(64), context=60), [Plan(Request(prompt, params, EOS), 0, None, None)]
    )()
    assert [run.tokens(i) for i in range(beams)] == beam_oracle(prompt, beams, 3)
    assert run.engine.cache.in_use == 0


def beam_oracle(prompt: tuple[int, ...], beams: int, length: int) -> list[list[int]]:
    from tests.engine.toy import next_logits

    live, done = [((), 0.0)], []
    for step in range(1, length + 1):
        options = []
        for tokens, score in live:
            row = next_logits(np.array((*prompt, *tokens))).astype(np.float64)
            row -= np.log(np.exp(row).sum())
            options += [((*tokens, t), score + row[t]) for t in range(VOCAB)]
        options.sort(key=lambda option: -option[1])
        live = []
        for rank, (tokens, score) in enumerate(options[: 2 * beams]):
            if tokens[-1] in EOS:
                if rank < beams:
                    done.append((tokens[:-1], score / step))
            elif len(live) < beams:
                live.append((tokens, score))
        done = sorted(done, key=lambda d: -d[1])[:beams]
        if len(done) == beams and done[-1][1] >= live[0][1] / step:
            live = []
            break
    done += [(tokens, score / length) for tokens, score in live]
    return [list(tokens) for tokens, _ in sorted(done, key=lambda d: -d[1])[:beams]]
