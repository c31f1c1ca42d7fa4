"""Of the metal backend alone: rows that verify drafts, quantized KV, memory and its limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from localllm.adapters.lora import make_adapter
from localllm.backend import metal_limits
from localllm.backend.memory import StepSize
from localllm.backend.metal import MetalBackend
from localllm.backend.metal_kv import dequantize, quantize
from localllm.backend.metal_memory import MetalMemory
from localllm.checkpoint.form import form_of
from localllm.checkpoint.tensor import Tensor
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.dispatch import Always, Never
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.runs import MOST_RUNS
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_groups, state_bytes
from tests.backend.conformance import BLOCKS, Sequence, assert_close, run
from tests.backend.hybrid_conformance import SLOTS, Recurring
from tests.backend.random_models import (
    PACKINGS,
    dense,
    hybrid,
    llama,
    random_adapter,
    random_weights,
)

FOUR_BIT = next(p for p in PACKINGS if p.of == "MLX 4-bit/32")


def packed(spec: DecoderSpec) -> dict[str, Tensor]:
    rng = np.random.default_rng(3)
    tensors = dense(random_weights(spec))
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            tensors[name] = FOUR_BIT.random(rng, tensor.shape)
    return tensors


class Told(Always):
    """Uses every kernel that applies, and remembers which did."""

    def __init__(self) -> None:
        self.used: list[str] = []

    def uses(self, kernel: str, work: str, contest: Callable[[], Contest]) -> bool:
        self.used.append(kernel)
        return True


@contextmanager
def backend(
    *,
    kernels: bool,
    kv_bits: int = 16,
    told: Told | None = None,
    blocks: int = BLOCKS,
    spec: DecoderSpec | None = None,
    slots: int = SLOTS,
) -> Iterator[MetalBackend]:
    spec = spec or llama(hidden=64, layers=2)
    opened = MetalBackend(
        spec,
        iter(packed(spec).items()),
        num_blocks=blocks,
        block_size=4,
        state_slots=slots,
        kv_bits=kv_bits,
        dtype=mx.float32,
        choose=(told or Always()) if kernels else Never(),
        executor=Emulator() if kernels else None,
    )
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_verifying_drafts_gives_the_bits_that_decoding_one_by_one_gives(kv_bits: int) -> None:
    """Also beside a sequence with an adapter on attention's matrices, quantized KV or not.

    One on gate or up makes the step multiply these without the fused activation, which rounds
    otherwise.
    """
    rng = np.random.default_rng(5)
    told = Told()
    with backend(kernels=True, kv_bits=kv_bits, told=told) as metal:
        targets = random_adapter(metal.spec, 1).targets
        attention = {name: pair for name, pair in targets.items() if ".attn." in name}
        index = metal.add_adapter(make_adapter("attention", attention))
        tokens = rng.integers(0, metal.spec.vocab_size, (2, 14))
        blocks = np.split(rng.permutation(BLOCKS)[:16], 4)

        def prefilled(row: int, at: int, adapter: int | None) -> Sequence:
            sequence = Sequence(tokens[row], blocks[at])
            run(metal, sequence.next(10, rows=(), adapter=adapter))
            return sequence

        one, other = prefilled(0, 0, None), prefilled(1, 1, index)
        alone = [run(metal, one.next(1)) for _ in range(4)]
        adapted = [run(metal, other.next(1, adapter=index)) for _ in range(4)]
        one, other = prefilled(0, 2, None), prefilled(1, 3, index)
        told.used.clear()
        together = run(metal, one.next(4), other.next(4, adapter=index))
    assert np.array_equal(together[:4], np.concatenate(alone))
    assert np.array_equal(together[4:], np.concatenate(adapted))
    assert {"qmm_small", "paged_decode", "lora"} <= set(told.used)
    assert not {"qmv", "paged_prefill"} & set(told.used)


def wide_hybrid(heads: int = 4, dim: int = 16) -> DecoderSpec:
    """`hybrid`, its delta net of such heads; every matrix can be packed by groups of 32."""
    spec = hybrid()
    delta = replace(spec.layers[0].mixer, value_heads=heads, key_dim=dim, value_dim=dim)
    return replace(spec, layers=(replace(spec.layers[0], mixer=delta), *spec.layers[1:]))


def test_a_hybrid_verifies_guesses_and_replays_them_with_the_bits_of_decoding() -> None:
    """Beside another sequence, and after a prompt that was cut elsewhere."""
    rng = np.random.default_rng(5)
    told = Told()
    with backend(kernels=True, told=told, spec=wide_hybrid()) as metal:
        tokens = rng.integers(0, metal.spec.vocab_size, 14).astype(np.int32)
        alone = Recurring(metal, tokens, np.arange(4))
        run(metal, alone.chunk(6))
        wanted = np.concatenate([run(metal, alone.chunk(1)) for _ in range(8)])
        told.used.clear()
        guessing, other = (Recurring(metal, tokens, np.arange(n, n + 4)) for n in (4, 8))
        other.free = guessing.free[3:]
        run(metal, guessing.chunk(6))
        run(metal, guessing.chunk(3), other.chunk(2))
        got = [run(metal, guessing.chunk(1, guesses=[*tokens[10:12], 3]), other.chunk(1))[:3]]
        assert guessing.slot is not None
        metal.replay(0, 0, 2, guessing.slot, guessing.slot)
        guessing.done += 2
        got += [run(metal, guessing.chunk(1)), run(metal, guessing.chunk(1))]
    assert np.array_equal(np.concatenate(got), wanted[3:])
    assert {"qmm_small", "causal_conv", "gated_delta"} <= set(told.used)


def test_more_sequences_than_a_launch_takes_are_carried_on_together() -> None:
    """One of them in two chunks, the second of which begins with what the first leaves."""
    tokens = np.random.default_rng(2).integers(0, 96, (MOST_RUNS + 2, 5)).astype(np.int32)
    with backend(kernels=True, spec=wide_hybrid(), slots=2 * len(tokens) + 1) as metal:
        wanted = [run(metal, Recurring(metal, t, np.arange(2)).chunk(5))[3:] for t in tokens]
        sequences = []
        for n, own in enumerate(tokens):
            sequences.append(Recurring(metal, own, np.arange(2 * n, 2 * n + 2)))
            sequences[n].free = [2 * n, 2 * n + 1, 2 * len(tokens)]
            run(metal, sequences[n].chunk(3))
        chunks = [sequence.chunk(2) for sequence in sequences[1:]]
        got = run(metal, *chunks[:4], *(sequences[0].chunk(1) for _ in range(2)), *chunks[4:])
    first, last = np.concatenate(wanted[1:5]), np.concatenate(wanted[5:])
    assert_close(got, np.concatenate([first, wanted[0], last]), 1e-5)


def test_states_take_no_more_than_their_slots() -> None:
    spec = wide_hybrid(heads=16, dim=128)
    state = state_bytes(spec)
    with backend(kernels=False, spec=spec) as metal:
        sequence = Recurring(metal, np.arange(40), np.arange(BLOCKS))
        run(metal, sequence.chunk(1))
        before = mx.get_active_memory()
        for _ in range(SLOTS + 2):
            run(metal, sequence.chunk(1, guesses=(3, 4)))
            metal.replay(0, 0, 1, sequence.slot, sequence.slot)
            sequence.done += 1
        assert mx.get_active_memory() - before < (SLOTS - 1 + 0.1) * state


@pytest.mark.parametrize("rows", [1, 2, 39])
def test_a_step_of_a_hybrid_takes_no_more_than_told(rows: int) -> None:
    """With MLX's own ops, which make states anew for every row; guesses among them."""
    spec = wide_hybrid(heads=16, dim=128)
    with backend(kernels=False, spec=spec) as metal:
        sequence = Recurring(metal, np.arange(60), np.arange(BLOCKS))
        run(metal, sequence.chunk(1))
        mx.clear_cache()
        beside = [Recurring(metal, np.arange(9), np.arange(n, n + 3)) for n in range(20, 32, 3)]
        for other, slot in zip(beside, range(2, SLOTS), strict=True):
            other.free = [slot]
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        guesses = [3] * min(rows - 1, 17)
        run(metal, sequence.chunk(rows, guesses), *(other.chunk(1) for other in beside))
        taken = mx.get_peak_memory() - before
    told = MetalMemory().step(spec, {}, StepSize(rows=60, logits=60, context=64))
    assert taken - 5 * state_bytes(spec) < told  # the slots that are written are told elsewhere


