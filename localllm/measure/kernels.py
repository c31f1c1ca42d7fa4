"""The Metal kernels against MLX on this machine: what `localllm bench --kernels` reports."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from localllm.errors import BackendUnavailable, InvalidRequest
from localllm.kernels_metal import device
from localllm.kernels_metal.dispatch import Measured, Verdict, judge, sources_hash
from localllm.kernels_metal.registry import KERNELS, all_contests
from localllm.machine import memory


@dataclass(frozen=True)
class KernelReport:
    """What a Mac's owner can send back: where it was measured, with what, and every verdict."""

    machine: dict[str, Any]
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "verdicts": [asdict(v) for v in self.verdicts]}


def measure_kernels(
    kept: Measured, kernels: Sequence[str] = KERNELS, progress: Callable[[Verdict], object] = id
) -> KernelReport:
    """Judges every contest anew; the verdicts also go into `kept`, where the backend finds them.

    Raises BackendUnavailable without an Apple GPU, InvalidRequest for a kernel there is none of.
    """
    for name in kernels:
        if name not in KERNELS:
            raise InvalidRequest(
                f"there is no kernel named {name!r}", hint=f"kernels: {', '.join(KERNELS)}"
            )
    if not device.is_available():
        raise BackendUnavailable(
            "kernels can be timed on an Apple GPU only, and there is none here",
            hint="the emulator checks them: python -m localllm.kernels_metal.emulator --help",
        )
    verdicts = []
    for contest in all_contests(kernels=kernels):
        verdict = judge(contest)
        kept.keep(verdict)
        verdicts.append(verdict)
        progress(verdict)
    return KernelReport(_machine(), tuple(verdicts))


def _machine() -> dict[str, Any]:
    info = device.info()
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "chip": info.get("device_name"),
        "architecture": info.get("architecture"),
        "working_set_bytes": info.get("max_recommended_working_set_size"),
        "memory_bytes": memory().total,
        "macos": platform.mac_ver()[0],
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "kernels": sources_hash(),
    }
