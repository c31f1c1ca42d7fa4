"""From the tensors of a checkpoint to the weights of a spec, one at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.form import AffineForm, Form
from localllm.checkpoint.tensor import Affine, Dense, Tensor
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models.layout import (
    Layout,
    Part,
    Source,
    head_name,
    prefix_of,
    sources,
    sources_of,
)
from localllm.models.stacking import stack
from localllm.spec import DecoderSpec, GatedDeltaNetSpec, MoESpec, ShortConvSpec
from localllm.spec.weights import weight_shapes

Shape = tuple[int, ...]

OF_EXPERTS = ("moe.gate", "moe.up", "moe.down")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pick:
    """One weight, found: the tensors it is made of and what is done to them.

    order, columns: which row, which column of the file each of ours is. factor: the tensor that
    NVFP4 keeps beside its weights, with a number for all of them or for each expert.
    """

    shape: Shape
    files: tuple[str, ...]
    stacked: bool = False
    rows: slice | np.ndarray | None = None
    transposed: bool = False
    flat: bool = False
    order: np.ndarray | None = None
    columns: np.ndarray | None = None
    negative_exp: bool = False
    factor: str | None = None


def read_weights(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    layout: Layout,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the spec, or only those named, in the order of `weight_shapes`, each read
    when it is asked for.

    All names and shapes are checked before the first is read. Raises CheckpointError for a
    missing tensor or one whose shape contradicts the config, UnsupportedModel for a tensor that
    the architecture does not know.
    """
    picks = _Finder(checkpoint, spec, layout).picks()
    _refuse_leftovers(checkpoint, spec, layout, picks)
    if only is not None:
        picks = {name: pick for name, pick in picks.items() if name in only}
    return _read(checkpoint, picks)


def read_layer(checkpoint: Checkpoint, spec: DecoderSpec, layout: Layout) -> dict[str, Tensor]:
    """All weights but the embedding, of a part of a checkpoint; raises as `read_weights`."""
    finder = _Finder(checkpoint, spec, layout)
    shapes = weight_shapes(spec)
    del shapes["embed.weight"]
    return dict(
        _read(checkpoint, {name: finder.pick(name, shape) for name, shape in shapes.items()})
    )


def read_forms(checkpoint: Checkpoint, spec: DecoderSpec, layout: Layout) -> dict[str, Form]:
    """How `read_weights` will give each weight, told from headers alone; raises what it raises."""
    picks = _Finder(checkpoint, spec, layout).picks()
    return {name: _form(checkpoint, pick) for name, pick in picks.items()}


def read_kinds(checkpoint: Checkpoint, spec: DecoderSpec, layout: Layout) -> dict[str, str]:
    """What the file calls the type of each weight."""
    picks = _Finder(checkpoint, spec, layout).picks()
    return {name: checkpoint.kind(pick.files[0]) for name, pick in picks.items()}


