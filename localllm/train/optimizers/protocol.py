"""What an optimizer is: an update of flat float32 vectors, in one fixed order of operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from localllm.errors import CheckpointError
from localllm.train.program import Layout


class Optimizer(Protocol):
    """State and results depend on the calls alone: the same calls give the same bits."""

    name: str

    def state(self) -> dict[str, np.ndarray]:
        """All it knows, as arrays; they are its own, so copy what is to be kept."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises CheckpointError for arrays that are missing, unknown or misshapen."""
        ...

    def update(
        self, parameters: np.ndarray, gradient: np.ndarray, learning_rate: float, step: int
    ) -> None:
        """Changes `parameters` in place. float32 [layout.size]; step: counted from 1."""
        ...


@dataclass(frozen=True)
class Piece:
    """One parameter of the flat vector. rate: times the learning rate; decay: whether it decays."""

    name: str
    at: slice
    shape: tuple[int, ...]
    rate: float
    decay: bool


def pieces(layout: Layout, lora_plus: float | None = None) -> tuple[Piece, ...]:
    """Matrices decay; gains, biases and magnitudes do not. B learns `lora_plus` times as fast."""
    return tuple(_pieces(layout, lora_plus or 1.0))


def _pieces(layout: Layout, ratio: float) -> Iterator[Piece]:
    at = 0
    for name, shape in layout.shapes.items():
        stop = at + int(np.prod(shape))
        is_b = bool(layout.scales) and name.endswith(".b")
        yield Piece(name, slice(at, stop), shape, ratio if is_b else 1.0, len(shape) > 1)
        at = stop


def merged(parts: Iterable[Piece]) -> tuple[Piece, ...]:
    """Neighbours that are treated alike as one, for updates entry by entry."""
    result: list[Piece] = []
    for part in parts:
        if result and (result[-1].rate, result[-1].decay) == (part.rate, part.decay):
            last = result.pop()
            at = slice(last.at.start, part.at.stop)
            part = replace(last, at=at, shape=(at.stop - at.start,))
        result.append(part)
    return tuple(result)


def checked_state(
    own: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The optimizer's own arrays by name, after comparing all of them with `given`."""
    if own.keys() != given.keys():
        raise CheckpointError(
            f"the optimizer's state holds {', '.join(given) or 'nothing'} where "
            f"{', '.join(own) or 'nothing'} is needed",
            hint="the checkpoint belongs to another optimizer",
        )
    for name, array in own.items():
        found = given[name]
        if found.shape != array.shape or found.dtype != array.dtype:
            raise CheckpointError(
                f"the optimizer's {name} is {found.dtype} {list(found.shape)} where "
                f"{array.dtype} {list(array.shape)} is needed",
                hint="the checkpoint belongs to another optimizer or layout",
            )
    return iter(own.items())
