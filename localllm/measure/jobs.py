"""The rows of the table to come, and which of them the time allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from localllm.measure.plan import Plan, Settings
from localllm.measure.report import LeftOut, Work
from localllm.measure.steps import Steps
from localllm.measure.timing import timed

DRAFTS = 4
_PROBE_ROWS = 16
_PASSES = 2  # of each row at least: one that is not counted, and one that is


@dataclass(frozen=True)
class Speed:
    """Seconds of a row among many, and of a step with one."""

    row: float
    step: float


def probe(steps: Steps, most: int) -> Speed:
    """How fast a few rows are computed, `most` of them at most."""
    rows = min(_PROBE_ROWS, most)
    timed(lambda: steps.fill(0, 1))
    return Speed(timed(lambda: steps.prefill(rows)) / rows, timed(lambda: steps.decode(1)))


@dataclass(frozen=True)
class Job:
    """A row to come: what to fill first, and the work to time."""

    work: Work
    size: int
    context: int
    tokens: int
    fills: tuple[tuple[int, int], ...]  # sequence, positions
    run: Callable[[], None]

    @property
    def label(self) -> str:
        return {
            "prefill": f"prefill of {self.size}",
            "decode": f"decode at {self.context}",
            "batch": f"{self.size} at once",
            "verify": f"verifying {self.size} drafts at {self.context}",
        }[self.work]


def make_jobs(steps: Steps, settings: Settings, plan: Plan, left_out: list[LeftOut]) -> list[Job]:
    """What a user waits for most comes first; the last ones are left out when time is short."""
    rows = plan.prefill
    jobs = [Job("prefill", rows, rows, rows, (), lambda: steps.prefill(rows))]
    for context in sorted(set(plan.contexts)):

        def decode(context: int = context) -> None:
            steps.decode(context)

        jobs.append(Job("decode", 1, context, 1, ((0, context - 1),), decode))
    first = jobs[1]
    if first.context > DRAFTS:
        verify = lambda: steps.verify(first.context, DRAFTS)  # noqa: E731
        jobs.insert(2, Job("verify", DRAFTS, first.context, DRAFTS + 1, first.fills, verify))
    else:
        reason = f"a context of {first.context} has no room for them"
        left_out.append(LeftOut(f"verifying {DRAFTS} drafts", reason))
    for batch in sorted(set(settings.batches)):

        def together(batch: int = batch) -> None:
            steps.decode(plan.batch_context, batch)

        fills = tuple((sequence, plan.batch_context - 1) for sequence in range(batch))
        jobs.append(Job("batch", batch, plan.batch_context, batch, fills, together))
    return jobs


def affordable(jobs: list[Job], speed: Speed, seconds: float, left_out: list[LeftOut]) -> list[Job]:
    """The jobs that fit into the time; one at least."""
    filled: dict[int, int] = {}
    chosen: list[Job] = []
    late: list[tuple[float, Job]] = []
    for job in jobs:
        new = sum(max(0, stop - filled.get(sequence, 0)) for sequence, stop in job.fills)
        needed = new * speed.row + _PASSES * max(speed.step, job.tokens * speed.row)
        if needed > seconds:
            late.append((needed, job))
            continue
        seconds -= needed
        for sequence, stop in job.fills:
            filled[sequence] = max(stop, filled.get(sequence, 0))
        chosen.append(job)
    if not chosen:
        late.sort(key=lambda item: item[0])
        chosen.append(late.pop(0)[1])
    left_out += [
        LeftOut(job.label, f"it takes about {needed:.0f} s, more than were left")
        for needed, job in late
    ]
    return chosen
