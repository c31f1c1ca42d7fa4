"""Weights of a checkpoint into the native engine's packed store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor
from localllm.errors import CheckpointError
from localllm.kernels_cpu import _native
from localllm.spec import AttentionSpec, DecoderSpec, NormSpec
from localllm.spec.memory import active_bytes
from localllm.spec.weights import weight_shapes

_BITS = (2, 3, 4, 5, 6, 8)


def pack(spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]]) -> _native.WeightStore:
    """The weights in memory; raises as `pack_into`."""
    store = _native.WeightStore()
    pack_into(store, spec, weights)
    return store


def pack_to_file(path: Path, spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]]) -> None:
    """The weights in a file, however much larger than memory it is.

    Raises as `pack_into`, and RuntimeError when the file cannot be written.
    """
    shapes = weight_shapes(spec).values()
    count = sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)
    writer = _native.PackedWriter(str(path), count)
    pack_into(writer, spec, weights)
    writer.finish()


def pack_into(
    store: _native.WeightStore | _native.PackedWriter,
    spec: DecoderSpec,
    weights: Iterable[tuple[str, Tensor]],
) -> None:
    """The weights of `weight_shapes(spec)`, each packed and dropped before the next is read.

    Affine codes keep their width, but 2 and 3 bits become 4; scales keep their form. Codes by
    groups that are neither 16 nor a multiple of 32 are held as float32.
    Raises CheckpointError for a missing, unknown, repeated or misshapen weight.
    """
    shapes = weight_shapes(spec)
    orders = dict(row_orders(spec))
    offsets = dict(_norm_offsets(spec))
    seen: set[str] = set()
    for name, tensor in weights:
        if name not in shapes:
            raise CheckpointError(f"{name}: this {spec.architecture} model has no such weight")
        if name in seen:
            raise CheckpointError(f"{name}: given twice")
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{name}: shape {list(tensor.shape)} where {list(shapes[name])} is needed"
            )
        if name in orders:
            tensor = tensor.rows(orders[name])
        if len(tensor.shape) == 1:
            values = tensor.to_float32() + np.float32(offsets.get(name, 0.0))
            if name.endswith("delta.rate.weight"):  # as it is used; in float64 the same anywhere
                values = (-np.exp(values.astype(np.float64))).astype(np.float32)
            store.add_vector(name, np.ascontiguousarray(values))
        elif len(tensor.shape) == 2:
            add_matrix(store, name, tensor)
        else:
            for expert in range(tensor.shape[0]):
                add_matrix(store, f"{name}.{expert}", _slice(tensor, expert))
        seen.add(name)
        del tensor  # else it would live on while the next one is read
    missing = [name for name in shapes if name not in seen]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"weights are missing: {missing[0]}{others}")


def bytes_per_token(spec: DecoderSpec, store: _native.WeightStore) -> int:
    """Packed bytes that one token's step reads: of tables a row, of experts the chosen ones."""
    return _active_bytes(spec, store, experts_alone=False)


def expert_bytes_per_token(spec: DecoderSpec, store: _native.WeightStore) -> int:
    """Of `bytes_per_token`, what belongs to experts that are chosen anew for every token."""
    return _active_bytes(spec, store, experts_alone=True)


def _active_bytes(spec: DecoderSpec, store: _native.WeightStore, *, experts_alone: bool) -> int:
    shapes = weight_shapes(spec)

    def bytes_of(name: str) -> int:
        if len(shapes[name]) == 3:
            return sum(store.bytes_of(f"{name}.{expert}") for expert in range(shapes[name][0]))
        return 0 if experts_alone else int(store.bytes_of(name))

    return active_bytes(spec, bytes_of)


def add_matrix(
    store: _native.WeightStore | _native.PackedWriter, name: str, tensor: Tensor
) -> None:
    """tensor: [out, in], dense or affine; no value changes."""
    if isinstance(tensor, Dense):
        store.add_dense(name, np.ascontiguousarray(tensor.data))
        return
    if tensor.bits not in _BITS or (tensor.group != 16 and tensor.group % 32):
        store.add_dense(name, tensor.to_float32())
        return
    store.add_affine(
        name,
        np.ascontiguousarray(tensor.codes),
        tensor.shape[-1],
        tensor.bits,
        tensor.group,
        tensor.zero_point,
        *_group_values(tensor.scales),
        *(_group_values(tensor.biases) if tensor.biases else (None, None)),
    )


def _group_values(groups: GroupValues) -> tuple[np.ndarray, np.ndarray | None]:
    multiplier = groups.multiplier
    return (
        np.ascontiguousarray(groups.values),
        None if multiplier is None else np.ascontiguousarray(multiplier),
    )


def _slice(tensor: Tensor, index: int) -> Tensor:
    """One matrix of a stack."""
    if isinstance(tensor, Dense):
        return Dense(tensor.data[index], tensor.dtype)

    def part(groups: GroupValues) -> GroupValues:
        multiplier = groups.multiplier
        return GroupValues(groups.values[index], None if multiplier is None else multiplier[index])

    return Affine(
        tensor.codes[index],
        tensor.bits,
        tensor.group,
        part(tensor.scales),
        None if tensor.biases is None else part(tensor.biases),
        tensor.zero_point,
    )


_LAYER_NORMS = (
    *("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", "per_layer_norm"),
    *(f"moe.{part}_norm" for part in ("router", "expert", "expert_post", "shared_post")),
)


def _norm_offsets(spec: DecoderSpec) -> Iterable[tuple[str, float]]:
    """What is added to each norm's weight to make its gain."""
    for index, layer in enumerate(spec.layers):
        at = f"layers.{index}."
        for part in _LAYER_NORMS:
            yield f"{at}{part}.weight", layer.norm.offset
        attends = isinstance(layer.mixer, AttentionSpec)
        qk_norm: NormSpec | None = layer.attention.qk_norm if attends else None
        if qk_norm is not None:
            yield f"{at}attn.q_norm.weight", qk_norm.offset
            yield f"{at}attn.k_norm.weight", qk_norm.offset
    for name in ("final_norm", "per_layer_inputs.norm"):
        yield f"{name}.weight", spec.final_norm.offset


def row_orders(spec: DecoderSpec) -> Iterable[tuple[str, np.ndarray]]:
    """Row orders that turn interleaved RoPE pairs (2i, 2i + 1) into halves (i, i + dim / 2).

    Q and K change alike, so their products stay what they were.
    """
    for index, attn in spec.attentions:
        if attn.rope is None or not attn.rope.interleaved:
            continue
        at = f"layers.{index}.attn."
        for name, heads in (("q", attn.heads), ("k", attn.kv_heads)):
            order = _halves_order(attn, heads)
            yield f"{at}{name}.weight", order
            yield f"{at}{name}.bias", order
            over_all = attn.qk_norm_over == "all"
            norm_order = order if over_all else _halves_order(attn, 1)
            yield f"{at}{name}_norm.weight", norm_order
            yield f"{at}{name}_norm.bias", norm_order


def _halves_order(attn: AttentionSpec, heads: int) -> np.ndarray:
    assert attn.rope is not None
    dim = attn.rope.dim
    head = np.concatenate(
        (np.arange(0, dim, 2), np.arange(1, dim, 2), np.arange(dim, attn.head_dim))
    )
    order: np.ndarray = (np.arange(heads)[:, None] * attn.head_dim + head).reshape(-1)
    return order
