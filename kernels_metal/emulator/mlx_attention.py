"""MLX's fused attention in the emulator, chosen as MLX chooses."""

from __future__ import annotations

import struct

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.emulator.arrays import TYPE_NAMES, empty, to_mlx, to_numpy
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.mlx_kernels import (
    Gpu,
    MlxRun,
    NoSuchKernel,
    flag,
    int32,
    run_shipped,
)

_VECTOR = ("sdpa_vector.h",)
_TILES = ("steel/attn/kernels/steel_attention.h",)
_VECTOR_ROWS = 8  # more query rows than this are tiled


def attention(
    emulator: Emulator,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    gpu: Gpu | None = None,
    kernel: str | None = None,
) -> MlxRun:
    """`mx.fast.scaled_dot_product_attention`: q [b, heads, rows, d], k and v [b, kv_heads, n, d]
    -> [b, heads, rows, d]. mask: None, "causal", or an array that broadcasts to
    [b, heads, rows, n]. kernel: "sdpa_vector" or "sdpa_vector_2pass" instead of MLX's choice.

    Raises NoSuchKernel where MLX falls back to separate matmuls; ShippedKernelFault.
    """
    gpu = gpu or Gpu()
    _refuse_what_falls_back(q, k, v)
    causal = isinstance(mask, str)
    array = None if mask is None or isinstance(mask, str) else _whole(mask, q, k)
    if q.shape[2] > _VECTOR_ROWS:
        return _tiled(emulator, q, k, v, scale, causal, array, sinks)
    two_pass = (gpu.size in "sd" and k.shape[2] >= 1024) or (
        k.shape[1] < q.shape[1] and k.shape[2] >= 4096
    )
    if kernel is not None:
        two_pass = kernel == "sdpa_vector_2pass"
    causal = causal and q.shape[2] > 1
    if two_pass:
        return _two_pass(emulator, q, k, v, scale, causal, array, sinks, gpu)
    return _one_pass(emulator, q, k, v, scale, causal, array, sinks)


def _refuse_what_falls_back(q: mx.array, k: mx.array, v: mx.array) -> None:
    rows, d = q.shape[2:]
    per_kv_head = q.shape[1] // k.shape[1]
    if v.shape[-1] != d:
        raise NoSuchKernel("heads of different sizes for keys and values")
    if rows > _VECTOR_ROWS and d not in (64, 72, 80, 96, 128):
        raise NoSuchKernel(f"MLX has no tiled attention for head size {d}")
    if rows <= _VECTOR_ROWS and (d not in (64, 96, 128, 256) or rows * per_kv_head > 32):
        raise NoSuchKernel(
            f"MLX has no vector attention for head size {d}, {rows} rows of {per_kv_head} heads"
        )


def _whole(mask: mx.array, q: mx.array, k: mx.array) -> mx.array:
    """With four axes. One of its own for each sequence but not for each head is copied for all
    heads, as MLX's vector kernels need it."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[0] > 1 and mask.shape[1] == 1 and q.shape[2] <= _VECTOR_ROWS:
        shape = (q.shape[0], q.shape[1], *mask.shape[2:])
        mask = mx.contiguous(mx.broadcast_to(mask, shape))
    return mask


def _mask_strides(mask: mx.array) -> tuple[int, int, int, int]:
    """In elements; 0 along what is broadcast."""
    strides = []
    step = 1
    for size in reversed(mask.shape):
        strides.append(step if size > 1 else 0)
        step *= size
    b, head, row, position = reversed(strides)
    return b, head, row, position


def _vector_constants(
    causal: bool, mask: mx.array | None, sinks: mx.array | None, blocks: int
) -> dict[str, str]:
    boolean = mask is not None and mask.dtype == mx.bool_
    return {
        "has_mask": flag(mask is not None),
        "query_transposed": "false",
        "do_causal": flag(causal),
        "bool_mask": flag(boolean),
        "float_mask": flag(mask is not None and not boolean),
        "has_sinks": flag(sinks is not None),
        "blocks": str(blocks),
    }


def _vector_extras(
    mask: mx.array | None, sinks: mx.array | None, q: mx.array
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The buffers for the mask (boolean, float, three strides) and for the sinks."""
    nothing = int32(0)
    masks = [nothing] * 5
    if mask is not None:
        masks[0 if mask.dtype == mx.bool_ else 1] = to_numpy(
            mask if mask.dtype == mx.bool_ else mask.astype(q.dtype)
        )
        _, head, row, position = _mask_strides(mask)
        masks[2:] = [int32(position), int32(row), int32(head)]
    sink = nothing if sinks is None else to_numpy(sinks.astype(q.dtype))
    return masks, [sink]


def _strides(k: mx.array) -> list[np.ndarray]:
    n, d = k.shape[2:]
    return [np.array([n * d], np.uint64), np.array([d], np.uint64)]


