"""The weights a spec calls for: every name with its shape."""

from __future__ import annotations

from collections.abc import Iterator

from localllm.spec.decoder import (
    AttentionSpec,
    DecoderSpec,
    FeedForward,
    GatedDeltaNetSpec,
    Mixer,
    MoESpec,
    NormSpec,
    ShortConvSpec,
)

Shape = tuple[int, ...]


def weight_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Names (see `localllm.spec.decoder`) and shapes of exactly the weights `spec` needs.

    Order: embeddings, layers from first to last, final norm, head.
    """
    return dict(_all(spec))


def _all(spec: DecoderSpec) -> Iterator[tuple[str, Shape]]:
    yield "embed.weight", (spec.vocab_size, spec.hidden)
    if spec.learned_positions is not None:
        yield "pos_embed.weight", (spec.learned_positions, spec.hidden)
    if (extra := spec.per_layer) is not None:
        width = len(spec.layers) * extra.size
        yield "per_layer_inputs.embed.weight", (extra.vocab_size, width)
        yield from _linear("per_layer_inputs.up", width, spec.hidden, False)
        yield from _norm("per_layer_inputs.norm", spec.final_norm, extra.size)
    for index, layer in enumerate(spec.layers):
        at = f"layers.{index}."
        for part in ("attn", "ffn"):
            if layer.pre_norm:
                yield from _norm(f"{at}{part}_norm", layer.norm, spec.hidden)
            if layer.post_norm:
                yield from _norm(f"{at}{part}_post_norm", layer.norm, spec.hidden)
        yield from _mixer(at, layer.mixer, spec.hidden)
        yield from _feed_forward(at, layer.ffn, layer.norm, spec.hidden)
        if extra is not None:
            yield from _linear(f"{at}per_layer.gate", extra.size, spec.hidden, False)
            yield from _linear(f"{at}per_layer.up", spec.hidden, extra.size, False)
            yield from _norm(f"{at}per_layer_norm", layer.norm, spec.hidden)
        if layer.scalar:
            yield f"{at}scalar.weight", (1,)
    yield from _norm("final_norm", spec.final_norm, spec.hidden)
    if not spec.tied_head:
        yield "head.weight", (spec.vocab_size, spec.hidden)
    if spec.head_bias:
        yield "head.bias", (spec.vocab_size,)


def _norm(name: str, norm: NormSpec, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if norm.bias:
        yield f"{name}.bias", (size,)


def _linear(name: str, out: int, inner: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def _mixer(at: str, mixer: Mixer, hidden: int) -> Iterator[tuple[str, Shape]]:
    if isinstance(mixer, AttentionSpec):
        yield from _attention(f"{at}attn.", mixer, hidden)
    elif isinstance(mixer, GatedDeltaNetSpec):
        yield from _delta(f"{at}delta.", mixer, hidden)
    else:
        yield from _short_conv(f"{at}conv.", mixer, hidden)


def _delta(at: str, delta: GatedDeltaNetSpec, hidden: int) -> Iterator[tuple[str, Shape]]:
    values = delta.value_heads * delta.value_dim
    yield f"{at}qkv.weight", (delta.channels, hidden)
    yield f"{at}z.weight", (values, hidden)
    yield f"{at}beta.weight", (delta.value_heads, hidden)
    yield f"{at}decay.weight", (delta.value_heads, hidden)
    yield f"{at}conv.weight", (delta.channels * delta.kernel,)
    yield f"{at}rate.weight", (delta.value_heads,)
    yield f"{at}step.weight", (delta.value_heads,)
    yield f"{at}norm.weight", (delta.value_dim,)
    yield f"{at}o.weight", (hidden, values)


def _short_conv(at: str, conv: ShortConvSpec, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{at}in", 3 * hidden, hidden, conv.bias)
    yield f"{at}taps.weight", (hidden * conv.kernel,)
    if conv.bias:
        yield f"{at}taps.bias", (hidden,)
    yield from _linear(f"{at}out", hidden, hidden, conv.bias)


def _attention(at: str, attn: AttentionSpec, hidden: int) -> Iterator[tuple[str, Shape]]:
    q, kv = attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim
    yield from _linear(f"{at}q", q, hidden, attn.qkv_bias)
    own = attn.shared_kv is None
    if own:
        yield from _linear(f"{at}k", kv, hidden, attn.qkv_bias)
    if own and not attn.v_from_k:
        yield from _linear(f"{at}v", kv, hidden, attn.qkv_bias)
    if attn.gate:
        yield from _linear(f"{at}gate", q, hidden, attn.qkv_bias)
    yield from _linear(f"{at}o", hidden, q, attn.out_bias)
    if attn.qk_norm is not None:
        over_head = attn.qk_norm_over == "head"
        yield from _norm(f"{at}q_norm", attn.qk_norm, attn.head_dim if over_head else q)
        if own:
            yield from _norm(f"{at}k_norm", attn.qk_norm, attn.head_dim if over_head else kv)
    if attn.sinks:
        yield f"{at}sinks.weight", (attn.heads,)


def _feed_forward(
    at: str, ffn: FeedForward, norm: NormSpec, hidden: int
) -> Iterator[tuple[str, Shape]]:
    if isinstance(ffn, MoESpec):
        yield from _linear(f"{at}moe.router", ffn.experts, hidden, ffn.bias)
        for name, out, inner in (
            ("gate", ffn.hidden, hidden),
            ("up", ffn.hidden, hidden),
            ("down", hidden, ffn.hidden),
        ):
            yield f"{at}moe.{name}.weight", (ffn.experts, out, inner)
            if ffn.bias:
                yield f"{at}moe.{name}.bias", (ffn.experts * out,)
        if ffn.selection_bias:
            yield f"{at}moe.selection_bias.weight", (ffn.experts,)
        if ffn.shared:
            yield from _linear(f"{at}moe.shared.gate", ffn.shared, hidden, False)
            yield from _linear(f"{at}moe.shared.up", ffn.shared, hidden, False)
            yield from _linear(f"{at}moe.shared.down", hidden, ffn.shared, False)
        if ffn.shared_gate:
            yield from _linear(f"{at}moe.shared_gate", 1, hidden, False)
        if ffn.expert_scale:
            yield f"{at}moe.expert_scale.weight", (ffn.experts,)
        if ffn.own_norms:
            for part in ("router", "expert", "expert_post", "shared_post"):
                if part != "shared_post" or ffn.shared:
                    yield from _norm(f"{at}moe.{part}_norm", norm, hidden)
        return
    if ffn.gated:
        yield from _linear(f"{at}ffn.gate", ffn.hidden, hidden, ffn.bias)
    yield from _linear(f"{at}ffn.up", ffn.hidden, hidden, ffn.bias)
    yield from _linear(f"{at}ffn.down", hidden, ffn.hidden, ffn.bias)
