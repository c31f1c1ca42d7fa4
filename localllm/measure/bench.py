"""Loads a model and measures it, within a time that was set beforehand."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from localllm.backend.select import choose_backend
from localllm.engine.planner import BLOCK_SIZE
from localllm.errors import OutOfMemoryPlan
from localllm.hub.progress import Progress
from localllm.loading import LoadedModel, load
from localllm.machine import cores, cpu_model, resident_memory
from localllm.measure.jobs import affordable, make_jobs, probe
from localllm.measure.plan import Plan, Settings, make_plan
from localllm.measure.report import LeftOut, Report, Row
from localllm.measure.steps import Steps
from localllm.measure.timing import take_turns, timed
from localllm.spec.memory import kv_bytes

_FIRST_PROMPT = 8  # tokens
_UNSTEADY = 1.3  # slowest round against fastest
_BANDWIDTH_LEAST, _BANDWIDTH_MOST = 64 << 20, 1 << 30  # beyond caches; no more than is needed


def measure(name: str, settings: Settings, progress: Progress | None = None) -> Report:
    """Measures the model called `name`; it is fetched first if need be.

    Raises InvalidRequest for contexts that the model does not have, and what `LLM` raises.
    """
    load_average = os.getloadavg()[0]
    plan = make_plan(name, settings, progress)
    start = time.perf_counter()
    loaded = _load(name, settings, plan)
    load_seconds = time.perf_counter() - start
    try:
        return _measure(loaded, settings, plan, load_seconds, load_average)
    finally:
        loaded.close()


def _load(name: str, settings: Settings, plan: Plan) -> LoadedModel:
    """The model, with room for every row."""
    most = max(settings.batches, default=1)
    try:
        return load(
            name,
            backend=settings.backend,
            threads=settings.threads,
            activations=settings.activations,
            context=plan.longest,
            kv_tokens=plan.longest + (most - 1) * (plan.batch_context + BLOCK_SIZE),
            max_batch=most,
            offline=settings.offline,
        )
    except OutOfMemoryPlan as error:
        raise OutOfMemoryPlan(
            str(error), hint="measure at shorter contexts, with smaller batches"
        ) from error


def _measure(
    loaded: LoadedModel,
    settings: Settings,
    plan: Plan,
    load_seconds: float,
    load_average: float,
) -> Report:
    start = time.perf_counter()
    left_out = list(plan.left_out)
    resident_loaded, resident_peak = resident_memory()
    steps = _steps(loaded, settings, plan)
    first_step = timed(lambda: steps.prefill(min(_FIRST_PROMPT, plan.longest)))
    token_bytes, weight_bytes, kernels, threads = _native_facts(loaded)
    bandwidth, bandwidth_bytes = None, None
    if token_bytes is None:
        reason = f"the {loaded.backend.name} backend's weights change their form when they are read"
        left_out.append(LeftOut("share of the read bandwidth", reason))
    else:
        from localllm.kernels_cpu import _native

        bandwidth_bytes = min(max(token_bytes, _BANDWIDTH_LEAST), _BANDWIDTH_MOST)
        bandwidth = float(_native.read_bandwidth(bandwidth_bytes, threads))

    end = start + settings.seconds
    speed = probe(steps, plan.prefill)
    left = end - time.perf_counter()
    jobs = make_jobs(steps, settings, plan.within(left, speed.row), left_out)
    chosen = affordable(jobs, speed, left, left_out)
    for job in chosen:
        for sequence, positions in job.fills:
            steps.fill(sequence, positions)
    figures = take_turns(
        [job.run for job in chosen], settings.rounds, max(0.0, end - time.perf_counter())
    )
    rows = [
        Row(job.work, job.size, job.context, job.tokens, seconds)
        for job, seconds in zip(chosen, figures, strict=True)
    ]
    rows = [_completed(row, rows, loaded, token_bytes, bandwidth) for row in rows]
    found = cores()
    return Report(
        model=loaded.name,
        backend=loaded.backend.name,
        kernels=kernels,
        threads=threads,
        activations=loaded.backend.activations,
        processor=cpu_model(),
        cores=(found.usable, found.installed),
        versions=_versions(),
        load_seconds=load_seconds,
        first_token_seconds=load_seconds + first_step,
        from_cache=loaded.backend.from_cache,
        resident=(resident_loaded, resident_peak, resident_memory()[0]),
        weight_bytes=weight_bytes,
        kv_bytes=loaded.plan.kv_bytes,
        kv_tokens=loaded.plan.kv_tokens,
        bandwidth=bandwidth,
        bandwidth_bytes=bandwidth_bytes,
        rows=rows,
        left_out=left_out,
        warnings=_warnings(loaded, rows, load_average, threads or 1),
        seconds=time.perf_counter() - start,
    )


def _steps(loaded: LoadedModel, settings: Settings, plan: Plan) -> Steps:
    others = max(settings.batches, default=1) - 1
    return Steps(loaded.backend, [plan.longest] + [plan.batch_context] * others)


def _native_facts(loaded: LoadedModel) -> tuple[int | None, int, str | None, int | None]:
    """Bytes of weights that a token reads, bytes of all weights, kernels and threads."""
    if loaded.backend.name != "cpu":
        return None, loaded.plan.weight_bytes, None, None
    from localllm.backend.cpu import CpuBackend

    backend = loaded.backend
    assert isinstance(backend, CpuBackend)
    return backend.token_bytes, backend.weight_bytes, backend.kernels, backend.threads


def _completed(
    row: Row, rows: list[Row], loaded: LoadedModel, token_bytes: int | None, bandwidth: float | None
) -> Row:
    if row.work == "decode" and token_bytes is not None and bandwidth:
        per_value = choose_backend(loaded.backend.name).kv_value_bytes(loaded.plan.kv_bits)
        reads = token_bytes + kv_bytes(loaded.backend.spec, row.context, per_value)
        share = reads / row.seconds.median / bandwidth
        return replace(row, token_bytes=reads, share=share)
    if row.work == "verify":
        alone = next((r for r in rows if r.work == "decode" and r.context == row.context), None)
        if alone is not None:
            return replace(row, relative=row.seconds.median / alone.seconds.median)
    return row


def _warnings(loaded: LoadedModel, rows: list[Row], load_average: float, threads: int) -> list[str]:
    notes = [note for note in (loaded.backend_note, loaded.backend.load_note) if note]
    usable = cores().usable
    if load_average > 0.5 and load_average + threads > usable + 0.5:
        notes.append(
            f"other work ran: the load average was {load_average:.1f} before the start, with "
            f"{usable} core{'' if usable == 1 else 's'}"
        )
    unsteady = max(rows, key=lambda row: row.seconds.spread)
    if unsteady.seconds.spread > _UNSTEADY:
        notes.append(
            f"unsteady: the slowest round took up to {unsteady.seconds.spread:.1f} times as long "
            "as the fastest; something else ran, or the processor changed its speed"
        )
    return notes


def _versions() -> dict[str, str]:
    from localllm import __version__

    found = {"localllm": __version__, "python": platform.python_version()}
    for package in ("numpy", "mlx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
