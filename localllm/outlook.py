"""What a known model would take on machines of common sizes, before anything is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localllm.backend.select import BackendStatus
from localllm.checkpoint.form import AffineForm, DenseForm, Form, GroupForm
from localllm.engine.planner import BLOCK_SIZE, Machine, Model, Plan, Wish, largest, make_plan
from localllm.models import spec_of_config
from localllm.spec import DecoderSpec
from localllm.spec.memory import active_parameters, parameters
from localllm.spec.weights import weight_shapes

MACHINES = (16, 24, 32, 64)  # GB of memory
BITS = (16, 8, 4)
_SYSTEM = 4e9  # bytes for the system and what else runs beside the model
_RESIDENT = 300e6  # of a process with its imports and a tokenizer
_LEAST_CONTEXT = 4096


@dataclass(frozen=True)
class Fit:
    """On a machine of so many GB: the widest weights that fit, and with them the longest context.

    bits: None if no width fits. context: positions of one sequence; as the model supports at most.
    experts: of a mixture that does not fit whole, the share of its experts in memory beside a short
    context, while the others are read from disk; None where all weights are in memory.
    """

    gigabytes: int
    bits: int | None
    context: int
    experts: float | None = None


@dataclass(frozen=True)
class Outlook:
    """Bytes as the backend keeps them. weights: by bits, groups of 32 with a scale in 16 bits."""

    architecture: str
    backend: str
    parameters: int
    active_parameters: int
    context: int
    weights: Mapping[int, int]
    kv_bytes_per_1k: int
    fits: tuple[Fit, ...]


def outlook(config: Mapping[str, Any], backend: BackendStatus) -> Outlook:
    """From a published config.json. Raises UnsupportedModel and CheckpointError as loading does."""
    spec = spec_of_config(config, Path("catalog.toml"))
    models = {bits: Model(spec, _forms(spec, bits)) for bits in BITS}
    few, many = (_planned(models[4], tokens, 64 << 40, backend).kv_bytes for tokens in (2048, 4096))
    return Outlook(
        spec.architecture,
        backend.name,
        parameters(spec),
        active_parameters(spec),
        spec.context,
        {bits: backend.memory.weights(spec, model.forms) for bits, model in models.items()},
        (many - few) // 2,
        tuple(_fit(size, models, backend) for size in MACHINES),
    )


def _fit(gigabytes: int, models: Mapping[int, Model], backend: BackendStatus) -> Fit:
    available = int(gigabytes * 1e9 - _SYSTEM)
    for bits, model in models.items():
        most = model.spec.context // BLOCK_SIZE
        least = min(_LEAST_CONTEXT // BLOCK_SIZE, most)

        def fits(blocks: int, model: Model = model) -> bool:
            plan = _planned(model, blocks * BLOCK_SIZE, available, backend)
            return plan.fits and plan.wish.expert_bytes is None

        blocks = largest(least, most, fits)
        if blocks:
            return Fit(gigabytes, bits, blocks * BLOCK_SIZE)
    bits, model = min(models.items())
    context = min(_LEAST_CONTEXT, model.spec.context)
    plan = _planned(model, context, available, backend)
    sizes = backend.memory.experts(model.spec, model.forms)
    if not plan.fits or sizes is None or plan.wish.expert_bytes is None:
        return Fit(gigabytes, None, 0)
    return Fit(gigabytes, bits, context, plan.wish.expert_bytes / (sizes.count * sizes.slot))


def _planned(model: Model, context: int, available: int, backend: BackendStatus) -> Plan:
    wish = Wish(context, context, max_batch=1)
    return make_plan(model, wish, Machine(available, int(_RESIDENT)), backend)


def _forms(spec: DecoderSpec, bits: int) -> dict[str, Form]:
    """Matrices of so many bits where groups divide their rows, all else in 16."""
    small: Form = DenseForm(2) if bits == 16 else AffineForm(bits, 32, GroupForm(2))
    return {
        name: small if len(shape) > 1 and shape[-1] % 32 == 0 else DenseForm(2)
        for name, shape in weight_shapes(spec).items()
    }
