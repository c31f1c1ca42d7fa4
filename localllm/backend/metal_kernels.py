"""Our Metal kernels in the metal backend: where each one serves, and who decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from localllm.backend.metal_adapters import Stack
from localllm.backend.metal_attention import ChunkRows
from localllm.backend.metal_kv import KvPool, Rows, Side
from localllm.backend.metal_ops import Angles, Linear, Norm, Ops
from localllm.backend.metal_weights import Matrix, QuantizedMatrix
from localllm.hub.store import Store
from localllm.kernels_metal import (
    affine_contests,
    causal_conv,
    gated_delta,
    lora,
    paged_decode,
    paged_prefill,
    qmm_small,
    qmv,
    rms_norm,
)
from localllm.kernels_metal import rope_kv as ropes
from localllm.kernels_metal.affine import ACTIVATIONS, BITS, GROUPS, Affine
from localllm.kernels_metal.dispatch import Always, Chooser, Measured
from localllm.kernels_metal.kernel import Executor
from localllm.kernels_metal.paged_contests import Shape
from localllm.kernels_metal.paged_pool import Pool, QuantizedPool
from localllm.kernels_metal.runs import Carried, Runs
from localllm.spec import AttentionSpec
from localllm.spec.decoder import Activation

_HEAD_STEP, _LARGEST_HEAD = 16, 256  # head sizes that the attention kernels take
_DECODED_ROWS = 8  # of a sequence in a step: what verifies drafts is computed as decoding is
_LORA_ROWS = 32  # beyond, each adapter's own matrix products read it less often
_MEASURED_WEIGHTS = 1 << 22  # of a matrix in a contest, which takes its first rows alone
_MEASURED_RUN = 64  # rows of a sequence, of which a recurrence in MLX's ops takes one at a time


def chooser() -> Chooser:
    """Verdicts by measurement, kept beside the models; without a GPU every kernel that applies."""
    return Measured(verdicts_folder()) if mx.metal.is_available() else Always()


def emulator() -> Executor:
    """What runs kernels without a GPU."""
    from localllm.kernels_metal.emulator import Emulator

    return Emulator()


def verdicts_folder() -> Path:
    return Store().home / "metal"


class KernelOps(Ops):
    """As `Ops`, by a kernel where one applies and `choose` is for it."""

    def __init__(self, dtype: mx.Dtype, kv_bits: int, choose: Chooser) -> None:
        super().__init__(dtype, kv_bits)
        self._choose = choose

    def linear(self, x: mx.array, linear: Linear) -> mx.array:
        weight = _affine(linear.matrix)
        kernel = None if weight is None else self._multiplier("linear", x, weight)
        if weight is None or kernel is None:
            return super().linear(x, linear)
        bias = None if linear.bias is None else linear.bias.astype(x.dtype)
        multiply = qmv.qmv if kernel == "qmv" else qmm_small.qmm_small
        return multiply(x, weight, bias=bias)

    def gated(self, x: mx.array, gate: Linear, up: Linear, activation: Activation) -> mx.array:
        g, u = _affine(gate.matrix), _affine(up.matrix)
        if (
            g is None
            or u is None
            or (g.bits, g.group, g.shape) != (u.bits, u.group, u.shape)
            or activation not in ACTIVATIONS
            or (kernel := self._multiplier("gated", x, g)) is None
        ):
            return super().gated(x, gate, up, activation)
        biases = (None if one.bias is None else one.bias.astype(x.dtype) for one in (gate, up))
        gate_bias, up_bias = biases
        multiply = qmv.qmv_gated if kernel == "qmv" else qmm_small.qmm_small_gated
        return multiply(x, g, u, activation, gate_bias=gate_bias, up_bias=up_bias)

    def add_norm(
        self, x: mx.array, y: mx.array, scale: float, norm: Norm | None
    ) -> tuple[mx.array, mx.array]:
        rows, width = x.shape
        if (
            norm is None
            or norm.spec.kind != "rms"
            or norm.bias is not None
            or width > rms_norm.LONGEST_ROW
            or not self._choose.uses(
                "add_rms_norm",
                rms_norm.work(_bucket(rows), width, x.dtype),
                lambda: rms_norm.contest(_bucket(rows), width, x.dtype),
            )
        ):
            return super().add_norm(x, y, scale, norm)
        return rms_norm.add_rms_norm(y, x, norm.weight, norm.spec.eps, scale=scale)

    def heads(
        self,
        spec: AttentionSpec,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        q_norm: Norm | None,
        k_norm: Norm | None,
        angles: Angles | None,
    ) -> tuple[mx.array, Rows, Rows]:
        bits = min(self.kv_bits, 16)
        rows = _bucket(q.shape[0])
        shape = (rows, spec.heads, spec.kv_heads, spec.head_dim, bits)
        fits = spec.head_dim >= _HEAD_STEP and (bits == 16 or spec.head_dim % _HEAD_STEP == 0)
        if not fits or not self._choose.uses(
            ropes.kernel_name(bits),
            ropes.work(*shape, q.dtype),
            lambda: ropes.contest(*shape, q.dtype),
        ):
            return super().heads(spec, q, k, v, q_norm, k_norm, angles)
        if q_norm is not None and k_norm is not None:
            per_head = spec.qk_norm_over == "head" and q_norm.spec.kind == "rms"
            if not per_head or q_norm.bias is not None:
                if spec.qk_norm_over == "head":
                    return super().heads(spec, q, k, v, q_norm, k_norm, angles)
                q, k = self.norm(q, q_norm), self.norm(k, k_norm)
                q_norm = k_norm = None
        norm = None
        if q_norm is not None and k_norm is not None:
            norm = ropes.HeadNorm(q_norm.weight, k_norm.weight, q_norm.spec.eps)
        turn = None
        if spec.rope is not None:
            assert angles is not None
            turn = ropes.Angles(*angles, interleaved=spec.rope.interleaved)
        queries, keys, values = ropes.rope_kv(
            q, k, v, spec.head_dim, norm=norm, angles=turn, bits=bits
        )
        return queries, _rows(keys), _rows(values)

    def attention(
        self,
        spec: AttentionSpec,
        pool: KvPool,
        layer: int,
        chunks: Sequence[ChunkRows],
        q: mx.array,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """A few rows of a sequence by the decode kernel, longer chunks by the prefill kernel."""
        if spec.head_dim % _HEAD_STEP or spec.head_dim > _LARGEST_HEAD:
            return super().attention(spec, pool, layer, chunks, q, sinks)
        short = [c for c in chunks if c.count <= _DECODED_ROWS]
        longer = [c for c in chunks if c.count > _DECODED_ROWS]
        parts: list[tuple[list[ChunkRows], mx.array]] = []
        for some, kernel in ((short, "paged_decode"), (longer, "paged_prefill")):
            if not some:
                continue
            rows = q if len(some) == len(chunks) else _rows_of(some, q)
            packed = _packed(some)
            if self._attends(kernel, spec, some, q.dtype):
                run = self._decode if kernel == "paged_decode" else self._prefill
                out = run(spec, pool, layer, packed, rows, sinks)
            else:
                out = super().attention(spec, pool, layer, packed, rows, sinks)
            parts.append((some, out))
        if len(parts) == 1:
            return parts[0][1]
        places = np.concatenate([_places(some) for some, _ in parts])
        return mx.concatenate([out for _, out in parts])[mx.array(np.argsort(places))]

    def causal_conv(
        self,
        kind: causal_conv.Kind,
        x: mx.array,
        states: Sequence[mx.array],
        taps: mx.array,
        runs: Runs,
    ) -> Carried:
        kept, channels = states[0].shape
        shape = (kind, _longest(runs), channels, kept + 1, x.dtype)
        if not self._choose.uses(
            "causal_conv", causal_conv.work(*shape), lambda: causal_conv.contest(*shape)
        ):
            return super().causal_conv(kind, x, states, taps, runs)
        return causal_conv.WAYS[kind].kernel(x, states, taps, runs)

    def gated_delta(
        self, inputs: gated_delta.Inputs, states: Sequence[mx.array], runs: Runs
    ) -> Carried:
        heads, value_dim, key_dim = states[0].shape
        key_heads = (inputs.qkv.shape[1] - heads * value_dim) // (2 * key_dim)
        shape = (_longest(runs), key_heads, heads, key_dim, value_dim, inputs.beta.dtype)
        serves = key_dim <= gated_delta.LONGEST_KEY and self._choose.uses(
            "gated_delta", gated_delta.work(*shape), lambda: gated_delta.contest(*shape)
        )
        advance = gated_delta.gated_delta if serves else super().gated_delta
        return advance(inputs, states, runs)

    def lora(self, y: mx.array, x: mx.array, stack: Stack, slots: np.ndarray) -> mx.array | None:
        rows, rank, inner, out = x.shape[0], stack.a.shape[1], x.shape[1], y.shape[1]
        if rows > _LORA_ROWS or inner % 8:
            return None
        shape = (_bucket(rows), rank, inner, out)
        if not self._choose.uses(
            "lora", lora.work(*shape, x.dtype), lambda: lora.contest(*shape, x.dtype)
        ):
            return None
        return lora.lora(y, x, stack.a, stack.b, mx.array(slots))

    def _multiplier(self, kind: str, x: mx.array, weight: Affine) -> str | None:
        """The kernel for a few rows, None for MLX's own product.

        `qmm_small` comes first for a single row too: it gives a row the same bits alone and among
        others (what verifies drafts), with the same reads. `qmv` is for where that loses.
        """
        rows, (out, inner) = x.shape[0], weight.shape
        if rows > qmm_small.MAX_ROWS:
            return None
        out = min(out, max(64, _MEASURED_WEIGHTS // inner))
        shape = (rows, inner, out, weight.bits, weight.group)
        work = affine_contests.work(kind, *shape, x.dtype)
        if self._choose.uses("qmm_small", work, lambda: qmm_small.contest(kind, *shape, x.dtype)):
            return "qmm_small"
        if rows == 1 and self._choose.uses("qmv", work, lambda: qmv.contest(kind, *shape, x.dtype)):
            return "qmv"
        return None

    def _attends(
        self, kernel: str, spec: AttentionSpec, chunks: Sequence[ChunkRows], dtype: mx.Dtype
    ) -> bool:
        """By the longest chunk's rows and positions, each rounded up to a power of two."""
        rows = _bucket(max(c.count for c in chunks))
        seen = max(256, _bucket(max(c.start + c.count for c in chunks)), rows)
        shape = Shape(
            "",
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            (seen - rows,) * _bucket(len(chunks)),
            rows,
            0 if self.kv_bits >= 16 else self.kv_bits,
            spec.window,
            spec.softcap,
            spec.sinks,
        )
        module = paged_decode if kernel == "paged_decode" else paged_prefill
        return self._choose.uses(kernel, shape.work(dtype), lambda: module.contest(shape, dtype))

    def _decode(
        self,
        spec: AttentionSpec,
        pool: KvPool,
        layer: int,
        chunks: Sequence[ChunkRows],
        q: mx.array,
        sinks: mx.array | None,
    ) -> mx.array:
        runs = tuple(c.count for c in chunks)
        lengths = np.concatenate([np.arange(c.count) + c.start + 1 for c in chunks])
        tables = np.repeat(_tables(chunks, pool.block_size), runs, axis=0)
        keys, values = (self._pool(spec, pool, side) for side in pool.layers[layer])
        return paged_decode.paged_decode(
            q,
            keys,
            values,
            mx.array(tables),
            mx.array(lengths.astype(np.int32)),
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            sinks=sinks,
            runs=runs,
        )

    def _prefill(
        self,
        spec: AttentionSpec,
        pool: KvPool,
        layer: int,
        chunks: Sequence[ChunkRows],
        q: mx.array,
        sinks: mx.array | None,
    ) -> mx.array:
        offsets = np.cumsum([0, *(c.count for c in chunks)]).astype(np.int32)
        keys, values = (self._pool(spec, pool, side) for side in pool.layers[layer])
        return paged_prefill.paged_prefill(
            q,
            keys,
            values,
            mx.array(_tables(chunks, pool.block_size)),
            offsets,
            np.array([c.start for c in chunks], np.int32),
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            sinks=sinks,
        )

    def _pool(self, spec: AttentionSpec, pool: KvPool, side: Side) -> Pool:
        arrays = side.blocks(spec.kv_heads, pool.block_size)
        if len(arrays) == 1:
            return arrays[0]
        codes, scales, biases = arrays
        return QuantizedPool(codes, scales, biases, self.kv_bits)


