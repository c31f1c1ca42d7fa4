"""Experts stored one by one, stacked into one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor
from localllm.errors import UnsupportedModel


def stack(checkpoint: Checkpoint, files: Sequence[str]) -> Tensor:
    """The matrices of all experts, [E, out, in], read one by one into their place."""
    first = checkpoint.tensor(files[0])
    if isinstance(first, Dense):
        data = np.empty((len(files), *first.shape), first.data.dtype)
        for at, file in enumerate(files):
            tensor = first if at == 0 else checkpoint.tensor(file)
            if not isinstance(tensor, Dense) or tensor.dtype != first.dtype:
                raise _unlike(checkpoint, files[0], file)
            data[at] = tensor.data
        return Dense(data, first.dtype)
    tensors = [first]
    for file in files[1:]:
        tensor = checkpoint.tensor(file)
        if not isinstance(tensor, Affine) or _form(tensor) != _form(first):
            raise _unlike(checkpoint, files[0], file)
        tensors.append(tensor)
    biases = [tensor.biases for tensor in tensors if tensor.biases is not None]
    return Affine(
        np.stack([tensor.codes for tensor in tensors]),
        first.bits,
        first.group,
        _stack_groups([tensor.scales for tensor in tensors]),
        _stack_groups(biases) if biases else None,
        first.zero_point,
    )


def _stack_groups(groups: Sequence[GroupValues]) -> GroupValues:
    multipliers = [group.multiplier for group in groups if group.multiplier is not None]
    return GroupValues(
        np.stack([group.values for group in groups]), np.stack(multipliers) if multipliers else None
    )


def _form(tensor: Affine) -> tuple[object, ...]:
    def of(group: GroupValues | None) -> object:
        return group and (group.values.dtype, group.multiplier is not None)

    return tensor.bits, tensor.group, tensor.zero_point, of(tensor.scales), of(tensor.biases)


def _unlike(checkpoint: Checkpoint, first: str, other: str) -> UnsupportedModel:
    return UnsupportedModel(f"{checkpoint.path}: {first} and {other} are stored in different ways")
