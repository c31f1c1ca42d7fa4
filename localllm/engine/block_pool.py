"""Which KV blocks are free, shared or kept for reuse. Their contents belong to the backend."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class BlockPool:
    """Reference counts and names of the blocks 0 … num_blocks - 1.

    A full block has a name, the digest of everything that its content depends on. When its last
    user lets go it stays findable by that name until another block is needed: the least recently
    used goes first. So a block is free, in use (by one or several), or idle (named, unused).

    on_evict: told of an idle block and its name before it is given to someone else.
    """

    def __init__(
        self, num_blocks: int, on_evict: Callable[[int, bytes], None] = lambda block, name: None
    ) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.evictions = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.num_blocks - self.available

    @property
    def idle(self) -> int:
        return len(self._idle)

    def users(self, block: int) -> int:
        return self._users[block]

    def name_of(self, block: int) -> bytes | None:
        return self._names.get(block)

    def allocate(self) -> int:
        """A block for one user, its content undefined."""
        assert self.available, "ask `available` first"
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._on_evict(block, self._names[block])
            self._forget(block)
            self.evictions += 1
        self._users[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more user of a block that is in use or idle."""
        if self._users[block] == 0:
            del self._idle[block]
        self._users[block] += 1

    def release(self, block: int) -> None:
        """One user less; the last one leaves it idle if it has a name, else free."""
        assert self._users[block] > 0, "a block was released twice"
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._names:
            self._idle[block] = None
        else:
            self._free.append(block)

    def give_name(self, block: int, name: bytes) -> bool:
        """False, and no name, if another block has it."""
        assert self._users[block] > 0, "only a block in use can get a name"
        if self._named.setdefault(name, block) != block:
            return False
        self._names[block] = name
        return True

    def find(self, name: bytes) -> int | None:
        return self._named.get(name)

    def idle_blocks(self) -> list[tuple[int, bytes]]:
        """Blocks kept for reuse and their names, least recently used first."""
        return [(block, self._names[block]) for block in self._idle]

    def drop_idle(self, block: int, name: bytes) -> None:
        """Makes a block free, if it still has this name and no user."""
        if block in self._idle and self._names[block] == name:
            del self._idle[block]
            self._forget(block)
            self._free.append(block)

    def forget_idle(self) -> None:
        """Makes every idle block free."""
        for block in self._idle:
            self._forget(block)
            self._free.append(block)
        self._idle.clear()

    def check(self) -> None:
        """Asserts that every block is in exactly one state."""
        used = {block for block, users in enumerate(self._users) if users}
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(idle), "a block is free and idle"
        assert used.isdisjoint(free | idle), "a block in use is free or idle"
        assert len(free) + len(idle) + len(used) == self.num_blocks, "a block is lost"
        assert idle <= set(self._names), "an idle block has no name"
        assert not free & set(self._names), "a free block has a name"
        assert self._named == {name: block for block, name in self._names.items()}

    def _forget(self, block: int) -> None:
        del self._named[self._names.pop(block)]