def _affine(matrix: Matrix) -> Affine | None:
    """The matrix as the kernels take it, if they do."""
    if not isinstance(matrix, QuantizedMatrix):
        return None
    if matrix.bits not in BITS or matrix.group not in GROUPS or len(matrix.shape) != 2:
        return None
    return Affine(matrix.codes, matrix.scales, matrix.biases, matrix.bits, matrix.group)


def _longest(runs: Runs) -> int:
    """The rows of a contest for them."""
    return min(_bucket(max(run.count for run in runs)), _MEASURED_RUN)


def _bucket(count: int) -> int:
    """The next power of two: one verdict serves all counts up to it."""
    return 1 << max(0, count - 1).bit_length()


def _rows(rows: ropes.KVRows) -> Rows:
    if rows.scales is None or rows.biases is None:
        return (rows.values,)
    return rows.values, rows.scales, rows.biases


def _places(chunks: Sequence[ChunkRows]) -> np.ndarray:
    return np.concatenate([np.arange(c.offset, c.offset + c.count) for c in chunks])


def _rows_of(chunks: Sequence[ChunkRows], q: mx.array) -> mx.array:
    return q[mx.array(_places(chunks).astype(np.int32))]


def _packed(chunks: Sequence[ChunkRows]) -> list[ChunkRows]:
    """The same, their rows laid end to end."""
    packed, at = [], 0
    for chunk in chunks:
        packed.append(ChunkRows(chunk.table, chunk.start, at, chunk.count))
        at += chunk.count
    return packed


def _tables(chunks: Sequence[ChunkRows], block_size: int) -> np.ndarray:
    """int32 [chunks, blocks of the longest], filled up with -1, which is never looked at."""
    needed = [-(-(c.start + c.count) // block_size) for c in chunks]
    tables = np.full((len(chunks), max(needed)), -1, np.int32)
    for row, chunk, count in zip(tables, chunks, needed, strict=True):
        row[:count] = chunk.table[:count]
    return tables