def _one_pass(
    emulator: Emulator,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> MlxRun:
    b, heads, rows, d = q.shape
    masks, sink = _vector_extras(mask, sinks, q)
    run = run_shipped(
        emulator,
        _VECTOR,
        "sdpa_vector",
        {"T": TYPE_NAMES[q.dtype], "D": str(d), "V": str(d)},
        _vector_constants(causal, mask, sinks, 32),
        [
            *(to_numpy(array) for array in (q, k, v)),
            empty(q.shape, q.dtype),
            int32(heads // k.shape[1]),
            int32(k.shape[2]),
            *_strides(k),
            *_strides(v),
            np.array([scale], np.float32),
            *masks,
            *sink,
            int32(heads),
        ],
        (b * heads, rows, 1),
        (1024, 1, 1),
    )
    return MlxRun(to_mlx(run.buffers[3], q.dtype), (run,))


def _blocks(n: int, simdgroups: int, gpu: Gpu) -> int:
    """Into how many parts MLX splits the positions."""
    if gpu.size == "s":
        if n <= 1024 or simdgroups <= 4:
            return 64
        for limit, blocks in ((8192, 128), (32768, 256), (65536, 512)):
            if n <= limit:
                return blocks
        return 1024
    if gpu.size == "d":
        if simdgroups <= 2 and n > 8192:
            return 256
        if simdgroups >= 6 and n >= 16384:
            return 512 if n < 65536 else 1024
        return 128
    return 64 if simdgroups >= 4 else 32


def _two_pass(
    emulator: Emulator,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    mask: mx.array | None,
    sinks: mx.array | None,
    gpu: Gpu,
) -> MlxRun:
    b, heads, rows, d = q.shape
    n = k.shape[2]
    per_kv_head = heads // k.shape[1]
    blocks = _blocks(n, per_kv_head * rows, gpu)
    template = {"T": TYPE_NAMES[q.dtype], "D": str(d), "V": str(d)}
    grouped = (
        mask is None
        and sinks is None
        and rows == 1
        and per_kv_head == 8
        and d in (64, 128)
        and n >= 8192
    )
    name = "sdpa_vector_2pass_1" + ("_gqa" if grouped else "")
    template |= {"G": "8", "HPT": "8" if d == 64 else "4"} if grouped else {"TK": "4"}
    masks, sink = _vector_extras(mask, sinks, q)
    constants = _vector_constants(causal, mask, sinks, blocks)
    parts = (b, heads, rows, blocks)
    first = run_shipped(
        emulator,
        _VECTOR,
        name,
        template,
        constants,
        [
            *(to_numpy(array) for array in (q, k, v)),
            empty((*parts, d), q.dtype),
            empty(parts, mx.float32),
            empty(parts, mx.float32),
            int32(0),
            int32(n),
            *_strides(k),
            *_strides(v),
            np.array([scale], np.float32),
            *masks,
            *sink,
        ],
        (k.shape[1], b, blocks),
        (32, per_kv_head, rows),
    )
    second = run_shipped(
        emulator,
        _VECTOR,
        "sdpa_vector_2pass_2",
        {"T": TYPE_NAMES[q.dtype], "D": str(d)},
        constants,
        [*first.buffers[3:6], empty(q.shape, q.dtype), int32(blocks)],
        (b * heads, rows, 1),
        (1024, 1, 1),
    )
    return MlxRun(to_mlx(second.buffers[3], q.dtype), (first, second))


def _tiled(
    emulator: Emulator,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> MlxRun:
    b, heads, rows, d = q.shape
    n = k.shape[2]
    tile_q, tile_k = 32, 32 if d < 128 else 16
    whole_q, whole_k = rows // tile_q, n // tile_k
    sizes = (b, heads, d, rows, n, heads // k.shape[1])
    tiles = (-(-rows // tile_q), -(-n // tile_k), whole_q, whole_k)
    rest = (rows - whole_q * tile_q, n - whole_k * tile_k, n - rows)
    of_output = (rows * heads * d, d, heads * d)  # MLX lays the output out as [b, rows, heads, d]
    strides = [
        step
        for array in (q, k, v)
        for step in (array.shape[1] * array.shape[2] * d, array.shape[2] * d, d)
    ]
    params = struct.pack("<6if7i12q", *sizes, scale, *tiles, *rest, *strides, *of_output)
    mask_params, mask_values, mask_type = int32(0), int32(0), TYPE_NAMES[q.dtype]
    if mask is not None:
        batch, head, row, _ = _mask_strides(mask)
        mask_params = np.array([batch, head, row], np.int64)
        boolean = mask.dtype == mx.bool_
        mask_values = to_numpy(mask if boolean else mask.astype(q.dtype))
        mask_type = "bool" if boolean else mask_type
    run = run_shipped(
        emulator,
        _TILES,
        "attention",
        {
            "T": TYPE_NAMES[q.dtype],
            "BQ": str(tile_q),
            "BK": str(tile_k),
            "BD": str(d),
            "BV": str(d),
            "WM": "4",
            "WN": "1",
            "MaskType": mask_type,
            "AccumType": "float",
        },
        {
            "align_Q": flag(rows % tile_q == 0),
            "align_K": flag(n % tile_k == 0),
            "has_mask": flag(mask is not None),
            "do_causal": flag(causal),
            "has_sinks": flag(sinks is not None),
            "save_lse": "false",
        },
        [
            *(to_numpy(array) for array in (q, k, v)),
            empty((b, rows, heads, d), q.dtype),
            np.frombuffer(params, np.uint8).copy(),
            mask_params,
            mask_values,
            int32(0) if sinks is None else to_numpy(sinks.astype(q.dtype)),
            int32(0),
        ],
        (tiles[0], heads, b),
        (32, 4, 1),
    )
    return MlxRun(to_mlx(run.buffers[3], q.dtype).transpose(0, 2, 1, 3), (run,))
