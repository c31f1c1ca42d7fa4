"""A model as one GGUF file, written in process: metadata, vocabulary, tensors one after the other.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from localllm.checkpoint.gguf import GGUFCheckpoint
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.export import k_quants
from localllm.export.source import Source
from localllm.files import sync_folder
from localllm.models import load_kinds
from localllm.models.gguf import names_of
from localllm.models.gguf_check import require_told
from localllm.models.gguf_config import GGUFConfig
from localllm.models.gguf_metadata import (
    gguf_architecture,
    gguf_metadata,
    gguf_names,
    gguf_notes,
    needs_head,
)
from localllm.models.layout import Names
from localllm.models.weights import factor_of
from localllm.models.writing import Stored, gather, stored_tensors, to_dense
from localllm.tokenizer.gguf_vocabulary import gguf_vocabulary

if TYPE_CHECKING:
    import gguf

Kind = Literal["keep", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_BLOCK = 32  # values in a block of the simpler quantized types
_DENSE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Written anew, or of no use in one file.
_NOT_COPIED = ("general.architecture", "general.file_type", "general.quantization_version")
_SAME_BLOCKS = {"mxfp4": "MXFP4"}  # of folders, by the names that GGUF has for them
_ROUTER = "ffn_gate_inp"  # kept in float32: a choice between experts hangs on it


@dataclass(frozen=True)
class WrittenGGUF:
    """nbytes: of the file. kinds: how many tensors are of each type; changed: by the adapter.

    notes: what llama.cpp will not do as the model does.
    """

    path: Path
    nbytes: int
    kinds: Mapping[str, int]
    changed: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    """shape: of the values; kind: a type's name. copied: as it lies in the source file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    stored: Stored | None
    copied: bool = False


def write_gguf(
    source: Source,
    path: Path,
    kind: Kind = "keep",
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenGGUF:
    """Writes the model, merged with the adapter if it has one.

    kind: of matrices. "keep" leaves each as it is stored and writes what the adapter changes in
        float16 (bfloat16 or float32 where it was such). Vectors and routers stay float32.
    The file appears when it is whole. Raises UnsupportedModel for an architecture, vocabulary or
    quantization that the format or this writer has no place for, CheckpointError where the file
    cannot be written.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"no type {kind!r}", hint=f"types: {', '.join(KINDS)}")
    checkpoint = source.checkpoint
    _, names, has = gguf_layout(source)
    stored = stored_tensors(source.spec, names, "", has=has)
    metadata: _Copied | _Made
    extra: dict[str, np.ndarray] = {}
    if isinstance(checkpoint, GGUFCheckpoint):
        metadata = _Copied(checkpoint)
    else:
        made, extra = gguf_metadata(source.spec)
        if needs_head(source.spec):
            embed = next(one for one in stored if one.parts == ("embed.weight",))
            stored.append(replace(embed, name="output.weight"))
        require_told(source.spec, made, {one.name: one.shape for one in stored}, extra)
        made["general.name"] = Path(source.name).name
        made |= gguf_vocabulary(source.path, source.spec.vocab_size)
        metadata = _Made(made)
    tensors = _plan(source, kind, stored, extra)
    part = path.with_name(f".{path.name}.part")
    try:
        _write(source, part, metadata, tensors, kind, extra, progress)
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return WrittenGGUF(
        path,
        path.stat().st_size,
        dict(Counter(tensor.kind for tensor in tensors)),
        sum(t.stored is not None and _is_changed(source, t.stored) for t in tensors),
        gguf_notes(source.spec),
    )


def gguf_layout(source: Source) -> tuple[str, Names, Callable[[str], bool] | None]:
    """`general.architecture`, names of tensors, and which of several places the source uses."""
    checkpoint = source.checkpoint
    if isinstance(checkpoint, GGUFCheckpoint):
        name = GGUFConfig(checkpoint).architecture
        return name, names_of(name), checkpoint.__contains__
    return gguf_architecture(source.spec), gguf_names(source.spec), None


class _Copied:
    """The metadata of a GGUF file, type by type as it is there."""

    def __init__(self, checkpoint: GGUFCheckpoint) -> None:
        self.architecture = str(checkpoint.config["general.architecture"])
        self._checkpoint = checkpoint

    def put(self, writer: gguf.GGUFWriter) -> None:
        import gguf

        for key, value in self._checkpoint.config.items():
            if key.startswith("split.") or key in _NOT_COPIED:
                continue
            kind, inner = self._checkpoint.kinds[key]
            of = None if inner is None else gguf.GGUFValueType(inner)
            writer.add_key_value(key, value, gguf.GGUFValueType(kind), sub_type=of)


class _Made:
    """Metadata of our own: int, float, bool, str and lists of one of them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.architecture = str(values["general.architecture"])
        self._values = values

    def put(self, writer: gguf.GGUFWriter) -> None:
        for key, value in self._values.items():
            if key in _NOT_COPIED:
                continue
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_string(key, str(value))


def _plan(
    source: Source, kind: Kind, stored: list[Stored], extra: Mapping[str, np.ndarray]
) -> list[_Tensor]:
    checkpoint = source.checkpoint
    kinds = load_kinds(checkpoint, source.spec)
    # Tensors come as their last part does.
    place = {name: i for i, name in enumerate(kinds)}
    stored = sorted(stored, key=lambda one: max(place[part] for part in one.parts))
    others = [_Tensor(name, array.shape, "F32", None) for name, array in extra.items()]
    found = []
    for one in stored:
        wanted = _kind(source, kind, one, {kinds[part] for part in one.parts})
        copied = (
            isinstance(checkpoint, GGUFCheckpoint)
            and not _is_changed(source, one)
            and checkpoint.kind(one.name) == wanted
        )
        found.append(_Tensor(one.name, one.shape, wanted, one, copied))
    if isinstance(checkpoint, GGUFCheckpoint):
        known = {one.name for one in stored}
        # The factors of weights that are written anew are in them.
        known |= {factor_of(checkpoint, t.name) or "" for t in found if not t.copied}
        for name in checkpoint.names():  # tables of RoPE, a copy of a tied head
            if name not in known:
                kept = checkpoint.kind(name)
                others.append(_Tensor(name, checkpoint.shape(name), kept, None, copied=True))
    return [*others, *found]


def _is_changed(source: Source, stored: Stored) -> bool:
    return any(part in source.adapted for part in stored.parts)


def _kind(source: Source, kind: Kind, stored: Stored, own: set[str]) -> str:
    if kind == "keep":
        name = own.pop() if len(own) == 1 else "F16"
        if isinstance(source.checkpoint, GGUFCheckpoint) and not _is_changed(source, stored):
            return name
        if stored.vector:
            return "F32"
        name = _SAME_BLOCKS.get(name, name)
        if name in _SAME_BLOCKS.values() and not _is_changed(source, stored):
            return name
        if name not in _DENSE and not isinstance(source.checkpoint, GGUFCheckpoint):
            raise UnsupportedModel(
                f"{source.name}: {name} has no counterpart in GGUF",
                hint="choose a type: --type f16, q8_0 …",
            )
        return name if name in _DENSE else "F16"
    if stored.vector or _ROUTER in stored.name:
        return "F32"
    if kind.startswith("q") and stored.shape[-1] % _BLOCK:
        return "F16"
    name = kind.upper()
    return k_quants.INSTEAD.get(name, name) if stored.shape[-1] % k_quants.BLOCK else name


def _write(
    source: Source,
    path: Path,
    metadata: _Copied | _Made,
    tensors: list[_Tensor],
    kind: Kind,
    extra: Mapping[str, np.ndarray],
    progress: Callable[[int, int], None],
) -> None:
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, metadata.architecture)
    try:
        metadata.put(writer)
        if kind != "keep" or not isinstance(metadata, _Copied):
            most = Counter(t.kind for t in tensors if len(t.shape) > 1).most_common(1)[0][0]
            writer.add_file_type(_file_type(most))
        if any(tensor.kind not in _DENSE for tensor in tensors):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        total = 0
        for tensor in tensors:
            shape, dtype, nbytes = _form(tensor)
            raw = None if tensor.kind in ("F32", "F16") else gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, shape, dtype, nbytes, raw_dtype=raw)
            total += nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for array in _arrays(source, tensors, extra):
            writer.write_tensor_data(array)
            done += array.nbytes
            progress(done, total)
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
    finally:
        writer.close()