@pytest.mark.parametrize(("kv_bits", "error"), [(8, 0.02), (4, 0.3)])
def test_kernels_read_and_write_quantized_kv_as_mlx_ops_do(kv_bits: int, error: float) -> None:
    tokens = np.random.default_rng(6).integers(0, 96, 30)

    def logits(*, kernels: bool, bits: int) -> np.ndarray:
        with backend(kernels=kernels, kv_bits=bits) as metal:
            sequence = Sequence(tokens, np.arange(BLOCKS))
            parts = [run(metal, sequence.next(n)) for n in (17, 1, 5, 7)]
        return np.concatenate(parts)

    exact, ops = logits(kernels=False, bits=16), logits(kernels=False, bits=kv_bits)
    ours = logits(kernels=True, bits=kv_bits)
    scale = np.abs(exact).max()
    assert 0 < np.abs(ops - exact).max() < error * scale
    # The two may round a value that lies between two codes to either.
    assert np.abs(ours - ops).max() < 0.1 * np.abs(ops - exact).max()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_kv_is_quantized_by_the_rule_of_mlx(dtype: mx.Dtype, bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = rng.normal(size=(60, 2, 64)) * rng.choice([0, 1e-3, 1, 100], (60, 1, 1))
    rows[::7] = np.abs(rows[::7])
    rows[::11] = 3
    x = mx.array(rows.astype(np.float32)).astype(dtype)
    ours, theirs = quantize(x, bits), mx.quantize(x, group_size=32, bits=bits)
    assert all(mx.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    narrow = x[..., :16]  # in groups of 16, of which MLX has none
    back = dequantize(quantize(narrow, bits), bits).astype(mx.float32)
    step = (narrow.max(-1) - narrow.min(-1)).astype(mx.float32) / (2**bits - 1)
    rounding = 2 * mx.abs(narrow).astype(mx.float32).max(-1) * float(mx.finfo(dtype).eps)
    # Half a step; at the nearer end another half, since the codes are shifted to meet 0.
    assert (mx.abs(back - narrow).max(-1) <= step + 2 * rounding + 1e-6).all()


def test_the_kv_pool_is_written_in_place() -> None:
    """A step holds no second copy of the pool: it takes over the buffer of the one before."""
    with backend(kernels=False, blocks=20_000) as metal:
        pool = sum(array.nbytes for array in metal._pool.arrays)
        assert pool > 20 << 20
        sequence = Sequence(np.arange(12), np.arange(8))
        run(metal, sequence.next(4))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in range(4):
            run(metal, sequence.next(2))
        assert mx.get_peak_memory() - before < pool / 20


@pytest.mark.parametrize("of", [llama, wide_hybrid], ids=["llama", "hybrid"])
@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_memory_is_told_before_it_is_taken(kv_bits: int, of: Callable[[], DecoderSpec]) -> None:
    spec = of()
    tensors = packed(spec)
    forms = {name: form_of(tensor) for name, tensor in tensors.items()}
    sizes = {"num_blocks": 7, "block_size": 32, "kv_bits": kv_bits, "state_slots": SLOTS}
    opened = MetalBackend(spec, iter(tensors.items()), dtype=mx.float16, **sizes)
    told = MetalMemory()
    pool = sum(array.nbytes for array in opened._pool.arrays)
    assert sum(told.kv_pool(spec, g, 7, 32, kv_bits) for g in kv_groups(spec)) == pool
    opened.close()
    mx.clear_cache()
    before = mx.get_active_memory()
    opened = MetalBackend(spec, iter(tensors.items()), dtype=mx.float16, **sizes)
    taken = mx.get_active_memory() - before - pool
    # MLX rounds every buffer up, which these small ones show.
    assert abs(taken - told.weights(spec, forms)) < 0.05 * taken
    opened.close()


class Limits:
    """MLX's memory limits on a machine with a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, working_set: int | None) -> None:
        self.set: dict[str, int] = {}
        monkeypatch.setattr(metal_limits, "working_set", lambda: working_set)
        for name in ("cache", "memory", "wired"):
            monkeypatch.setattr(
                mx, f"set_{name}_limit", lambda value, name=name: self.set.update({name: value})
            )


def test_a_model_is_wired_and_the_allocator_bounded_by_the_working_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = Limits(monkeypatch, working_set=10 << 30)
    metal_limits.bound_memory(3 << 30)
    assert limits.set["wired"] == 3 << 30
    assert limits.set["memory"] == 10 << 30
    assert 0 < limits.set["cache"] <= 1 << 30
    metal_limits.bound_memory(30 << 30)
    assert limits.set["wired"] == 10 << 30


def test_opening_a_model_on_a_gpu_wires_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, working_set=10 << 30)
    with backend(kernels=False) as metal:
        pool = sum(array.nbytes for array in metal._pool.arrays)
        assert pool < limits.set["wired"] < 10 << 30


def test_without_a_gpu_no_limit_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(monkeypatch, working_set=None)
    with backend(kernels=False):
        assert limits.set == {}
