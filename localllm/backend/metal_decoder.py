"""The MLX graph of a `DecoderSpec` for the `metal` backend.

Rows are flat, [n, hidden], whatever sequences they belong to; `attend` and `adapt` know which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import mlx.core as mx
import numpy as np

from localllm.backend.metal_kv import Rows
from localllm.backend.metal_ops import Angles, Linear, Norm, Ops, activate, gated
from localllm.backend.metal_weights import Matrix
from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, MoESpec, NormSpec
from localllm.spec.rope import tables

# (layer, q [n, heads, head_dim], the pool's rows of K and of V) -> T [n, heads * head_dim]
Attend = Callable[[int, mx.array, Rows, Rows], mx.array]
Weights = Mapping[str, mx.array | Matrix]


class Adapt(Protocol):
    """What the adapters of a step add. targets: "attn.q", "ffn.up" …"""

    def __call__(self, layer: int, target: str, x: mx.array, y: mx.array) -> mx.array:
        """y with what is added. x: [n, in]; y: [n, out] = W x."""
        ...

    def touches(self, layer: int, *targets: str) -> bool:
        """Whether anything is added to one of them."""
        ...


# Rows x chosen experts from which sorting by expert pays: each expert's weights are read once.
_SORT_EXPERTS = 64


class Decoder:
    """weights: one entry for every name of `weight_shapes(spec)`."""

    def __init__(self, spec: DecoderSpec, weights: Weights, ops: Ops) -> None:
        self.spec = spec
        self._ops = ops
        self._embed = _matrix(weights, "embed.weight")
        self._positions = (
            None if spec.learned_positions is None else _matrix(weights, "pos_embed.weight")
        )
        self._layers = [
            _Layer(layer, weights, f"layers.{index}.", ops)
            for index, layer in enumerate(spec.layers)
        ]
        self._final_norm = _norm(weights, "final_norm", spec.final_norm)
        head = self._embed if spec.tied_head else _matrix(weights, "head.weight")
        self._head = Linear(head, _vector(weights, "head.bias") if spec.head_bias else None)

    def __call__(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        attend: Attend,
        adapt: Adapt | None,
    ) -> mx.array:
        """T [n, hidden] after the last layer, before the final norm.

        tokens, positions: int [n]. lengths: int [n], see `localllm.spec.rope.tables`.
        """
        x = self.embed(mx.array(tokens))
        if self._positions is not None:
            x = x + self._positions.rows(mx.array(positions))
        angles: dict[object, Angles] = {}
        for spec in self.spec.layers:
            rope = spec.attention.rope
            if rope is not None and rope not in angles:
                cos, sin = tables(rope, positions, lengths)
                angles[rope] = mx.array(cos), mx.array(sin)
        first = self._layers[0].attn_norm
        normed = x if first is None else self._ops.norm(x, first)
        for index, layer in enumerate(self._layers):
            following = self._layers[index + 1].attn_norm if index + 1 < len(self._layers) else None
            rope = layer.spec.attention.rope
            turn = None if rope is None else angles[rope]
            x, normed = layer(index, x, normed, turn, attend, adapt, following)
        return x

    @property
    def sinks(self) -> list[mx.array | None]:
        """Of each layer: float32 [heads], or None."""
        return [layer.attn.sinks for layer in self._layers]

    def embed(self, tokens: mx.array) -> mx.array:
        """T [n, hidden], scaled."""
        x = self._embed.rows(tokens)
        return x if self.spec.embed_scale == 1 else x * self.spec.embed_scale

    def final_norm(self, x: mx.array) -> mx.array:
        return self._ops.norm(x, self._final_norm)

    def project(self, normed: mx.array) -> mx.array:
        """The head: T [n, hidden], as the final norm gives it -> float32 [n, vocab_size]."""
        return self.finish(self._ops.linear(normed, self._head).astype(mx.float32))

    def finish(self, logits: mx.array) -> mx.array:
        """Scaled and capped as the spec says."""
        logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * mx.tanh(logits / cap)


class _Layer:
    def __init__(self, spec: LayerSpec, weights: Weights, at: str, ops: Ops) -> None:
        self.spec = spec
        self._ops = ops
        self.attn = _Attention(spec.attention, weights, f"{at}attn.", ops)
        self._ffn: _Experts | _FeedForward = (
            _Experts(spec.ffn, weights, f"{at}moe.", ops)
            if isinstance(spec.ffn, MoESpec)
            else _FeedForward(spec.ffn, weights, f"{at}ffn.", ops)
        )

        def norm(name: str, wanted: bool) -> Norm | None:
            return _norm(weights, at + name, spec.norm) if wanted else None

        self.attn_norm = norm("attn_norm", spec.pre_norm)
        self._ffn_norm = norm("ffn_norm", spec.pre_norm)
        self._attn_post_norm = norm("attn_post_norm", spec.post_norm)
        self._ffn_post_norm = norm("ffn_post_norm", spec.post_norm)

    def __call__(
        self,
        index: int,
        x: mx.array,
        normed: mx.array,
        angles: Angles | None,
        attend: Attend,
        adapt: Adapt | None,
        following: Norm | None,
    ) -> tuple[mx.array, mx.array]:
        """x and normed, what the layer takes in -> the same of the layer after, whose norm is
        `following`: the sum and the norm after it are one kernel."""
        scale = self.spec.residual_scale
        y = self.attn(index, normed, angles, attend, adapt)
        if self._attn_post_norm is not None:
            y = self._ops.norm(y, self._attn_post_norm)
        x, normed = self._ops.add_norm(x, y, scale, self._ffn_norm)
        y = self._ffn(index, normed, adapt)
        if self._ffn_post_norm is not None:
            y = self._ops.norm(y, self._ffn_post_norm)
        return self._ops.add_norm(x, y, scale, following)


class _Attention:
    def __init__(self, spec: AttentionSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._q, self._k, self._v = (
            _linear(weights, at + name, spec.qkv_bias) for name in ("q", "k", "v")
        )
        self._o = _linear(weights, f"{at}o", spec.out_bias)
        self.sinks = _vector(weights, f"{at}sinks.weight") if spec.sinks else None
        norm = spec.qk_norm
        self._q_norm = None if norm is None else _norm(weights, f"{at}q_norm", norm)
        self._k_norm = None if norm is None else _norm(weights, f"{at}k_norm", norm)

    def __call__(
        self,
        layer: int,
        x: mx.array,
        angles: Angles | None,
        attend: Attend,
        adapt: Adapt | None,
    ) -> mx.array:
        q, k, v = (
            _adapted(adapt, layer, f"attn.{name}", x, self._ops.linear(x, linear))
            for name, linear in (("q", self._q), ("k", self._k), ("v", self._v))
        )
        queries, keys, values = self._ops.heads(
            self._spec, q, k, v, self._q_norm, self._k_norm, angles
        )
        mixed = attend(layer, queries, keys, values)
        return _adapted(adapt, layer, "attn.o", mixed, self._ops.linear(mixed, self._o))


class _FeedForward:
    def __init__(self, spec: FeedForwardSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._gate = _linear(weights, f"{at}gate", spec.bias) if spec.gated else None
        self._up = _linear(weights, f"{at}up", spec.bias)
        self._down = _linear(weights, f"{at}down", spec.bias)

    def __call__(self, layer: int, x: mx.array, adapt: Adapt | None) -> mx.array:
        ops, kind = self._ops, self._spec.activation
        fused = adapt is None or not adapt.touches(layer, "ffn.gate", "ffn.up")
        if self._gate is not None and fused:
            inner = ops.gated(x, self._gate, self._up, kind)
        else:
            inner = _adapted(adapt, layer, "ffn.up", x, ops.linear(x, self._up))
            if self._gate is None:
                inner = activate(inner, kind)
            else:
                gate = _adapted(adapt, layer, "ffn.gate", x, ops.linear(x, self._gate))
                inner = gated(gate, inner, kind)
        return _adapted(adapt, layer, "ffn.down", inner, ops.linear(inner, self._down))


class _Expert:
    """One of the three matrices of all experts, with biases or without."""

    def __init__(self, weights: Weights, name: str, spec: MoESpec) -> None:
        self._matrix = _matrix(weights, f"{name}.weight")
        self._bias: mx.array | None = None
        if spec.bias:
            self._bias = _vector(weights, f"{name}.bias").reshape(spec.experts, 1, -1)

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """[n, 1, in] -> [n, 1, out]; see `DenseMatrix.gathered`."""
        y = self._matrix.gathered(x, experts, in_order)
        return y if self._bias is None else y + self._bias[experts].astype(y.dtype)


class _Experts:
    """Each row goes through its own `top_k` experts; only theirs are read."""

    def __init__(self, spec: MoESpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._router = _linear(weights, f"{at}router", spec.bias)
        self._gate, self._up, self._down = (
            _Expert(weights, f"{at}{name}", spec) for name in ("gate", "up", "down")
        )
        self._selection_bias = (
            _vector(weights, f"{at}selection_bias.weight") if spec.selection_bias else None
        )
        self._shared: _FeedForward | None = None
        self._shared_gate: Linear | None = None
        if spec.shared:
            shared = FeedForwardSpec(spec.shared, spec.activation)
            self._shared = _FeedForward(shared, weights, f"{at}shared.", ops)
        if spec.shared_gate:
            self._shared_gate = _linear(weights, f"{at}shared_gate", False)

    def __call__(self, layer: int, x: mx.array, adapt: Adapt | None) -> mx.array:
        y = self._routed(x)
        if self._shared is None:
            return y
        shared = self._shared(layer, x, None)
        if self._shared_gate is not None:
            gate = self._ops.linear(x, self._shared_gate).astype(mx.float32)
            shared = (mx.sigmoid(gate) * shared.astype(mx.float32)).astype(x.dtype)
        return y + shared

    def _routed(self, x: mx.array) -> mx.array:
        """T [n, D]: the sum of the chosen experts' outputs by their weights."""
        spec = self._spec
        chosen, weights = self._route(x)
        experts = chosen.reshape(-1).astype(mx.uint32)  # [n * top_k]
        rows = mx.repeat(x, spec.top_k, axis=0)[:, None]  # [n * top_k, 1, D]
        in_order = experts.shape[0] >= _SORT_EXPERTS
        if in_order:
            order = mx.argsort(experts)
            experts, rows = experts[order], rows[order]
        gate = self._gate(rows, experts, in_order)
        inner = gated(gate, self._up(rows, experts, in_order), spec.activation)
        out = self._down(inner, experts, in_order)[:, 0]  # [n * top_k, D]
        if in_order:
            out = out[mx.argsort(order)]
        shares = out.reshape(*chosen.shape, -1).astype(mx.float32) * weights[..., None]
        return shares.sum(axis=1).astype(x.dtype)

    def _route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Each row's experts, int [n, top_k], and their weights, float32 [n, top_k]."""
        spec = self._spec
        logits = self._ops.linear(x, self._router).astype(mx.float32)
        scores = mx.sigmoid(logits) if spec.scores == "sigmoid" else mx.softmax(logits, axis=-1)
        choice = scores  # [n, E]
        if self._selection_bias is not None:
            choice = choice + self._selection_bias
        if spec.top_groups < spec.groups:
            choice = _within_groups(choice, spec)
        # Ascending, so that a row's sum does not depend on the order of its scores.
        chosen = mx.sort(mx.argsort(-choice, axis=-1)[:, : spec.top_k], axis=-1)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if spec.renormalize:
            weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + spec.renormalize_eps)
        return chosen, weights if spec.weight_scale == 1 else weights * spec.weight_scale


