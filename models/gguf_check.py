"""Whether a GGUF file would say of a model all that there is to say of it.

llama.cpp takes much from an architecture's name alone (which activation, which scale of queries),
so a model that differs there would be written without complaint and run as another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint.base import Format
from localllm.checkpoint.form import DenseForm, Form
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import UnsupportedModel
from localllm.models.registry import load_spec
from localllm.spec import DecoderSpec, RopeSpec
from localllm.spec.rope import tables

# Norms are written with their offset in them; a file knows Mistral as Llama with a window.
_NOT_COMPARED = ("offset", "architecture")
_TOLERANCE = 1e-6  # numbers are float32 there


def require_told(
    spec: DecoderSpec,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    extra: Mapping[str, np.ndarray],
) -> None:
    """shapes: of every tensor of the file; extra: those of RoPE factors, with their values.

    Raises UnsupportedModel naming what the file would be read as differently.
    """
    told = load_spec(_Planned(metadata, shapes, extra))
    if spec.tied_head:  # a head that is a copy computes the same
        told = dataclasses.replace(told, tied_head=True)
    theirs = dict(_fields("", told))
    for name, ours in _fields("", spec):
        if not _same(ours, theirs.get(name), spec.context):
            raise UnsupportedModel(
                f"{spec.architecture}: {name} is {_shown(ours)}, and GGUF files of that "
                f"architecture are read as {_shown(theirs.get(name))}",
                hint="the format has no place for it; a safetensors folder has",
            )


def _fields(at: str, part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, RopeSpec) or not dataclasses.is_dataclass(part):
        if isinstance(part, tuple):
            yield f"{at}count", len(part)
            for n, one in enumerate(part):
                yield from _fields(f"{at}{n}.", one)
        else:
            yield at.removesuffix("."), part
        return
    for field in dataclasses.fields(part):
        if field.name not in _NOT_COMPARED:
            yield from _fields(f"{at}{field.name}.", getattr(part, field.name))


def _same(ours: Any, theirs: Any, context: int) -> bool:
    if isinstance(ours, RopeSpec) and isinstance(theirs, RopeSpec):
        return _same_rope(ours, theirs, context)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=_TOLERANCE)
    return bool(ours == theirs)


def _same_rope(ours: RopeSpec, theirs: RopeSpec, context: int) -> bool:
    """By their angles, short and long: kinds may differ that turn alike."""
    if (ours.dim, ours.interleaved) != (theirs.dim, theirs.interleaved):
        return False
    for length in (1, context):
        positions, lengths = np.array([1, 17]), np.array([length, length])
        for one, other in zip(
            tables(ours, positions, lengths), tables(theirs, positions, lengths), strict=True
        ):
            if not np.allclose(one, other, atol=1e-5):
                return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, RopeSpec):
        return f"{value.kind} RoPE of base {value.theta:g}"
    return repr(value)


class _Planned:
    """A file that is not written yet, as a checkpoint, for its spec to be read."""

    format: Format = "gguf"

    def __init__(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        extra: Mapping[str, np.ndarray],
    ) -> None:
        self.path = Path("the GGUF file")
        self.config = metadata
        self._shapes = {**shapes, **{name: array.shape for name, array in extra.items()}}
        self._extra = extra

    def files(self) -> tuple[Path, ...]:
        return ()

    def names(self) -> Iterator[str]:
        return iter(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def kind(self, name: str) -> str:
        return "F32"

    def nbytes(self, name: str) -> int:
        return 4 * int(math.prod(self._shapes[name]))

    def form(self, name: str) -> Form:
        return DenseForm(4)

    def tensor(self, name: str) -> Tensor:
        if name in self._extra:
            return Dense(self._extra[name].astype(np.float32), "float32")
        # A head that has a tensor is no copy of the embedding.
        return Dense(np.array([len(name)], np.float32), "float32")

    def forget_vocabulary(self) -> None: ...

    def close(self) -> None: ...
