"""MLX's quantized matmul in the emulator, chosen as MLX chooses."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.emulator.arrays import TYPE_NAMES, empty, to_mlx, to_numpy
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.mlx_kernels import Gpu, MlxRun, flag, int32, run_shipped

_FILES = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
_CONSTANTS = {"align_M": "false", "align_N": "false", "align_K": "false"}
_UNUSED = 8  # shapes and strides of a batch of matrices, which the kernels read only if batched


def quantized_matmul(
    emulator: Emulator,
    x: mx.array,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    group: int,
    bits: int,
    gpu: Gpu | None = None,
    kernel: str | None = None,
) -> MlxRun:
    """`mx.quantized_matmul(x, codes, scales, biases, transpose=True)`: x [..., K], codes uint32
    [N, K * bits / 32] -> [..., N]. kernel: one by name instead of MLX's choice.

    Raises ShippedKernelFault, ShippedSourceMissing.
    """
    gpu = gpu or Gpu()
    k, n = x.shape[-1], codes.shape[0]
    m = x.size // k
    weights = [to_numpy(array) for array in (codes, scales, biases)]
    rows = to_numpy(x).reshape(m, k)
    template = {"T": TYPE_NAMES[x.dtype], "group_size": str(group), "bits": str(bits)}
    template["batched"] = "false"
    chosen = kernel or _choose(m, n, k, bits, gpu)
    out = empty((m, n), x.dtype)
    sizes: list[np.ndarray]
    if chosen == "affine_qmm_t_splitk":
        return _split_k(emulator, weights, rows, x, n, template, group)
    if chosen == "affine_qmv_wide":
        tiles = -(-m // 5)  # at most 5 rows a threadgroup; each tile reads the weights again
        per_tile = -(-m // tiles)
        template |= {"vecs_per_tg": str(per_tile), "k_lanes": "8"}
        sizes = [int32(k), int32(n), int32(m)]
        groups, threads = (-(-m // per_tile), -(-n // 8), 1), (32, 2, 1)
    elif chosen == "affine_qmm_t":
        template["aligned_N"] = flag(n % 32 == 0)
        sizes = [int32(k), int32(n), int32(m)]
        groups, threads = (-(-n // 32), -(-m // 32), 1), (32, 2, 2)
    elif chosen == "affine_qmv_quad":
        template["D"] = str(k)
        sizes = [int32(k), int32(n)]
        groups, threads = (m, -(-n // 64), 1), (32, 1, 1)
    else:  # affine_qmv_fast, affine_qmv
        sizes = [int32(k), int32(n)]
        groups, threads = (m, -(-n // 8), 1), (32, 2, 1)
    buffers = [*weights, rows, out, *sizes, *[int32(0)] * _UNUSED]
    run = run_shipped(emulator, _FILES, chosen, template, _CONSTANTS, buffers, groups, threads)
    y = to_mlx(run.buffers[4], x.dtype).reshape(*x.shape[:-1], n)
    return MlxRun(y, (run,))


def _choose(m: int, n: int, k: int, bits: int, gpu: Gpu) -> str:
    if m >= _most_rows_of_vectors(k, n, gpu):
        return "affine_qmm_t_splitk"
    if k in (64, 128) and bits in (2, 4, 8):
        return "affine_qmv_quad"
    if m >= 2 and gpu.generation >= 15:
        return "affine_qmv_wide"
    step = 32 // bits * (1 if bits == 2 else 2) * 32
    return "affine_qmv_fast" if n % 8 == 0 and k % step == 0 else "affine_qmv"


def _most_rows_of_vectors(k: int, n: int, gpu: Gpu) -> int:
    """From so many rows on MLX multiplies tiles of matrices."""
    large = 0 if max(k, n) <= 2048 else 1 if max(k, n) <= 4096 else 2
    if gpu.size == "d":
        return (32, 18, 12)[large]
    if gpu.generation >= 17:
        return (33, 25, 13)[large]
    if gpu.generation >= 15:
        return (13, 15, 13)[large]
    if gpu.generation >= 13:
        return (14, 10, 6)[large]
    return (18, 12, 10)[large]


def _split_k(
    emulator: Emulator,
    weights: list[np.ndarray],
    rows: np.ndarray,
    x: mx.array,
    n: int,
    template: dict[str, str],
    group: int,
) -> MlxRun:
    """Tiles of matrices, K split over threadgroups until there are some 512, and a sum of the
    parts; the sum's kernel is counted as its input and output once."""
    m, k = rows.shape
    tiles = -(-n // 32) * -(-m // 32)
    step = max(group, 32)
    parts = min(max(1, 512 // tiles), k // step)
    while parts > 1 and k % (parts * step):
        parts -= 1
    if parts <= 1:
        codes, scales, biases = (mx.array(weight) for weight in weights)
        scales, biases = (
            array.view(mx.bfloat16) if x.dtype == mx.bfloat16 else array
            for array in (scales, biases)
        )
        bits = int(template["bits"])
        return quantized_matmul(
            emulator, x, codes, scales, biases, group=group, bits=bits, kernel="affine_qmm_t"
        )
    partial = empty((parts, m, n), mx.float32)
    sizes = [int32(value) for value in (k, n, m, k // parts, m * n)]
    del template["batched"]
    run = run_shipped(
        emulator,
        _FILES,
        "affine_qmm_t_splitk",
        template | {"aligned_N": flag(n % 32 == 0)},
        _CONSTANTS,
        [*weights, rows, partial, *sizes],
        (-(-n // 32), -(-m // 32), parts),
        (32, 2, 2),
    )
    total = mx.array(run.buffers[4]).sum(axis=0).astype(x.dtype)
    summed = run.buffers[4].nbytes + total.nbytes
    return MlxRun(total.reshape(*x.shape[:-1], n), (run,), summed)
