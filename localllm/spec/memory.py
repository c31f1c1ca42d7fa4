"""What a spec costs: parameters, and bytes of KV cache. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, prod

from localllm.errors import UnsupportedModel
from localllm.spec.decoder import (
    AttentionSpec,
    DecoderSpec,
    GatedDeltaNetSpec,
    Mixer,
    MoESpec,
)
from localllm.spec.weights import weight_shapes

# Tables of which a token reads one row.
_BY_ROW = ("pos_embed.weight", "per_layer_inputs.embed.weight")


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


def active_bytes(spec: DecoderSpec, bytes_of: Callable[[str], int]) -> int:
    """Bytes of weights that one token's computation reads: of the experts the chosen ones, and of
    embeddings that are no head a row.

    bytes_of: what a weight takes as it is held.
    """
    total = 0
    for name, shape in weight_shapes(spec).items():
        size = bytes_of(name)
        if len(shape) == 3:
            ffn = spec.layers[int(name.split(".")[1])].ffn
            assert isinstance(ffn, MoESpec)
            size = size * ffn.top_k // ffn.experts
        elif name in _BY_ROW or (name == "embed.weight" and not spec.tied_head):
            size //= shape[0]
        total += size
    return total


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
    """The layers that attend by what they keep, the widest window first.

    Raises UnsupportedModel where none does: prefixes are known by their blocks.
    """
    by_window: dict[int | None, list[int]] = {}
    for index, attn in spec.attentions:
        if attn.shared_kv is None:
            by_window.setdefault(attn.window, []).append(index)
    if not by_window:
        raise UnsupportedModel(f"a {spec.architecture} model none of whose layers attend")
    widest_first = sorted(by_window, key=lambda window: -inf if window is None else -window)
    return tuple(KvGroup(tuple(by_window[window]), window) for window in widest_first)


def kv_layer(spec: DecoderSpec, index: int) -> int:
    """The layer whose keys and values layer `index` attends to: itself, or the one it names."""
    attn = spec.layers[index].attention
    if attn.shared_kv is None:
        return index
    owner = spec.layers[attn.shared_kv].attention
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
        attn = spec.layers[index].attention
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
        ffn = layer.ffn
        inner = 3 * ffn.hidden
        if isinstance(ffn, MoESpec):
            # A row goes to top_k experts, each with its own input and output.
            inner = ffn.top_k * (inner + 2 * spec.hidden) + 3 * ffn.shared
            inner += 3 * spec.hidden if ffn.own_norms else 0
        widest = max(widest, _mixer_values(layer.mixer) + inner)
    own = 0 if spec.per_layer is None else 2 * len(spec.layers) * spec.per_layer.size
    values = rows * (4 * spec.hidden + widest + own)
    return values * 4 * 5 // 4 * 5 // 4 + logit_rows * spec.vocab_size * 4


def state_values(spec: DecoderSpec) -> int:
    """Numbers in the state that recurrent layers keep of a sequence, however long it is."""
    return sum(mixer.state_values for _, mixer in spec.recurrences)


def state_bytes(spec: DecoderSpec) -> int:
    """Bytes of that state: float32, for it is carried on through every token."""
    return 4 * state_values(spec)


def _mixer_values(mixer: Mixer) -> int:
    """Numbers of a row on its way through a mixer."""
    if isinstance(mixer, AttentionSpec):
        q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        return (3 if mixer.gate else 2) * q + 2 * kv
    if isinstance(mixer, GatedDeltaNetSpec):
        return 2 * mixer.channels + 2 * mixer.value_heads * (mixer.value_dim + 1)
    return 5 * mixer.channels


def _kv_values(spec: DecoderSpec, tokens: int) -> int:
    values = 0
    for _, attn in spec.attentions:
        if attn.shared_kv is not None:
            continue
        kept = tokens if attn.window is None else min(tokens, attn.window)
        values += 2 * attn.kv_heads * attn.head_dim * kept
    return values
