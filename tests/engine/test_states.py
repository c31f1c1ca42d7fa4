"""States of recurrent layers are kept where they will be of use, and within their slots."""

from __future__ import annotations

import pytest

from localllm.backend.select import BackendStatus
from localllm.checkpoint.form import DenseForm
from localllm.engine import Engine, Finished, Request
from localllm.engine.planner import LEAST_STATES, Machine, Model, Wish, make_plan
from localllm.engine.receipt import Receipt
from localllm.sampling import SamplingParams
from localllm.spec import DecoderSpec
from localllm.spec.memory import state_bytes
from localllm.spec.weights import weight_shapes
from tests.backend.random_models import hybrid, llama
from tests.engine.test_engine import expected
from tests.engine.test_promises import MemoryTier
from tests.engine.toy import ToyBackend

PROMPT = tuple(range(1, 15))  # three blocks of 4, and two tokens


def ask(engine: Engine, prompt: tuple[int, ...], count: int = 6, **options: object) -> Receipt:
    """The receipt of one answer, which must be the right one."""
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, **options)
    request = Request(prompt, params)
    first = engine.add(request)
    tokens: list[int] = []
    receipts = []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                assert event.error is None
                receipts.append(event.receipt)
            elif event.request_id == first:
                tokens.append(event.draw.token_id)
    assert tokens == expected(request, engine.context)
    return receipts[0]


def answer(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    request = Request(prompt, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))
    return tuple(expected(request, 4096))


@pytest.mark.parametrize("speculation", ["auto", "off"])
def test_a_second_turn_goes_on_from_the_last_full_block_of_the_first(speculation):
    for count in range(1, 12):
        engine = Engine(ToyBackend(64, state_slots=12), context=200)
        ask(engine, PROMPT, count, speculation=speculation)
        whole = PROMPT + answer(PROMPT, count)
        second = ask(engine, (*whole, 3, 3, 3))
        assert second.cached_tokens == (len(whole) - 1) // 4 * 4  # the last token was not run


def test_the_same_prompt_is_found_up_to_its_last_full_block():
    engine = Engine(ToyBackend(64, state_slots=12), context=200)
    assert ask(engine, PROMPT).cached_tokens == 0
    again = ask(engine, PROMPT)
    assert (again.cached_tokens, again.cache_stop) == (12, "the last tokens are always computed")


def test_a_prompt_whose_end_is_written_anew_goes_on_a_block_before():
    engine = Engine(ToyBackend(64, state_slots=12), context=200)
    ask(engine, PROMPT)
    assert ask(engine, (*PROMPT[:9], 30, 30, 30, 30)).cached_tokens == 8


def test_where_two_prompts_part_a_state_is_kept_for_the_third():
    shared = tuple(range(1, 23))  # five blocks and two tokens
    engine = Engine(ToyBackend(400, state_slots=12), context=200)
    ask(engine, (*shared, *[30] * 20))
    second = ask(engine, (*shared, *[29] * 20))
    assert second.cached_tokens == 0
    assert second.cache_stop == "no state of the recurrent layers was kept further on"
    assert ask(engine, (*shared, *[28] * 20)).cached_tokens == 20


def test_states_are_kept_at_wide_intervals_of_a_long_prompt():
    engine = Engine(ToyBackend(64, state_slots=12), context=250)
    assert engine.cache.states is not None
    interval = engine.cache.states.interval
    prompt = tuple(n % 29 for n in range(3 * interval + 7))
    ask(engine, prompt)
    assert ask(engine, (*prompt[: 2 * interval + 1], 30, 30)).cached_tokens == 2 * interval


def test_a_long_answer_keeps_a_state_at_its_end_and_at_intervals_alone():
    engine = Engine(ToyBackend(64, state_slots=40), context=250)
    ask(engine, (1, 2, 3), 200, speculation="off")
    states = engine.cache.states
    assert states is not None
    assert states.pool.in_use == 0
    assert states.pool.idle == 202 // states.interval + (202 // 4 * 4 % states.interval > 0)


def test_states_survive_on_disk_when_the_pool_has_forgotten_them():
    backend = ToyBackend(64, state_slots=4)
    engine = Engine(backend, context=200, disk=MemoryTier(backend))
    ask(engine, PROMPT)
    for other in range(20, 28):
        ask(engine, tuple([other] * 14))
    again = ask(engine, PROMPT)
    assert again.cached_tokens == 12
    assert engine.cache.states is not None
    assert engine.cache.states.pool.evictions > 0


def test_more_sequences_than_states_take_turns():
    engine = Engine(ToyBackend(400, state_slots=4), context=100, max_batch=8)
    requests = [
        Request((n, n, n), SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
        for n in range(8)
    ]
    ids = {engine.add(request): request for request in requests}
    got: dict[int, list[int]] = {i: [] for i in ids}
    while engine.busy:
        for event in engine.step():
            if not isinstance(event, Finished):
                got[event.request_id].append(event.draw.token_id)
        assert len(engine.scheduler.running) <= 3
    assert got == {i: expected(request, 100) for i, request in ids.items()}


def plan(spec: DecoderSpec, available: int, **wishes: object):
    forms = {name: DenseForm(2) for name in weight_shapes(spec)}
    wish = Wish(context=64, **wishes)
    status = BackendStatus("reference", True, "")
    return make_plan(Model(spec, forms), wish, Machine(available, 0), status)


def test_the_plan_counts_states_and_takes_no_more_than_are_of_use():
    spec = hybrid()
    roomy = plan(spec, 1 << 40, max_batch=4)
    assert roomy.state_slots == 2 * 4 + 64
    assert roomy.bytes_of("recurrent states") == roomy.state_slots * state_bytes(spec)
    least = plan(spec, roomy.total, max_batch=4, kv_tokens=64).total
    tight = plan(spec, least - 10 * state_bytes(spec), max_batch=4)
    assert LEAST_STATES <= tight.state_slots < roomy.state_slots
    assert tight.fits


def test_a_model_without_recurrent_layers_has_no_states():
    assert plan(llama(), 1 << 40).state_slots == 0
