"""Everything at once: whatever requests of a batch ask for, each gets what it gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm import LLM
from localllm.adapters.lora import make_adapter
from localllm.backend.cpu import CpuBackend
from localllm.engine import Engine, Request
from localllm.engine.adapters import AdapterSlots
from localllm.engine.drafters import DraftModel
from localllm.engine.speculative import Pace
from localllm.errors import InvalidRequest, LocalLLMError
from localllm.sampling import SamplingParams, Vocabulary, compile_constraint
from localllm.spec import DecoderSpec, RopeSpec
from tests.backend.random_models import dense, llama, random_adapter, random_weights
from tests.engine.test_engine import expected
from tests.engine.test_promises import Plan, Run
from tests.engine.toy import ToyBackend
from tests.examples import examples
from tests.tiny_model import write_tiny_model

CONTEXT = 64
SPEC = llama()
_WINDOW = replace(SPEC.layers[0], mixer=replace(SPEC.layers[0].mixer, window=6))
SPECS = {"full": SPEC, "windows": replace(SPEC, layers=(_WINDOW, *SPEC.layers[1:]))}
EOS = 95
LETTERS = Vocabulary(
    [bytes([32 + i]) for i in range(EOS)] + [b"<end>"],
    frozenset({EOS}),
    frozenset({EOS}),
    lambda text: [byte - 32 for byte in text.encode()],
)
ADAPTERS = [
    make_adapter(name, random_adapter(SPEC, seed).targets) for name, seed in (("a", 1), ("b", 2))
]
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

samplers = st.sampled_from(
    [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 1.2, "mirostat": 2, "mirostat_tau": 3.0},
        {"typical_p": 0.7},
        {"xtc_probability": 0.6, "xtc_threshold": 0.05},
        {"dynatemp_range": 0.5},
        {"top_n_sigma": 1.5},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.02},
        {"typical_p": 0.8, "top_k": 20, "xtc_probability": 0.5},
    ]
)
changes = st.lists(
    st.sampled_from(
        [
            {"repetition_penalty": 1.3},
            {"presence_penalty": 0.5, "frequency_penalty": 0.3},
            {"dry_multiplier": 0.8, "dry_sequence_breakers": (3,)},
            {"logit_bias": {66: 3.0, 67: 3.0, 9: float("-inf")}},
            {"min_tokens": 2},
            {"stop_token_ids": (64, 3)},
            {"ignore_eos": True},
            {"prompt_logprobs": 1},
        ]
    ),
    max_size=2,
).map(lambda found: {key: value for one in found for key, value in one.items()})
constraints = st.sampled_from(
    [
        {},
        {},
        {},
        {"regex": "[a-f]{2,9}"},
        {"choices": ("cat", "category", "dog")},
        {"json_schema": OBJECT},
        {"grammar": 'start: ("ab" | "c")+'},
    ]
)
drawn = st.builds(
    lambda *parts: SamplingParams(**{k: v for part in parts for k, v in part.items()}),
    samplers,
    changes,
    constraints,
    st.fixed_dictionaries(
        {
            "max_tokens": st.integers(2, 14),
            "seed": st.integers(0, 50),
            "logprobs": st.just(2),
            "n": st.sampled_from([1, 1, 2, 3]),
            "speculation": st.sampled_from(["auto", "off", "ngram", "model"]),
        }
    ),
)
searched = st.builds(
    lambda change, **rest: SamplingParams(**change, **rest),
    changes,
    max_tokens=st.integers(2, 8),
    beams=st.integers(2, 4),
    n=st.integers(1, 2),
    logprobs=st.just(2),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0]),
)


def request_of(
    prompt: tuple[int, ...], params: SamplingParams, adapter: str | None, priority: int, reuse: bool
) -> Request:
    constraint = compile_constraint(params, LETTERS)
    return Request(prompt, params, frozenset({EOS}), constraint, adapter, priority, reuse)


requests = st.builds(
    request_of,
    st.builds(
        lambda head, length, tail: ((65 + head, 66, 67, 66, 3) * 6)[:length] + tuple(tail),
        st.integers(0, 1),
        st.integers(0, 24),
        st.lists(st.integers(64, 67), min_size=1, max_size=6),
    ),
    st.one_of(drawn, drawn, drawn, searched),
    st.sampled_from([None, "a", "b"]),
    st.integers(0, 2),
    st.sampled_from([True, True, False]),
)
plans = st.builds(
    Plan,
    requests,
    st.integers(0, 8),
    st.sampled_from([None, None, None, 2, 6]),
    st.just(None),
)


def backend_of(spec: DecoderSpec, blocks: int, *, bits: int = 16, seed: int = 0) -> CpuBackend:
    weights = iter(dense(random_weights(spec, seed)).items())
    return CpuBackend(spec, weights, num_blocks=blocks, block_size=4, threads=1, kv_bits=bits)


def slots_of(backend: CpuBackend, at_a_time: int) -> AdapterSlots:
    slots = AdapterSlots(backend, max_adapters=at_a_time, max_bytes=1 << 30)
    for adapter in ADAPTERS:
        slots.register(adapter)
    return slots


class Alone:
    """A request's answers where it has a fresh engine to itself, without speculation."""

    def __init__(self, spec: DecoderSpec, bits: int) -> None:
        self.backend = backend_of(spec, 80, bits=bits)
        self.slots = slots_of(self.backend, 2)

    def draws(self, request: Request) -> list[list]:
        params = replace(request.params, speculation="off")
        engine = Engine(
            self.backend, context=CONTEXT, max_batch=8, step_rows=200, adapters=self.slots
        )
        run = Run(engine, [Plan(replace(request, params=params, reuse=False), 0, None, None)])()
        assert all(end.error is None for end in run.ends.values())
        return [run.draws[i] for i in range(request.samples)]


