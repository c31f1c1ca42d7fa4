"""A decoder built from its spec, in plain MLX ops: what the reference runs and training trains.

Rows are flat, [n, hidden], whatever sequences they belong to; only the `attend` callback knows
which rows see which. A server answers it from a KV pool, training from the batch itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localllm.backend.reference_linear import Linear, Matrix, Part
from localllm.backend.reference_parts import Adapt, Norm, Routed, Weight, Weights, activate
from localllm.backend.reference_recurrent import Recur, Recurrent, recurrent
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    PerLayerSpec,
    RopeSpec,
)
from localllm.spec.decoder import Activation, Mixer
from localllm.spec.rope import query_scales, tables

# K and V, [n, kv_heads, head_dim] each; None in a layer that attends to those of another.
KeysValues = tuple[mx.array, mx.array] | None
# (layer, q [n, heads, head_dim], K and V) -> [n, heads, head_dim]
Attend = Callable[[int, mx.array, KeysValues], mx.array]
AttendHere = Callable[[mx.array, KeysValues], mx.array]
# (layer, rows as its recurrence takes them [n, width]) -> what it makes of them
RecurAt = Callable[[int, mx.array], mx.array]
Angles = tuple[mx.array, mx.array]  # cos and sin, each [n, dim / 2]


class Turn(NamedTuple):
    """What positions do to a layer: RoPE's angles, and factors of the queries [n, 1, 1]."""

    angles: Angles | None
    query_scale: mx.array | None


