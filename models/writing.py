"""From the weights of a spec to the tensors of a checkpoint: the way back from `weights.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor
from localllm.errors import UnsupportedModel
from localllm.models.layout import HEAD_PREFIXES, Names, Part, Source, sources_of
from localllm.models.weights import OF_EXPERTS, mixed_order, taps_shape, tiled_order
from localllm.spec import DecoderSpec, GatedDeltaNetSpec, MoESpec
from localllm.spec.weights import weight_shapes

Shape = tuple[int, ...]

# All parts of the tensors that hold several of ours, with the ends of our names.
_PARTS: tuple[dict[Part, str], ...] = (
    {"q": "q", "k": "k", "v": "v"},
    {"gate": "gate", "up": "up"},
    {"heads_q": "q", "heads_gate": "gate"},
    {"groups_qkv": "qkv", "groups_z": "z"},
    {"groups_beta": "beta", "groups_decay": "decay"},
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, and what of ours is in it.

    name: in the file. shape: as the file has it. parts: our weights whose rows follow each other in
    it. expert: only this matrix of a stack. transposed: kept [in, out]. orders: of each part, which
    of our rows each row of the file is; None for our own order. rows: of each part, how many.
    vector: a bias, a norm or a convolution. shift: what is added, where the file counts a
    norm's gain from another number. mixed: where the parts' rows do not follow each other after
    all, which of them each row of the file is. columns: which of our columns each of the file's is.
    negative_exp: kept as -exp of ours.
    """

    name: str
    shape: Shape
    parts: tuple[str, ...]
    expert: int | None = None
    transposed: bool = False
    orders: tuple[np.ndarray | None, ...] = ()
    rows: tuple[int, ...] = ()
    vector: bool = False
    shift: float = 0.0
    mixed: np.ndarray | None = None
    columns: np.ndarray | None = None
    negative_exp: bool = False

    def assemble(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """float32, as the file has it, of our weights in float32."""
        ordered = [
            part if order is None else part[order]
            for part, order in zip(parts, self.orders, strict=True)
        ]
        if self.expert is not None:
            ordered = [part[self.expert] for part in ordered]
        axis = -1 if self.vector else -2
        whole = ordered[0] if len(ordered) == 1 else np.concatenate(ordered, axis=axis)
        if self.mixed is not None:
            whole = np.take(whole, self.mixed, axis=axis)
        if self.columns is not None:
            whole = whole[..., self.columns]
        if self.negative_exp:
            whole = -np.exp(whole)
        result = np.ascontiguousarray(whole.T if self.transposed else whole)
        if self.vector:
            result = result.reshape(self.shape)
        if self.shift:
            result = result + np.float32(self.shift)
        assert result.shape == self.shape, f"{self.name}: {result.shape}, not {self.shape}"
        return result

    def assemble_codes(self, parts: Sequence[Affine]) -> Affine | None:
        """The same of quantized weights without touching a code; None where forms differ."""
        assert self.columns is None, "no folder moves columns"
        if self.transposed or len({(p.bits, p.group, p.zero_point) for p in parts}) > 1:
            return None
        ordered = [
            part if order is None else part.rows(order)
            for part, order in zip(parts, self.orders, strict=True)
        ]
        if self.expert is not None:
            ordered = [_expert(part, self.expert) for part in ordered]
        whole = ordered[0] if len(ordered) == 1 else _joined(ordered)
        return whole if whole is None or self.mixed is None else whole.rows(self.mixed)


def stored_tensors(
    spec: DecoderSpec,
    names: Names,
    prefix: str,
    *,
    has: Callable[[str], bool] | None = None,
    norm_offset: float = 0.0,
) -> list[Stored]:
    """Every tensor that holds a weight of `spec`, in the order of `weight_shapes`.

    norm_offset: what the file's reader adds to norms (1 for Gemma's in folders). has: whether a
    checkpoint that is to be written again has a tensor; its places are then taken, else the first
    that the table names. Raises UnsupportedModel for what cannot be written.
    """
    found: dict[str, Stored] = {}
    shapes = weight_shapes(spec)
    for name in shapes:
        for stored in _of(spec, names, prefix, has, shapes, name):
            own = _own_offset(spec, name)
            shifted = stored if own is None else replace(stored, shift=own - norm_offset)
            found.setdefault(stored.name, shifted)
    return list(found.values())


def gather(
    wanted: Sequence[Stored], weights: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[Stored, list[Tensor]]]:
    """Each of `wanted` with its parts as soon as they have come; parts that no other needs go."""
    users: dict[str, list[Stored]] = {}
    for stored in wanted:
        for part in stored.parts:
            users.setdefault(part, []).append(stored)
    here: dict[str, Tensor] = {}
    done: set[str] = set()
    for name, tensor in weights:
        here[name] = tensor
        del tensor
        for stored in users.get(name, ()):
            if stored.name not in done and all(part in here for part in stored.parts):
                done.add(stored.name)
                yield stored, [here[part] for part in stored.parts]
        for part in [p for p in here if all(s.name in done for s in users.get(p, ()))]:
            del here[part]
    assert len(done) == len(wanted), "weights are missing"


def _of(
    spec: DecoderSpec,
    names: Names,
    prefix: str,
    has: Callable[[str], bool] | None,
    shapes: Mapping[str, Shape],
    name: str,
) -> Iterator[Stored]:
    stem, _, suffix = name.rpartition(".")
    layer = -1
    if stem.startswith("layers."):
        _, number, stem = stem.split(".", 2)
        layer = int(number)
    source = _source(spec, names, prefix, has, stem, suffix, layer)
    if source.alternate or source.inputs_first:
        raise UnsupportedModel(
            f"{spec.architecture} models cannot be written: their experts are kept in a form that "
            "only reading knows"
        )
    at = _file_name(prefix, source, stem, suffix, layer)
    if has is not None and stem == "head":
        at = next((p + at for p in HEAD_PREFIXES if has(p + at)), at)
    parts: tuple[str, ...] = (name,)
    mixed: np.ndarray | None = None
    if source.part is not None:
        base, _, own = name.rpartition(".")
        before = base.rpartition(".")[0]
        kinds = next(kinds for kinds in _PARTS if source.part in kinds)
        parts = tuple(f"{before}.{kind}.{own}" for kind in kinds.values())
        mixed = mixed_order(spec, list(kinds), layer)
    vector = len(shapes[name]) == 1
    orders = tuple(_order(spec, source, part, layer) for part in parts)
    shape = shapes[name]
    rows = tuple(shapes[part][-1 if vector else -2] for part in parts)
    if len(parts) > 1:
        total = sum(rows)
        shape = (total,) if vector else (*shape[:-2], total, shape[-1])
    if "{e}" in source.name:
        ffn = spec.layers[layer].ffn
        assert isinstance(ffn, MoESpec)
        for expert in range(ffn.experts):
            whole = at.replace("{e}", str(expert))
            yield Stored(whole, shape[1:], parts, expert, orders=orders, rows=rows, vector=vector)
        return
    turned = source.conv1d and not vector
    in_file = shape[::-1] if turned else shape
    ffn = spec.layers[layer].ffn
    if source.taps and suffix == "weight":
        in_file = taps_shape(spec, layer, source.taps)
    elif isinstance(ffn, MoESpec) and vector and stem in OF_EXPERTS:
        in_file = (ffn.experts, shape[0] // ffn.experts)
    elif source.row:
        vector, in_file = True, shape[1:]
    columns = _tiling(spec, stem, layer) if source.tiled and stem == "delta.o" else None
    yield Stored(
        at,
        in_file,
        parts,
        None,
        turned,
        orders,
        rows,
        vector,
        mixed=mixed,
        columns=columns,
        negative_exp=source.negative_exp,
    )


def _own_offset(spec: DecoderSpec, name: str) -> float | None:
    """What is added to this weight to make a norm's gain; None for other weights."""
    if name in ("final_norm.weight", "per_layer_inputs.norm.weight"):
        return spec.final_norm.offset
    if not name.endswith("norm.weight"):
        return None
    layer = spec.layers[int(name.split(".")[1])]
    if ".delta." in name:
        return None  # every file has the gain itself
    norm = layer.attention.qk_norm if ".attn." in name else layer.norm
    assert norm is not None
    return norm.offset


def _source(
    spec: DecoderSpec,
    names: Names,
    prefix: str,
    has: Callable[[str], bool] | None,
    stem: str,
    suffix: str,
    layer: int,
) -> Source:
    entries = sources_of(names, stem, suffix)
    if not entries:
        raise UnsupportedModel(f"{spec.architecture} models have no name for {stem}.{suffix}")
    if has is None:
        return entries[0]
    for entry in entries:
        at = _file_name(prefix, entry, stem, suffix, layer).replace("{e}", "0")
        if has(at) or (stem == "head" and any(has(p + at) for p in HEAD_PREFIXES)):
            return entry
    return entries[0]


def _file_name(prefix: str, source: Source, stem: str, suffix: str, layer: int) -> str:
    ending = "" if source.bare else f".{suffix}"
    before = "" if stem == "head" else prefix
    return before + source.name.replace("{n}", str(layer)) + ending


def _order(spec: DecoderSpec, source: Source, name: str, layer: int) -> np.ndarray | None:
    """Which of our rows each row of the file is; None where they lie alike."""
    stem = name.split(".", 2)[-1].rpartition(".")[0]
    if source.tiled and stem != "delta.o":
        return _tiling(spec, stem, layer)
    if not source.interleaved:
        return None
    mixer = spec.layers[layer].attention
    if stem == "attn.v":
        return np.arange(mixer.kv_heads * mixer.head_dim)
    heads = mixer.heads if stem == "attn.q" else mixer.kv_heads
    rows = np.arange(heads * mixer.head_dim).reshape(heads, 2, mixer.head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _tiling(spec: DecoderSpec, stem: str, layer: int) -> np.ndarray:
    delta = spec.layers[layer].mixer
    assert isinstance(delta, GatedDeltaNetSpec)
    order = np.argsort(tiled_order(delta, stem))
    if stem != "delta.conv":
        return order
    return (order[:, None] * delta.kernel + np.arange(delta.kernel)).reshape(-1)


def _expert(weight: Affine, index: int) -> Affine:
    def one(groups: GroupValues) -> GroupValues:
        multiplier = groups.multiplier
        return GroupValues(groups.values[index], None if multiplier is None else multiplier[index])

    return Affine(
        weight.codes[index],
        weight.bits,
        weight.group,
        one(weight.scales),
        None if weight.biases is None else one(weight.biases),
        weight.zero_point,
    )


def _joined(parts: Sequence[Affine]) -> Affine | None:
    """One after the other, along the rows."""
    sides: list[GroupValues | None] = []
    for side in ("scales", "biases"):
        groups = [getattr(part, side) for part in parts]
        if all(g is None for g in groups):
            sides.append(None)
            continue
        if any(g is None for g in groups) or len({g.multiplier is None for g in groups}) > 1:
            return None
        many = None
        if groups[0].multiplier is not None:
            many = np.concatenate([g.multiplier for g in groups], axis=-2)
        sides.append(GroupValues(np.concatenate([g.values for g in groups], axis=-2), many))
    first = parts[0]
    codes = np.concatenate([part.codes for part in parts], axis=-2)
    assert sides[0] is not None
    return Affine(codes, first.bits, first.group, sides[0], sides[1], first.zero_point)


def to_dense(values: np.ndarray, dtype: str) -> Dense:
    """Finite float32 rounded to the nearest "float32", "float16" or "bfloat16" (ties to even)."""
    if dtype == "float32":
        return Dense(np.ascontiguousarray(values, np.float32), "float32")
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return Dense(values.astype(np.float16), "float16")
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return Dense((rounded >> 16).astype(np.uint16), "bfloat16")
