"""What a spec costs: parameters, and bytes of KV cache. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

from localllm.spec.decoder import DecoderSpec, MoESpec
from localllm.spec.weights import weight_shapes


def parameters(spec: DecoderSpec) -> int:
    """Stored parameters; a tied head counts once."""
    return sum(prod(shape) for shape in weight_shapes(spec).values())


def active_parameters(spec: DecoderSpec) -> int:
    """Parameters that one token's computation reads: of the experts, only the chosen ones, and of
    the table of per-layer embeddings a row."""
    idle = 0
    if spec.per_layer is not None:
        idle = (spec.per_layer.vocab_size - 1) * len(spec.layers) * spec.per_layer.size
    for layer in spec.layers:
        if isinstance(layer.ffn, MoESpec):
            idle += 3 * (layer.ffn.experts - layer.ffn.top_k) * layer.ffn.hidden * spec.hidden
    return parameters(spec) - idle


def kv_bytes_per_token(spec: DecoderSpec, bytes_per_value: float = 4) -> int:
    """Bytes of K and V that one position takes over all layers, windows not yet considered."""
    return round(_kv_values(spec, 1) * bytes_per_value)


def kv_bytes(spec: DecoderSpec, tokens: int, bytes_per_value: float = 4) -> int:
    """Bytes of K and V that a sequence of `tokens` must keep.

    A sliding-window layer keeps no more positions than its window.
    """
    return round(_kv_values(spec, tokens) * bytes_per_value)


@dataclass(frozen=True)
class KvGroup:
    """Layers whose KV cache keeps the same positions: the last `window`, or all (None).

    layers: those with keys and values of their own; others read the cache of one of these.
    """

    layers: tuple[int, ...]
    window: int | None


def kv_groups(spec: DecoderSpec) -> tuple[KvGroup, ...]:
    """The layers by what they keep, the widest window first."""
    by_window: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        if layer.mixer.shared_kv is None:
            by_window.setdefault(layer.mixer.window, []).append(index)
    widest_first = sorted(by_window, key=lambda window: -inf if window is None else -window)
    return tuple(KvGroup(tuple(by_window[window]), window) for window in widest_first)


def kv_layer(spec: DecoderSpec, index: int) -> int:
    """The layer whose keys and values layer `index` attends to: itself, or the one it names."""
    attn = spec.layers[index].mixer
    if attn.shared_kv is None:
        return index
    owner = spec.layers[attn.shared_kv].mixer
    assert attn.shared_kv < index, f"layer {index} shares keys that come later"
    assert owner.shared_kv is None, f"layer {attn.shared_kv} has no keys to share"
    assert (owner.kv_heads, owner.head_dim, owner.window) == (
        attn.kv_heads,
        attn.head_dim,
        attn.window,
    ), f"layer {index} cannot attend to the keys of layer {attn.shared_kv}"
    return attn.shared_kv


def kv_group_block_bytes(
    spec: DecoderSpec, group: KvGroup, block_size: int, bytes_per_value: float = 4
) -> int:
    """Bytes of one of the group's KV blocks: `block_size` positions in every layer of it."""
    values = 0
    for index in group.layers:
        attn = spec.layers[index].mixer
        values += 2 * attn.kv_heads * attn.head_dim * block_size
    return round(values * bytes_per_value)


def kv_block_bytes(spec: DecoderSpec, block_size: int, bytes_per_value: float = 4) -> int:
    """Bytes of one KV block: K and V of `block_size` positions in every layer."""
    return block_size * kv_bytes_per_token(spec, bytes_per_value)


def step_bytes(spec: DecoderSpec, rows: int, logit_rows: int) -> int:
    """Bytes that a step of `rows` rows takes beside weights and KV: activations in float32 and, as
    they enter matmuls, in 8 bits, a quarter of room to grow, and logits of `logit_rows` rows."""
    widest = 0
    for layer in spec.layers:
        attn, ffn = layer.mixer, layer.ffn
        q, kv = attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim
        inner = 3 * ffn.hidden
        if isinstance(ffn, MoESpec):
            # A row goes to top_k experts, each with its own input and output.
            inner = ffn.top_k * (inner + 2 * spec.hidden) + 3 * ffn.shared
            inner += 3 * spec.hidden if ffn.own_norms else 0
        widest = max(widest, 2 * q + 2 * kv + inner)
    own = 0 if spec.per_layer is None else 2 * len(spec.layers) * spec.per_layer.size
    values = rows * (4 * spec.hidden + widest + own)
    return values * 4 * 5 // 4 * 5 // 4 + logit_rows * spec.vocab_size * 4


def _kv_values(spec: DecoderSpec, tokens: int) -> int:
    values = 0
    for layer in spec.layers:
        attn = layer.mixer
        if attn.shared_kv is not None:
            continue
        kept = tokens if attn.window is None else min(tokens, attn.window)
        values += 2 * attn.kv_heads * attn.head_dim * kept
    return values
