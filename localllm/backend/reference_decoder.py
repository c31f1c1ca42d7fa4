"""A decoder built from its spec, in plain MLX ops: what the reference runs and training trains.

Rows are flat, [n, hidden], whatever sequences they belong to; only the `attend` callback knows
which rows see which. A server answers it from a KV pool, training from the batch itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from localllm.backend.reference_linear import Linear, Part
from localllm.backend.reference_parts import Adapt, Norm, Weight, Weights, activate
from localllm.backend.reference_recurrent import Recur, Recurrent, recurrent
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    RopeSpec,
)
from localllm.spec.decoder import Activation
from localllm.spec.rope import tables

# (layer, rows as its recurrence takes them [n, width]) -> what it makes of them
RecurAt = Callable[[int, mx.array], mx.array]
# (layer, q [n, heads, head_dim], k and v [n, kv_heads, head_dim]) -> [n, heads, head_dim]
Attend = Callable[[int, mx.array, mx.array, mx.array], mx.array]
Angles = tuple[mx.array, mx.array]  # cos and sin, each [n, dim / 2]


class Attention(Part):
    """Projections, query and key norms and RoPE; who sees whom is left to `attend`."""

    def __init__(self, spec: AttentionSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.q = weights.linear("q", spec.qkv_bias)
        self.k = weights.linear("k", spec.qkv_bias)
        self.v = weights.linear("v", spec.qkv_bias)
        self.gate = weights.linear("gate", spec.qkv_bias) if spec.gate else None
        self.o = weights.linear("o", spec.out_bias)
        self.sinks = weights.vector("sinks.weight") if spec.sinks else None
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if spec.qk_norm is not None:
            self.q_norm = Norm(spec.qk_norm, weights.under("q_norm"))
            self.k_norm = Norm(spec.qk_norm, weights.under("k_norm"))

    def __call__(
        self,
        x: mx.array,
        angles: Angles | None,
        attend: Callable[[mx.array, mx.array, mx.array], mx.array],
        adapt: Adapt,
    ) -> mx.array:
        q = adapt("attn.q", x, self.q(x))
        k = adapt("attn.k", x, self.k(x))
        v = adapt("attn.v", x, self.v(x))
        q = self._heads(q, self.spec.heads, self.q_norm, angles)
        k = self._heads(k, self.spec.kv_heads, self.k_norm, angles)
        v = v.reshape(x.shape[0], self.spec.kv_heads, self.spec.head_dim)
        mixed = attend(q, k, v).reshape(x.shape[0], -1)
        if self.gate is not None:
            mixed = mixed * mx.sigmoid(adapt("attn.gate", x, self.gate(x)))
        return adapt("attn.o", mixed, self.o(mixed))

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
    """Each row goes through its own `top_k` experts; an expert runs once, on all its rows."""

    def __init__(self, spec: MoESpec, weights: Weights) -> None:
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

    def __call__(self, x: mx.array, adapt: Adapt) -> mx.array:
        chosen, weights = self._route(x)
        # The experts in rising order: a row's sum does not depend on its neighbours.
        y = mx.zeros_like(x)
        for expert in np.unique(chosen):
            row, slot = (mx.array(at) for at in np.nonzero(chosen == expert))
            y = y.at[row].add(self._expert(int(expert), x[row]) * weights[row, slot][:, None])
        if self.shared is None:
            return y
        shared = self.shared(x, _unadapted)
        if self.shared_gate is not None:
            shared = mx.sigmoid(self.shared_gate(x)) * shared
        return y + shared

    def _route(self, x: mx.array) -> tuple[np.ndarray, mx.array]:
        """Each row's experts, int [n, top_k], and their weights, float32 [n, top_k]."""
        spec, logits = self.spec, self.router(x)
        scores = mx.sigmoid(logits) if spec.scores == "sigmoid" else mx.softmax(logits, axis=-1)
        choice = np.array(scores)  # [n, E]
        if self.selection_bias is not None:
            choice = choice + np.array(self.selection_bias)
        chosen = best_experts(choice, spec)
        weights = mx.take_along_axis(scores, mx.array(chosen), axis=-1)
        if spec.renormalize:
            weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + spec.renormalize_eps)
        return chosen, weights * spec.weight_scale

    def _expert(self, index: int, x: mx.array) -> mx.array:
        inner = gated(self.gate[index](x), self.up[index](x), self.spec.activation)
        return self.down[index](inner)


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


class Layer(Part):
    def __init__(self, spec: LayerSpec, weights: Weights) -> None:
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
                spec.ffn, weights.under("moe")
            )
        else:
            self.ffn = FeedForward(spec.ffn, weights.under("ffn"))

        def norm(name: str, wanted: bool) -> Norm | None:
            return Norm(spec.norm, weights.under(name)) if wanted else None

        self.attn_norm = norm("attn_norm", spec.pre_norm)
        self.attn_post_norm = norm("attn_post_norm", spec.post_norm)
        self.ffn_norm = norm("ffn_norm", spec.pre_norm)
        self.ffn_post_norm = norm("ffn_post_norm", spec.post_norm)

    def __call__(
        self,
        x: mx.array,
        angles: Angles | None,
        attend: Callable[[mx.array, mx.array, mx.array], mx.array],
        adapt: Adapt,
        recur: Recur,
    ) -> mx.array:
        y = _apply(self.attn_norm, x)
        if self.attn is not None:
            y = self.attn(y, angles, attend, adapt)
        else:
            assert self.recurrent is not None
            y = self.recurrent(y, recur, adapt)
        x = x + _apply(self.attn_post_norm, y) * self.residual_scale
        y = self.ffn(_apply(self.ffn_norm, x), adapt)
        return x + _apply(self.ffn_post_norm, y) * self.residual_scale


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
            Layer(layer, layers.under(str(index))) for index, layer in enumerate(spec.layers)
        ]
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
    ) -> mx.array:
        """float32 [n, hidden] after the last layer, before the final norm.

        tokens, positions: int [n]. lengths: int [n], see `localllm.spec.rope.tables`.
        """
        x = self.embed.rows(mx.array(tokens)) * self.spec.embed_scale
        if self.pos_embed is not None:
            x = x + self.pos_embed.rows(mx.array(positions))
        angles: dict[RopeSpec, Angles] = {}
        for index, layer in enumerate(self.layers):
            mixer = self.spec.layers[index].mixer
            rope = mixer.rope if isinstance(mixer, AttentionSpec) else None
            if rope is not None and rope not in angles:
                cos, sin = tables(rope, positions, lengths)
                angles[rope] = mx.array(cos), mx.array(sin)

            def attend_here(q: mx.array, k: mx.array, v: mx.array, at: int = index) -> mx.array:
                return attend(at, q, k, v)

            def adapt_here(name: str, x: mx.array, y: mx.array, at: int = index) -> mx.array:
                return y if adapt is None else adapt(f"layers.{at}.{name}", x, y)

            def recur_here(rows: mx.array, at: int = index) -> mx.array:
                assert recur is not None, "a model with recurrent layers"
                return recur(at, rows)

            x = layer(
                x, None if rope is None else angles[rope], attend_here, adapt_here, recur_here
            )
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


def _unadapted(target: str, x: mx.array, y: mx.array) -> mx.array:
    return y


def _apply(norm: Norm | None, x: mx.array) -> mx.array:
    return x if norm is None else norm(x)