@pytest.fixture(scope="module", params=["full 16", "full 8", "windows 8", "full 4"])
def alone(request):
    name, bits = request.param.split()
    return SPECS[name], int(bits), Alone(SPECS[name], int(bits))


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples(25))
@given(
    plans=st.lists(plans, min_size=1, max_size=6),
    blocks=st.integers(17, 30),
    batch=st.integers(1, 5),
    rows=st.integers(1, 24),
    slots=st.integers(1, 2),
    draft_seed=st.sampled_from([0, 9]),
    cheap=st.booleans(),
)
def test_any_mixture_of_requests(alone, plans, blocks, batch, rows, slots, draft_seed, cheap):
    spec, bits, oracle = alone
    with pytest.MonkeyPatch.context() as patch:
        if cheap:  # rows cost nothing, so that as much is guessed as may be
            patch.setattr(Pace, "seconds", lambda self, rows: 1 + 1e-6 * rows)
        backend = backend_of(spec, blocks, bits=bits)
        engine = Engine(
            backend,
            context=CONTEXT,
            max_batch=batch,
            step_rows=rows,
            drafters=[DraftModel(backend_of(spec, 20, seed=draft_seed))],
            adapters=slots_of(backend, slots),
        )
        run = Run(engine, plans)
        owners = []
        add = run.add
        run.add = lambda request: owners.append((add(request), request)) or owners[-1][0]
        run()
    assert len(run.ends) == len(run.requests)
    for first, request in owners:
        for sample, wanted in enumerate(oracle.draws(request)):
            end, got = run.ends[first + sample], run.draws[first + sample]
            assert end.error is None
            whole = end.receipt.stopped_by != "cancelled"
            assert got == (wanted if whole else wanted[: len(got)])
            assert end.receipt.generated_tokens == len(got)
            assert end.receipt.accepted_tokens <= end.receipt.drafted_tokens
    engine.close()
    assert engine.cache.in_use == 0
    assert engine.speculator.error is None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = str(write_tiny_model(tmp_path_factory.mktemp("tiny")))
    with (
        LLM(folder, backend="cpu", threads=1) as plain,
        LLM(
            folder,
            backend="cpu",
            threads=1,
            kv_tokens=256,
            context=256,
            max_batch=3,
            draft_model=folder,
        ) as small,
    ):
        yield plain, small


class TestText:
    """The same through `LLM`, with stop strings that drafts run past."""

    @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples(30))
    @given(data=st.data())
    def test_stop_strings_end_answers_where_they_would_end_them_alone(self, models, data):
        plain, small = models
        letters = dict.fromkeys(b"abc de", 6.0)
        asked = []
        for _ in range(data.draw(st.integers(1, 5))):
            prompt = data.draw(st.text("abc d", min_size=1, max_size=40))
            params = SamplingParams(
                max_tokens=40,
                temperature=data.draw(st.sampled_from([0.0, 0.7])),
                seed=data.draw(st.integers(0, 50)),
                logit_bias=letters,
                logprobs=1,
                speculation="off",
                ignore_eos=True,
            )
            text = plain.generate(prompt, params).text
            at, length = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(1, 5))
            asked.append((prompt, replace(params, stop=(text[at : at + length], "\x00")), text))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pace, "seconds", lambda self, rows: 1 + 1e-6 * rows)
            speculation = st.sampled_from(["auto", "ngram", "model"])
            got = small.generate(
                [prompt for prompt, _, _ in asked],
                [replace(params, speculation=data.draw(speculation)) for _, params, _ in asked],
            )
        for (prompt, params, text), result in zip(asked, got, strict=True):
            wanted = plain.generate(prompt, params)
            assert result.text == wanted.text == text[: text.find(params.stop[0])]
            assert result.token_ids == wanted.token_ids
            assert result.logprobs == wanted.logprobs
            assert result.finish_reason == "stop"
            assert result.receipt.stopped_by == "stop string"
            assert result.receipt.generated_tokens == len(result.token_ids)
        load = small.pump.load()
        assert (load.waiting, load.running, load.blocks_in_use) == (0, 0, 0)


