"""A compiled kernel, loaded and ready to run on arrays of numpy."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Literal

import numpy as np

from localllm.kernels_metal.emulator import abi, compiler, ir, lines
from localllm.kernels_metal.emulator.counters import Counters
from localllm.kernels_metal.emulator.faults import Happening, KernelFault, Place, Touched, tell
from localllm.kernels_metal.emulator.lower import Lowered

Order = Literal["forward", "reverse", "random"]
Placement = Literal["high", "low"]
Size = tuple[int, int, int]

ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
THREADGROUP_LIMIT = 32 * 1024
CACHE_BYTES = 768 * 1024
_one_at_a_time = Lock()  # the runtime has one set of fibers


@dataclass(frozen=True)
class Options:
    """How a program runs: see `Emulator`, whose arguments these are."""

    order: Order = "forward"
    seed: int = 1
    strict: bool = False
    initialised: bool = False
    placement: Placement = "high"
    cache_bytes: int = CACHE_BYTES


@dataclass(frozen=True)
class Argument:
    """Memory for one buffer: contiguous; written in place if the kernel may write.

    initialised: what it holds before the run has a meaning.
    """

    array: np.ndarray
    initialised: bool = True


@dataclass(frozen=True)
class Traffic:
    """What the instructions moved to and from one buffer, in bytes."""

    loaded: int
    stored: int


class Program:
    """lowered: the kernel. preamble: what comes before it, MLX's utils.h by default. count: watch
    every access. flags: more of clang's. Raises KernelFault, BackendUnavailable."""

    def __init__(
        self,
        lowered: Lowered,
        *,
        title: str | None = None,
        preamble: str = compiler.PREAMBLE,
        file: str = "kernel.metal",
        count: bool = True,
        flags: Sequence[str] = (),
    ) -> None:
        self.name = title or lowered.name
        self.buffers, self.count = lowered.buffers, count
        text = f'{preamble}#line 1 "{file}"\n{lowered.text}'
        self.path = compiler.program(text, self.name, watch=count, flags=flags)
        runtime = _runtime()
        self._run = runtime.msl_run
        self._library = ctypes.CDLL(str(self.path))
        self._entry = ctypes.cast(self._library.msl_entry, ctypes.c_void_p).value
        self._variables = _variables(self._library)
        self.threadgroup_bytes = sum((size + 15) // 16 * 16 for _, _, size in self._variables)
        self.traffic: dict[str, Traffic] = {}
        if self.threadgroup_bytes > THREADGROUP_LIMIT:
            each = ", ".join(f"`{name}` {size}" for name, _, size in self._variables)
            raise KernelFault(
                f"{self.threadgroup_bytes} bytes of threadgroup memory, of {THREADGROUP_LIMIT} "
                f"that there are ({each})",
                kernel=self.name, stage="compile", kind="threadgroup memory",
            )  # fmt: skip

    def run(
        self,
        arguments: Sequence[Argument],
        grid: Size,
        threadgroup: Size,
        options: Options = Options(),
    ) -> Counters:
        """arguments: one a buffer of the kernel, in the order of its parameters. Outputs are
        written in place. Raises KernelFault."""
        assert len(arguments) == len(self.buffers), "one argument for each buffer of the kernel"
        if min(*grid, *threadgroup) < 1:
            raise KernelFault(
                f"grid {grid} of threadgroups {threadgroup}: every side must be at least 1",
                kernel=self.name, stage="run", kind="empty grid",
                hint="do not launch where there is nothing to do",
            )  # fmt: skip
        slots = (abi.Buffer * (max((b.index for b in self.buffers), default=-1) + 1))()
        for parameter, argument in zip(self.buffers, arguments, strict=True):
            array = argument.array
            assert array.flags.c_contiguous, "arguments are contiguous"
            slot = slots[parameter.index]
            slot.data, slot.bytes = array.ctypes.data, array.nbytes
            slot.space = abi.SPACES[parameter.space]
            slot.writable, slot.initialised = not parameter.read_only, argument.initialised
        report = abi.Report()
        launch = self._launch(slots, grid, threadgroup, options)
        with _one_at_a_time:
            self._run(ctypes.byref(launch), ctypes.byref(report))
        if report.kind:
            raise self._fault(report, arguments)
        by_index = {parameter.index: parameter.name for parameter in self.buffers}
        self.traffic = {
            name: Traffic(slots[i].loaded, slots[i].stored) for i, name in by_index.items()
        }
        return self._counters(report, sum(slot.unwritten for slot in slots), options)

    def _launch(
        self,
        slots: ctypes.Array[abi.Buffer],
        grid: Size,
        threadgroup: Size,
        options: Options,
    ) -> abi.Launch:
        variables = (abi.Variable * max(1, len(self._variables)))()
        for i, (_, address, size) in enumerate(self._variables):
            variables[i] = abi.Variable(address, size)
        launch = abi.Launch(
            self._entry, slots, variables,
            buffer_count=len(slots), variable_count=len(self._variables),
            grid=grid, group=threadgroup, order=ORDERS.index(options.order),
            seed=options.seed & 0xFFFFFFFF, strict=options.strict,
            low=options.placement == "low", watch=self.count, initialised=options.initialised,
            cache_bytes=options.cache_bytes,
        )  # fmt: skip
        if self._variables:
            launch.arena = _address(self._library, "msl_before")
            launch.arena_bytes = _address(self._library, "msl_after") - launch.arena
        return launch

    def _counters(self, report: abi.Report, unwritten: int, options: Options) -> Counters:
        device, constant, shared = report.loaded
        same = (
            "threads", "threadgroups", "simd_ops", "matrix_ops", "barriers", "simd_barriers",
            "atomics", "lines_read", "lines_written", "moved_read", "moved_written", "bank_steps",
            "bank_conflicts", "uninitialised",
        )  # fmt: skip
        return Counters(
            threadgroup_bytes=self.threadgroup_bytes,
            loaded_device=device, loaded_constant=constant, loaded_threadgroup=shared,
            stored_device=report.stored[0], stored_threadgroup=report.stored[2],
            cache_bytes=options.cache_bytes if self.count else 0, unwritten=unwritten,
            **{name: getattr(report, name) for name in same},
        )  # fmt: skip

    def _fault(self, report: abi.Report, arguments: Sequence[Argument]) -> KernelFault:
        touched = None
        if report.in_threadgroup and report.region < len(self._variables):
            name, _, size = self._variables[report.region]
            touched = Touched(name, size, True)
        else:
            for parameter, argument in zip(self.buffers, arguments, strict=True):
                if parameter.index == report.region:
                    touched = Touched(parameter.name, argument.array.nbytes, False)
        told = tell(
            Happening(
                report.kind, touched, bool(report.is_write), report.offset, report.bytes,
                report.extra, report.other_thread, report.other_group, bool(report.other_write),
                report.text.decode(errors="replace"),
            )
        )  # fmt: skip
        place = lines.place(self.path, report.pc - 1) if report.pc else None
        if report.has_line:
            place = Place(report.file.decode(errors="replace"), report.line, report.column)
        x, y, z = report.thread
        i, j, k = report.group
        return KernelFault(
            told.message, kernel=self.name, stage="run", kind=told.kind, place=place,
            thread=(x, y, z), threadgroup=(i, j, k), hint=told.hint,
        )  # fmt: skip


@cache
def _runtime() -> ctypes.CDLL:
    # Kernels find libm and the runtime among the symbols that all can see.
    for name in ("libc.so.6", "libm.so.6"):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(compiler.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.msl_run.argtypes = [ctypes.POINTER(abi.Launch), ctypes.POINTER(abi.Report)]
    library.msl_run.restype = ctypes.c_int
    return library


def _address(library: ctypes.CDLL, symbol: str) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(library, symbol))


def _variables(library: ctypes.CDLL) -> list[tuple[str, int, int]]:
    """(name, address, bytes) of the threadgroup variables."""
    found = []
    symbols = ctypes.c_char_p.in_dll(library, "msl_symbols").value or b""
    for i, symbol in enumerate(symbols.decode().split()):
        size = ctypes.c_uint64.in_dll(library, f"msl_size_{i}").value
        found.append((ir.plain(symbol), _address(library, symbol), size))
    return found
