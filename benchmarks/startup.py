"""How long `localllm --help` takes, next to a Python that does nothing.

    python benchmarks/startup.py

Each runs 20 times, in turn; the median and the fastest are printed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 20
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import localllm": [sys.executable, "-c", "import localllm"],
    "localllm --help": [str(Path(sys.executable).with_name("localllm")), "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS + 1):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    print(f"{'':<18}{'median':>10}{'fastest':>10}")
    for name, taken in times.items():
        warm = taken[1:]  # the first run fills the file cache
        print(f"{name:<18}{statistics.median(warm):>8.3f} s{min(warm):>8.3f} s")


if __name__ == "__main__":
    main()
