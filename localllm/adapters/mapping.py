"""From the modules of a checkpoint to our linears, by the architecture's own table of names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from localllm.adapters.files import MAX_RANK, AdapterFile, ModulePair, names_match
from localllm.adapters.lora import EXPERTS, LINEARS, LowRank
from localllm.checkpoint.finite import require_finite
from localllm.checkpoint.safetensors import SafetensorsFile, StoredTensor
from localllm.checkpoint.tensor import Dense
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models.layout import PREFIXES, Source, sources
from localllm.models.registry import ARCHITECTURES
from localllm.models.weights import part_rows
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes

_NOT_ADAPTED = {
    "embed": "an embedding",
    "pos_embed": "an embedding",
    "head": "the output head",
    "moe": "experts or their router",
    "delta": "what a delta net's state changes by",
}
_EXPERTS_IN_FIRST = ("gpt_oss",)  # transformers keeps them [in, out]


class Mapped(NamedTuple):
    """By our names (`layers.0.attn.q` …): the pairs, and DoRA's magnitudes, float32 [out]."""

    pairs: dict[str, LowRank]
    magnitudes: dict[str, np.ndarray]


class _Place(NamedTuple):
    stem: str
    source: Source
    layer: int


def map_targets(adapter: AdapterFile, spec: DecoderSpec) -> Mapped:
    """Every pair, checked against the spec and read.

    One pair of a module that holds several of our linears (Phi's qkv_proj, GPT-2's c_attn) becomes
    several: they share A, and each has its own rows of B.
    """
    table = _Table(spec)
    shapes = weight_shapes(spec)
    for name in (*adapter.named, *adapter.named_experts):
        stems = EXPERTS if name in adapter.named_experts else LINEARS
        if table.has(name, stems) and not any(
            names_match(module, (name,)) for module in adapter.pairs
        ):
            raise CheckpointError(
                f"{adapter.file.path}: has no tensors for {name!r}, which adapter_config.json "
                "names",
                hint="The file is incomplete; save or download the adapter again.",
            )
    found: dict[str, LowRank] = {}
    magnitudes: dict[str, np.ndarray] = {}
    for module, pair in adapter.pairs.items():
        places = table.places(adapter.file, module, experts=pair.experts is not None)
        _check_layer(adapter, module, places[0].layer, len(spec.layers))
        targets = {f"layers.{p.layer}.{p.stem}": p for p in places}
        for target in targets:
            if f"{target}.weight" not in shapes:
                raise UnsupportedModel(
                    f"{adapter.file.path}: this {spec.architecture} model has no {module}"
                )
            if target in found:
                raise CheckpointError(f"{adapter.file.path}: two modules adapt {target}")
        *experts, _, inner = shapes[f"{next(iter(targets))}.weight"]
        if pair.experts is not None and [pair.experts] != experts:
            raise CheckpointError(
                f"{adapter.file.path}: {module} has {pair.experts} experts; this model has "
                f"{experts[0]}",
                hint="The adapter belongs to another model.",
            )
        total = sum(shapes[f"{target}.weight"][-2] for target in targets)
        if pair.experts is not None and total == inner:
            _check_square_experts(adapter, module, spec)
        whole = _read(adapter, module, pair, total, inner)
        parts = {target: _part(spec, whole, place) for target, place in targets.items()}
        found |= _own_ranks(parts, dora=pair.magnitude is not None) if len(parts) > 1 else parts
        if pair.magnitude is not None:
            vector = _magnitude(adapter, module, pair.magnitude, total)
            magnitudes |= {t: _part_of(spec, vector, place) for t, place in targets.items()}
    return Mapped(found, magnitudes)


def _part_of(spec: DecoderSpec, vector: np.ndarray, place: _Place) -> np.ndarray:
    rows = _rows_of(spec, place)
    return vector if rows is None else vector[rows]


