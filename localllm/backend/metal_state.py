"""The metal backend's states of recurrent layers.

A slot holds arrays, one for each part of a layer's state. A step makes new ones, and the slot that
it writes takes them over when it is done: nothing is copied, and nothing that was read changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from localllm.backend.metal_recurrent import Advance, Inputs, Recurrent, State
from localllm.backend.protocol import StateSlots
from localllm.kernels_metal.runs import MOST_RUNS, Run, joined


class StatePool:
    """mixers: of all recurrent layers, by their numbers. A slot takes memory when it is written."""

    def __init__(self, mixers: Mapping[int, Recurrent], slots: int) -> None:
        self._mixers = mixers
        self._empty = {layer: mixer.empty() for layer, mixer in mixers.items()}
        self._slots = [dict(self._empty) for _ in range(slots)]
        self._guesses: dict[tuple[int, int], Inputs] = {}  # by layer and chunk of the last step

    def begin(self, chunks: Sequence[tuple[StateSlots, Run]]) -> StateStep:
        """A step begins: the guesses of the one before are forgotten, its targets are given up."""
        self._guesses.clear()
        for slots, _ in chunks:
            self._slots[slots.target] = dict(self._empty)
        return StateStep(self, chunks)

    def settle(self, step: StateStep) -> None:
        """It is done, and its arrays are evaluated."""
        for (layer, slot), state in step.written.items():
            self._slots[slot][layer] = state
        self._guesses.update(step.guesses)

    def state(self, layer: int, slot: int | None) -> State:
        return self._empty[layer] if slot is None else self._slots[slot][layer]

    def replay(self, chunk: int, first: int, rows: int, source: int, target: int) -> None:
        """See `Backend.replay`."""
        run, after = Run(first, rows, rows), {}
        for layer, mixer in self._mixers.items():
            inputs, state = self._guesses[layer, chunk], self.state(layer, source)
            _, (after[layer],) = mixer.advance(inputs, (run,), [state])
        mx.eval(list(after.values()))
        self._slots[target] = after

    def read(self, slot: int) -> np.ndarray:
        """uint8 [n]: see `Backend.read_state`."""
        parts = [np.array(part).reshape(-1) for part in self._parts(slot)]
        content: np.ndarray = np.concatenate(parts).view(np.uint8)
        return content

    def write(self, slot: int, content: np.ndarray) -> None:
        """See `Backend.write_state`."""
        values, at = content.view(np.float32), 0
        for layer, empty in self._empty.items():
            parts = []
            for part in empty:
                parts.append(mx.array(values[at : at + part.size].reshape(part.shape)))
                at += part.size
            self._slots[slot][layer] = tuple(parts)
        mx.eval(self._parts(slot))

    def _parts(self, slot: int) -> list[mx.array]:
        return [part for layer in self._empty for part in self._slots[slot][layer]]


class StateStep:
    """What a step makes of the states; nothing of it stays if the step is cancelled.

    chunks: where each finds and leaves its state, and its rows among those of the step.
    """

    def __init__(self, pool: StatePool, chunks: Sequence[tuple[StateSlots, Run]]) -> None:
        self._pool = pool
        self._waves = _waves(chunks)
        self.written: dict[tuple[int, int], State] = {}  # by layer and slot
        self.guesses: dict[tuple[int, int], Inputs] = {}  # by layer and chunk

    @property
    def arrays(self) -> list[mx.array]:
        parts = [*self.written.values(), *self.guesses.values()]
        return [array for part in parts for array in part]

    def recur(self, layer: int, advance: Advance, inputs: Inputs) -> mx.array:
        """See `Recur`."""
        outputs, number = [], 0
        for wave in self._waves:
            before = [self._before(layer, slots.source) for slots, _ in wave]
            y, after = advance(inputs, tuple(run for _, run in wave), before)
            outputs.append(y)
            for (slots, run), state in zip(wave, after, strict=True):
                self.written[layer, slots.target] = state
                if slots.guesses:
                    # Gathered, for a slice would keep the rows of the whole step.
                    rows = mx.arange(run.first + run.sure, run.first + run.count)
                    self.guesses[layer, number] = tuple(part[rows] for part in inputs)
                number += 1
        return joined(outputs)

    def _before(self, layer: int, source: int | None) -> State:
        written = None if source is None else self.written.get((layer, source))
        return written or self._pool.state(layer, source)


def _waves(chunks: Sequence[tuple[StateSlots, Run]]) -> list[list[tuple[StateSlots, Run]]]:
    """The chunks in their order, in lists that are carried on at once: no chunk begins with what
    another of its list leaves."""
    waves: list[list[tuple[StateSlots, Run]]] = []
    for slots, run in chunks:
        left = {other.target for other, _ in waves[-1]} if waves else set()
        if not waves or slots.source in left or len(waves[-1]) == MOST_RUNS:
            waves.append([])
        waves[-1].append((slots, run))
    return waves