class _Finder:
    """Looks up and checks every weight of a spec in one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, spec: DecoderSpec, layout: Layout) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._layout = layout
        self._prefix = prefix_of(checkpoint, layout)
        self._named = {one.name for stem in layout.names for one in sources(layout.names, stem)}

    def picks(self) -> dict[str, _Pick]:
        return {name: self.pick(name, shape) for name, shape in weight_shapes(self._spec).items()}

    def pick(self, name: str, shape: Shape) -> _Pick:
        stem, _, suffix = name.rpartition(".")
        layer = -1
        if stem.startswith("layers."):
            _, number, stem = stem.split(".", 2)
            layer = int(number)
        tried: list[str] = []
        for source in sources_of(self._layout.names, stem, suffix):
            files = self._files(source, stem, suffix, layer)
            if all(file in self._checkpoint for file in files):
                return self._checked(source, stem, layer, shape, files)
            absent = [file for file in files if file not in self._checkpoint]
            # Of several experts some are there: name the one that is not.
            tried.insert(0 if len(absent) < len(files) else len(tried), absent[0])
        raise CheckpointError(
            f"{self._checkpoint.path}: {tried[0]} is missing",
            hint="The download may be incomplete."
            if len(tried) == 1
            else f"Also looked for: {', '.join(tried[1:])}.",
        )

    def _files(self, source: Source, stem: str, suffix: str, layer: int) -> tuple[str, ...]:
        ending = "" if source.bare else f".{suffix}"
        if stem == "head":
            name = head_name(self._checkpoint, self._layout) or f"{source.name}.weight"
            return (name.removesuffix(".weight") + ending,)
        name = self._prefix + source.name.replace("{n}", str(layer)) + ending
        if "{e}" not in name:
            return (name,)
        ffn = self._spec.layers[layer].ffn
        assert isinstance(ffn, MoESpec)
        return tuple(name.replace("{e}", str(e)) for e in range(ffn.experts))

    def _checked(
        self, source: Source, stem: str, layer: int, shape: Shape, files: tuple[str, ...]
    ) -> _Pick:
        """Compares shapes as the file must have them."""
        rows: slice | np.ndarray | None = None
        wanted = whole = shape
        if source.taps:
            whole = taps_shape(self._spec, layer, source.taps)
        ffn = self._spec.layers[layer].ffn
        flat = isinstance(ffn, MoESpec) and len(shape) == 1 and stem in OF_EXPERTS
        if flat:  # a vector an expert, here [E, out, 1]
            assert isinstance(ffn, MoESpec)
            whole = shape = (ffn.experts, shape[0] // ffn.experts, 1)
        if source.part is not None:
            rows, total = part_rows(self._spec, source.part, layer)
            if source.alternate:
                rows = slice(0 if source.part == "gate" else 1, None, 2)
            whole = (*shape[:-2], total, shape[-1]) if len(shape) > 1 else (total,)
        transposed = source.conv1d and len(shape) == 2 and self._keeps_conv1d(layer)
        in_file = whole[::-1] if transposed else whole
        if source.inputs_first:
            transposed, in_file = True, (whole[0], whole[2], whole[1])
        if flat:
            in_file = in_file[:-1]
        stacked = "{e}" in source.name
        if stacked:
            in_file = in_file[1:]
        for file in files:
            found = self._checkpoint.shape(file)
            if found != in_file and not (source.row and found == in_file[1:]):
                raise CheckpointError(
                    f"{self._checkpoint.path}: {file} has the shape {list(found)}; "
                    f"the config calls for {list(in_file)}"
                )
        order = self._order(stem, layer) if source.interleaved else None
        columns = None
        if source.tiled:
            mixer = self._spec.layers[layer].mixer
            assert isinstance(mixer, GatedDeltaNetSpec)
            tiled = tiled_order(mixer, stem)
            order, columns = (None, tiled) if stem == "delta.o" else (tiled, None)
        return _Pick(
            wanted,
            files,
            stacked,
            rows,
            transposed,
            flat,
            order,
            columns,
            source.negative_exp,
            self._factor(files, whole[:-2]),
        )

    def _factor(self, files: tuple[str, ...], experts: Shape) -> str | None:
        (file, *others) = files
        name = factor_of(self._checkpoint, file)
        if others or name is None or re.sub(r"\.\d+\.", ".{n}.", name) in self._named:
            return None
        if (found := self._checkpoint.shape(name)) not in ((), (1,), experts):
            raise CheckpointError(f"{self._checkpoint.path}: {name} has the shape {list(found)}")
        return name

    def _keeps_conv1d(self, layer: int) -> bool:
        """MLX converters turn Conv1D weights around; that of q, k and v, never square, tells."""
        name = self._files(sources(self._layout.names, "attn.q")[0], "attn.q", "weight", layer)[0]
        total = part_rows(self._spec, "v", layer)[1]
        turned = (total, self._spec.hidden)
        return name not in self._checkpoint or self._checkpoint.shape(name) != turned

    def _order(self, stem: str, layer: int) -> np.ndarray:
        """Which row of the file each of our rows is."""
        mixer = self._spec.layers[layer].attention
        heads = mixer.heads if stem == "attn.q" else mixer.kv_heads
        rows = np.arange(heads * mixer.head_dim).reshape(heads, mixer.head_dim // 2, 2)
        return rows.swapaxes(1, 2).reshape(-1)


def part_rows(spec: DecoderSpec, part: Part, layer: int) -> tuple[slice | np.ndarray, int]:
    """The rows of a part in a fused tensor, and how many that has."""
    if part in ("gate", "up"):
        hidden = spec.layers[layer].ffn.hidden
        return slice(0, hidden) if part == "gate" else slice(hidden, 2 * hidden), 2 * hidden
    mixer = spec.layers[layer].mixer
    if isinstance(mixer, GatedDeltaNetSpec):
        return _group_rows(mixer, part)
    attn = spec.layers[layer].attention
    q, kv = attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim
    if part in ("heads_q", "heads_gate"):
        heads = np.arange(2 * q).reshape(attn.heads, 2, attn.head_dim)
        return heads[:, 0 if part == "heads_q" else 1].reshape(-1), 2 * q
    first = {"q": 0, "k": q, "v": q + kv}[part]
    return slice(first, first + (q if part == "q" else kv)), q + 2 * kv


def mixed_order(spec: DecoderSpec, parts: Sequence[Part | None], layer: int) -> np.ndarray | None:
    """Which of the rows of these parts, one after the other, each row of their tensor is.

    None where it has them in that order. The parts are all that is in the tensor.
    """
    rows = [part_rows(spec, part, layer)[0] for part in parts if part is not None]
    mixed = [found for found in rows if isinstance(found, np.ndarray)]
    if not mixed:
        return None
    assert len(mixed) == len(parts)
    return np.argsort(np.concatenate(mixed))


def _group_rows(delta: GatedDeltaNetSpec, part: Part) -> tuple[np.ndarray, int]:
    """By key head: its q, its k, and v and z of its value heads; or their betas and decays."""
    repeat = delta.value_heads // delta.key_heads
    values = repeat * delta.value_dim
    if part in ("groups_beta", "groups_decay"):
        both = np.arange(2 * delta.value_heads).reshape(delta.key_heads, 2, repeat)
        return both[:, 0 if part == "groups_beta" else 1].reshape(-1), both.size
    rows = np.arange(delta.key_heads * 2 * (delta.key_dim + values)).reshape(delta.key_heads, -1)
    ends = np.cumsum([delta.key_dim, delta.key_dim, values])
    q, k, v, z = (found.reshape(-1) for found in np.split(rows, ends, axis=1))
    return (z if part == "groups_z" else np.concatenate([q, k, v])), rows.size


def factor_of(checkpoint: Checkpoint, file: str) -> str | None:
    """What all of this tensor's weights are multiplied with, if NVFP4 has it beside them."""
    name = f"{file.removesuffix('.weight')}.scale"
    return name if name in checkpoint and checkpoint.kind(file) == "NVFP4" else None


