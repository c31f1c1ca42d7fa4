"""Weights on their way into a backend: checked against the spec, one at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import CheckpointError
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes


def checked_weights(
    spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, in the same order; all that `spec` needs when the iterator ends.

    A tensor is for copying from: once the next is asked for, its pages of a mapped file leave
    memory (they come back if touched). Raises CheckpointError for a missing, unknown, repeated or
    misshapen weight.
    """
    missing = weight_shapes(spec)
    known = frozenset(missing)
    for name, tensor in weights:
        if name not in known:
            raise CheckpointError(f"{name}: this {spec.architecture} model has no such weight")
        if name not in missing:
            raise CheckpointError(f"{name}: given twice")
        needed = missing.pop(name)
        if tensor.shape != needed:
            raise CheckpointError(
                f"{name}: shape {list(tensor.shape)} where {list(needed)} is needed"
            )
        yield name, tensor
        _release_pages(tensor)
        del tensor  # else it would live on while the next one is read
    if missing:
        first = next(iter(missing))
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"weights are missing: {first}{others}")


def file_map(array: np.ndarray) -> mmap.mmap | None:
    """The file mapping an array is a view of, None if it has memory of its own."""
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return owner


def _release_pages(tensor: Tensor) -> None:
    """Otherwise a file read through a mapping counts twice: as its pages and as our copy."""
    array = tensor.data if isinstance(tensor, Dense) else tensor.codes
    mapping = file_map(array)
    # A writeable mapping may hold changes that are not in the file.
    if mapping is not None and not array.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