class Attention(Part):
    """Projections, query and key norms and RoPE; who sees whom is left to `attend`."""

    def __init__(self, spec: AttentionSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.q = weights.linear("q", spec.qkv_bias)
        own = spec.shared_kv is None
        self.k = weights.linear("k", spec.qkv_bias) if own else None
        self.v = weights.linear("v", spec.qkv_bias) if own and not spec.v_from_k else None
        self.gate = weights.linear("gate", spec.qkv_bias) if spec.gate else None
        self.o = weights.linear("o", spec.out_bias)
        self.sinks = weights.vector("sinks.weight") if spec.sinks else None
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if spec.qk_norm is not None:
            self.q_norm = Norm(spec.qk_norm, weights.under("q_norm"))
            self.k_norm = Norm(spec.qk_norm, weights.under("k_norm")) if own else None

    def __call__(
        self,
        x: mx.array,
        turn: Turn,
        attend: AttendHere,
        adapt: Adapt,
    ) -> mx.array:
        q = adapt("attn.q", x, self.q(x))
        q = self._heads(q, self.spec.heads, self.q_norm, turn.angles)
        if turn.query_scale is not None:
            q = q * turn.query_scale
        mixed = attend(q, self._keys_values(x, turn.angles, adapt)).reshape(x.shape[0], -1)
        if self.gate is not None:
            mixed = mixed * mx.sigmoid(adapt("attn.gate", x, self.gate(x)))
        return adapt("attn.o", mixed, self.o(mixed))

    def _keys_values(self, x: mx.array, angles: Angles | None, adapt: Adapt) -> KeysValues:
        if self.k is None:
            return None
        k = adapt("attn.k", x, self.k(x))
        v = k if self.v is None else adapt("attn.v", x, self.v(x))
        v = v.reshape(x.shape[0], self.spec.kv_heads, self.spec.head_dim)
        if self.spec.v_norm is not None:
            variance = mx.mean(mx.square(v), axis=-1, keepdims=True)
            v = v * mx.rsqrt(variance + self.spec.v_norm)
        return self._heads(k, self.spec.kv_heads, self.k_norm, angles), v

    def _heads(self, x: mx.array, heads: int, norm: Norm | None, angles: Angles | None) -> mx.array:
        """[n, heads * head_dim] -> [n, heads, head_dim], normalized and rotated."""
        if norm is not None and self.spec.qk_norm_over == "all":
            x = norm(x)
        x = x.reshape(x.shape[0], heads, self.spec.head_dim)
        if norm is not None and self.spec.qk_norm_over == "head":
            x = norm(x)
        if self.spec.rope is None:
            return x
        assert angles is not None
        return rotate(x, self.spec.rope, angles)


class FeedForward(Part):
    def __init__(self, spec: FeedForwardSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.gate = weights.linear("gate", spec.bias) if spec.gated else None
        self.up = weights.linear("up", spec.bias)
        self.down = weights.linear("down", spec.bias)

    def __call__(self, x: mx.array, adapt: Adapt) -> mx.array:
        up = adapt("ffn.up", x, self.up(x))
        if self.gate is None:
            inner = activate(up, self.spec.activation)
        else:
            inner = gated(adapt("ffn.gate", x, self.gate(x)), up, self.spec.activation)
        return adapt("ffn.down", inner, self.down(inner))


class MixtureOfExperts(Part):
    """Each row goes through its own `top_k` experts; an expert runs once, on all its rows.

    norm: of the layer, for norms of its own. Called with rows before the layer's norm and after.
    """

    def __init__(self, spec: MoESpec, norm: NormSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.router = weights.linear("router", spec.bias)
        self.gate = weights.experts("gate", spec.bias)
        self.up = weights.experts("up", spec.bias)
        self.down = weights.experts("down", spec.bias)
        self.selection_bias = (
            weights.vector("selection_bias.weight") if spec.selection_bias else None
        )
        self.shared: FeedForward | None = None
        self.shared_gate: Linear | None = None
        if spec.shared:
            shared = FeedForwardSpec(spec.shared, spec.activation)
            self.shared = FeedForward(shared, weights.under("shared"))
        if spec.shared_gate:
            self.shared_gate = weights.linear("shared_gate")
        self.expert_scale = weights.vector("expert_scale.weight") if spec.expert_scale else None

        def own(part: str) -> Norm | None:
            return Norm(norm, weights.under(f"{part}_norm")) if spec.own_norms else None

        self.router_norm, self.expert_norm = own("router"), own("expert")
        self.expert_post_norm = own("expert_post")
        self.shared_post_norm = own("shared_post") if spec.shared else None

    def __call__(self, x: mx.array, normed: mx.array, adapt: Adapt) -> mx.array:
        y = self._routed(x, normed, adapt)
        if self.shared is None:
            return y
        shared = self.shared(normed, _unadapted)
        if self.shared_gate is not None:
            shared = mx.sigmoid(self.shared_gate(normed)) * shared
        return y + _apply(self.shared_post_norm, shared)

    def _routed(self, x: mx.array, normed: mx.array, adapt: Adapt) -> mx.array:
        """float32 [n, D]: the chosen experts' outputs by their weights."""
        chosen, weights = self._route(normed if self.router_norm is None else self.router_norm(x))
        x = normed if self.expert_norm is None else self.expert_norm(x)
        # The experts in rising order: a row's sum does not depend on its neighbours.
        y = mx.zeros_like(x)
        for expert in np.unique(chosen):
            rows, slots = np.nonzero(chosen == expert)
            row, slot = mx.array(rows), mx.array(slots)
            out = self._expert(x[row], Routed(int(expert), rows), adapt)
            y = y.at[row].add(out * weights[row, slot][:, None])
        return _apply(self.expert_post_norm, y)

    def _route(self, x: mx.array) -> tuple[np.ndarray, mx.array]:
        """Each row's experts, int [n, top_k], and their weights, float32 [n, top_k]."""
        spec, logits = self.spec, self.router(x) * self.spec.router_scale
        scores = mx.sigmoid(logits) if spec.scores == "sigmoid" else mx.softmax(logits, axis=-1)
        choice = np.array(scores)  # [n, E]
        if self.selection_bias is not None:
            choice = choice + np.array(self.selection_bias)
        chosen = best_experts(choice, spec)
        weights = mx.take_along_axis(scores, mx.array(chosen), axis=-1)
        if spec.renormalize:
            weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + spec.renormalize_eps)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[mx.array(chosen)]
        return chosen, weights * spec.weight_scale

    def _expert(self, x: mx.array, routed: Routed, adapt: Adapt) -> mx.array:
        gate, up, down = (part[routed.expert] for part in (self.gate, self.up, self.down))
        inner = gated(
            adapt("moe.gate", x, gate(x), routed),
            adapt("moe.up", x, up(x), routed),
            self.spec.activation,
        )
        return adapt("moe.down", inner, down(inner), routed)


def best_experts(choice: np.ndarray, spec: MoESpec) -> np.ndarray:
    """int [n, top_k] of what each row prefers, float [n, E]: the best first."""
    if spec.top_groups < spec.groups:
        runs = choice.reshape(len(choice), spec.groups, -1)  # [n, groups, E / groups]
        best = np.sort(runs, axis=-1)[..., -2:].sum(axis=-1)
        left = np.argsort(-best, axis=-1, kind="stable")[:, spec.top_groups :]
        runs = runs.copy()
        np.put_along_axis(runs, left[..., None], -np.inf, axis=1)
        choice = runs.reshape(choice.shape)
    order: np.ndarray = np.argsort(-choice, axis=-1, kind="stable")
    return order[:, : spec.top_k]


class PerLayerInputs(Part):
    """Every layer's own embeddings; see `PerLayerSpec`."""

    def __init__(self, spec: DecoderSpec, weights: Weights) -> None:
        super().__init__()
        assert spec.per_layer is not None
        self.size, self.hidden = spec.per_layer.size, spec.hidden
        self.up = weights.linear("up")
        self.norm = Norm(spec.final_norm, weights.under("norm"))

    def __call__(self, rows: mx.array, x: mx.array) -> mx.array:
        """float32 [n, layers, size] for rows of the table, [n, layers * size], and what enters the
        first layer, x [n, hidden]."""
        of_x = (self.up(x) * self.hidden**-0.5).reshape(x.shape[0], -1, self.size)
        of_token = rows.reshape(of_x.shape) * self.size**0.5
        both: mx.array = self.norm(of_x) + of_token
        return both * math.sqrt(0.5)


class PerLayer(Part):
    """What a layer does with its part of them."""

    def __init__(self, spec: PerLayerSpec, norm: NormSpec, weights: Weights) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate = weights.linear("per_layer.gate")
        self.up = weights.linear("per_layer.up")
        self.norm = Norm(norm, weights.under("per_layer_norm"))

    def __call__(self, x: mx.array, own: mx.array) -> mx.array:
        """x: float32 [n, hidden]; own: float32 [n, size]."""
        return x + self.norm(self.up(activate(self.gate(x), self.activation) * own))


class Layer(Part):
    def __init__(
        self, spec: LayerSpec, weights: Weights, per_layer: PerLayerSpec | None = None
    ) -> None:
        super().__init__()
        self.residual_scale = spec.residual_scale
        self.attn: Attention | None = None
        self.recurrent: Recurrent | None = None
        if isinstance(spec.mixer, AttentionSpec):
            self.attn = Attention(spec.mixer, weights.under("attn"))
        else:
            self.recurrent = recurrent(spec.mixer, weights)
        if isinstance(spec.ffn, MoESpec):
            self.ffn: MixtureOfExperts | FeedForward = MixtureOfExperts(
                spec.ffn, spec.norm, weights.under("moe")
            )
        else:
            self.ffn = FeedForward(spec.ffn, weights.under("ffn"))

        def norm(name: str, wanted: bool) -> Norm | None:
            return Norm(spec.norm, weights.under(name)) if wanted else None

        self.attn_norm = norm("attn_norm", spec.pre_norm)
        self.attn_post_norm = norm("attn_post_norm", spec.post_norm)
        self.ffn_norm = norm("ffn_norm", spec.pre_norm)
        self.ffn_post_norm = norm("ffn_post_norm", spec.post_norm)
        self.per_layer = None if per_layer is None else PerLayer(per_layer, spec.norm, weights)
        self.scalar = weights.vector("scalar.weight") if spec.scalar else None

    def __call__(
        self,
        x: mx.array,
        turn: Turn,
        attend: AttendHere,
        adapt: Adapt,
        recur: Recur,
        own: mx.array | None = None,
    ) -> mx.array:
        """own: float32 [n, size], the layer's part of the per-layer embeddings, if there are."""
        y = _apply(self.attn_norm, x)
        if self.attn is not None:
            y = self.attn(y, turn, attend, adapt)
        else:
            assert self.recurrent is not None
            y = self.recurrent(y, recur, adapt)
        x = x + _apply(self.attn_post_norm, y) * self.residual_scale
        normed = _apply(self.ffn_norm, x)
        if isinstance(self.ffn, MixtureOfExperts):
            y = self.ffn(x, normed, adapt)
        else:
            y = self.ffn(normed, adapt)
        x = x + _apply(self.ffn_post_norm, y) * self.residual_scale
        if self.per_layer is not None:
            assert own is not None
            x = self.per_layer(x, own)
        # As transformers, training keeps the scalar as it is.
        return x if self.scalar is None else x * mx.stop_gradient(self.scalar)


class Turns:
    """The `Turn` of each kind of layer, for rows at some positions; see `tables`."""

    def __init__(self, positions: np.ndarray, lengths: np.ndarray) -> None:
        self._positions, self._lengths = positions, lengths
        self._angles: dict[RopeSpec, Angles] = {}

    def of(self, spec: Mixer) -> Turn:
        if not isinstance(spec, AttentionSpec):
            return Turn(None, None)
        rope, scale = spec.rope, None
        if rope is not None and rope not in self._angles:
            cos, sin = tables(rope, self._positions, self._lengths)
            self._angles[rope] = mx.array(cos), mx.array(sin)
        if spec.query_growth:
            scale = mx.array(query_scales(spec, self._positions))[:, None, None]
        return Turn(None if rope is None else self._angles[rope], scale)


class Decoder(Part):
    """The whole model: `decoder(tokens, positions, lengths, attend)` -> hidden, then `logits`.

    weights: one entry for every name of `weight_shapes(spec)`.
    """

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        tree = Weights(weights)
        self.spec = spec
        self.embed = tree.matrix("embed.weight")
        self.pos_embed = None if spec.learned_positions is None else tree.matrix("pos_embed.weight")
        layers = tree.under("layers")
        self.layers = [
            Layer(layer, layers.under(str(index)), spec.per_layer)
            for index, layer in enumerate(spec.layers)
        ]
        self.per_layer: PerLayerInputs | None = None
        self.per_layer_embed: Matrix | None = None
        if spec.per_layer is not None:
            self.per_layer = PerLayerInputs(spec, tree.under("per_layer_inputs"))
            self.per_layer_embed = tree.matrix("per_layer_inputs.embed.weight")
        self.final_norm = Norm(spec.final_norm, tree.under("final_norm"))
        # A tied head is the embedding itself: one matrix, one gradient.
        self.head = None if spec.tied_head else tree.matrix("head.weight")
        self.head_bias = tree.vector("head.bias") if spec.head_bias else None

    def __call__(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        attend: Attend,
        adapt: Adapt | None = None,
        recur: RecurAt | None = None,
        embeddings: np.ndarray | None = None,
    ) -> mx.array:
        """float32 [n, hidden] after the last layer, before the final norm.

        tokens, positions: int [n]. lengths: int [n], see `localllm.spec.rope.tables`.
        embeddings: float32 [n, hidden], instead of the tokens' own.
        """
        if embeddings is None:
            x = self.embed.rows(mx.array(tokens)) * self.spec.embed_scale
        else:
            x = mx.array(embeddings)
        if self.pos_embed is not None:
            x = x + self.pos_embed.rows(mx.array(positions))
        own = None
        if self.per_layer is not None and self.per_layer_embed is not None:
            own = self.per_layer(self.per_layer_embed.rows(mx.array(tokens)), x)
        turns = Turns(positions, lengths)
        for index, layer in enumerate(self.layers):
            mixer = self.spec.layers[index].mixer

            def attend_here(q: mx.array, kv: KeysValues, at: int = index) -> mx.array:
                return attend(at, q, kv)

            def adapt_here(
                target: str,
                x: mx.array,
                y: mx.array,
                routed: Routed | None = None,
                at: int = index,
            ) -> mx.array:
                return y if adapt is None else adapt(f"layers.{at}.{target}", x, y, routed)

            def recur_here(rows: mx.array, at: int = index) -> mx.array:
                assert recur is not None, "a model with recurrent layers"
                return recur(at, rows)

            part = None if own is None else own[:, index]
            x = layer(x, turns.of(mixer), attend_here, adapt_here, recur_here, part)
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        """float32 [n, hidden] -> [n, vocab_size]."""
        return self.project(self.final_norm(hidden))

    def project(self, normed: mx.array) -> mx.array:
        """The head: float32 [n, hidden], as the final norm gives it -> [n, vocab_size]."""
        head = self.embed if self.head is None else self.head
        logits = head.matmul(normed)
        if self.head_bias is not None:
            logits = logits + self.head_bias
        return self.finish(logits)

    def finish(self, logits: mx.array) -> mx.array:
        """Scaled and capped as the spec says."""
        logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else softcap(logits, cap)


def rotate(x: mx.array, rope: RopeSpec, angles: Angles) -> mx.array:
    """RoPE on [n, heads, head_dim]: the first `rope.dim` entries turn, the others stay."""
    cos, sin = (table[:, None, :] for table in angles)  # [n, 1, dim / 2]
    turned, still = x[..., : rope.dim], x[..., rope.dim :]
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = pairs.reshape(turned.shape)
    else:
        a, b = turned[..., : rope.dim // 2], turned[..., rope.dim // 2 :]
        turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned if still.shape[-1] == 0 else mx.concatenate([turned, still], axis=-1)


def gated(gate: mx.array, up: mx.array, kind: Activation) -> mx.array:
    """act(gate) * up, and what is more than that."""
    if kind == "clamped_swiglu":
        gate, up = mx.minimum(gate, 7), mx.clip(up, -7, 7)
        return gate * mx.sigmoid(1.702 * gate) * (up + 1)
    return activate(gate, kind) * up


def softcap(x: mx.array, cap: float) -> mx.array:
    return cap * mx.tanh(x / cap)


def _unadapted(target: str, x: mx.array, y: mx.array, routed: Routed | None = None) -> mx.array:
    return y


def _apply(norm: Norm | None, x: mx.array) -> mx.array:
    return x if norm is None else norm(x)