def _part(spec: DecoderSpec, whole: LowRank, place: _Place) -> LowRank:
    """What a module's pair does to one of the linears in it."""
    rows = _rows_of(spec, place)
    return whole if rows is None else replace(whole, b=_rows(whole.b, rows))


def _rows_of(spec: DecoderSpec, place: _Place) -> slice | np.ndarray | None:
    """Those of a module that are this linear's; None for all."""
    if place.source.part is None:
        return None
    if place.source.alternate:
        return slice(0 if place.source.part == "gate" else 1, None, 2)
    return part_rows(spec, place.source.part, place.layer)[0]


def _own_ranks(parts: Mapping[str, LowRank], *, dora: bool) -> dict[str, LowRank]:
    """Without the ranks that only other parts use, as `save_adapter` lays them side by side.

    A part with no ranks of its own is not adapted, unless DoRA scales it.
    """
    used: dict[str, np.ndarray] = {
        target: np.any(pair.b.to_float32().reshape(-1, pair.rank) != 0, axis=0)
        for target, pair in parts.items()
    }
    if not any(columns.any() for columns in used.values()):
        return dict(parts)
    return {
        target: pair if used[target].all() else _with_ranks(pair, used[target])
        for target, pair in parts.items()
        if used[target].any() or dora
    }


def _with_ranks(pair: LowRank, kept: np.ndarray) -> LowRank:
    """kept: bool [r], of which one stays in any case."""
    kept = kept if kept.any() else np.arange(len(kept)) == 0
    a = replace(pair.a, data=np.ascontiguousarray(pair.a.data[..., kept, :]))
    b = replace(pair.b, data=np.ascontiguousarray(pair.b.data[..., kept]))
    return replace(pair, a=a, b=b)


class _Table:
    """Which of our linears a module of the checkpoint holds."""

    def __init__(self, spec: DecoderSpec) -> None:
        if spec.architecture not in ARCHITECTURES:
            raise UnsupportedModel(f"adapters of {spec.architecture} models are not supported")
        self._spec = spec
        self._weights = {name.removesuffix(".weight") for name in weight_shapes(spec)}
        self._stems = {name.split(".", 2)[-1] for name in self._weights}
        names = ARCHITECTURES[spec.architecture].names
        self._entries = [
            (re.compile(_as_pattern(source.name)), stem, source)
            for stem in names
            for source in sources(names, stem)
        ]

    def places(self, file: SafetensorsFile, module: str, *, experts: bool) -> list[_Place]:
        """At least one, all of one layer. experts: the module is a stack of matrices."""
        found = list(self._find(module))
        if experts:
            found = [place for place in found if place.stem in EXPERTS]
        # One name may stand for parts of which a model has the one or the other.
        here = [place for place in found if f"layers.{place.layer}.{place.stem}" in self._weights]
        found = here or found
        if not found:
            raise UnsupportedModel(
                f"{file.path}: the {self._spec.architecture} architecture has no linear {module}",
                hint="The adapter may belong to another model.",
            )
        for place in found:
            if place.stem not in (EXPERTS if experts else LINEARS):
                what = _NOT_ADAPTED.get(place.stem.split(".")[0], "no linear")
                raise UnsupportedModel(
                    f"{file.path}: {module} is {what}, which adapters cannot change here",
                    hint="Merge the adapter into its model and load that.",
                )
        layer = found[0].layer
        if layer >= len(self._spec.layers):
            raise CheckpointError(
                f"{file.path}: adapts layer {layer} of a model with "
                f"{len(self._spec.layers)} layers",
                hint="The adapter belongs to another model.",
            )
        return found

    def has(self, name: str, stems: Collection[str]) -> bool:
        """Whether some layer of the model has one of these that is called so, or ends so.

        PEFT lets a list name modules that a model has not.
        """
        return any(
            stem in stems
            and stem in self._stems
            and (names_match(source.name, (name,)) or expression.fullmatch(name))
            for expression, stem, source in self._entries
        )

    def _find(self, module: str) -> Iterator[_Place]:
        for expression, stem, source in self._entries:
            if match := expression.fullmatch(module):
                yield _Place(stem, source, int(match["n"]) if "n" in match.groupdict() else -1)


