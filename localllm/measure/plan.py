"""What to measure: what was asked for, as far as the model goes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localllm import hub
from localllm.backend.protocol import Activations
from localllm.checkpoint import open_checkpoint
from localllm.errors import InvalidRequest
from localllm.hub.progress import Progress
from localllm.measure.report import LeftOut
from localllm.models import load_spec

_CONTEXTS = (128, 1024, 4096)
_PREFILL = 512
_BATCH_CONTEXT = 128


@dataclass(frozen=True)
class Settings:
    """contexts: None for 128, 1024 and 4096, as far as the model has them. batches: sequences
    decoded together, each with 128 positions. prefill: tokens of a prompt; None for 512, or as
    many as the model takes. rounds: at most so many. seconds: about how long measuring may take,
    loading not counted."""

    backend: str | None = None
    threads: int | None = None
    activations: Activations | None = None
    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 8, 32)
    prefill: int | None = None
    rounds: int = 7
    seconds: float = 60.0
    offline: bool | None = None

    def __post_init__(self) -> None:
        least = {
            "contexts": min(self.contexts or (1,)),
            "batches": min(self.batches, default=1),
            "prefill": 1 if self.prefill is None else self.prefill,
            "rounds": self.rounds,
        }
        for name, value in least.items():
            if value < 1:
                raise InvalidRequest(f"{name}: at least 1 is possible, not {value}")
        if not self.seconds > 0:
            raise InvalidRequest(f"seconds must be more than 0, not {self.seconds}")


@dataclass(frozen=True)
class Plan:
    """The settings, as far as the model's context goes."""

    contexts: tuple[int, ...]
    prefill: int
    prefill_asked: bool
    batch_context: int
    left_out: list[LeftOut]

    @property
    def longest(self) -> int:
        return max(*self.contexts, self.prefill, self.batch_context)

    def within(self, seconds: float, row: float) -> Plan:
        """With a shorter prompt where it would take most of the time and was not asked for.

        row: seconds that one row takes.
        """
        prefill = self.prefill
        while not self.prefill_asked and prefill > 16 and prefill * row * 8 > seconds:
            prefill //= 2
        return replace(self, prefill=prefill)


def make_plan(name: str, settings: Settings, progress: Progress | None) -> Plan:
    """What was asked for is done or refused; contexts of our own choice give way to the model's."""
    stored = hub.resolve(name, progress=progress, offline=settings.offline)
    checkpoint = open_checkpoint(stored.path)
    try:
        most = load_spec(checkpoint).context
    finally:
        checkpoint.close()
    for option, asked in (("contexts", settings.contexts or ()), ("prefill", (settings.prefill,))):
        for positions in asked:
            if positions is not None and positions > most:
                raise InvalidRequest(
                    f"{option}: {positions} positions were asked for; this model supports 1 to "
                    f"{most}"
                )
    contexts = settings.contexts or tuple(c for c in _CONTEXTS if c <= most) or (most,)
    left_out = [
        LeftOut(f"decode at {context}", f"this model supports {most} positions")
        for context in _CONTEXTS
        if settings.contexts is None and context > most
    ]
    prefill = settings.prefill or min(_PREFILL, most)
    prefill_asked = settings.prefill is not None
    return Plan(contexts, prefill, prefill_asked, min(_BATCH_CONTEXT, most), left_out)