def tiled_order(delta: GatedDeltaNetSpec, stem: str) -> np.ndarray:
    """Which entry of a tiled tensor each of ours is; of its rows, for `delta.o` of its columns."""
    repeat = delta.value_heads // delta.key_heads
    heads = np.arange(delta.value_heads).reshape(repeat, delta.key_heads).T.reshape(-1)
    if stem in ("delta.beta", "delta.decay", "delta.rate", "delta.step"):
        return heads
    values = (heads[:, None] * delta.value_dim + np.arange(delta.value_dim)).reshape(-1)
    if stem in ("delta.z", "delta.o"):
        return values
    keys = 2 * delta.key_heads * delta.key_dim
    return np.concatenate([np.arange(keys), keys + values])


def taps_shape(spec: DecoderSpec, layer: int, dimensions: int) -> Shape:
    """How a layer's convolution is kept."""
    mixer = spec.layers[layer].mixer
    assert isinstance(mixer, GatedDeltaNetSpec | ShortConvSpec)
    one = (1,) * (dimensions - 2)
    return (mixer.channels, *one, mixer.kernel)


def _refuse_leftovers(
    checkpoint: Checkpoint, spec: DecoderSpec, layout: Layout, picks: Mapping[str, _Pick]
) -> None:
    used = {file for pick in picks.values() for file in (*pick.files, pick.factor) if file}
    used |= _of_sharing_layers(checkpoint, spec, layout)
    if spec.tied_head and (head := head_name(checkpoint, layout)):
        used.add(head)  # a copy of the embedding
    left: list[str] = []
    others: list[str] = []
    for name in checkpoint.names():
        if name in used or _matches(name, layout.buffers):
            continue
        (others if _matches(name, layout.other_parts) else left).append(name)
    if left:
        raise UnsupportedModel(
            f"{checkpoint.path}: the {spec.architecture} architecture has no place for "
            f"{_listed(left)}",
            hint="Leaving weights out would run another model than the one in the file.",
        )
    if others:
        log.warning(
            "%s: only the language model is loaded, not %s", checkpoint.path, _listed(others)
        )


