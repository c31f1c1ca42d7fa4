"""What kernels compute in the emulator, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Literal

import mlx.core as mx
import numpy as np
import pytest

from localllm.errors import BackendUnavailable
from localllm.kernels_metal.emulator import Counters, Dispatch, Emulator, KernelFault
from localllm.kernels_metal.emulator.toolchain import toolchain
from localllm.kernels_metal.kernel import Launch, executed_by
from tests.kernels_metal.inline import USING, InlineKernel

I = "uint i = thread_position_in_grid.x; "  # noqa: E741
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "


def run(
    body: str,
    inputs: Sequence[mx.array],
    *,
    shape: tuple[int, ...] = (64,),
    dtype: mx.Dtype = mx.float32,
    grid: tuple[int, int, int] = (64, 1, 1),
    group: tuple[int, int, int] = (64, 1, 1),
    header: str = USING,
    init: float | None = None,
    emulator: Emulator | None = None,
) -> Dispatch:
    """One kernel with inputs a, b, … and the output o."""
    names = "abcdefgh"[: len(inputs)]
    kernel = InlineKernel(body, header=header, inputs=list(names))
    launch = Launch(inputs, grid, group, [shape], [dtype], [("T", dtype)], init)
    return (emulator or Emulator()).run(kernel, launch)


def numbers(dispatch: Dispatch) -> np.ndarray:
    return np.array(dispatch.outputs[0].astype(mx.float32))


def values(dtype: mx.Dtype = mx.float32, size: int = 64) -> mx.array:
    return mx.array(np.random.default_rng(7).standard_normal(size).astype(np.float32)).astype(dtype)


# ---- what lanes of a simdgroup get -----------------------------------------------------------

LANE = np.arange(64) % 32
SIMD = np.arange(64) // 32


def by_simd(x: np.ndarray, reduce: Literal["sum", "prod", "max", "min"]) -> np.ndarray:
    return np.repeat(getattr(x.reshape(-1, 32), reduce)(1), 32)


def test_simdgroup_functions_give_every_lane_what_metal_promises() -> None:
    a = mx.arange(64, dtype=mx.float32) % 7 + 1
    x = np.array(a)
    expected = {
        "simd_sum(x)": by_simd(x, "sum"),
        "simd_max(x)": by_simd(x, "max"),
        "simd_min(x)": by_simd(x, "min"),
        "simd_product(x > 3 ? 1.0f : x)": by_simd(np.where(x > 3, 1, x), "prod"),
        "simd_or(uint(x))": np.full(64, 7),
        "simd_and(uint(x) | 8)": np.full(64, 8),
        "simd_xor(lane)": np.zeros(64),
        "simd_prefix_inclusive_sum(x)": x.reshape(2, 32).cumsum(1).ravel(),
        "simd_prefix_exclusive_sum(x)": (x.reshape(2, 32).cumsum(1) - x.reshape(2, 32)).ravel(),
        "simd_shuffle(x, 31 - lane)": x.reshape(2, 32)[:, ::-1].ravel(),
        "simd_shuffle_xor(x, 5)": x[np.arange(64) ^ 5],
        "simd_broadcast(x, 9)": np.repeat(x[[9, 41]], 32),
        "simd_broadcast_first(x)": np.repeat(x[[0, 32]], 32),
        "simd_shuffle_down(x, 3)": np.where(LANE + 3 < 32, x[(np.arange(64) + 3) % 64], x),
        "simd_shuffle_up(x, 3)": np.where(LANE >= 3, x[np.arange(64) - 3], x),
        "simd_shuffle_rotate_down(x, 3)": np.roll(x.reshape(2, 32), -3, 1).ravel(),
        "simd_shuffle_rotate_up(x, 3)": np.roll(x.reshape(2, 32), 3, 1).ravel(),
        "simd_shuffle_and_fill_down(x, 9.0f, 3)": np.where(
            LANE + 3 < 32, x[(np.arange(64) + 3) % 64], 9
        ),
        "simd_shuffle_and_fill_up(x, 9.0f, 3)": np.where(LANE >= 3, x[np.arange(64) - 3], 9),
        "quad_sum(x)": np.repeat(x.reshape(16, 4).sum(1), 4),
        "quad_max(x)": np.repeat(x.reshape(16, 4).max(1), 4),
        "quad_shuffle(x, 2)": np.repeat(x.reshape(16, 4)[:, 2], 4),
        "quad_shuffle_xor(x, 1)": x[np.arange(64) ^ 1],
        "quad_prefix_inclusive_sum(x)": x.reshape(16, 4).cumsum(1).ravel(),
        "popcount(uint((simd_vote::vote_t)simd_ballot(x > 4)))": by_simd(1.0 * (x > 4), "sum"),
        "simd_any(x > 6)": np.ones(64),
        "simd_all(x > 1)": np.zeros(64),
        "simd_is_first()": LANE == 0,
        "simd_sum(float2(x, 1)).y": np.full(64, 32),
        "simdgroup_index_in_threadgroup": SIMD,
        "thread_index_in_quadgroup": LANE % 4,
    }
    header = USING + "#define EACH(N, E) o[N * 64 + i] = float(E);\n"
    body = I + "uint lane = thread_index_in_simdgroup; float x = a[i];\n"
    body += "\n".join(f"EACH({n}, {text})" for n, text in enumerate(expected))
    got = numbers(run(body, [a], shape=(len(expected), 64), header=header))
    for row, (text, want) in zip(got, expected.items(), strict=True):
        assert np.array_equal(row, want), text


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_scans_of_halves_round_where_metal_and_mlx_do(dtype: mx.Dtype) -> None:
    """half after every step; bfloat once, since MLX's bf16_math.h scans it as float."""
    # Large, small and subnormal numbers: the sums round in every way.
    spread = values(mx.float32) * mx.power(2.0, mx.arange(64, dtype=mx.float32) % 37 - 24)
    a = spread.astype(dtype)
    within = dtype if dtype == mx.float16 else mx.float32
    expected = []
    for group in (a[:32], a[32:]):
        total = mx.array(0, within)
        for k in range(32):
            total = total + group[k].astype(within)
            expected.append(total.astype(dtype).item())
    got = numbers(run(I + "o[i] = simd_prefix_inclusive_sum(a[i]);", [a], dtype=dtype))
    assert np.array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_matrices_of_a_simdgroup_load_multiply_and_store(dtype: mx.Dtype) -> None:
    a, b = values(dtype, 64), values(dtype, 64)[::-1]
    body = I + (
        "threadgroup T t[64]; t[i] = b[i]; t[i + 32] = b[i + 32]; " + BARRIER
        + "simdgroup_matrix<T, 8, 8> x, y; simdgroup_matrix<float, 8, 8> z(1.0f); "
        "simdgroup_load(x, a, 8, ulong2(0), true); simdgroup_load(y, t, 8); "
        "simdgroup_multiply_accumulate(z, x, y, z); simdgroup_store(z, o, 8);"
    )  # fmt: skip
    kernel = InlineKernel(body, inputs=["a", "b"])
    launch = Launch([a, b], (32, 1, 1), (32, 1, 1), [(8, 8)], [mx.float32], [("T", dtype)])
    dispatch = Emulator().run(kernel, launch)
    x, y = (np.array(v.astype(mx.float32), np.float64).reshape(8, 8) for v in (a, b))
    # Nine terms, each of at most 2^-24 of the largest partial sum.
    np.testing.assert_allclose(numbers(dispatch), x.T @ y + np.eye(8), rtol=0, atol=9e-6)
    assert dispatch.counters.matrix_ops == 1
    assert dispatch.counters.matrix_flops == 1024


