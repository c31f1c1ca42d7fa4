"""Training by several processes that share each step's micro-batches (data parallelism).

Micro-batch i of a step belongs to process i modulo their number. Gradients are gathered and added
in the order of the micro-batches, by everyone alike, so that the result has the same bits with
any number of processes: a reduction would add in an order of its own.

`mlx.launch` starts the processes (https://ml-explore.github.io/mlx, "Distributed Communication").
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np

from localllm.errors import BackendUnavailable

# What mlx.launch, Open MPI and MPICH tell their processes.
_TOLD = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_BLOCK = 64 << 20  # bytes sent at once, so that gathering a large vector holds little of it twice


class Group(Protocol):
    """rank: which of `size` processes this is."""

    rank: int
    size: int

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Everyone's array, of one shape and dtype, by rank: [size, *shape]."""
        ...

    def first(self, data: bytes) -> bytes:
        """What rank 0 holds; what the others pass is ignored."""
        ...


class Alone:
    """The only process."""

    rank, size = 0, 1

    def gather(self, array: np.ndarray) -> np.ndarray:
        return array[None]

    def first(self, data: bytes) -> bytes:
        return data


class MlxGroup:
    """The processes of `mx.distributed`. Bytes travel, so that no dtype is changed on the way."""

    def __init__(self, group: Any) -> None:
        self.rank, self.size = int(group.rank()), int(group.size())
        self._group = group

    def gather(self, array: np.ndarray) -> np.ndarray:
        sent = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        made = np.empty((self.size, len(sent)), np.uint8)
        for start in range(0, len(sent), _BLOCK):
            made[:, start : start + _BLOCK] = self._gathered(sent[start : start + _BLOCK])
        return made.view(array.dtype).reshape(self.size, *array.shape)

    def first(self, data: bytes) -> bytes:
        size = int(self.gather(np.array(len(data), np.int64))[0])
        mine = np.frombuffer(data, np.uint8) if self.rank == 0 else np.zeros(size, np.uint8)
        made = np.empty(size, np.uint8)
        for start in range(0, size, _BLOCK):
            made[start : start + _BLOCK] = self._gathered(mine[start : start + _BLOCK])[0]
        return made.tobytes()

    def _gathered(self, block: np.ndarray) -> np.ndarray:
        import mlx.core as mx

        everyone = mx.distributed.all_gather(mx.array(block), group=self._group, stream=mx.cpu)
        return np.array(everyone, copy=False).reshape(self.size, -1)


def join_group() -> Group:
    """The processes started together with this one; none unless a launcher says so."""
    if not any(name in os.environ for name in _TOLD):
        return Alone()
    import mlx.core as mx

    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"the launched processes cannot be joined: {error}",
            hint="start them with `mlx.launch`, or unset MLX_RANK to train alone",
        ) from error
    return MlxGroup(group) if group.size() > 1 else Alone()
