"""Which kernels are used: those that were checked and found faster than MLX's own ops.

On a GPU each kernel is checked against the reference and timed against MLX once for each shape
class; the verdict is kept on disk by chip, MLX version and the kernels' sources. So a kernel can
make a Mac neither wrong nor slower.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest

_ROUNDS = 7
_REPEATS = 10  # evaluations timed as one, since a single one is mostly the wait for the GPU
_MAX_VERDICTS = 5000


@dataclass(frozen=True)
class Verdict:
    """error: of ours, relative to the largest value. Times in microseconds, medians."""

    kernel: str
    work: str
    used: bool
    reason: str
    error: float | None = None
    tolerance: float | None = None
    ours_us: float | None = None
    mlx_us: float | None = None


class Chooser(Protocol):
    """Decides for a kernel and a shape class. contest: builds the work, if it must be measured."""

    def uses(self, kernel: str, work: str, contest: Callable[[], Contest]) -> bool: ...


class Always:
    """Every kernel that applies: for the emulator, where nothing can be timed."""

    def uses(self, kernel: str, work: str, contest: Callable[[], Contest]) -> bool:
        return True


class Never:
    """MLX's own ops alone."""

    def uses(self, kernel: str, work: str, contest: Callable[[], Contest]) -> bool:
        return False


class Measured:
    """Verdicts by measurement, remembered in a file of `folder` (None: for this process alone).

    A file that cannot be read or written is no error: the kernels are measured again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / f"{signature()}.json"
        self._verdicts = {} if self.path is None else _read(self.path)

    def uses(self, kernel: str, work: str, contest: Callable[[], Contest]) -> bool:
        verdict = self._verdicts.get((kernel, work))
        if verdict is None:
            verdict = judge(contest())
            self.keep(verdict)
        return verdict.used

    def keep(self, verdict: Verdict) -> None:
        """Remembers it, on disk too; the oldest are forgotten beyond 5,000."""
        self._verdicts[verdict.kernel, verdict.work] = verdict
        while len(self._verdicts) > _MAX_VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]
        if self.path is not None:
            _write(self.path, self)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self._verdicts.values())


def judge(contest: Contest) -> Verdict:
    """Checks ours against the truth and times it against MLX's. Never raises for a kernel's fault:
    a kernel that does not compile or fails is not used, and the verdict says why."""
    try:
        error = error_of(contest)
    except Exception as fault:  # whatever the Metal compiler or the driver throws
        reason = f"failed: {str(fault).strip().splitlines()[0][:200] if str(fault) else fault!r}"
        return Verdict(contest.kernel, contest.work, False, reason)
    if not error <= contest.tolerance:
        reason = f"wrong: error {error:.1e}, allowed {contest.tolerance:.1e}"
        return Verdict(
            contest.kernel, contest.work, False, reason, _finite(error), contest.tolerance
        )
    if contest.mlx is None:
        verdict = Verdict(contest.kernel, contest.work, True, "MLX has no way of its own")
        return Verdict(**{**asdict(verdict), "error": error, "tolerance": contest.tolerance})
    ours, mlx = timed(contest.ours, contest.mlx)
    faster = ours < mlx
    return Verdict(
        contest.kernel,
        contest.work,
        faster,
        "faster than MLX" if faster else "slower than MLX",
        error,
        contest.tolerance,
        ours * 1e6,
        mlx * 1e6,
    )


def error_of(contest: Contest) -> float:
    """The largest error of ours relative to the largest value of the truth; infinite for NaN or
    another shape."""
    worst = 0.0
    for got, truth in zip(contest.ours(), contest.truth(), strict=True):
        value = np.array(got.astype(mx.float32), np.float64)
        if value.shape != truth.shape or not np.isfinite(value).all():
            return float("inf")
        scale = np.abs(truth).max(initial=0)
        difference = np.abs(value - truth).max(initial=0)
        if difference:
            worst = max(worst, difference / scale if scale else float("inf"))
    return worst


def timed(
    ours: Callable[[], list[mx.array]], mlx: Callable[[], list[mx.array]]
) -> tuple[float, float]:
    """Seconds of each, medians over rounds that alternate."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(_ROUNDS + 1):
        for side, run in enumerate((ours, mlx)):
            start = time.perf_counter()
            mx.eval([run() for _ in range(_REPEATS)])
            if round_:  # the first one compiles
                seconds[side].append((time.perf_counter() - start) / _REPEATS)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def signature() -> str:
    """Names chip, MLX version and the kernels' sources: what verdicts depend on."""
    chip = "no-gpu"
    if mx.metal.is_available():
        chip = str(mx.device_info().get("device_name", "gpu"))
    plain = re.sub(r"[^A-Za-z0-9]+", "-", chip).strip("-").lower()
    return f"{plain}-mlx-{version('mlx')}-{sources_hash()}"


def sources_hash() -> str:
    """Of every file that decides what a kernel computes and how it is launched."""
    digest = hashlib.sha256()
    for entry in sorted(resources.files("localllm.kernels_metal").iterdir(), key=lambda e: e.name):
        if entry.name.endswith((".metal", ".py")):
            digest.update(entry.name.encode() + entry.read_bytes())
    return digest.hexdigest()[:12]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _read(path: Path) -> dict[tuple[str, str], Verdict]:
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
        verdicts = [Verdict(**row) for row in rows["verdicts"][:_MAX_VERDICTS]]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {(v.kernel, v.work): v for v in verdicts}


def _write(path: Path, verdicts: Measured) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"verdicts": [asdict(verdict) for verdict in verdicts]}, file, indent=1)
        os.replace(name, path)
    except OSError:
        return