# ---- the rest of the language -----------------------------------------------------------------


def test_threads_know_their_places_in_an_uneven_grid() -> None:
    body = (
        "uint3 p = thread_position_in_grid; uint3 n = threads_per_grid; "
        "uint at = (p.z * n.y + p.y) * n.x + p.x; "
        "uint3 g = threadgroup_position_in_grid; uint3 t = thread_position_in_threadgroup; "
        "uint3 s = threads_per_threadgroup; uint3 d = dispatch_threads_per_threadgroup; "
        "bool right = all(p == g * d + t) && thread_index_in_threadgroup == "
        "(t.z * s.y + t.y) * s.x + t.x && thread_index_in_simdgroup == "
        "thread_index_in_threadgroup % 32; o[at] = right ? a[0] : 0;"
    )
    done = run(body, [mx.ones((8,))], shape=(2, 3, 50), grid=(50, 3, 2), group=(32, 2, 1))
    assert (numbers(done) == 1).all()
    assert (done.counters.threads, done.counters.threadgroups) == (300, 2 * 2 * 2)


def test_vectors_construct_swizzle_and_pack() -> None:
    body = I + (
        "float4 v = float4(1, float2(2, 3), 4); v.xy = v.wz; "
        "float3 p = ((const device packed_float3*)a)[1]; half2 h = half2(v.xy); "
        "uint4 u = as_type<uint4>(v); packed_half4 q = packed_half4(half4(5)); "
        "auto w = vec<float, 2>(8, 9); bfloat b = 3.5bf; "
        "float all[16] = {v.x, v.y, v.z, v.w, p.x, p.y, p.z, float(h.x), as_type<float>(u.w), "
        "float(q.w), dot(v, float4(1)), w.y, float(b), float(max(v, 3.5f).y), "
        "metal::fast::exp(0.0f) + precise::sqrt(4.0f), "
        "float(clamp(7, 1, 5) + select(1, 2, true))}; o[i] = all[i];"
    )
    got = numbers(run(body, [mx.arange(64, dtype=mx.float32)], shape=(16,), grid=(16, 1, 1)))
    assert got.tolist() == [4, 3, 3, 4, 3, 4, 5, 4, 4, 5, 14, 9, 3.5, 3.5, 3, 7]