def _within_groups(choice: mx.array, spec: MoESpec) -> mx.array:
    """float32 [n, E], -inf outside the groups whose two best experts are the most together."""
    runs = choice.reshape(len(choice), spec.groups, -1)  # [n, groups, E / groups]
    best = mx.sort(runs, axis=-1)[..., -2:].sum(axis=-1)
    kept = mx.argsort(-best, axis=-1)[:, : spec.top_groups]  # [n, top_groups]
    is_kept = (mx.arange(spec.groups)[None, :, None] == kept[:, None, :]).any(axis=-1)
    return mx.where(is_kept[..., None], runs, -mx.inf).reshape(choice.shape)


def _adapted(adapt: Adapt | None, layer: int, target: str, x: mx.array, y: mx.array) -> mx.array:
    return y if adapt is None else adapt(layer, target, x, y)


def _vector(weights: Weights, name: str) -> mx.array:
    part = weights[name]
    assert isinstance(part, mx.array), f"{name} is no vector"
    return part


def _matrix(weights: Weights, name: str) -> Matrix:
    part = weights[name]
    assert not isinstance(part, mx.array), f"{name} is no matrix"
    return part


def _linear(weights: Weights, name: str, bias: bool) -> Linear:
    matrix = _matrix(weights, f"{name}.weight")
    return Linear(matrix, _vector(weights, f"{name}.bias") if bias else None)


def _norm(weights: Weights, name: str, spec: NormSpec) -> Norm:
    bias = _vector(weights, f"{name}.bias") if spec.bias else None
    return Norm(spec, _vector(weights, f"{name}.weight"), bias)
