"""Which program computes a run's gradients: the native one where it can, else the reference."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from localllm.backend.memory import ReferenceMemory, loading_bytes
from localllm.errors import BackendUnavailable, InvalidRequest, OutOfMemoryPlan
from localllm.hub.progress import human_bytes
from localllm.machine import memory, return_freed_memory
from localllm.train.base import BaseWeights, base_weights
from localllm.train.lora import FullConfig, LoRAConfig, TuneConfig
from localllm.train.planner import smaller
from localllm.train.program import Layout, Program

ProgramName = Literal["auto", "native", "reference"]


def open_program(
    model: BaseWeights | str | Path,
    layout: Layout,
    config: TuneConfig,
    *,
    threads: int | None = None,
    program: ProgramName = "auto",
    with_base: bool = True,
) -> tuple[Program, str | None]:
    """The program, and what the user should know of the choice.

    layout: of `layout_for` for the same model and config. program: "auto" takes the native one
    where it covers the run and says why where it does not. with_base: with all weights trained,
    whether the base will be asked for as well, by `log_probs` without parameters.
    Raises BackendUnavailable where "native" was asked for and cannot be, InvalidRequest for full
    fine-tuning of a quantized model, CheckpointError for weights that are not as the headers
    promise, OutOfMemoryPlan where they do not fit.
    """
    weights = model if isinstance(model, BaseWeights) else base_weights(model)
    check_trainable(weights, config)
    kept = ReferenceMemory().weights(weights.spec, weights.forms)
    if program == "reference":
        _require_room(weights, layout, kept)
        return _reference(weights, layout, config), _threads_note(threads)
    native, reason = _native()
    if native is not None:
        reason = native.why_not(weights.spec, weights, layout, config)
        if reason is None:
            held = native.store_bytes(weights.spec, weights.forms)
            _require_room(weights, layout, held if layout.scales or with_base else 0)
            made: Program = native.NativeProgram(
                weights.spec, weights, layout, config, threads=threads, with_base=with_base
            )
            return made, None
    if program == "native":
        raise BackendUnavailable(
            f"the native program cannot train this: {reason}",
            hint="leave --program out, or give --program reference",
        )
    notes = [f"trained by the reference program, not the native one: {reason}"]
    _require_room(weights, layout, kept)
    return _reference(weights, layout, config), "; ".join(
        [*notes, *filter(None, [_threads_note(threads)])]
    )


def check_trainable(weights: BaseWeights, config: TuneConfig) -> None:
    """Raises InvalidRequest for weights that the config cannot train."""
    if isinstance(config, FullConfig) and weights.quantized and not config.dequantize:
        raise InvalidRequest(
            f"{weights.name} keeps {len(weights.quantized)} weights in few bits, which cannot be "
            "trained as they are",
            hint="train an adapter on it, take the unquantized model, or give --dequantize to "
            "train its weights in float32",
        )


def _require_room(weights: BaseWeights, layout: Layout, nbytes: int) -> None:
    """Raises OutOfMemoryPlan where the weights alone do not fit, nbytes as the program keeps them.

    Said before they are read: what a control group does not allow ends in a kill without a word.
    """
    needed = nbytes + 4 * layout.size + loading_bytes(weights.spec, weights.forms)
    return_freed_memory()  # what reading data and tokenizer left behind is not in use
    available = memory().available
    if needed > available:
        raise OutOfMemoryPlan(
            f"loading {weights.name} for training takes {human_bytes(needed)}, and "
            f"{human_bytes(available)} may still be used",
            hint=f"{smaller(not layout.scales)}, or end other programs",
        )


def _reference(weights: BaseWeights, layout: Layout, config: TuneConfig) -> Program:
    from localllm.train.reference import ReferenceProgram

    dropout = config.dropout if isinstance(config, LoRAConfig) else 0.0
    return ReferenceProgram(weights, layout, dropout=dropout)


def _threads_note(threads: int | None) -> str | None:
    if threads is None:
        return None
    return f"the reference program runs on as many threads as MLX takes, not {threads}"


def _native() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("localllm.train.native"), None
    except ImportError as error:
        return None, f"it is not built here ({error})"