def _file_type(kind: str) -> int:
    import gguf

    name = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}.get(kind, f"MOSTLY_{kind}")
    return int(getattr(gguf.LlamaFileType, name, gguf.LlamaFileType.GUESSED))


def _form(tensor: _Tensor) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and bytes as the library wants to hear them: blocks as rows of bytes."""
    import gguf

    if tensor.kind == "F32":
        return tensor.shape, np.dtype(np.float32), int(np.prod(tensor.shape)) * 4
    if tensor.kind == "F16":
        return tensor.shape, np.dtype(np.float16), int(np.prod(tensor.shape)) * 2
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
    return shape, np.dtype(np.uint8), int(np.prod(shape))


def _arrays(
    source: Source, tensors: list[_Tensor], extra: Mapping[str, np.ndarray]
) -> Iterator[np.ndarray]:
    """In the order of `tensors`."""
    checkpoint = source.checkpoint
    computed = [t for t in tensors if t.stored is not None and not t.copied]
    only = {part for t in computed if t.stored is not None for part in t.stored.parts}
    ready = gather([t.stored for t in computed if t.stored is not None], source.weights(only))
    for tensor in tensors:
        shape, dtype, _ = _form(tensor)
        if tensor.copied:
            assert isinstance(checkpoint, GGUFCheckpoint)
            yield checkpoint.raw(tensor.name).view(dtype).reshape(shape)
        elif tensor.stored is None:
            yield extra[tensor.name].astype(np.float32)
        else:
            stored, parts = next(ready)
            assert stored.name == tensor.name, f"{stored.name} came for {tensor.name}"
            yield _encoded(stored.assemble([p.to_float32() for p in parts]), tensor.kind, stored)


def _encoded(values: np.ndarray, kind: str, stored: Stored) -> np.ndarray:
    import gguf

    if kind == "BF16":
        return to_dense(values, "bfloat16").data.view(np.uint8)
    if kind in _DENSE:
        found = to_dense(values, _DENSE[kind]).data
        if not np.isfinite(found).all():
            raise UnsupportedModel(
                f"{stored.name}: a weight is too large for float16", hint="choose --type bf16"
            )
        return found
    if kind in k_quants.INSTEAD:
        return k_quants.quantize(values, kind)
    encoded: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return encoded
