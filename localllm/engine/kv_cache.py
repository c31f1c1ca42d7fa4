"""The paged KV cache as sequences see it: block tables, prefix reuse, forks, windows.

Every KV group (layers that keep the same positions) has a pool of its own. A full block is named
by a chained hash: its tokens, and the name of the block before it, back to a root that stands
for the weights, the adapter, the cache's format and whatever else decides a position's K and V.
Two blocks of one name therefore hold the same bits, and one may stand for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import numpy as np

from localllm.backend.protocol import Backend, StateSlots
from localllm.engine.block_pool import BlockPool
from localllm.engine.state_cache import StateCache, StateTrack
from localllm.spec.memory import kv_groups


class Disk(Protocol):
    """Where blocks outlive the pool, and states: those are the group after the last."""

    def has(self, group: int, name: bytes) -> bool: ...

    def load(self, group: int, name: bytes) -> np.ndarray | None:
        """The content that was saved under this name, verified; None if it cannot be had."""
        ...

    def offer(self, group: int, block: int, name: bytes) -> bool:
        """True if the block will be written; it must stay as it is until `finished` lists it."""
        ...

    def save(self, group: int, name: bytes, content: np.ndarray) -> None: ...

    def finished(self) -> list[tuple[int, int]]:
        """(group, block) of those offered that need not stay any longer."""
        ...


@dataclass
class BlockTable:
    """The blocks of one sequence. tables: for each KV group, -1 where a window has passed.

    names: the chained hash of each full block, as far as known. root: what they begin with.
    """

    root: bytes
    tables: list[list[int]]
    names: list[bytes] = field(default_factory=list)
    published: int = 0  # full blocks that have been given their name
    states: StateTrack = field(default_factory=StateTrack)  # of recurrent layers

    @property
    def blocks(self) -> int:
        """Blocks held, over all groups."""
        return sum(1 for table in self.tables for block in table if block >= 0)


@dataclass(frozen=True)
class PrefixHit:
    """tokens: positions that need not be computed. why: what stopped the match there.

    blocks: positions whose K and V are known, more where no state was kept at their end.
    """

    tokens: int
    from_disk: int
    why: str
    blocks: int = 0


class KvCache:
    """Block tables over the pools of a backend. Not thread-safe; the engine calls it."""

    def __init__(self, backend: Backend, disk: Disk | None = None) -> None:
        self.backend = backend
        self.block_size = backend.block_size
        self.groups = kv_groups(backend.spec)
        self._disk = disk
        self.pools = [
            BlockPool(blocks, self._evicting(group))
            for group, blocks in enumerate(backend.group_blocks)
        ]
        self.states: StateCache | None = None
        if backend.state_slots:
            self.states = StateCache(backend, self._evicting_state)
        self._spelled: dict[tuple[int, int], tuple[int, ...]] = {}

    # ---- sizes

    def blocks_for(self, positions: int) -> int:
        """How many blocks hold this many positions."""
        return -(-positions // self.block_size)

    def fits(self, positions: int, rows: int) -> bool:
        """Whether the pools, all empty, could hold one sequence of so many positions.

        rows: that are computed in one step at most.
        """
        return all(
            self._most_held(group, positions, rows) <= pool.num_blocks
            for group, pool in enumerate(self.pools)
        )  # two states are enough, and every pool of them has two

    def room_to_start(
        self, table: BlockTable, tokens: Sequence[int], *, rows: int, spare: int
    ) -> bool:
        """Whether an empty table could come to hold all `tokens` and one more.

        rows: of a step at most. spare: blocks to leave for others. Blocks that others use already
        cost nothing.
        """
        if self.states is not None and self.states.pool.available < spare + 2:
            return False  # it reads one while it writes another
        most = (len(tokens) - 1) // self.block_size
        self._extend_names(table, tokens, most)
        for group, pool in enumerate(self.pools):
            needed = self._most_held(group, len(tokens) + 1, rows)
            for name in table.names[:most]:
                block = pool.find(self._name(name, group))
                if block is None or needed == 0:
                    break
                needed -= pool.users(block) > 0
            if needed + spare > pool.available:
                return False
        return True

    @property
    def available(self) -> int:
        return min(pool.available for pool in self.pools)

    @property
    def in_use(self) -> int:
        return sum(pool.in_use for pool in self.pools)

    @property
    def idle(self) -> int:
        return sum(pool.idle for pool in self.pools)

    # ---- a sequence's life

    def open(self, root: bytes) -> BlockTable:
        return BlockTable(root, [[] for _ in self.groups])

    def reuse(self, table: BlockTable, tokens: Sequence[int], limit: int) -> PrefixHit:
        """Fills an empty table with the longest known prefix of `tokens`, `limit` at most."""
        assert not any(table.tables)
        most = limit // self.block_size
        self._extend_names(table, tokens, most)
        lost: dict[bytes, str] = {}
        loaded = None
        while loaded is None:
            length, blocks = self._known_prefix(table, most, lost)
            loaded = self._take(table, length, lost)
        table.published = length
        if length == most:
            why = "the last tokens are always computed"
        elif length < blocks:
            why = next(iter(lost.values()), "no state of the recurrent layers was kept further on")
        else:
            why = next(iter(lost.values()), "the next block is not cached")
        size = self.block_size
        return PrefixHit(length * size, loaded * size, why, blocks * size)

    def begin(self, table: BlockTable, tokens: int, hit: PrefixHit) -> None:
        """A sequence of so many tokens starts after what of its beginning was reused."""
        if self.states is not None:
            self.states.begin(table.states, tokens, hit.blocks)

    def known(self, root: bytes, tokens: Sequence[int]) -> int:
        """How many of the first tokens stand in the cache, or on disk, now."""
        table = self.open(root)
        most = len(tokens) // self.block_size
        self._extend_names(table, tokens, most)
        return self._known_prefix(table, most, {})[0] * self.block_size

    def hold(
        self, table: BlockTable, start: int, stop: int, *, guesses: int = 0, spare: int = 0
    ) -> bool:
        """Makes positions start … stop - 1 writable: blocks for them, no one else's, and slots for
        the states to come.

        guesses: of the last positions, those that may be wrong. spare: slots to leave for others.
        False if blocks or slots are short; then nothing has changed.
        """
        work = []
        for group, pool in enumerate(self.pools):
            shared = self._shared(table, group, start, stop)
            fresh = self.blocks_for(stop) - len(table.tables[group])
            if shared or fresh > 0:
                if len(shared) + max(0, fresh) > pool.available:
                    return False
                work.append((group, pool, shared))
        if self.states is not None and not self.states.plan(
            table.states, start, stop - guesses, spare
        ):
            return False
        for group, pool, shared in work:
            blocks = table.tables[group]
            for index in shared:
                own = pool.allocate()
                self.backend.copy_block(group, blocks[index], own)
                pool.release(blocks[index])
                blocks[index] = own
            while len(blocks) * self.block_size < stop:
                blocks.append(pool.allocate())
        return True

    def slots(
        self, table: BlockTable, stop: int, guesses: int
    ) -> list[tuple[int, StateSlots | None]]:
        """The chunks of a step up to `stop` that was held: where each ends, and its states."""
        if self.states is None:
            return [(stop, None)]
        found = self.states.slots(table.states, guesses)
        return [*found[:-1], (stop, found[-1][1])]

    def chunks(self, table: BlockTable) -> int:
        """How many chunks that step has."""
        return 1 if self.states is None else len(table.states.planned)

    def settle(self, table: BlockTable) -> None:
        """The step that was held is done, and its rows are right, but for the guesses."""
        if self.states is not None:
            self.states.settle(table.states)

    def accept(self, table: BlockTable, chunk: int, position: int, right: int) -> None:
        """Of the guesses from `position` on the first `right` were right. chunk: the number of
        the chunk they stood in, in the last batch."""
        if self.states is not None and right:
            self.states.accept(table.states, chunk, position, right)

    def advance(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Positions 0 … computed - 1 are final: names full blocks, frees what no layer will see."""
        full = computed // self.block_size
        if full > table.published:
            self._extend_names(table, tokens, full)
            for index in range(table.published, full):
                for group, pool in enumerate(self.pools):
                    block = table.tables[group][index]
                    if block >= 0:
                        name = self._name(table.names[index], group)
                        block = self._one_of_a_name(pool, block, name)
                        table.tables[group][index] = block
                        start = index * self.block_size
                        self._spelled[group, block] = tuple(tokens[start : start + self.block_size])
            table.published = full
        if self.states is not None:
            self.states.name(
                table.states,
                lambda at: self._state_name(table.names[at // self.block_size - 1]),
                computed,
            )
        self.leave_windows(table, computed)

    def leave_windows(self, table: BlockTable, computed: int) -> None:
        """Frees what no layer will see from position `computed` on."""
        for group in range(len(self.pools)):
            self._drop(table, group, self._first_block(group, computed))

    def fork(self, table: BlockTable, computed: int) -> BlockTable:
        """Another sequence with the same first `computed` positions; no content is copied."""
        blocks = self.blocks_for(computed)
        copy = BlockTable(
            table.root,
            [list(own[:blocks]) for own in table.tables],
            table.names[: table.published],
            table.published,
        )
        if self.states is not None:
            copy.states = self.states.fork(table.states)
        for group, pool in enumerate(self.pools):
            for block in copy.tables[group]:
                if block >= 0:
                    pool.retain(block)
        return copy

    def close(self, table: BlockTable, *, spill: bool = True) -> None:
        """Gives every block up. What has a name can be found again; `spill` sends it to disk."""
        if spill:
            self._spill(table)
        for group, pool in enumerate(self.pools):
            # The end of a prefix is worth nothing without its beginning: it goes first.
            for block in reversed(table.tables[group]):
                if block >= 0:
                    pool.release(block)
            table.tables[group] = []
        if self.states is not None:
            self.states.close(table.states)
        table.published = 0

    def block_table(self, table: BlockTable) -> np.ndarray:
        """int32 [groups, m], as `Chunk.block_table`."""
        return np.array(table.tables, dtype=np.int32)

    def tokens_of(self, group: int, block: int) -> tuple[int, ...] | None:
        """What a full block holds; None for one that is not full, or came from disk."""
        if self.pools[group].name_of(block) is None:
            return None
        return self._spelled.get((group, block))

    # ---- the disk

    def collect(self) -> None:
        """Lets go of blocks that have been written to disk."""
        if self._disk is not None:
            for group, block in self._disk.finished():
                self._pool(group).release(block)

    def spill_idle(self) -> None:
        """Writes every block that is kept for reuse to disk, the most recently used first."""
        if self._disk is None:
            return
        for group, pool in enumerate(self.pools):
            for block, name in reversed(pool.idle_blocks()):
                if not self._disk.has(group, name):
                    self._disk.save(group, name, self.backend.read_block(group, block))
        if self.states is not None:
            for slot, name in reversed(self.states.pool.idle_blocks()):
                self._save_state(slot, name)

    def _pool(self, group: int) -> BlockPool:
        if group < len(self.pools):
            return self.pools[group]
        assert self.states is not None
        return self.states.pool

    def _spill(self, table: BlockTable) -> None:
        if self._disk is None:
            return
        for group, pool in enumerate(self.pools):
            for block in table.tables[group][: table.published]:
                name = None if block < 0 else pool.name_of(block)
                if name is not None and self._disk.offer(group, block, name):
                    pool.retain(block)
        if self.states is None:
            return
        pool = self.states.pool
        for block_name in reversed(table.names[: table.published]):
            name = self._state_name(block_name)
            slot = pool.find(name)
            if slot is not None and self._disk.offer(len(self.pools), slot, name):
                pool.retain(slot)

    def _evicting_state(self, slot: int, name: bytes) -> None:
        if self._disk is not None:
            self._save_state(slot, name)

    def _save_state(self, slot: int, name: bytes) -> None:
        assert self._disk is not None
        group = len(self.pools)
        if not self._disk.has(group, name):
            self._disk.save(group, name, self.backend.read_state(slot))

    def _evicting(self, group: int) -> Callable[[int, bytes], None]:
        def evicted(block: int, name: bytes) -> None:
            self._spelled.pop((group, block), None)
            if self._disk is not None and not self._disk.has(group, name):
                self._disk.save(group, name, self.backend.read_block(group, block))

        return evicted

    # ---- names

    def _extend_names(self, table: BlockTable, tokens: Sequence[int], count: int) -> None:
        size = self.block_size
        for index in range(len(table.names), count):
            part = np.array(tokens[index * size : (index + 1) * size], dtype="<i4")
            before = table.names[-1] if table.names else table.root
            table.names.append(blake2b(before + part.tobytes(), digest_size=32).digest())

    @staticmethod
    def _one_of_a_name(pool: BlockPool, block: int, name: bytes) -> int:
        """Names the block, or gives it up for the one that holds the same already."""
        if pool.give_name(block, name):
            return block
        other = pool.find(name)
        assert other is not None
        pool.retain(other)
        pool.release(block)
        return other

    @staticmethod
    def _name(name: bytes, group: int) -> bytes:
        return name[:-1] + bytes([name[-1] ^ group])

    def _state_name(self, name: bytes) -> bytes:
        """Of the state at the end of a block."""
        return self._name(name, len(self.pools))

    def _known_prefix(
        self, table: BlockTable, most: int, lost: Mapping[bytes, str]
    ) -> tuple[int, int]:
        """Blocks of the longest prefix that every group knows as far back as it must see, and at
        whose end a state was kept; and of the longest that would do without one."""
        runs: list[list[int]] = []  # of each group: known blocks in a row that end with index
        for group, pool in enumerate(self.pools):
            run, lengths = 0, []
            for index in range(most):
                name = self._name(table.names[index], group)
                if pool.find(name) is not None or (
                    self._disk is not None and name not in lost and self._disk.has(group, name)
                ):
                    run += 1
                else:
                    run = 0
                lengths.append(run)
            runs.append(lengths)
        without = 0
        for length in range(most, 0, -1):
            first = [self._first_block(g, length * self.block_size) for g in range(len(runs))]
            if all(run[length - 1] >= length - at for run, at in zip(runs, first, strict=True)):
                without = without or length
                if self._knows_state(table.names[length - 1], lost):
                    return length, without
        return 0, without

    def _knows_state(self, name: bytes, lost: Mapping[bytes, str]) -> bool:
        if self.states is None:
            return True
        group, name = len(self.pools), self._state_name(name)
        on_disk = self._disk is not None and name not in lost and self._disk.has(group, name)
        return self.states.pool.find(name) is not None or on_disk

    def _take(self, table: BlockTable, length: int, lost: dict[bytes, str]) -> int | None:
        """Puts the first `length` blocks into the table; how many came from disk (all groups).

        None, and an empty table, if one of them cannot be had; `lost` then says which and why.
        """
        from_disk: set[int] = set()
        if self.states is not None and length:
            slot = self._take_state(table.names[length - 1], lost)
            if slot is None:
                return None
            table.states.slot = slot
        for group, pool in enumerate(self.pools):
            first = self._first_block(group, length * self.block_size)
            blocks = table.tables[group]
            blocks.extend([-1] * min(first, length))
            found = [
                pool.find(self._name(table.names[index], group)) for index in range(first, length)
            ]
            for block in found:  # held before anything is evicted to make room
                if block is not None:
                    pool.retain(block)
            for index, block in zip(range(first, length), found, strict=True):
                if block is None:
                    name = self._name(table.names[index], group)
                    block = self._read(group, name, lost)
                    if block is None:
                        for held in found[index - first :]:
                            if held is not None:
                                pool.release(held)
                        self.close(table, spill=False)
                        return None
                    from_disk.add(index)
                blocks.append(block)
        return len(from_disk)

    def _take_state(self, name: bytes, lost: dict[bytes, str]) -> int | None:
        """The slot of a state, held; None if it cannot be had."""
        assert self.states is not None
        pool, group = self.states.pool, len(self.pools)
        name = self._state_name(name)
        slot = pool.find(name)
        if slot is not None:
            pool.retain(slot)
            return slot
        assert self._disk is not None
        if pool.available < 2:
            lost[name] = "no free slot to read the state of the recurrent layers into"
            return None
        content = self._disk.load(group, name)
        if content is None:
            lost[name] = "the state of the recurrent layers on disk is damaged or gone"
            return None
        slot = pool.allocate()
        self.backend.write_state(slot, content)
        pool.give_name(slot, name)
        return slot

    def _read(self, group: int, name: bytes, lost: dict[bytes, str]) -> int | None:
        pool = self.pools[group]
        assert self._disk is not None
        if not pool.available:
            lost[name] = "no free block to read the next one from disk into"
            return None
        content = self._disk.load(group, name)
        if content is None:
            lost[name] = "the next block on disk is damaged or gone"
            return None
        block = pool.allocate()
        self.backend.write_block(group, block, content)
        pool.give_name(block, name)
        return block

    # ---- windows and shared blocks

    def _first_block(self, group: int, position: int) -> int:
        """The first block that the row at `position`, and those after it, can see."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def _most_held(self, group: int, positions: int, rows: int) -> int:
        window = self.groups[group].window
        seen = positions if window is None else min(positions, window + rows + self.block_size)
        return min(self.blocks_for(positions), self.blocks_for(seen))

    def _drop(self, table: BlockTable, group: int, first: int) -> None:
        blocks = table.tables[group]
        index = min(first, len(blocks)) - 1
        while index >= 0 and blocks[index] >= 0:
            self.pools[group].release(blocks[index])
            blocks[index] = -1
            index -= 1

    def _shared(self, table: BlockTable, group: int, start: int, stop: int) -> list[int]:
        blocks, pool = table.tables[group], self.pools[group]
        last = min(len(blocks), self.blocks_for(stop))
        return [i for i in range(start // self.block_size, last) if pool.users(blocks[i]) > 1]
