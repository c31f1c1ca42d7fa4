"""A picture of the KV blocks at one moment, for those who look: who holds which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localllm.engine.engine import Engine


@dataclass(frozen=True)
class KvBlock:
    """number: counted over all groups. refcount: sequences that hold it, and the disk while it is
    written. owners: the running requests among them. name: the end of its hash, "" while it has
    none (not full, or free).
    """

    number: int
    group: int
    refcount: int
    owners: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class KvMap:
    """blocks: of all groups, in order. block_size: positions each holds."""

    blocks: tuple[KvBlock, ...]
    block_size: int


def kv_map(engine: Engine) -> KvMap:
    cache = engine.cache
    owners: dict[tuple[int, int], list[int]] = {}
    for sequence in engine.scheduler.running:
        for group, table in enumerate(sequence.table.tables):
            for block in table:
                if block >= 0:
                    owners.setdefault((group, block), []).append(sequence.id)
    blocks: list[KvBlock] = []
    for group, pool in enumerate(cache.pools):
        for block in range(pool.num_blocks):
            name = pool.name_of(block)
            blocks.append(
                KvBlock(
                    len(blocks),
                    group,
                    pool.users(block),
                    tuple(owners.get((group, block), ())),
                    "" if name is None else name.hex()[-8:],
                )
            )
    return KvMap(tuple(blocks), cache.block_size)


def block_tokens(engine: Engine, number: int) -> tuple[int, ...]:
    """The token ids that a block of the map holds now; empty where nobody knows them."""
    cache = engine.cache
    for group, pool in enumerate(cache.pools):
        if number >= pool.num_blocks:
            number -= pool.num_blocks
            continue
        found = cache.tokens_of(group, number)
        if found is not None:
            return found
        for sequence in engine.scheduler.running:
            if number in sequence.table.tables[group]:
                start = sequence.table.tables[group].index(number) * cache.block_size
                end = min(start + cache.block_size, sequence.computed)
                return tuple(sequence.tokens[start:end])
    return ()
