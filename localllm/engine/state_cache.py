"""The states of recurrent layers as sequences see them: where a step reads, writes and keeps them.

K and V of a position stay what they are; a state is what all positions so far add up to, and the
next row changes it. So a step reads one slot and writes another, and what it read can serve again:
for the same step, if it was cancelled, for another sequence that goes on from there, or for a
later one with the same beginning. For the latter a state that stands at the end of a block has the
block's name. States are large, so only some are named: those at the end of a prompt, where
prompts have parted before, at wide intervals, and at the last full block of an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from localllm.backend.protocol import Backend, StateSlots
from localllm.engine.block_pool import BlockPool

# The name of the state after so many positions, whole blocks of them.
NameOf = Callable[[int], bytes]
_PER_CONTEXT = 8  # states at intervals of a text that fills the KV pool, where slots allow


@dataclass(frozen=True)
class StateAt:
    """A slot, and how many positions its state has seen."""

    position: int
    slot: int


@dataclass
class StateTrack:
    """The states of one sequence.

    slot: the state after all computed positions, None before the first. planned: those that the
    step under way writes, in order. unnamed: written, and to be named. wanted: positions of whose
    states it is known that they will be of use. prompt: where generated tokens begin. latest: the
    last one that was named while generating.
    """

    slot: int | None = None
    planned: list[StateAt] = field(default_factory=list)
    unnamed: list[StateAt] = field(default_factory=list)
    wanted: frozenset[int] = frozenset()
    prompt: int = 0
    latest: StateAt | None = None


class StateCache:
    """Tracks over the slots of a backend. `KvCache` calls it.

    evicting: told of a state and its name before its slot is given to another.
    """

    def __init__(self, backend: Backend, evicting: Callable[[int, bytes], None]) -> None:
        self.backend = backend
        self.block_size = backend.block_size
        self.pool = BlockPool(backend.state_slots, evicting)
        blocks = -(-max(backend.group_blocks) // min(_PER_CONTEXT, backend.state_slots))
        self.interval = blocks * self.block_size

    def begin(self, track: StateTrack, tokens: int, branch: int) -> None:
        """A sequence of so many tokens starts. branch: positions that the KV cache knows."""
        last = (tokens - 1) // self.block_size * self.block_size
        # A chat's next turn may write the end of the prompt anew: then the block before serves.
        track.wanted = frozenset({last, last - self.block_size, branch})
        track.prompt = tokens

    def plan(self, track: StateTrack, start: int, stop: int, spare: int) -> bool:
        """Slots for the states of a step over the positions start … stop - 1.

        spare: slots to leave for others; no state is kept at their cost. False, and no plan, if
        there is no slot for the last one.
        """
        self.drop_plan(track)
        if not self.pool.available:
            return False
        first = start // self.block_size + 1
        for position in range(first * self.block_size, stop, self.block_size):
            if self._keeps(track, position) and self.pool.available > spare + 1:
                track.planned.append(StateAt(position, self.pool.allocate()))
        track.planned.append(StateAt(stop, self.pool.allocate()))
        return True

    def slots(self, track: StateTrack, guesses: int) -> list[tuple[int, StateSlots]]:
        """Of each chunk of the planned step: the position where it ends, its guesses left out."""
        found, source = [], track.slot
        for state in track.planned:
            own = guesses if state is track.planned[-1] else 0
            found.append((state.position, StateSlots(source, state.slot, own)))
            source = state.slot
        return found

    def settle(self, track: StateTrack) -> None:
        """The planned step is done."""
        *kept, last = track.planned
        track.planned.clear()
        track.unnamed += kept
        if track.slot is not None:
            self.pool.release(track.slot)
        track.slot = last.slot

    def accept(self, track: StateTrack, chunk: int, position: int, right: int) -> None:
        """Carries the state at `position` on over the first `right` guesses of a chunk.

        If a block ends on the way, the state there is kept, if there is a slot to go on in.
        """
        assert track.slot is not None
        assert self.pool.users(track.slot) == 1, "a state with guesses after it is shared"
        end = (position + right) // self.block_size * self.block_size
        before = end - position
        if 0 <= before < right and self.pool.available:
            if before:
                self.backend.replay(chunk, 0, before, track.slot, track.slot)
            target = self.pool.allocate()
            self.backend.replay(chunk, before, right - before, track.slot, target)
            track.unnamed.append(StateAt(end, track.slot))
            track.slot = target
        else:
            self.backend.replay(chunk, 0, right, track.slot, track.slot)

    def name(self, track: StateTrack, name_of: NameOf, computed: int) -> None:
        """Names the states that are worth it. computed: positions that the current one has seen."""
        for state in track.unnamed:
            self._name(track, state, name_of)
            self.pool.release(state.slot)
        track.unnamed.clear()
        if computed and computed % self.block_size == 0 and track.slot is not None:
            self._name(track, StateAt(computed, track.slot), name_of)

    def fork(self, track: StateTrack) -> StateTrack:
        if track.slot is not None:
            self.pool.retain(track.slot)
        return StateTrack(track.slot, prompt=track.prompt)

    def close(self, track: StateTrack) -> None:
        """Gives every slot up; what has a name can be found again."""
        self.drop_plan(track)
        for state in track.unnamed:
            self.pool.release(state.slot)
        track.unnamed.clear()
        if track.slot is not None:
            self.pool.release(track.slot)
            track.slot = None
        track.latest = None

    def drop_plan(self, track: StateTrack) -> None:
        for state in track.planned:
            self.pool.release(state.slot)
        track.planned.clear()

    def _keeps(self, track: StateTrack, position: int) -> bool:
        return position % self.interval == 0 or position in track.wanted

    def _name(self, track: StateTrack, state: StateAt, name_of: NameOf) -> None:
        keeps = self._keeps(track, state.position)
        if not keeps and state.position <= track.prompt:
            return
        self.pool.give_name(state.slot, name_of(state.position))
        if not keeps:
            # Of an answer only the end matters, and it moves on.
            if track.latest is not None and track.latest != state:
                self.pool.drop_idle(track.latest.slot, name_of(track.latest.position))
            track.latest = state
