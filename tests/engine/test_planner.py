"""What does not fit is refused before loading, with ways out that do fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.backend.cpu_memory import CpuMemory
from localllm.backend.memory import StepSize
from localllm.backend.select import BackendStatus, available_backends
from localllm.checkpoint.form import DenseForm
from localllm.engine.kv_cache import KvCache
from localllm.engine.planner import (
    BLOCK_SIZE,
    Machine,
    Model,
    Wish,
    largest,
    make_plan,
    pool_blocks,
)
from localllm.engine.ways_out import require_fit, ways_out
from localllm.errors import InvalidRequest, OutOfMemoryPlan
from localllm.spec.memory import kv_bytes_per_token
from localllm.spec.weights import weight_shapes
from tests.backend.random_models import dense, random_weights, specs
from tests.engine.toy import ToyBackend, toy_spec

SPEC = toy_spec(context=65536)
BACKEND = BackendStatus("toy", True, "", kv_bits=(32,))
PER_TOKEN = kv_bytes_per_token(SPEC)


def model(spec=SPEC) -> Model:
    return Model(spec, {name: DenseForm(4) for name in weight_shapes(spec)})


def machine_for(kv_positions: int, wish: Wish, spec=SPEC) -> Machine:
    """One that has room for the KV cache of so many positions beside the rest of the wish."""
    least = make_plan(model(spec), replace(wish, kv_tokens=None), Machine(0, 0), BACKEND)
    per = PER_TOKEN + 400 / BLOCK_SIZE
    return Machine(round(least.total - least.kv_tokens * per + kv_positions * per), 0)


def plan(kv_positions: int, **wishes):
    wish = Wish(**wishes)
    return make_plan(model(), wish, machine_for(kv_positions, wish), BACKEND)


@given(
    st.integers(0, 200_000),
    st.none() | st.integers(1, 65536),
    st.none() | st.integers(1, 200_000),
)
def test_a_plan_holds_one_context_and_says_whether_it_fits(free, context, kv_tokens):
    try:
        made = plan(free, context=context, kv_tokens=kv_tokens)
    except InvalidRequest:
        assert kv_tokens is not None
        return
    assert made.fits == (made.peak <= made.available)
    assert made.kv_tokens >= made.context
    assert context is None or made.context == context
    assert kv_tokens is None or made.kv_tokens >= kv_tokens
    assert made.total == sum(item.nbytes for item in made.items)


def test_the_default_is_eight_thousand_positions_and_room_for_two_such_sequences():
    made = plan(10**6)
    assert (made.context, made.kv_tokens) == (8192, 16384)


def test_short_memory_shrinks_the_pool_before_it_refuses():
    assert plan(9000).kv_tokens == 8992
    assert plan(9000).fits
    assert not plan(8000).fits
    assert plan(8000, context=8000).fits


def test_a_larger_batch_takes_its_memory_from_the_pool():
    wide = replace(SPEC, vocab_size=400_000)
    one, many = (
        make_plan(model(wide), Wish(max_batch=batch), Machine(1 << 40, 0), BACKEND)
        for batch in (1, 200)
    )
    assert many.step_bytes - one.step_bytes >= 199 * wide.vocab_size * 4


def test_a_context_the_model_does_not_have_is_refused():
    with pytest.raises(InvalidRequest, match="1 to 65536"):
        plan(10**6, context=65537)


def test_a_cache_smaller_than_one_context_is_refused():
    with pytest.raises(InvalidRequest, match="less than one context"):
        plan(10**6, context=100, kv_tokens=99)


def test_bits_that_a_backend_lacks_are_refused_by_its_name():
    with pytest.raises(InvalidRequest, match="the toy backend keeps a KV cache of 32 bits, not 8"):
        plan(10**6, kv_bits=8)


@st.composite
def wishes(draw):
    spec = replace(draw(specs()), context=50_000)
    context = draw(st.none() | st.integers(1, spec.context))
    wish = Wish(
        context,
        draw(st.none() | st.integers(context or 8192, 100_000)),
        draw(st.integers(1, 64)),
        draw(st.sampled_from([None, 16, 8, 4])),
        draw(st.integers(1, 8)),
        draw(st.booleans()),
        draw(st.integers(0, 3)),
        draw(st.integers(1, 9)),
        draw(st.none() | specs().map(model)),
    )
    return spec, wish


@given(wishes(), st.floats(0, 1))
def test_every_way_out_fits_and_is_named_where_the_engine_refuses(drawn, share):
    spec, wish = drawn
    backend = cpu()
    needed = make_plan(model(spec), wish, Machine(0, 0), backend)
    machine = Machine(int(share * needed.peak), 0)
    made = make_plan(model(spec), wish, machine, backend)
    if made.fits:
        require_fit(made, model(spec), machine, backend)
        return
    ways = ways_out(model(spec), wish, machine, backend)
    assert all(way.plan.fits and way.plan.available == machine.available for way in ways)
    with pytest.raises(OutOfMemoryPlan) as refused:
        require_fit(made, model(spec), machine, backend)
    assert all(way.change in refused.value.hint for way in ways)
    assert ways or "smaller model" in refused.value.hint


def test_ways_out_name_each_knob_that_helps_alone():
    wish = Wish(context=40_000, max_batch=64, adapters=4, draft=model(SPEC))
    spec = replace(SPEC, vocab_size=60_000)
    needed = make_plan(model(spec), wish, Machine(0, 0), cpu()).peak
    ways = ways_out(model(spec), wish, Machine(needed - 1, 0), cpu())
    changes = [way.change for way in ways]
    assert changes == [
        "--context 39k",
        "--kv-bits 8",
        "--batch 32",
        "--adapters 3",
        "no --draft-model",
    ]


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 60), st.integers(1, 40))
def test_a_windowed_pool_lets_the_whole_batch_in(positions, batch, window, rows):
    """The engine admits a sequence when the pool could hold it with a block to spare for each."""
    spec = toy_spec(window=window)
    blocks = -(-positions // BLOCK_SIZE) * batch
    _, windowed = pool_blocks(spec, blocks, batch, rows)
    backend = ToyBackend(blocks, BLOCK_SIZE, window=window, window_blocks=windowed)
    cache = KvCache(backend)
    assert cache.fits(positions, max(rows, batch))
    most = cache._most_held(1, positions, max(rows, batch))
    if windowed < blocks:
        assert (batch - 1) * most + most + batch - 1 <= windowed


@given(st.integers(0, 100), st.integers(0, 100), st.integers(-5, 105))
def test_largest_is_found_by_halving(low, high, limit):
    good = [n for n in range(low, high + 1) if n <= limit]
    assert largest(low, high, lambda n: n <= limit) == (good[-1] if good else 0)


def cpu() -> BackendStatus:
    (status,) = (status for status in available_backends() if status.name == "cpu")
    return status


@given(specs(), st.integers(1, 30), st.sampled_from([16, 8, 4]), st.integers(1, 4))
def test_the_plans_kv_bytes_are_those_the_backend_takes(spec, blocks, bits, batch):
    pytest.importorskip("localllm.kernels_cpu._native")
    from localllm.backend.cpu import CpuBackend

    spec = replace(spec, context=2048, learned_positions=None)
    wish = Wish(context=1, kv_tokens=blocks * BLOCK_SIZE, max_batch=batch, kv_bits=bits)
    made = make_plan(model(spec), wish, Machine(0, 0), cpu())
    backend = CpuBackend(
        spec,
        dense(random_weights(spec)).items(),
        num_blocks=made.group_blocks,
        kv_bits=bits,
        threads=1,
    )
    assert made.kv_bytes == backend.kv_bytes
    assert made.weight_bytes == backend.weight_bytes
    backend.close()


def test_a_step_of_more_threads_rows_or_adapters_takes_more():
    small = StepSize(64, 1, 4096, threads=1)
    sizes = [
        CpuMemory().step(SPEC, model().forms, size)
        for size in (small, replace(small, threads=4), replace(small, rows=6400))
    ]
    assert sizes[0] < sizes[1]
    assert sizes[0] < sizes[2]