def toy_run(engine: Engine, *asked: Request) -> Run:
    return Run(engine, [Plan(request, 0, None, None) for request in asked])()


GOOD = Request((1, 2), SamplingParams(max_tokens=9, temperature=0))


class TestOneFailsAlone:
    def test_whose_constraint_leaves_nothing_while_drafts_are_checked(self, monkeypatch):
        monkeypatch.setattr(Pace, "seconds", lambda self, rows: 1 + 1e-6 * rows)
        engine = Engine(ToyBackend(64), context=100)
        params = SamplingParams(max_tokens=9, temperature=0, logit_bias={7: 100.0})
        run = Run(engine, [Plan(GOOD, 0, None, None)])
        bad = run.add(Request((7, 7, 7, 7), params))
        for event in engine.step():
            run.take(event)
        [sequence] = engine.scheduler.running
        sequence.sampler.constraint = Nothing()
        run()
        assert "allows nothing" in str(run.ends[bad].error)
        assert run.ends[bad].receipt.generated_tokens == 1
        assert run.tokens(1) == expected(GOOD, 100)

    def test_whose_prompt_has_no_log_probabilities(self):
        backend = ToyBackend(64)
        logits = backend._logits
        backend._logits = lambda prefix: logits(prefix) * (np.nan if prefix[0] == 9 else 1)
        run = toy_run(
            Engine(backend, context=100),
            Request((9, 9, 9), SamplingParams(max_tokens=3, prompt_logprobs=1)),
            GOOD,
        )
        assert "NaN" in str(run.ends[0].error)
        assert run.tokens(1) == expected(GOOD, 100)

    def test_and_a_drafter_that_raises_fails_nobody(self, monkeypatch):
        monkeypatch.setattr(Pace, "seconds", lambda self, rows: 1 + 1e-6 * rows)
        small = ToyBackend(64)
        forward = small.forward

        def sometimes(batch, hidden=None):
            if len(small.steps) % 3 == 2:
                small.steps.append([])
                raise MemoryError
            return forward(batch, hidden)

        small.forward = sometimes
        engine = Engine(ToyBackend(64), context=100, drafters=[DraftModel(small)])
        run = toy_run(engine, GOOD)
        assert run.tokens(0) == expected(GOOD, 100)
        assert run.ends[0].receipt.accepted_tokens > 0
        assert isinstance(engine.speculator.error, MemoryError)


class Nothing:
    finished = False

    def fork(self) -> Nothing:
        return self

    def allowed(self, vocab_size: int) -> np.ndarray:
        raise LocalLLMError("it allows nothing")


def test_an_adapter_stays_while_a_waiting_request_names_it():
    backend = backend_of(SPEC, 40)
    engine = Engine(backend, context=CONTEXT, max_batch=1, adapters=slots_of(backend, 1))
    params = SamplingParams(max_tokens=4, temperature=0)
    engine.add(Request((65, 66), params))
    waiting = engine.add(Request((65, 66), params, adapter="a"))
    with pytest.raises(InvalidRequest, match="'a' is used by 1 request"):
        engine.unload_adapter("a")
    engine.end(waiting)
    engine.unload_adapter("a")
    assert engine.adapters.names == ("b",)


def test_an_adapter_of_the_same_name_shares_no_blocks_with_the_one_before():
    backend = backend_of(SPEC, 40)
    engine = Engine(backend, context=CONTEXT, adapters=slots_of(backend, 2))
    request = Request(
        tuple(range(60, 80)), SamplingParams(max_tokens=4, temperature=0, logprobs=1), adapter="a"
    )
    first = toy_run(engine, request)
    engine.unload_adapter("a")
    engine.adapters.register(make_adapter("a", ADAPTERS[1].targets))
    second = Run(engine, [Plan(request, 0, None, None)])()
    assert second.ends[1].receipt.cached_tokens == 0
    same = Run(engine, [Plan(replace(request, adapter="b"), 0, None, None)])()
    assert second.draws[1] == same.draws[2] != first.draws[0]
    plain = Run(engine, [Plan(replace(request, adapter=None), 0, None, None)])()
    assert plain.ends[3].receipt.cached_tokens == 0


