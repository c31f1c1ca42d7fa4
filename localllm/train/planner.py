"""The memory of a run, computed for its largest micro-batch before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from localllm.errors import OutOfMemoryPlan
from localllm.hub.progress import human_bytes as size

# Freed blocks that the allocator cannot hand back, and pages shared by large and small ones.
_SLACK = 0.03
_SHORTEST = 64  # tokens; nobody wants shorter examples than that


@dataclass(frozen=True)
class Item:
    """One line of a plan, in bytes."""

    name: str
    nbytes: int
    detail: str = ""


@dataclass(frozen=True)
class Needs:
    """What the sum is made of. Bytes but for `examples`.

    resident: what the process holds with model, data and parameters in memory. examples: of the
    largest micro-batch, the longest first: the lengths of each one's sequences (of a pair, two);
    working: of a step over sequences of such lengths. vector: one float32 of
    every trainable parameter; accumulated: whether a second gradient is held. optimizer: its state.
    beside: what else a run loads later (an engine for sample answers).
    """

    resident: int
    examples: tuple[tuple[int, ...], ...]
    working: Callable[[Sequence[int]], int]
    vector: int
    accumulated: bool
    optimizer: int
    beside: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(length for example in self.examples for length in example)


@dataclass(frozen=True)
class Wish:
    """The settings that a plan may change.

    shortest: tokens of the data's shortest example. whole: all weights are trained.
    """

    batch_size: int
    accumulate: int
    seq_len: int
    tokens: int | None = None
    shortest: int = 0
    whole: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """available: what this process may use, with what it holds already."""

    items: tuple[Item, ...]
    available: int

    @property
    def total(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def lines(self) -> list[str]:
        """For people: one line an item, then the sum."""
        rows = [(item.name, size(item.nbytes), item.detail) for item in self.items]
        rows.append(("in all", size(self.total), f"of {size(self.available)} that may be used"))
        names, sizes = (max(len(row[column]) for row in rows) for column in (0, 1))
        return [f"{name:<{names}}  {took:>{sizes}}  {what}".rstrip() for name, took, what in rows]


@dataclass(frozen=True)
class WayOut:
    """A change of settings that fits, as flags, and what it takes."""

    change: str
    total: int


def plan_memory(needs: Needs, available: int) -> MemoryPlan:
    """The most a run holds at any moment."""
    working = needs.working(needs.lengths)
    longest = ", ".join(map(str, needs.lengths[:4])) + (", …" if len(needs.lengths) > 4 else "")
    items = [
        Item("held already", needs.resident, "weights, data, Python"),
        Item("gradients", needs.vector * (1 + needs.accumulated)),
        Item("optimizer", needs.optimizer),
        Item("largest micro-batch", working, f"{sum(needs.lengths):,} tokens: {longest}"),
        Item("checkpoint under way", needs.vector + needs.optimizer, "a copy, written behind"),
    ]
    if needs.beside:
        items.append(Item("sample answers", needs.beside, "a second copy of the model"))
    new = sum(item.nbytes for item in items[1:])
    items.append(Item("allocator", round(_SLACK * new)))
    return MemoryPlan(tuple(items), available)


def ways_out(needs: Needs, wish: Wish, available: int) -> list[WayOut]:
    """Settings that fit and learn from the same steps as far as possible; the mildest first."""
    found = []
    for change, examples, accumulated in _milder(needs, wish):
        changed = replace(needs, examples=examples, accumulated=accumulated)
        plan = plan_memory(changed, available)
        if plan.fits:
            found.append(WayOut(change, plan.total))
            if len(found) == 2:
                break
    return found


def require_fit(plan: MemoryPlan, needs: Needs, wish: Wish) -> None:
    """Raises OutOfMemoryPlan with the plan and what would fit."""
    if not plan.fits:
        raise OutOfMemoryPlan(
            f"training needs {size(plan.total)} and {size(plan.available)} may be used:\n  "
            + "\n  ".join(plan.lines()),
            hint=advice(needs, wish, plan.available),
        )


def advice(needs: Needs, wish: Wish, available: int) -> str:
    ways = ways_out(needs, wish, available)
    if not ways:
        return "no batch or length fits: " + smaller(wish.whole)
    return "what fits: " + ", or ".join(f"{way.change} ({size(way.total)})" for way in ways)


def smaller(whole: bool) -> str:
    """What takes less where no batch is small enough; whole: all weights are trained."""
    if whole:
        return "choose a smaller model, an optimizer that holds less, or train an adapter"
    return "choose a smaller model or a lower --rank"


def _milder(needs: Needs, wish: Wish) -> Iterator[tuple[str, tuple[tuple[int, ...], ...], bool]]:
    """Flags, the largest micro-batch then, and whether gradients accumulate.

    First the very same steps in smaller pieces, then shorter examples one at a time.
    """
    whole = wish.accumulate
    if wish.tokens is None:
        whole *= wish.batch_size
        for size in range(wish.batch_size - 1, 0, -1):
            if whole % size == 0:
                flags = f"--batch-size {size} --accumulate {whole // size}"
                yield flags, needs.examples[:size], True
    else:
        tokens = wish.tokens
        while (tokens := tokens // 2) >= sum(needs.examples[0]):
            whole *= 2
            flags = f"--batch-tokens {tokens} --accumulate {whole}"
            yield flags, _filled(needs.examples, tokens), True
    parts = len(needs.examples[0])
    length = _SHORTEST * ((min(wish.seq_len, max(needs.lengths)) - 1) // _SHORTEST)
    while length >= _SHORTEST:
        left = "drop" if wish.shortest <= length else "cut"  # dropping must leave something
        flags = f"--seq-len {length} --on-long {left} --batch-size 1 --accumulate {whole}"
        yield flags, ((length,) * parts,), whole > 1
        length = _SHORTEST * (length // 2 // _SHORTEST)


def _filled(examples: Sequence[tuple[int, ...]], tokens: int) -> tuple[tuple[int, ...], ...]:
    held: list[tuple[int, ...]] = []
    for example in examples:
        if sum(map(sum, held)) + sum(example) <= tokens:
            held.append(example)
    return tuple(held)
