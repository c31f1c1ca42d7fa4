"""Speculation changes neither tokens nor their distribution, and gives up where it does not pay."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import pytest

from localllm.engine import Engine, Finished, Request, Token
from localllm.engine.drafters import DraftModel, PromptLookup
from localllm.engine.sequence import Sequence
from localllm.engine.speculative import MAX_DRAFTS, Pace, Speculator, Wish, Worth
from localllm.errors import InvalidRequest
from localllm.sampling import SamplingParams
from tests.engine.toy import VOCAB, ToyBackend, next_logits

PROMPT = (1, 2, 4)


def answers(engine: Engine, requests: list[Request]) -> tuple[list[list[int]], int]:
    """Each request's tokens, and how many drafts were accepted altogether."""
    ids = {engine.add(request): [] for request in requests}
    accepted = 0
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Token):
                ids[event.request_id].append(event.draw.token_id)
            elif isinstance(event, Finished):
                accepted += event.receipt.accepted_tokens
    return list(ids.values()), accepted


def eager(monkeypatch) -> None:
    """Rows cost nothing, so that as much is guessed as may be."""
    monkeypatch.setattr(Pace, "seconds", lambda self, rows: 1 + 1e-6 * rows)


@pytest.mark.parametrize("count", [1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_seed_by_seed_the_same_tokens_and_the_distribution_of_the_model(monkeypatch, count):
    eager(monkeypatch)
    engine = Engine(
        ToyBackend(400),
        context=1600,
        max_batch=64,
        drafters=[DraftModel(ToyBackend(400, doubt=0.5))],
    )

    def requests(speculation: str) -> list[Request]:
        params = {"max_tokens": 4, "temperature": 0.9, "speculation": speculation}
        return [Request(PROMPT, SamplingParams(seed=seed, **params)) for seed in range(count)]

    drafted, accepted = answers(engine, requests("model"))
    plain, none = answers(engine, requests("off"))
    assert drafted == plain
    assert accepted > count / 4
    assert none == 0
    # The second token, over all first ones: its probabilities are known.
    first = softmax(next_logits(np.array(PROMPT)) / 0.9)
    wanted = sum(
        p * softmax(next_logits(np.array([*PROMPT, t])) / 0.9) for t, p in enumerate(first)
    )
    found = np.bincount([tokens[1] for tokens in drafted], minlength=VOCAB)
    chi_square = float(((found - count * wanted) ** 2 / (count * wanted)).sum())
    assert chi_square < 59.7  # 30 degrees of freedom: passed with probability 0.999


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    result: np.ndarray = weights / weights.sum()
    return result


def test_text_that_repeats_itself_takes_few_steps(monkeypatch):
    eager(monkeypatch)
    backend = ToyBackend(100)
    params = SamplingParams(max_tokens=60, temperature=0, logit_bias={7: 100.0})
    [tokens], accepted = answers(Engine(backend, context=400), [Request(PROMPT, params)])
    assert tokens == [7] * 60
    assert len(backend.steps) <= 3 + 60 / MAX_DRAFTS
    assert accepted == 60 - len(backend.steps)


def test_a_request_may_ask_for_a_drafter_and_not_for_one_that_is_not_here():
    engine = Engine(ToyBackend(), context=60)
    engine.check(Request(PROMPT, SamplingParams(speculation="ngram")))
    with pytest.raises(InvalidRequest, match="speculation='model'"):
        engine.check(Request(PROMPT, SamplingParams(speculation="model")))


def test_a_draft_model_with_too_small_a_pool_drafts_less_and_breaks_nothing(monkeypatch):
    eager(monkeypatch)
    small = ToyBackend(6)
    engine = Engine(ToyBackend(200), context=400, drafters=[DraftModel(small)])
    requests = [
        Request((i, *PROMPT), SamplingParams(max_tokens=30, temperature=0.7, seed=i))
        for i in range(6)
    ]
    with_drafts, accepted = answers(engine, requests)
    assert accepted > 0
    off = [
        Request(r.token_ids, SamplingParams(**{**r.params.__dict__, "speculation": "off"}))
        for r in requests
    ]
    assert with_drafts == answers(engine, off)[0]


class Guesser:
    """Right with a probability of its own, and told what it is."""

    name = "model"
    wants_states = False
    knows_chances = False

    def __init__(self, chance: float, row_cost: float = 0.0) -> None:
        self.chance, self.row_cost = chance, row_cost
        self.asked: list[int] = []

    def ready(self, sequence: Sequence) -> float | None:
        return self.chance

    def propose(self, wishes: Seq[Wish]) -> list[list[int]]:
        self.asked += [wish.most for wish in wishes]
        return [[0] * wish.most for wish in wishes]

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None: ...

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None: ...

    def forget(self, sequence: Sequence) -> None: ...


def proposals(chance: float, *, a: float, b: float, sequences: int = 1, row_cost: float = 0.0):
    """How many drafts each sequence is given, when a step takes a + b · rows."""
    backend = ToyBackend(200)
    engine = Engine(backend, context=400)
    guesser = Guesser(chance, row_cost)
    speculator = Speculator([guesser])
    for rows in (1, 2, 4, 8) * 8:
        speculator.pace.record(rows, a + b * rows)
    for i in range(sequences):
        engine.add(Request((i, 1), SamplingParams(max_tokens=90, temperature=0)))
    engine.step()
    speculator.propose(engine.scheduler.running, 64)
    return [len(s.speculation.drafts) for s in engine.scheduler.running]


def test_as_many_guesses_as_make_the_time_per_token_shortest():
    for chance in (0.2, 0.5, 0.8, 0.95):
        for b in (0.05, 0.2, 0.4):
            times = [
                (1 - b + b * (1 + k)) / sum(chance**i for i in range(k + 1))
                for k in range(MAX_DRAFTS + 1)
            ]
            [given] = proposals(chance, a=1 - b, b=b)
            assert times[given] <= min(times) * 1.02


def test_guesses_that_cost_more_than_they_bring_are_not_made():
    assert proposals(0.1, a=0.5, b=0.5) == [0]
    assert proposals(0.9, a=0.8, b=0.2, row_cost=1.0) == [0]
    assert proposals(0.3, a=0.0, b=1.0, sequences=5) == [0] * 5


def test_after_a_long_time_without_guesses_one_is_tried():
    engine = Engine(ToyBackend(200), context=400)
    guesser = Guesser(0.01)
    speculator = Speculator([guesser])
    engine.add(Request(PROMPT, SamplingParams(max_tokens=390, temperature=0)))
    engine.step()
    for _ in range(480):
        speculator.propose(engine.scheduler.running, 64)
    assert guesser.asked == [1] * 10


def test_the_pace_follows_what_steps_take():
    pace = Pace()
    for step in range(200):
        rows = 1 + step % 4
        pace.record(rows, 0.004 + 0.001 * rows)
    a, b = pace.line()
    assert a == pytest.approx(0.004, rel=0.1)
    assert b == pytest.approx(0.001, rel=0.1)
    for _ in range(400):
        pace.record(1, 0.02)
    a, b = pace.line()
    assert a + b == pytest.approx(0.02, rel=0.01)


def test_the_pace_tells_sizes_apart_and_forgets_what_they_took():
    pace = Pace()
    took = {1: 4.0, 2: 4.1, 3: 6.0, 4: 8.0}
    for step in range(200):
        rows = 1 + step % 4
        pace.record(rows, took[rows])
    for rows, seconds in took.items():
        assert pace.seconds(rows) == pytest.approx(seconds, rel=0.1)
    for _ in range(400):
        pace.record(1, 8.0)
    assert pace.seconds(2) > 8.0


def test_a_second_row_that_costs_nothing_is_filled_and_a_dear_third_is_not():
    engine = Engine(ToyBackend(200), context=400)
    speculator = Speculator([Guesser(0.5)])
    for _ in range(100):
        for rows, seconds in {1: 4.0, 2: 4.1, 3: 7.0}.items():
            speculator.pace.record(rows, seconds)
    engine.add(Request(PROMPT, SamplingParams(max_tokens=90, temperature=0)))
    engine.step()
    speculator.propose(engine.scheduler.running, 64)
    [sequence] = engine.scheduler.running
    assert len(sequence.speculation.drafts) == 1


def test_lookup_continues_what_followed_the_longest_match():
    engine = Engine(ToyBackend(), context=60)
    lookup = PromptLookup()
    engine.add(Request((8, 1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3), SamplingParams(max_tokens=9)))
    [sequence] = engine.scheduler.waiting
    assert lookup.ready(sequence) is not None
    worth = Worth([1.0], 0.0)  # it knows no chances to ask about
    assert lookup.propose([Wish(sequence, 4, worth)]) == [[5, 6, 1, 2]]
    sequence.tokens += [4]
    assert lookup.propose([Wish(sequence, 2, worth)]) == [[9, 1]]
    sequence.tokens += [7, 7]
    assert lookup.ready(sequence) is None


class TestWorth:
    """A row of guesses ends where one more no longer shortens the time per token."""

    def test_guesses_that_are_sure_go_on_and_doubtful_ones_end(self):
        sure, doubtful = (Worth([1.0, 1.1, 1.2, 1.3], 0.05) for _ in range(2))
        assert [sure.keep(0.95) and sure.another(0.9) for _ in range(3)] == [True, True, False]
        assert doubtful.keep(0.3)
        assert not doubtful.another(0.3)

    def test_it_is_what_the_times_say(self):
        for chance in (0.2, 0.5, 0.7, 0.9):
            for row, guess in ((0.02, 0.05), (0.1, 0.02), (0.3, 0.1)):
                seconds = [1 + row * i for i in range(9)]
                times = [
                    (seconds[k] + k * guess) / sum(chance**i for i in range(k + 1))
                    for k in range(9)
                ]
                worth, made = Worth(seconds, guess), 0
                while worth.another(chance) and worth.keep(chance):
                    made += 1
                assert times[made] <= min(times) * 1.03

    def test_a_guess_too_doubtful_for_its_row_is_not_checked(self):
        worth = Worth([1.0, 1.5], 0.01)
        assert not worth.keep(0.3)
        assert Worth([1.0, 1.5], 0.01).keep(0.7)

    def test_a_drafter_learns_how_far_its_probabilities_can_be_trusted(self, monkeypatch):
        """A draft model that is always sure, and wrong: after some steps it hardly drafts."""
        monkeypatch.setattr(Pace, "seconds", lambda self, rows: 1 + 0.2 * rows)
        backend, other = ToyBackend(400), ToyBackend(400)
        monkeypatch.setattr(other, "_logits", lambda prefix: 40 * _one(prefix))
        engine = Engine(backend, context=1200, drafters=[DraftModel(other)])
        params = SamplingParams(max_tokens=400, temperature=0, speculation="model")
        answers(engine, [Request(PROMPT, params)])
        assert sum(rows[0] - 1 for rows in backend.steps[:20]) >= 10
        assert sum(rows[0] - 1 for rows in backend.steps[-100:]) <= 10


def _one(prefix: np.ndarray) -> np.ndarray:
    """1 for the token that the toy's model finds the least likely."""
    found = np.zeros(VOCAB, np.float32)
    found[int(np.argmin(next_logits(prefix)))] = 1.0
    return found


def test_a_few_steps_that_took_far_too_long_are_not_believed():
    """Another process had the core for a while: two rows still cost what one does."""
    pace = Pace()
    for step in range(120):
        rows = 1 + step % 2
        pace.record(rows, 0.1 if step in (101, 111) else 0.004 + 0.0001 * rows)
    assert pace.seconds(2) < 1.2 * pace.seconds(1)


def test_a_guess_that_catches_up_with_a_long_text_says_no_more_than_that(monkeypatch):
    """Else its time would be taken for that of any guess, and none would be made again."""
    eager(monkeypatch)
    backend = ToyBackend(400)
    drafter = DraftModel(ToyBackend(400))
    engine = Engine(backend, context=1200, drafters=[drafter])
    clock = iter(range(10**6))
    monkeypatch.setattr("localllm.engine.drafters.time.perf_counter", lambda: float(next(clock)))
    params = SamplingParams(max_tokens=2, temperature=0, speculation="model")
    answers(engine, [Request(tuple(range(1, 20)) * 10, params)])
    assert drafter.row_cost == 0.0
    params = SamplingParams(max_tokens=8, temperature=0, speculation="model")
    answers(engine, [Request(PROMPT, params)])
    assert drafter.row_cost > 0.0
