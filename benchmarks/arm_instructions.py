"""Instructions that ARM's matmul kernels execute, counted under qemu: not a measure of speed.

    python benchmarks/arm_instructions.py

A matrix of 64 x 256 codes with one scale per 32 is multiplied once and then twice; the difference
is what one matmul takes. The figure is per activation row and block of 16 x 32 codes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1] / "kernels_cpu" / "tests"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
BLOCKS = (64 // 16) * (256 // 32)


def executed(program: Path, kernels: str, bits: int, rows: int, times: int) -> int:
    # One instruction a translated block, and a line of log for each.
    log = ["-singlestep", "-d", "nochain,exec", "-D", "/dev/stdout"]
    command = [QEMU, "-cpu", "max", *log, str(program), kernels, *map(str, (bits, rows, times))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        count = sum(line.startswith(b"Trace") for line in process.stdout)
    assert process.returncode == 0, f"{QEMU} ended with {process.returncode}"
    return count


def per_block(program: Path, kernels: str, bits: int, rows: int) -> float:
    once, twice = (executed(program, kernels, bits, rows, times) for times in (1, 2))
    return (twice - once) / (rows * BLOCKS)


def main() -> int:
    missing = [name for name in (COMPILER, QEMU) if shutil.which(name) is None]
    if missing:
        print(f"skipped: needs {' and '.join(missing)}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "matmul_loop"
        script = [str(TESTS / "build.sh"), str(program), COMPILER, "-O3 -static"]
        subprocess.run([*script, str(TESTS / "matmul_loop.cpp")], check=True, env=os.environ)
        print("| code bits | rows | neon | neon_i8mm |\n| --- | --- | --- | --- |")
        for bits in (4, 6, 8):
            for rows in (1, 2, 4, 8, 32):
                a, b = (per_block(program, k, bits, rows) for k in ("neon", "neon_i8mm"))
                print(f"| {bits} | {rows} | {a:.0f} | {b:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
