"""The MLX graph of a `DecoderSpec` for the `metal` backend.

Rows are flat, [n, hidden], whatever sequences they belong to; `attend` and `adapt` know which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localllm.backend.metal_kv import Rows
from localllm.backend.metal_ops import Angles, Linear, Norm, Ops, activate, gated
from localllm.backend.metal_parts import (
    Adapt,
    Weights,
    adapted,
    linear_of,
    matrix_of,
    norm_of,
    vector_of,
)
from localllm.backend.metal_recurrent import Recur, Recurrent, recurrent
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    PerLayerSpec,
)
from localllm.spec.rope import query_scales, tables

# The pool's rows of K and of V; None in a layer that attends to those of another.
KeysValues = tuple[Rows, Rows] | None
# (layer, q [n, heads, head_dim], K and V) -> T [n, heads * head_dim]
Attend = Callable[[int, mx.array, KeysValues], mx.array]

# Rows x chosen experts from which sorting by expert pays: each expert's weights are read once.
_SORT_EXPERTS = 64


class Decoder:
    """weights: one entry for every name of `weight_shapes(spec)`."""

    def __init__(self, spec: DecoderSpec, weights: Weights, ops: Ops) -> None:
        self.spec = spec
        self._ops = ops
        self._embed = matrix_of(weights, "embed.weight")
        self._positions = (
            None if spec.learned_positions is None else matrix_of(weights, "pos_embed.weight")
        )
        self._layers = [
            _Layer(layer, weights, f"layers.{index}.", ops, spec.per_layer)
            for index, layer in enumerate(spec.layers)
        ]
        self._per_layer = None if spec.per_layer is None else _PerLayerInputs(spec, weights, ops)
        self._final_norm = norm_of(weights, "final_norm", spec.final_norm)
        head = self._embed if spec.tied_head else matrix_of(weights, "head.weight")
        self._head = Linear(head, vector_of(weights, "head.bias") if spec.head_bias else None)

    def __call__(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        attend: Attend,
        recur: Recur,
        adapt: Adapt | None,
        embeddings: np.ndarray | None = None,
    ) -> mx.array:
        """T [n, hidden] after the last layer, before the final norm.

        tokens, positions: int [n]. lengths: int [n], see `localllm.spec.rope.tables`.
        embeddings: float32 [n, hidden], instead of the tokens' own.
        """
        x = self.embed(mx.array(tokens))
        if embeddings is not None:
            x = mx.array(embeddings).astype(x.dtype)
        if self._positions is not None:
            x = x + self._positions.rows(mx.array(positions))
        own = None if self._per_layer is None else self._per_layer(mx.array(tokens), x)
        angles: dict[object, Angles] = {}
        for _, attn in self.spec.attentions:
            rope = attn.rope
            if rope is not None and rope not in angles:
                cos, sin = tables(rope, positions, lengths)
                angles[rope] = mx.array(cos), mx.array(sin)
        first = self._layers[0].attn_norm
        normed = x if first is None else self._ops.norm(x, first)
        for index, layer in enumerate(self._layers):
            following = self._layers[index + 1].attn_norm if index + 1 < len(self._layers) else None
            turn, mixer = _Turn(None, None), layer.spec.mixer
            if isinstance(mixer, AttentionSpec):
                scales = None
                if mixer.query_growth:
                    scales = mx.array(query_scales(mixer, positions))[:, None, None]
                turn = _Turn(None if mixer.rope is None else angles[mixer.rope], scales)
            part = None if own is None else own[:, index]
            x, normed = layer(index, x, normed, turn, attend, recur, adapt, following, part)
        return x

    @property
    def sinks(self) -> list[mx.array | None]:
        """Of each layer: float32 [heads], or None."""
        return [None if layer.attn is None else layer.attn.sinks for layer in self._layers]

    @property
    def recurrences(self) -> dict[int, Recurrent]:
        """The recurrent mixers, by the numbers of their layers."""
        return {
            index: layer.recurrent
            for index, layer in enumerate(self._layers)
            if layer.recurrent is not None
        }

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


class _Turn(NamedTuple):
    """What positions do to a layer: RoPE's angles, and float32 factors of the queries [n, 1, 1]."""

    angles: Angles | None
    query_scale: mx.array | None


