"""What a layer is made of, on MLX: each op by a kernel of ours where one serves, else by MLX."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from localllm.backend.metal_adapters import Stack
from localllm.backend.metal_attention import ChunkRows, attend
from localllm.backend.metal_kv import KvPool, Rows, quantize
from localllm.backend.metal_weights import Matrix
from localllm.kernels_metal import causal_conv, gated_delta
from localllm.kernels_metal.runs import Carried, Run, Runs, joined, rows_of
from localllm.spec import AttentionSpec, NormSpec
from localllm.spec.decoder import Activation

Angles = tuple[mx.array, mx.array]  # cos and sin, float32 [n, dim / 2] each
_ROWS_AT_ONCE = 4  # that a state is carried over before it is evaluated


class Linear:
    """x -> x W^T + b."""

    def __init__(self, matrix: Matrix, bias: mx.array | None = None) -> None:
        self.matrix = matrix
        self.bias = bias


class Norm:
    """RMSNorm or LayerNorm over the last axis; the offset is already in the weight."""

    def __init__(self, spec: NormSpec, weight: mx.array, bias: mx.array | None) -> None:
        self.spec = spec
        self.weight = weight + spec.offset
        self.bias = bias


class Ops:
    """MLX's own ops, in `dtype` with float32 inside norms, softmax and RoPE."""

    def __init__(self, dtype: mx.Dtype, kv_bits: int) -> None:
        self.dtype = dtype
        self.kv_bits = kv_bits

    def linear(self, x: mx.array, linear: Linear) -> mx.array:
        """T [n, in] -> [n, out]."""
        y = linear.matrix.matmul(x)
        return y if linear.bias is None else y + linear.bias.astype(y.dtype)

    def gated(self, x: mx.array, gate: Linear, up: Linear, activation: Activation) -> mx.array:
        """T [n, in] -> [n, inner]: act(gate(x)) * up(x)."""
        return gated(self.linear(x, gate), self.linear(x, up), activation)

    def norm(self, x: mx.array, norm: Norm) -> mx.array:
        if norm.spec.kind == "rms" and norm.bias is None:
            return mx.fast.rms_norm(x, norm.weight.astype(x.dtype), norm.spec.eps)
        if norm.spec.kind == "layer":
            return mx.fast.layer_norm(
                x,
                norm.weight.astype(x.dtype),
                None if norm.bias is None else norm.bias.astype(x.dtype),
                norm.spec.eps,
            )
        assert norm.bias is not None
        y = mx.fast.rms_norm(x, norm.weight.astype(x.dtype), norm.spec.eps)
        return y + norm.bias.astype(x.dtype)

    def add_norm(
        self, x: mx.array, y: mx.array, scale: float, norm: Norm | None
    ) -> tuple[mx.array, mx.array]:
        """x + scale * y, and that normalized (itself without a norm)."""
        total = x + (y if scale == 1 else y * scale)
        return total, total if norm is None else self.norm(total, norm)

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
        """Queries ready to attend, T [n, heads, head_dim], and the pool's rows of K and V.

        q: [n, heads * head_dim]; k, v: [n, kv_heads * head_dim].
        """
        queries = self._turned(spec, q, spec.heads, q_norm, angles)
        keys = self._turned(spec, k, spec.kv_heads, k_norm, angles)
        values = v.reshape(v.shape[0], spec.kv_heads, spec.head_dim)
        return queries, self._rows(keys), self._rows(values)

    def queries(
        self, spec: AttentionSpec, q: mx.array, norm: Norm | None, angles: Angles | None
    ) -> mx.array:
        """Those of `heads`, for a layer without keys of its own."""
        return self._turned(spec, q, spec.heads, norm, angles)

    def attention(
        self,
        spec: AttentionSpec,
        pool: KvPool,
        layer: int,
        chunks: Sequence[ChunkRows],
        q: mx.array,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """T [rows, heads, head_dim] for the rows of all chunks, q as many; K and V are written.

        sinks: float32 [heads], where the spec has them.
        """
        return attend(spec, pool, layer, chunks, q, sinks)

    def causal_conv(
        self,
        kind: causal_conv.Kind,
        x: mx.array,
        states: Sequence[mx.array],
        taps: mx.array,
        runs: Runs,
    ) -> Carried:
        """See `causal_conv.delta_conv` and `causal_conv.short_conv`."""
        return causal_conv.WAYS[kind].ops(x, states, taps, runs)

    def gated_delta(
        self, inputs: gated_delta.Inputs, states: Sequence[mx.array], runs: Runs
    ) -> Carried:
        """See `gated_delta.gated_delta`. A few rows at a time, since MLX makes a state anew for
        each row and lets go of the one before when it has computed it."""
        outputs, afters = [], []
        for run, state in zip(runs, states, strict=True):
            for piece in _pieces(run):
                rows = inputs.qkv[piece.first - runs[0].first :][: piece.count]
                y, (state,) = gated_delta.by_ops(inputs._replace(qkv=rows), [state], (piece,))
                outputs.append(y)
                if rows_of(runs) > _ROWS_AT_ONCE:
                    mx.eval(y, state)
                if piece.first + piece.count == run.first + run.sure:
                    afters.append(state)
        return joined(outputs), afters

    def lora(self, y: mx.array, x: mx.array, stack: Stack, slots: np.ndarray) -> mx.array | None:
        """y + B A x, rows of several adapters at once: int32 [n] slots, -1 for none. None: chunk by
        chunk instead."""
        return None

    def _turned(
        self,
        spec: AttentionSpec,
        x: mx.array,
        heads: int,
        norm: Norm | None,
        angles: Angles | None,
    ) -> mx.array:
        if norm is not None and spec.qk_norm_over == "all":
            x = self.norm(x, norm)
        x = x.reshape(x.shape[0], heads, spec.head_dim)
        if norm is not None and spec.qk_norm_over == "head":
            x = self.norm(x, norm)
        if spec.rope is None:
            return x
        assert angles is not None
        return rotate(x, spec.rope.dim, spec.rope.interleaved, angles)

    def _rows(self, x: mx.array) -> Rows:
        return (x,) if self.kv_bits >= 16 else quantize(x, self.kv_bits)


def _pieces(run: Run) -> list[Run]:
    """Its rows, a few at a time; the sure ones end with a piece."""
    ends = [*range(_ROWS_AT_ONCE, run.sure, _ROWS_AT_ONCE), run.sure]
    ends += [*range(run.sure + _ROWS_AT_ONCE, run.count, _ROWS_AT_ONCE), run.count]
    starts = [0, *ends]
    counts = [(start, end - start) for start, end in zip(starts, ends, strict=False) if end > start]
    return [Run(run.first + start, count, count) for start, count in counts]


def rotate(x: mx.array, dim: int, interleaved: bool, angles: Angles) -> mx.array:
    """RoPE on [n, heads, head_dim] in float32: the first `dim` entries turn, the others stay."""
    cos, sin = (table[:, None, :] for table in angles)  # [n, 1, dim / 2]
    turned, still = x[..., :dim].astype(mx.float32), x[..., dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = pairs.reshape(turned.shape)
    else:
        a, b = turned[..., : dim // 2], turned[..., dim // 2 :]
        turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if still.shape[-1] == 0 else mx.concatenate([turned, still], axis=-1)


def gated(gate: mx.array, up: mx.array, kind: Activation) -> mx.array:
    """act(gate) * up, and what is more than that; float32 inside."""
    if kind != "clamped_swiglu":
        return activate(gate, kind) * up
    g = mx.minimum(gate.astype(mx.float32), 7)
    u = mx.clip(up.astype(mx.float32), -7, 7)
    return (g * mx.sigmoid(1.702 * g) * (u + 1)).astype(gate.dtype)


def activate(x: mx.array, kind: Activation) -> mx.array:
    """In float32 inside, the dtype of x outside."""
    if kind == "relu":
        return mx.maximum(x, 0)
    y = x.astype(mx.float32)
    if kind == "silu":
        y = y * mx.sigmoid(y)
    elif kind == "gelu":
        y = 0.5 * y * (1 + mx.erf(y * math.sqrt(0.5)))
    else:
        assert kind == "gelu_tanh", f"unknown activation {kind}"
        y = 0.5 * y * (1 + mx.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)))
    return y.astype(x.dtype)