def test_atomics_do_every_operation_in_both_memories() -> None:
    operations = ["add", "sub", "or", "and", "xor", "max", "min"]
    start = [0, 100, 0, 255, 0, -5, 5]
    calls = "".join(
        f"atomic_fetch_{name}_explicit(n + {k}, int(i), memory_order_relaxed); "
        for k, name in enumerate(operations)
    )
    body = I + (
        "threadgroup atomic_int t[7]; if (i < 7) atomic_store_explicit(t + i, b[i], "
        "memory_order_relaxed); " + BARRIER
        + "{ threadgroup atomic_int* n = t; " + calls + "} " + BARRIER
        + "if (i < 7) o[i] = atomic_load_explicit(t + i, memory_order_relaxed); "
        "device atomic_int* n = (device atomic_int*)o + 8; " + calls.replace("n + ", "n + ")
    )  # fmt: skip
    done = run(body, [mx.zeros((8,)), mx.array([*start, 0])], shape=(15,), dtype=mx.int32, init=0)
    i = np.arange(64)
    want = [i.sum(), 100 - i.sum(), 63, 0, np.bitwise_xor.reduce(i), 63, 0]
    assert numbers(done)[:7].tolist() == want
    assert numbers(done)[8:].tolist() == [i.sum(), -i.sum(), 63, 0, 0, 63, 0]
    assert done.counters.atomics == 7 + 7 + 2 * 7 * 64


def test_small_inputs_are_constant_and_single_numbers_are_references() -> None:
    body = I + "o[i] = a[i & 3] * b + a_shape[0] + int(a_ndim) + int(a_strides[0]);"
    got = numbers(run(body, [mx.array([1.0, 2, 3, 4]), mx.array(10.0)]))
    assert got[:5].tolist() == [16, 26, 36, 46, 16]


def test_initial_values_and_input_views_arrive() -> None:
    view = mx.arange(128, dtype=mx.float32)[::2]
    got = numbers(run(I + "if (i < 32) o[i] = a[i];", [view], init=7))
    assert got.tolist() == [*range(0, 64, 2), *[7] * 32]


def test_arguments_that_mlx_refuses_are_a_fault_of_the_call() -> None:
    kernel = InlineKernel(I + "o[i] = a[i];")
    with pytest.raises(KernelFault, match="MLX refuses"):
        Emulator().run(kernel, Launch([], (1, 1, 1), (1, 1, 1), [(1,)], [mx.float32]))


# ---- faults are told where a person looks -----------------------------------------------------


def test_a_fault_names_line_buffer_thread_and_what_to_do() -> None:
    with pytest.raises(KernelFault) as caught:
        run("\n" + I + "\no[i] =\n  a[i + 10];\n", [mx.zeros((64,))], emulator=Emulator())
    fault = caught.value
    assert fault.place is not None
    assert (fault.place.file, fault.place.line) == ("inline.body", 4)
    assert (fault.thread, fault.threadgroup) == ((54, 0, 0), (0, 0, 0))
    assert "buffer `a` (256 bytes)" in str(fault)
    assert fault.hint


def test_guard_pages_catch_both_sides_without_counting() -> None:
    a = mx.zeros((64,))
    for body, placement in (("o[i] = a[i + 1];", "high"), ("o[i] = a[int(i) - 1];", "low")):
        with pytest.raises(KernelFault, match="buffer `a`"):
            run(I + body, [a], emulator=Emulator(count=False, placement=placement))


def test_a_load_of_unset_memory_is_a_fault_if_asked() -> None:
    body = I + "threadgroup float t[64]; if (i) t[i] = 1; " + BARRIER + "o[i] = t[i] > 0 ? 1 : 0;"
    assert run(body, [mx.zeros((64,))]).counters.uninitialised == 4
    with pytest.raises(KernelFault, match="nothing was stored"):
        run(body, [mx.zeros((64,))], emulator=Emulator(initialised=True))


# ---- counters -----------------------------------------------------------------------------------