def _as_pattern(name: str) -> str:
    prefixes = "|".join(re.escape(prefix) for prefix in PREFIXES)
    text = re.escape(name).replace(re.escape("{n}"), "(?P<n>[0-9]{1,6})")
    return f"(?:{prefixes})" + text.replace(re.escape("{e}"), "[0-9]{1,6}")


def _check_layer(adapter: AdapterFile, module: str, layer: int, layers: int) -> None:
    allowed = adapter.layers
    if adapter.last_layers is not None:
        allowed = frozenset(range(max(0, layers - adapter.last_layers), layers))
    if allowed is not None and layer not in allowed:
        raise CheckpointError(
            f"{adapter.file.path}: has tensors for {module}, a layer that adapter_config.json "
            "leaves out"
        )


def _check_square_experts(adapter: AdapterFile, module: str, spec: DecoderSpec) -> None:
    """Shapes do not tell these apart from their transposes, which an older PEFT has adapted."""
    if adapter.experts_turned and spec.architecture not in _EXPERTS_IN_FIRST:
        raise UnsupportedModel(
            f"{adapter.file.path}: PEFT before 0.19 wrote it, which took the experts' {module} for "
            "its transpose",
            hint="Train the adapter anew with PEFT 0.19 or newer.",
        )


def _read(adapter: AdapterFile, module: str, pair: ModulePair, out: int, inner: int) -> LowRank:
    """Shapes are compared before a byte is read."""
    turned, experts = adapter.transposed, pair.experts or 1
    rank = pair.a.shape[turned] if len(pair.a.shape) == 2 else 0
    if not 1 <= rank <= MAX_RANK * experts:
        raise CheckpointError(
            f"{adapter.file.path}: {pair.a.name} has the shape {list(pair.a.shape)}, no matrix of "
            f"a rank from 1 to {MAX_RANK}"
        )
    sides = []
    for stored, shape in ((pair.a, (rank, inner)), (pair.b, (out, rank))):
        wanted = shape[::-1] if turned else shape
        if stored.shape != wanted:
            raise CheckpointError(
                f"{adapter.file.path}: {stored.name} has the shape {list(stored.shape)}; "
                f"{module} of this model calls for {list(wanted)}",
                hint="The adapter belongs to another model.",
            )
        sides.append(_dense(adapter.file, stored, turned))
    a, b = sides
    if pair.experts is not None:
        a = replace(a, data=a.data.reshape(experts, -1, inner))
        b = replace(b, data=b.data.reshape(out, -1, experts))
        b = replace(b, data=np.ascontiguousarray(b.data.transpose(2, 0, 1)))
    return LowRank(a, b, pair.scale)


def _magnitude(adapter: AdapterFile, module: str, stored: StoredTensor, out: int) -> np.ndarray:
    if stored.shape != (out,):
        raise CheckpointError(
            f"{adapter.file.path}: {stored.name} has the shape {list(stored.shape)}; "
            f"{module} of this model calls for {[out]}",
            hint="The adapter belongs to another model.",
        )
    return _dense(adapter.file, stored, turned=False).to_float32()


def _dense(file: SafetensorsFile, stored: StoredTensor, turned: bool) -> Dense:
    """A copy: nothing that happens to the file later matters."""
    tensor = file.dense(stored.name)
    require_finite(file.path, stored.name, tensor)
    return replace(tensor, data=np.array(tensor.data.T if turned else tensor.data, order="C"))


def _rows(tensor: Dense, rows: slice | np.ndarray) -> Dense:
    return replace(tensor, data=np.ascontiguousarray(tensor.data[..., rows, :]))