class _PerLayerInputs:
    """The rows of every layer's own embedding; see `PerLayerSpec`."""

    def __init__(self, spec: DecoderSpec, weights: Weights, ops: Ops) -> None:
        assert spec.per_layer is not None
        self._ops, self._size, self._hidden = ops, spec.per_layer.size, spec.hidden
        self._embed = matrix_of(weights, "per_layer_inputs.embed.weight")
        self._up = linear_of(weights, "per_layer_inputs.up", False)
        self._norm = norm_of(weights, "per_layer_inputs.norm", spec.final_norm)

    def __call__(self, tokens: mx.array, x: mx.array) -> mx.array:
        """T [n, layers, size] for tokens int [n], x T [n, hidden] as the first layer has it."""
        of_x = self._ops.linear(x, self._up) * self._hidden**-0.5
        of_x = self._ops.norm(of_x.reshape(x.shape[0], -1, self._size), self._norm)
        of_token = self._embed.rows(tokens).reshape(of_x.shape) * self._size**0.5
        both: mx.array = of_x + of_token
        return both * math.sqrt(0.5)


class _PerLayer:
    """What a layer does with its part of them."""

    def __init__(
        self, spec: PerLayerSpec, norm: NormSpec, weights: Weights, at: str, ops: Ops
    ) -> None:
        self._ops, self._activation = ops, spec.activation
        self._gate = linear_of(weights, f"{at}per_layer.gate", False)
        self._up = linear_of(weights, f"{at}per_layer.up", False)
        self._norm = norm_of(weights, f"{at}per_layer_norm", norm)

    def __call__(self, x: mx.array, own: mx.array) -> mx.array:
        """x: T [n, hidden]; own: T [n, size]."""
        inner = activate(self._ops.linear(x, self._gate), self._activation) * own
        return x + self._ops.norm(self._ops.linear(inner, self._up), self._norm)


