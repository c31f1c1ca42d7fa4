"""The engine on real backends: bit for bit on `cpu`, within rounding on those that are MLX's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.backend.cpu import CpuBackend
from localllm.backend.metal import MetalBackend
from localllm.backend.protocol import Backend
from localllm.backend.reference import ReferenceBackend
from localllm.engine import Engine, Request
from localllm.engine.disk_tier import DiskTier
from localllm.engine.drafters import DraftModel, HeadDrafter
from localllm.sampling import SamplingParams
from localllm.spec import DecoderSpec
from tests.backend.random_models import dense, hybrid, llama, random_weights
from tests.engine.heads import random_head
from tests.engine.test_promises import Plan, Run
from tests.examples import examples

SPECS = {"full": llama(), "windows": llama(), "hybrid": hybrid()}
layers = SPECS["windows"].layers
SPECS["windows"] = replace(
    SPECS["windows"],
    layers=(replace(layers[0], mixer=replace(layers[0].mixer, window=6)), *layers[1:]),
)
few = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=examples(25))

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 100),
    n=st.sampled_from([1, 2]),
    logprobs=st.just(2),
    speculation=st.sampled_from(["auto", "off"]),
)
prompts = st.lists(st.integers(0, 5), min_size=1, max_size=30).map(tuple)
plans = st.lists(
    st.builds(
        Plan,
        st.builds(Request, prompts, params),
        st.integers(0, 5),
        st.sampled_from([None, None, 4]),
        st.sampled_from([None, 3]),
    ),
    min_size=1,
    max_size=5,
)
pools = st.integers(12, 24)


def backend_of(kind: str, spec: DecoderSpec, num_blocks: int, **settings) -> Backend:
    weights = iter(dense(random_weights(spec)).items())
    settings = {"num_blocks": num_blocks, "block_size": 4, "state_slots": 9, **settings}
    if kind == "reference":
        return ReferenceBackend(spec, weights, **settings)
    if kind == "metal":
        return MetalBackend(spec, weights, dtype=mx.float32, **settings)
    return CpuBackend(spec, weights, threads=2, **settings)


def head_drafter(backend: Backend) -> HeadDrafter:
    head = random_head(backend.spec.hidden)
    layer = CpuBackend(head.spec, head.weights.items(), num_blocks=20, block_size=4, threads=2)
    return HeadDrafter(head, backend, layer)


class Alone:
    """Answers of a request that has a fresh engine to itself, without speculation."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def draws(self, request: Request, context: int) -> list:
        params = replace(request.params, speculation="off")
        engine = Engine(self.backend, context=context, max_batch=1, step_rows=200)
        engine.cache.pools[0].forget_idle()
        plan = Plan(replace(request, params=params, reuse=False), 0, None, None)
        return Run(engine, [plan])().draws[0]


@pytest.fixture(scope="module", params=[(s, b) for s in SPECS for b in (16, 8)], ids=str)
def cpu(request):
    spec, bits = SPECS[request.param[0]], request.param[1]
    return spec, bits, Alone(backend_of("cpu", spec, 60, kv_bits=bits))


class TestCpu:
    @few
    @given(
        plans=plans, blocks=pools, batch=st.integers(1, 4), rows=st.integers(1, 16), data=st.data()
    )
    def test_answers_and_logprobs_are_those_of_the_request_alone(
        self, cpu, tmp_path_factory, plans, blocks, batch, rows, data
    ):
        spec, bits, alone = cpu
        backend = backend_of("cpu", spec, blocks, kv_bits=bits)
        drafters = {
            "none": [],
            "model": [DraftModel(backend_of("cpu", SPECS["full"], 20))],
            "head": [head_drafter(backend)],
        }[data.draw(st.sampled_from(["none", "model", "head"]))]
        disk = None
        if data.draw(st.booleans()):
            disk = DiskTier(backend, tmp_path_factory.mktemp("kv"), 1 << 20)
        engine = Engine(
            backend,
            context=4 * blocks,
            max_batch=batch,
            step_rows=rows,
            drafters=drafters,
            disk=disk,
        )
        run = Run(engine, plans)()
        for request_id, request in run.requests.items():
            assert run.ends[request_id].error is None
            got = run.draws[request_id]
            assert got == alone.draws(request, 4 * blocks)[: len(got)]
            if run.ends[request_id].receipt.stopped_by != "cancelled":
                assert len(got) == request.params.max_tokens
        engine.close()
        if disk is not None:
            disk.close()


@pytest.mark.parametrize("kind", ["reference", "metal"])
@few
@given(plans=plans, blocks=pools, batch=st.integers(1, 4), rows=st.integers(1, 16))
def test_other_backends_answer_within_rounding(kind, plans, blocks, batch, rows):
    spec = SPECS["hybrid"]
    alone = Alone(backend_of(kind, spec, 60))
    engine = Engine(
        backend_of(kind, spec, blocks), context=4 * blocks, max_batch=batch, step_rows=rows
    )
    run = Run(engine, plans)()
    for request_id, request in run.requests.items():
        wanted = alone.draws(request, 4 * blocks)
        for mine, theirs in zip(run.draws[request_id], wanted, strict=False):
            if mine.token_id != theirs.token_id:
                break  # a tie within rounding; what follows is another text
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("kind", ["windows", "hybrid"])
def test_a_prefix_survives_a_restart_on_disk_and_damage_costs_time_only(kind, tmp_path: Path):
    spec = SPECS[kind]
    prompt = tuple(i % 7 for i in range(41))
    request = Request(prompt, SamplingParams(max_tokens=5, temperature=0, logprobs=1))

    def run() -> tuple[list, int]:
        backend = backend_of("cpu", spec, 30)
        disk = DiskTier(backend, tmp_path, 1 << 24)
        engine = Engine(backend, context=100, disk=disk, key=b"model")
        done = Run(engine, [Plan(request, 0, None, None)])()
        engine.close()
        disk.close()
        return done.draws[0], done.ends[0].receipt.cached_from_disk

    first, from_disk = run()
    assert from_disk == 0
    again, from_disk = run()
    assert (again, from_disk) == (first, 40)
    files = sorted(tmp_path.rglob("*.kv"))
    for victim in files[3:4] if kind == "windows" else files:  # states among them
        damaged = bytearray(victim.read_bytes())
        damaged[-1] ^= 1
        victim.write_bytes(damaged)
    again, from_disk = run()
    assert again == first
    assert from_disk < 40
