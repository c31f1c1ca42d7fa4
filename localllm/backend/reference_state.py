"""The reference backend's states of recurrent layers: float32, resident only where written."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from localllm.backend.protocol import StateSlots
from localllm.backend.reference_recurrent import Recurrent
from localllm.errors import OutOfMemoryPlan
from localllm.spec import DecoderSpec
from localllm.spec.memory import state_bytes, state_values


class StatePool:
    """One row for each slot, in it the states of all layers side by side; and the last guesses."""

    def __init__(self, spec: DecoderSpec, slots: int) -> None:
        self.slots = slots
        try:
            self.rows = np.zeros((slots, state_values(spec)), np.float32)
        except (MemoryError, ValueError) as error:
            raise OutOfMemoryPlan(
                f"a pool of {slots} states of {state_bytes(spec)} bytes does not fit in memory",
                hint="ask for fewer states: fewer sequences at once",
            ) from error
        self._places: dict[int, slice] = {}
        at = 0
        for index, mixer in spec.recurrences:
            self._places[index] = slice(at, at + mixer.state_values)
            at += mixer.state_values
        self._guesses: dict[tuple[int, int], mx.array] = {}  # by layer and chunk of the last step

    def begin(self) -> None:
        """A step begins: the guesses of the one before are forgotten."""
        self._guesses.clear()

    def run(
        self, layer: int, mixer: Recurrent, chunk: int, slots: StateSlots, rows: mx.array
    ) -> mx.array:
        """What the rows [n, mixer.width] of a chunk give: float32 [n, mixer.out_width]."""
        sure = rows.shape[0] - slots.guesses
        y, state = mixer.advance(self._state(layer, slots.source), rows[:sure])
        self._write(layer, slots.target, state)
        if not slots.guesses:
            return y
        self._guesses[layer, chunk] = rows[sure:]
        return mx.concatenate([y, mixer.advance(state, rows[sure:])[0]])

    def replay(
        self,
        mixers: Mapping[int, Recurrent],
        chunk: int,
        guesses: slice,
        source: int,
        target: int,
    ) -> None:
        """See `Backend.replay`. mixers: of all recurrent layers, by their numbers."""
        for layer, mixer in mixers.items():
            rows = self._guesses[layer, chunk][guesses]
            self._write(layer, target, mixer.advance(self._state(layer, source), rows)[1])

    def _state(self, layer: int, slot: int | None) -> mx.array:
        place = self._places[layer]
        if slot is None:
            return mx.zeros((place.stop - place.start,))
        return mx.array(self.rows[slot, place])

    def _write(self, layer: int, slot: int, state: mx.array) -> None:
        self.rows[slot, self._places[layer]] = np.array(state)