def test_blocks_are_of_one_length_class_in_every_layer():
    """Here the sets of classes are equal for prompts of 4 and 5 tokens, the angles are not."""
    ropes = [
        RopeSpec(16, kind="longrope", original_context=n, short_factor=(1.0,) * 8, long_factor=f)
        for n, f in ((4, (4.0,) * 8), (3, (2.0,) * 8), (5, (2.0,) * 8))
    ]
    layers = [replace(SPEC.layers[0], mixer=replace(SPEC.layers[0].mixer, rope=r)) for r in ropes]
    spec = replace(SPEC, layers=tuple(layers))
    request = Request((65, 66, 67, 68), SamplingParams(max_tokens=1, temperature=0, logprobs=1))
    longer = replace(request, token_ids=(65, 66, 67, 68, 69))
    fresh = toy_run(Engine(backend_of(spec, 40), context=CONTEXT), longer)
    engine = Engine(backend_of(spec, 40), context=CONTEXT)
    toy_run(engine, replace(request, params=replace(request.params, max_tokens=2)))
    second = Run(engine, [Plan(longer, 0, None, None)])()
    assert second.draws[1] == fresh.draws[0]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_second_turn_past_the_original_context_equals_a_fresh_one(kind):
    rope = RopeSpec(
        16,
        kind=kind,
        factor=4.0,
        original_context=20,
        short_factor=(1.0,) * 8,
        long_factor=tuple(np.linspace(1, 4, 8)),
    )
    mixer = replace(SPEC.layers[0].mixer, rope=rope)
    spec = replace(SPEC, layers=(replace(SPEC.layers[0], mixer=mixer),) * 2)
    first = Request(tuple(range(50, 66)), SamplingParams(max_tokens=12, temperature=0, logprobs=1))
    engine = Engine(backend_of(spec, 40), context=CONTEXT)
    run = toy_run(engine, first)
    for more in (1, 9):
        turn = replace(first, token_ids=(*first.token_ids, *run.tokens(0), *range(more)))
        again = Run(engine, [Plan(turn, 0, None, None)])()
        fresh = toy_run(Engine(backend_of(spec, 40), context=CONTEXT), turn)
        assert again.draws[max(again.draws)] == fresh.draws[0]


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples(100))
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from([{}, {"n": 3}, {"beams": 3, "n": 2}, {"prompt_logprobs": 0}]),
            st.integers(0, 6),
            st.none() | st.integers(0, 12),
            st.none() | st.integers(0, 12),
        ),
        min_size=1,
        max_size=4,
    ),
    broken=st.frozensets(st.integers(0, 30), max_size=4),
    cancelled=st.frozensets(st.integers(0, 30), max_size=4),
    blocks=st.integers(8, 20),
    batch=st.integers(1, 4),
    rows=st.integers(1, 12),
)
def test_steps_that_break_cost_nobody_else_a_token(asked, broken, cancelled, blocks, batch, rows):
    backend = ToyBackend(blocks)
    backend.cancel_steps = set(cancelled)
    forward = backend.forward

    def breaking(batch, hidden=None):
        if len(backend.steps) in broken:
            backend.steps.append([])
            raise MemoryError
        return forward(batch, hidden)

    backend.forward = breaking
    plans = []
    for index, (kind, arrival, end_at, fork_at) in enumerate(asked):
        params = SamplingParams(max_tokens=7, temperature=0.7, seed=index, **kind)
        request = Request(((5, 9) * 5)[: 3 + index], params)
        plans.append(Plan(request, arrival, end_at, None if "beams" in kind else fork_at))
    engine = Engine(backend, context=4 * blocks, max_batch=batch, step_rows=rows)
    run = Run(engine, plans)()
    assert set(run.ends) == set(run.requests)
    for request_id, end in run.ends.items():
        request = run.requests[request_id]
        assert end.error is None or (isinstance(end.error, MemoryError) and broken)
        if request.params.beams is None:
            got = run.tokens(request_id)
            whole = end.receipt.stopped_by == "max_tokens"
            assert got == expected(request, 4 * blocks)[: None if whole else len(got)]
    engine.close()
    assert engine.cache.in_use == 0
    assert not engine._unforked
    assert not engine._searches
    assert not engine._beams
