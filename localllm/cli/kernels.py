"""The table of Metal kernels, for `doctor --kernels` and `bench --kernels`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localllm.kernels_metal.dispatch import Verdict


def show_verdicts(json_out: bool) -> None:
    """What was decided on this machine so far."""
    from localllm.backend.metal_kernels import verdicts_folder
    from localllm.kernels_metal.dispatch import Measured, signature

    kept = Measured(verdicts_folder())
    verdicts = list(kept)
    if json_out:
        facts = {"signature": signature(), "verdicts": [asdict(verdict) for verdict in verdicts]}
        print(json.dumps(facts, indent=2))
        return
    print(f"Metal kernels on {signature()}")
    if not verdicts:
        print("  None has been measured here yet: `localllm bench --kernels` measures all of them;")
        print("  the metal backend measures each one when it first needs it.")
        return
    print("\n".join(_table(verdicts)))
    print(f"kept in {kept.path}")


def bench_kernels(json_out: bool, out: Path | None) -> None:
    """Measures every kernel against MLX and prints, or writes, what came of it."""
    from localllm.backend.metal_kernels import verdicts_folder
    from localllm.errors import InvalidRequest
    from localllm.kernels_metal.dispatch import Measured
    from localllm.measure.kernels import measure_kernels

    def progress(verdict: Verdict) -> None:
        print(f"  {verdict.kernel}: {verdict.work}: {verdict.reason}", file=sys.stderr)

    if out is not None and not out.resolve().parent.is_dir():
        raise InvalidRequest(
            f"{out} cannot be written: there is no folder {out.resolve().parent}",
            hint="name a file in a folder that exists",
        )
    report = measure_kernels(Measured(verdicts_folder()), progress=progress)
    if out is not None:
        out.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}", file=sys.stderr)
    if json_out:
        print(json.dumps(report.to_dict()))
    else:
        print("\n".join(_table(report.verdicts)))


def _table(verdicts: Iterable[Verdict]) -> Iterator[str]:
    yield f"  {'kernel':<14} {'work':<44} {'error':>8} {'ours us':>9} {'MLX us':>9}  verdict"
    for v in verdicts:
        error = "" if v.error is None else f"{v.error:.1e}"
        ours, mlx = ("" if t is None else f"{t:.1f}" for t in (v.ours_us, v.mlx_us))
        used = "used" if v.used else "not used"
        yield (f"  {v.kernel:<14} {v.work:<44} {error:>8} {ours:>9} {mlx:>9}  {used}: {v.reason}")
