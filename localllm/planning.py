"""From a checkpoint's headers and this machine to what the planner asks for."""

from __future__ import annotations

from pathlib import Path

from localllm.backend.cpu_memory import packed_bytes
from localllm.backend.select import BackendStatus
from localllm.checkpoint.base import Checkpoint
from localllm.engine.planner import Machine, Model, Plan, Wish, make_plan
from localllm.engine.ways_out import require_fit
from localllm.machine import memory, resident_memory, return_freed_memory
from localllm.models import load_forms
from localllm.spec import DecoderSpec
from localllm.spec.memory import active_bytes
from localllm.spec.weights import weight_shapes


def this_machine(backend: BackendStatus) -> Machine:
    """What this process may use now, beside and with what it holds already."""
    return_freed_memory()  # what reading the tokenizer left behind is not in use
    resident = resident_memory()[0] or 0
    available = memory().available + resident
    if backend.budget is not None:
        available = min(available, backend.budget)
    return Machine(available, resident)


def model_of(checkpoint: Checkpoint, spec: DecoderSpec) -> Model:
    """Reads headers only. Raises what loading the weights would raise for them."""
    return Model(spec, load_forms(checkpoint, spec))


def expected_speed(model: Model, plan: Plan, backend: BackendStatus, file: Path) -> float | None:
    """Tokens a second of one sequence that the plan leaves experts on disk for, were all of them
    chosen alike; None where all weights are in memory. Real routers are faster: memory keeps those
    that they prefer.

    file: of the model, which is read for a moment to know its disk. So is memory.
    """
    sizes = backend.memory.experts(model.spec, model.forms)
    if sizes is None or plan.wish.expert_bytes is None:
        return None
    from localllm.backend import cpu_experts

    shapes = weight_shapes(model.spec)
    return cpu_experts.expected_speed(
        active_bytes(model.spec, lambda name: packed_bytes(shapes[name], model.forms[name])),
        sizes.chosen,
        plan.wish.expert_bytes // sizes.slot / sizes.count,
        cpu_experts.memory_speed(plan.wish.threads),
        cpu_experts.read_speed(file, sizes.slot),
    )


def fitting_plan(model: Model, wish: Wish, backend: BackendStatus) -> Plan:
    """The plan on this machine. Raises InvalidRequest, and OutOfMemoryPlan naming what fits."""
    machine = this_machine(backend)
    plan = make_plan(model, wish, machine, backend)
    require_fit(plan, model, machine, backend)
    return plan