def _of_sharing_layers(checkpoint: Checkpoint, spec: DecoderSpec, layout: Layout) -> set[str]:
    """What layers that attend to another's keys may keep of their own, used by no program."""
    found = set()
    for index, attn in spec.attentions:
        if attn.shared_kv is None:
            continue
        for stem in ("attn.k", "attn.v", "attn.k_norm"):
            for source in sources(layout.names, stem):
                name = prefix_of(checkpoint, layout) + source.name.replace("{n}", str(index))
                found |= {f"{name}.weight", f"{name}.bias"}
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read(checkpoint: Checkpoint, picks: Mapping[str, _Pick]) -> Iterator[tuple[str, Tensor]]:
    fused: tuple[str, Tensor] | None = None  # q, k and v follow each other: read their tensor once
    for name, pick in picks.items():
        if pick.stacked:
            yield name, stack(checkpoint, pick.files)
            continue
        (file,) = pick.files
        if pick.rows is None:
            fused = None
            tensor = _whole(checkpoint, file, pick)
        else:
            if fused is None or fused[0] != file:
                fused = (file, _whole(checkpoint, file, pick))
            tensor = fused[1]
        if pick.rows is not None:
            tensor = tensor.rows(pick.rows)
        if pick.order is not None:
            tensor = tensor.rows(pick.order)
        if pick.columns is not None:
            tensor = _columns(checkpoint, file, tensor, pick.columns)
        if pick.negative_exp:
            tensor = _log_negated(checkpoint, file, tensor.to_float32())
        if tensor.shape != pick.shape and not pick.stacked:
            assert isinstance(tensor, Dense)
            tensor = Dense(np.ascontiguousarray(tensor.data).reshape(pick.shape), tensor.dtype)
        yield name, tensor


def _columns(checkpoint: Checkpoint, file: str, tensor: Tensor, order: np.ndarray) -> Tensor:
    try:
        return tensor.columns(order)
    except ValueError as error:
        raise UnsupportedModel(f"{checkpoint.path}: {file}: {error}") from None


def _log_negated(checkpoint: Checkpoint, file: str, values: np.ndarray) -> Dense:
    if not (values < 0).all():
        raise CheckpointError(f"{checkpoint.path}: {file} must be negative throughout")
    return Dense(np.log(-values), "float32")


def _form(checkpoint: Checkpoint, pick: _Pick) -> Form:
    form = checkpoint.form(pick.files[0])
    if pick.factor is not None and isinstance(form, AffineForm):
        form = form.scaled()
    return form if pick.columns is None else form.with_columns_moved()


def _whole(checkpoint: Checkpoint, file: str, pick: _Pick) -> Tensor:
    tensor = checkpoint.tensor(file)
    if pick.factor is not None and isinstance(tensor, Affine):
        tensor = tensor.scaled(checkpoint.tensor(pick.factor).to_float32())
    if pick.flat and isinstance(tensor, Dense):
        return Dense(tensor.data[..., None], tensor.dtype)
    if not pick.transposed:
        return tensor
    if not isinstance(tensor, Dense):
        raise UnsupportedModel(f"{checkpoint.path}: {file} is quantized along its outputs")
    return Dense(np.ascontiguousarray(tensor.data.swapaxes(-1, -2)), tensor.dtype)
