"""Which KV blocks are free. The blocks' contents belong to the backend."""

from __future__ import annotations


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1 of `block_size` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, positions: int) -> int:
        """How many blocks hold this many positions."""
        return -(-positions // self.block_size)

    def allocate(self, count: int) -> list[int]:
        assert count <= self.free, "ask `free` first"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.num_blocks, "a block was released twice"
