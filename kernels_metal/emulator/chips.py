"""Public figures of Apple chips, and the least time that a kernel can take on one: an estimate.

Bandwidths are those that Apple states, for the largest GPU of each chip. Apple states arithmetic
in FP32 only for the M1; the others are gathered by third parties, and marked `official=False`.
No figure here was measured by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from localllm.errors import LocalLLMError

_NEWS = "https://www.apple.com/newsroom"
_SUPPORT = "https://support.apple.com"
_M1 = f"{_NEWS}/2020/11/apple-unleashes-m1/"
_M1_PRO = (
    f"{_NEWS}/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built/"
)
_M1_ULTRA = (
    f"{_NEWS}/2022/03/apple-unveils-m1-ultra-the-worlds-most-powerful-chip-for-a-personal-computer/"
)
_M2 = f"{_NEWS}/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/"
_M2_PRO = (
    f"{_NEWS}/2023/01/"
    "apple-unveils-m2-pro-and-m2-max-next-generation-chips-for-next-level-workflows/"
)
_M2_ULTRA = f"{_NEWS}/2023/06/apple-introduces-m2-ultra/"
_M3_ULTRA = f"{_NEWS}/2025/03/apple-reveals-m3-ultra-taking-apple-silicon-to-a-new-extreme/"
_M4 = f"{_NEWS}/2024/10/apple-introduces-m4-pro-and-m4-max/"
_M5 = f"{_NEWS}/2025/10/apple-unleashes-m5-the-next-big-leap-in-ai-performance-for-apple-silicon/"
_M5_PRO = (
    f"{_NEWS}/2026/03/"
    "apple-debuts-m5-pro-and-m5-max-to-supercharge-the-most-demanding-pro-workflows/"
)
_M3_SPECS = f"{_SUPPORT}/en-us/117735"  # MacBook Pro 14", M3
_M3_PRO_SPECS = f"{_SUPPORT}/en-us/117736"  # MacBook Pro 14", M3 Pro or Max
_STUDIO_SPECS = f"{_SUPPORT}/en-sg/128107"  # Mac Studio, M5 Max or Ultra
_LLAMA = "https://github.com/ggml-org/llama.cpp/discussions/4167"
_HUGGINGFACE = (
    "https://github.com/huggingface/huggingface.js/blob/main/packages/tasks/src/hardware.ts"
)
_HUGGINGFACE_M5_ULTRA = "https://huggingface.co/hardware/apple-m5-ultra"


@dataclass(frozen=True)
class Figure:
    """A published number and where it is published. official: by Apple itself."""

    value: float
    source: str

    @property
    def official(self) -> bool:
        return self.source.startswith((_NEWS, _SUPPORT))


@dataclass(frozen=True)
class Chip:
    """bandwidth: GB/s (1e9 bytes) between memory and chip. tflops: FP32, 1e12 operations/s."""

    name: str
    bandwidth: Figure
    tflops: Figure


@dataclass(frozen=True)
class Estimate:
    """The least time that the work can take, were the chip's published peaks reached.

    microseconds: the longer of `memory` and `arithmetic`; a real kernel takes longer. `arithmetic`
    is None where the operations were not counted, so that memory alone decides.
    """

    chip: Chip
    memory: float
    arithmetic: float | None

    @property
    def microseconds(self) -> float:
        return max(self.memory, self.arithmetic or 0.0)

    @property
    def bound_by(self) -> Literal["memory", "arithmetic"]:
        return "memory" if self.memory >= (self.arithmetic or 0.0) else "arithmetic"


def _chip(
    name: str, bandwidth: float, where: str, tflops: float, whose: str = _HUGGINGFACE
) -> tuple[str, Chip]:
    chip = Chip(name, Figure(bandwidth, where), Figure(tflops, whose))
    return name.lower().replace(" ", "-"), chip


CHIPS: dict[str, Chip] = dict(
    [
        _chip("M1", 68, _LLAMA, 2.6, _M1),
        _chip("M1 Pro", 200, _M1_PRO, 5.2),
        _chip("M1 Max", 400, _M1_PRO, 10.4),
        _chip("M1 Ultra", 800, _M1_ULTRA, 21.0),
        _chip("M2", 100, _M2, 3.6),
        _chip("M2 Pro", 200, _M2_PRO, 6.8),
        _chip("M2 Max", 400, _M2_PRO, 13.49),
        _chip("M2 Ultra", 800, _M2_ULTRA, 27.2),
        _chip("M3", 100, _M3_SPECS, 4.1),
        _chip("M3 Pro", 150, _M3_PRO_SPECS, 7.4),
        _chip("M3 Max", 400, _M3_PRO_SPECS, 14.2),
        _chip("M3 Ultra", 800, _M3_ULTRA, 28.4),  # Apple says "over 800"
        _chip("M4", 120, _M4, 4.6),
        _chip("M4 Pro", 273, _M4, 9.2),
        _chip("M4 Max", 546, _M4, 18.4),
        _chip("M5", 153, _M5, 5.7),
        _chip("M5 Pro", 307, _M5_PRO, 11.4),
        _chip("M5 Max", 614, _M5_PRO, 22.8),
        _chip("M5 Ultra", 1200, _STUDIO_SPECS, 45.6, _HUGGINGFACE_M5_ULTRA),
    ]
)


def find_chip(name: str) -> Chip:
    """By a name such as "m2" or "M4 Max". Raises LocalLLMError, which lists the known ones."""
    chip = CHIPS.get(name.lower().replace(" ", "-").replace("_", "-"))
    if chip is None:
        raise LocalLLMError(
            f"no chip is called {name!r}", hint="known chips: " + ", ".join(sorted(CHIPS))
        )
    return chip


def estimate(chip: Chip, moved: int, operations: int | None = None) -> Estimate:
    """The roofline. moved: bytes between memory and chip. operations: of FP32, where counted."""
    memory = moved / (chip.bandwidth.value * 1e3)
    arithmetic = None if operations is None else operations / (chip.tflops.value * 1e6)
    return Estimate(chip, memory, arithmetic)
