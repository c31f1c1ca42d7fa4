"""The machine and the versions, printed above every table; its read bandwidth."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import version

from localllm.kernels_cpu import _native
from localllm.machine import cores, cpu_model, memory

READ_BYTES = 256 << 20  # a buffer that no cache holds


def describe() -> dict[str, str]:
    """Machine, system and versions, as words for a heading and values for JSON."""
    load = os.getloadavg()[0]
    return {
        "machine": f"{cpu_model()}, {cores().usable} usable processors, "
        f"{memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "localllm": f"{version('localllm')}, kernels that run here: "
        f"{', '.join(_native.usable_kernels())}",
        "load": f"{load:.2f} (average of the last minute, before the run)",
    }


def print_heading() -> None:
    for name, words in describe().items():
        print(f"{name}: {words}")
    if os.getloadavg()[0] > 0.5:
        print("NOTE: other work runs on this machine; the figures are not those of a quiet one.")


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that so many threads read from memory: median of a few passes."""
    return statistics.median(
        float(_native.read_bandwidth(READ_BYTES, threads)) for _ in range(rounds)
    )
