"""What can be wrong with a kernel, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from localllm.errors import LocalLLMError

Stage = Literal["compile", "run"]


@dataclass(frozen=True)
class Place:
    """A line of a source. column: from 1; None where it is not known."""

    file: str
    line: int
    column: int | None = None

    def __str__(self) -> str:
        column = f":{self.column}" if self.column else ""
        return f"{self.file}:{self.line}{column}"


class KernelFault(LocalLLMError):
    """A kernel that breaks a rule of Metal, when compiled or while it runs.

    stage: which of the two. kind: a short name of the rule, such as "out of bounds"; `where`: the
    line, if known; thread, threadgroup: positions, of a fault while running.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str,
        stage: Stage,
        kind: str,
        place: Place | None = None,
        thread: tuple[int, int, int] | None = None,
        threadgroup: tuple[int, int, int] | None = None,
        hint: str | None = None,
    ) -> None:
        at = f"{place}: " if place else ""
        who = f" (thread {thread} of threadgroup {threadgroup})" if thread is not None else ""
        super().__init__(f"{kernel}: {at}{message}{who}", hint=hint)
        self.kernel, self.stage, self.kind, self.place = kernel, stage, kind, place
        self.thread, self.threadgroup = thread, threadgroup


@dataclass(frozen=True)
class Touched:
    """What a fault is about: a buffer or a threadgroup variable."""

    name: str
    bytes: int
    in_threadgroup: bool

    def __str__(self) -> str:
        kind = "threadgroup variable" if self.in_threadgroup else "buffer"
        return f"{kind} `{self.name}` ({self.bytes} bytes)"


def in_metal_words(message: str) -> str:
    """A message of clang's with Metal's names for what OpenCL calls otherwise."""
    for ours, theirs in (
        ("__global", "device"), ("__local", "threadgroup"), ("__constant", "constant"),
        ("__private", "thread"), ("__bf16", "bfloat"), ("__generic", "generic"),
    ):  # fmt: skip
        message = message.replace(ours, theirs)
    return message


@dataclass(frozen=True)
class Happening:
    """A fault as the runtime wrote it down; the fields that its kind does not use are 0.

    offset, bytes: of the access in what it touched. extra: a lane, an index, an alignment, …
    other_*: the thread that touched the same bytes before, `other_ago` threadgroups earlier.
    """

    kind: int
    touched: Touched | None
    is_write: bool
    offset: int
    bytes: int
    extra: int
    other_thread: int
    other_ago: int
    other_write: bool
    text: str


@dataclass(frozen=True)
class Told:
    kind: str
    message: str
    hint: str


def tell(h: Happening) -> Told:
    """A happening in words. The numbers of the kinds are those of runtime/abi.h."""
    told = _KINDS[h.kind]
    what = str(h.touched) if h.touched else "memory"
    verb = "store to" if h.is_write else "load from"
    size = f"{h.bytes}-byte " if h.bytes else ""
    if h.kind == _OUT_OF_BOUNDS and h.touched:
        past = h.offset - h.touched.bytes
        side = (
            f"{-h.offset} bytes before its start" if h.offset < 0 else f"{past} bytes past its end"
        )
        if h.offset >= 0 and past < 0:
            side = f"across its end, at byte {h.offset}"
        return replace(told, message=f"{size}{verb} {what}: {side}")
    if h.kind == _RACE:
        before = "stored to" if h.other_write else "loaded"
        ago = f"of {h.other_ago} threadgroups before" if h.other_ago else "of the same threadgroup"
        return replace(
            told,
            message=f"race: {size}{verb} byte {h.offset} of {what}, which thread {h.other_thread} "
            f"{ago} has {before}, with no barrier between them",
            hint=told.hint if not h.other_ago else _BETWEEN_GROUPS,
        )
    return replace(
        told,
        message=told.message.format(
            what=what, verb=verb, size=size, offset=h.offset, bytes=h.bytes, extra=h.extra,
            text=in_metal_words(h.text),
        ),
    )  # fmt: skip


_OUT_OF_BOUNDS, _RACE = 1, 5
_BETWEEN_GROUPS = (
    "threadgroups run in no order: let one thread own the value, use atomics, or a second dispatch"
)
_CONVERGE = "move it out of the condition or the loop of unequal length"
_KINDS = {
    _OUT_OF_BOUNDS: Told(
        "out of bounds", "out of bounds", "check the index against the shape before the access"
    ),
    2: Told(
        "wild pointer",
        "access at address {offset:#x}, which belongs to no buffer and no variable",
        "follow the pointer back to where it is computed",
    ),
    3: Told(
        "write to read-only memory",
        "store to byte {offset} of {what}, which is an input",
        "write to an output; inputs of mx.fast.metal_kernel are const",
    ),
    4: Told(
        "misaligned",
        "byte {offset} of {what} is not aligned to {extra} bytes, as the type asks",
        "index in whole vectors, or use packed_ types",
    ),
    _RACE: Told(
        "race",
        "race",
        "a threadgroup_barrier with the flag of that memory (mem_threadgroup, mem_device) orders "
        "threads; simdgroup_barrier only those of one simdgroup; simd_sum and its kin none",
    ),
    6: Told(
        "uninitialised memory",
        "{size}load of byte {offset} of {what}, to which nothing was stored",
        "store to it first, in this threadgroup",
    ),
    7: Told(
        "divergent simdgroup",
        "lanes of one simdgroup wait at different simdgroup operations or barriers",
        _CONVERGE,
    ),
    8: Told("divergent barrier", "threads of a threadgroup wait at different barriers", _CONVERGE),
    9: Told(
        "barrier after return",
        "threadgroup_barrier after some threads of the threadgroup returned",
        "let all threads reach every barrier: guard the work, not the thread",
    ),
    10: Told(
        "divergent barrier",
        "deadlock: {offset} threads wait at a simdgroup operation, {bytes} at threadgroup_barrier, "
        "{extra} have returned",
        _CONVERGE,
    ),
    11: Told(
        "inactive lane",
        "a shuffle reads lane {extra}, which is not there or has returned",
        "keep all lanes until the last shuffle",
    ),
    12: Told(
        "partial simdgroup",
        "a simdgroup operation runs without all 32 lanes",
        "let all lanes take part, with a neutral value where there is no data",
    ),
    13: Told(
        "different arguments",
        "simdgroup_load or simdgroup_store: pointer, row length, origin and transposition must be "
        "the same in all lanes",
        "give the address of the whole 8x8 tile, not of the lane's part",
    ),
    14: Told(
        "stack overflow",
        "the thread's own memory overflows",
        "no recursion; make thread arrays smaller",
    ),
    15: Told(
        "array index",
        "index {extra} is out of bounds for type {text}",
        "check the index against the size of the array",
    ),
    16: Told("division by zero", "integer division by zero", "guard the divisor"),
    17: Told("shift", "shift by {extra} bits is too far for {text}", "mask the shift amount"),
    18: Told("missing return", "the end of a function without its return", "return on every path"),
    19: Told("float to integer", "a value that {text} cannot hold", "clamp before converting"),
    20: Told("unreachable", "a place is reached that cannot be", "look for undefined behaviour"),
    21: Told(
        "threadgroup too large",
        "a threadgroup of more than 1024 threads",
        "at most 1024 threads in a threadgroup",
    ),
    22: Told(
        "unsupported", "the kernel stopped ({extra})", "this operation is not in the emulator"
    ),
}  # fmt: skip