def test_a_copy_moves_exactly_its_bytes() -> None:
    n = 1000
    done = run(I + "o[i] = a[i];", [mx.zeros((n,))], shape=(n,), grid=(n, 1, 1))
    c = done.counters
    assert (c.loaded_device, c.stored_device) == (4 * n, 4 * n)
    assert (c.moved_read, c.moved_written, c.moved) == (4 * n, 4 * n, 8 * n)
    assert (c.lines_read, c.lines_written) == (32, 32)


@pytest.mark.parametrize(
    ("type_", "bytes_"),
    [("uchar", 1), ("uchar3", 4), ("ushort", 2), ("half3", 8), ("float2", 8), ("float4", 16),
     ("long4", 32), ("packed_float3", 12), ("packed_half4", 8)],
)  # fmt: skip
def test_loads_of_every_size_are_seen(type_: str, bytes_: int) -> None:
    body = I + f"device {type_}* to = (device {type_}*)o; to[i] = ((const device {type_}*)a)[i];"
    done = run(body, [mx.zeros((600,))], shape=(600,), grid=(32, 1, 1), init=0)
    # clang moves three-vectors as three or four components; either is told.
    least = bytes_ * 3 // 4 if type_ in ("uchar3", "half3") else bytes_
    assert 32 * least <= done.counters.loaded_device <= 32 * bytes_
    assert 32 * least <= done.counters.stored_device <= 32 * bytes_


def test_what_does_not_fit_the_cache_moves_again() -> None:
    body = (
        I + "float s = 0; "
        "for (int r = 0; r < 3; r++) for (int j = 0; j < 4096; j++) s += a[j]; o[i] = s;"
    )
    a = mx.zeros((4096,))
    moved = {
        size: run(body, [a], grid=(1, 1, 1), shape=(1,), emulator=Emulator(cache_bytes=size))
        for size in (8192, 65536)
    }
    assert moved[65536].counters.moved_read == 16384
    assert moved[8192].counters.moved_read == 3 * 16384


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (32, 31), (33, 0), (0, 0)])
def test_bank_conflicts_follow_the_stride(stride: int, conflicts: int) -> None:
    body = I + (
        f"threadgroup float t[1100]; threadgroup float* p = t; p[i * {max(stride, 1)}] = 1; "
        + BARRIER + f"o[i] = p[i * {stride}];"
    )  # fmt: skip
    done = run(body, [mx.zeros((32,))], shape=(32,), grid=(32, 1, 1), group=(32, 1, 1))
    assert done.counters.bank_steps == 2
    assert done.counters.bank_conflicts == conflicts * (2 if stride else 1)


def test_meetings_are_counted_once_for_all_who_meet() -> None:
    body = I + (
        "uint j = thread_position_in_threadgroup.x; threadgroup float t[64]; "
        "t[j] = simd_sum(a[i]); " + BARRIER
        + "simdgroup_barrier(mem_flags::mem_none); o[i] = t[63 - j];"
    )  # fmt: skip
    c = run(body, [mx.zeros((128,))], shape=(128,), grid=(128, 1, 1)).counters
    assert (c.threadgroups, c.threadgroup_bytes, c.barriers) == (2, 256, 2)
    assert (c.simd_ops, c.simd_barriers) == (4, 4)


def test_a_run_without_counting_gives_the_same_bits() -> None:
    body = (
        I + "threadgroup float t[64]; t[i] = exp(a[i]); " + BARRIER + "o[i] = simd_sum(t[63 - i]);"
    )
    counted, plain = (run(body, [values()], emulator=Emulator(count=c)) for c in (True, False))
    assert np.array_equal(numbers(counted), numbers(plain))
    zero = {f.name for f in fields(Counters) if getattr(plain.counters, f.name) == 0}
    assert {"moved_read", "loaded_device", "bank_steps"} <= zero


# ---- as an executor -----------------------------------------------------------------------------


def test_kernels_called_within_it_run_in_it_and_are_remembered() -> None:
    kernel = InlineKernel(I + "o[i] = a[i] + 1;")
    emulator = Emulator(order="random", seed=3)
    launch = Launch([mx.zeros((64,))], (64, 1, 1), (64, 1, 1), [(64,)], [mx.float32])
    with executed_by(emulator):
        for _ in range(1005):
            outputs = kernel(launch)
    assert (np.array(outputs[0]) == 1).all()
    assert len(emulator.dispatches) == 1000


def test_a_missing_compiler_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLLM_CLANG", "/no/such/clang")
    with pytest.raises(BackendUnavailable, match="no such program") as caught:
        toolchain()
    assert caught.value.hint is not None
    assert "ziglang" in caught.value.hint