class _Layer:
    def __init__(
        self,
        spec: LayerSpec,
        weights: Weights,
        at: str,
        ops: Ops,
        per_layer: PerLayerSpec | None,
    ) -> None:
        self.spec = spec
        self._ops = ops
        self.attn: _Attention | None = None
        self.recurrent: Recurrent | None = None
        if isinstance(spec.mixer, AttentionSpec):
            self.attn = _Attention(spec.mixer, weights, f"{at}attn.", ops)
        else:
            self.recurrent = recurrent(spec.mixer, weights, at, ops)
        self._ffn: _Experts | _FeedForward = (
            _Experts(spec.ffn, spec.norm, weights, f"{at}moe.", ops)
            if isinstance(spec.ffn, MoESpec)
            else _FeedForward(spec.ffn, weights, f"{at}ffn.", ops)
        )

        def norm(name: str, wanted: bool) -> Norm | None:
            return norm_of(weights, at + name, spec.norm) if wanted else None

        self.attn_norm = norm("attn_norm", spec.pre_norm)
        self._ffn_norm = norm("ffn_norm", spec.pre_norm)
        self._attn_post_norm = norm("attn_post_norm", spec.post_norm)
        self._ffn_post_norm = norm("ffn_post_norm", spec.post_norm)
        self._per_layer = (
            None if per_layer is None else _PerLayer(per_layer, spec.norm, weights, at, ops)
        )
        self._scalar = vector_of(weights, f"{at}scalar.weight") if spec.scalar else None

    def __call__(
        self,
        index: int,
        x: mx.array,
        normed: mx.array,
        turn: _Turn,
        attend: Attend,
        recur: Recur,
        adapt: Adapt | None,
        following: Norm | None,
        own: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """x and normed, what the layer takes in -> the same of the layer after, whose norm is
        `following`: the sum and the norm after it are one kernel.

        own: T [n, size], the layer's part of the per-layer embeddings, if there are.
        """
        scale = self.spec.residual_scale
        if self.attn is not None:
            y = self.attn(index, normed, turn, attend, adapt)
        else:
            assert self.recurrent is not None
            y = self.recurrent(index, normed, recur, adapt)
        if self._attn_post_norm is not None:
            y = self._ops.norm(y, self._attn_post_norm)
        x, normed = self._ops.add_norm(x, y, scale, self._ffn_norm)
        if isinstance(self._ffn, _Experts):
            y = self._ffn(index, x, normed)
        else:
            y = self._ffn(index, normed, adapt)
        if self._ffn_post_norm is not None:
            y = self._ops.norm(y, self._ffn_post_norm)
        if self._per_layer is None and self._scalar is None:
            return self._ops.add_norm(x, y, scale, following)
        x, _ = self._ops.add_norm(x, y, scale, None)
        if self._per_layer is not None:
            assert own is not None
            x = self._per_layer(x, own)
        if self._scalar is not None:
            x = x * self._scalar.astype(x.dtype)
        return x, x if following is None else self._ops.norm(x, following)


class _Attention:
    def __init__(self, spec: AttentionSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        own = spec.shared_kv is None
        self._q = linear_of(weights, f"{at}q", spec.qkv_bias)
        self._k = linear_of(weights, f"{at}k", spec.qkv_bias) if own else None
        self._v = None
        if own and not spec.v_from_k:
            self._v = linear_of(weights, f"{at}v", spec.qkv_bias)
        self._gate = linear_of(weights, f"{at}gate", spec.qkv_bias) if spec.gate else None
        self._o = linear_of(weights, f"{at}o", spec.out_bias)
        self.sinks = vector_of(weights, f"{at}sinks.weight") if spec.sinks else None
        norm = spec.qk_norm
        self._q_norm = None if norm is None else norm_of(weights, f"{at}q_norm", norm)
        self._k_norm = None if norm is None or not own else norm_of(weights, f"{at}k_norm", norm)

    def __call__(
        self,
        layer: int,
        x: mx.array,
        turn: _Turn,
        attend: Attend,
        adapt: Adapt | None,
    ) -> mx.array:
        ops, spec = self._ops, self._spec
        q = adapted(adapt, layer, "attn.q", x, ops.linear(x, self._q))
        kv: KeysValues = None
        if self._k is None:
            queries = ops.queries(spec, q, self._q_norm, turn.angles)
        else:
            k = adapted(adapt, layer, "attn.k", x, ops.linear(x, self._k))
            v = k
            if self._v is not None:
                v = adapted(adapt, layer, "attn.v", x, ops.linear(x, self._v))
            if spec.v_norm is not None:
                heads = v.reshape(x.shape[0], spec.kv_heads, spec.head_dim)
                v = mx.fast.rms_norm(heads, None, spec.v_norm).reshape(v.shape)
            queries, *rows = ops.heads(spec, q, k, v, self._q_norm, self._k_norm, turn.angles)
            kv = rows[0], rows[1]
        if turn.query_scale is not None:
            queries = queries * turn.query_scale.astype(queries.dtype)
        mixed = attend(layer, queries, kv)
        if self._gate is not None:
            gate = adapted(adapt, layer, "attn.gate", x, ops.linear(x, self._gate))
            opened = mixed.astype(mx.float32) * mx.sigmoid(gate.astype(mx.float32))
            mixed = opened.astype(x.dtype)
        return adapted(adapt, layer, "attn.o", mixed, self._ops.linear(mixed, self._o))


class _FeedForward:
    def __init__(self, spec: FeedForwardSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._gate = linear_of(weights, f"{at}gate", spec.bias) if spec.gated else None
        self._up = linear_of(weights, f"{at}up", spec.bias)
        self._down = linear_of(weights, f"{at}down", spec.bias)

    def __call__(self, layer: int, x: mx.array, adapt: Adapt | None) -> mx.array:
        ops, kind = self._ops, self._spec.activation
        fused = adapt is None or not adapt.touches(layer, "ffn.gate", "ffn.up")
        if self._gate is not None and fused:
            inner = ops.gated(x, self._gate, self._up, kind)
        else:
            inner = adapted(adapt, layer, "ffn.up", x, ops.linear(x, self._up))
            if self._gate is None:
                inner = activate(inner, kind)
            else:
                gate = adapted(adapt, layer, "ffn.gate", x, ops.linear(x, self._gate))
                inner = gated(gate, inner, kind)
        return adapted(adapt, layer, "ffn.down", inner, ops.linear(inner, self._down))


class _Expert:
    """One of the three matrices of all experts, with biases or without."""

    def __init__(self, weights: Weights, name: str, spec: MoESpec) -> None:
        self._matrix = matrix_of(weights, f"{name}.weight")
        self._bias: mx.array | None = None
        if spec.bias:
            self._bias = vector_of(weights, f"{name}.bias").reshape(spec.experts, 1, -1)

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """[n, 1, in] -> [n, 1, out]; see `DenseMatrix.gathered`."""
        y = self._matrix.gathered(x, experts, in_order)
        return y if self._bias is None else y + self._bias[experts].astype(y.dtype)


class _Experts:
    """Each row goes through its own `top_k` experts; only theirs are read.

    norm: of the layer, for norms of its own. Called with rows before the layer's norm and after.
    """

    def __init__(self, spec: MoESpec, norm: NormSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._router = linear_of(weights, f"{at}router", spec.bias)
        self._gate, self._up, self._down = (
            _Expert(weights, f"{at}{name}", spec) for name in ("gate", "up", "down")
        )
        self._selection_bias = (
            vector_of(weights, f"{at}selection_bias.weight") if spec.selection_bias else None
        )
        self._shared: _FeedForward | None = None
        self._shared_gate: Linear | None = None
        if spec.shared:
            shared = FeedForwardSpec(spec.shared, spec.activation)
            self._shared = _FeedForward(shared, weights, f"{at}shared.", ops)
        if spec.shared_gate:
            self._shared_gate = linear_of(weights, f"{at}shared_gate", False)
        self._expert_scale = (
            vector_of(weights, f"{at}expert_scale.weight") if spec.expert_scale else None
        )

        def own(part: str) -> Norm | None:
            return norm_of(weights, f"{at}{part}_norm", norm) if spec.own_norms else None

        self._router_norm, self._expert_norm = own("router"), own("expert")
        self._expert_post_norm = own("expert_post")
        self._shared_post_norm = own("shared_post") if spec.shared else None

    def __call__(self, layer: int, x: mx.array, normed: mx.array) -> mx.array:
        y = self._routed(x, normed)
        if self._shared is None:
            return y
        shared = self._shared(layer, normed, None)
        if self._shared_gate is not None:
            gate = self._ops.linear(normed, self._shared_gate).astype(mx.float32)
            shared = (mx.sigmoid(gate) * shared.astype(mx.float32)).astype(x.dtype)
        return y + self._normed(shared, self._shared_post_norm)

    def _normed(self, x: mx.array, norm: Norm | None) -> mx.array:
        return x if norm is None else self._ops.norm(x, norm)

    def _routed(self, x: mx.array, normed: mx.array) -> mx.array:
        """T [n, D]: the sum of the chosen experts' outputs by their weights."""
        spec = self._spec
        routed = normed if self._router_norm is None else self._ops.norm(x, self._router_norm)
        chosen, weights = self._route(routed)
        x = normed if self._expert_norm is None else self._ops.norm(x, self._expert_norm)
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
        return self._normed(shares.sum(axis=1).astype(x.dtype), self._expert_post_norm)

    def _route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Each row's experts, int [n, top_k], and their weights, float32 [n, top_k]."""
        spec = self._spec
        logits = self._ops.linear(x, self._router).astype(mx.float32) * spec.router_scale
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
        if self._expert_scale is not None:
            weights = weights * self._expert_scale[chosen]
        return chosen, weights if spec.weight_scale == 1 else weights * spec.weight_scale


def _within_groups(choice: mx.array, spec: MoESpec) -> mx.array:
    """float32 [n, E], -inf outside the groups whose two best experts are the most together."""
    runs = choice.reshape(len(choice), spec.groups, -1)  # [n, groups, E / groups]
    best = mx.sort(runs, axis=-1)[..., -2:].sum(axis=-1)
    kept = mx.argsort(-best, axis=-1)[:, : spec.top_groups]  # [n, top_groups]
    is_kept = (mx.arange(spec.groups)[None, :, None] == kept[:, None, :]).any(axis=-1)
    return mx.where(is_kept[..., None], runs, -mx.inf).reshape(choice.shape)
