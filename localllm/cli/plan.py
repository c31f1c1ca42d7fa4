"""`localllm plan`: the memory a model will take, and what to change if it does not fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localllm.cli import options
from localllm.cli.sizes import parse_bytes, parse_count

if TYPE_CHECKING:
    from pathlib import Path

    from localllm.engine.planner import Model, Plan
    from localllm.engine.ways_out import WayOut


def plan(
    model: options.Model,
    context: Annotated[
        str | None, typer.Option(help="Positions of one sequence: 8192, 32k; 8k unless told.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences computed together.")] = 32,
    kv_tokens: Annotated[
        str | None,
        typer.Option(help="Positions of all sequences together that the KV cache holds."),
    ] = None,
    kv_bits: options.KvBits = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    activations: options.Activations = None,
    adapters: Annotated[int, typer.Option(min=0, help="Adapters loaded at a time.")] = 0,
    adapter_rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 16,
    draft_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A small model that guesses for this one.")
    ] = None,
    expert_memory: options.ExpertMemory = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan for a process that may use so much, 16GB, not what is free here."),
    ] = None,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Show the memory a model on this machine will take. Reads headers, loads no weights.

    Exits with 1 if it does not fit, and says what would.
    """
    wished = None if context is None else parse_count(context)
    tokens = None if kv_tokens is None else parse_count(kv_tokens)
    available = None if memory is None else parse_bytes(memory)

    from dataclasses import replace

    from localllm.backend.select import check_activations, choose_backend
    from localllm.engine.planner import Wish, make_plan
    from localllm.engine.ways_out import ways_out
    from localllm.machine import cores
    from localllm.planning import expected_speed, this_machine

    chosen = choose_backend(backend)
    check_activations(chosen, activations)  # type: ignore[arg-type]
    read, file = _read(model)
    wish = Wish(
        wished,
        tokens,
        batch,
        kv_bits,
        threads or cores().usable,
        activations == "float32",
        adapters,
        adapter_rank,
        None if draft_model is None else _read(draft_model)[0],
        options.optional_bytes(expert_memory),
    )
    machine = this_machine(chosen)
    if available is not None:
        machine = replace(machine, available=available)
    made = make_plan(read, wish, machine, chosen)
    ways = [] if made.fits else ways_out(read, wish, machine, chosen)
    speed = expected_speed(read, made, chosen, file)
    if json_out:
        facts = {"model": model, "backend": chosen.name, **_facts(made, ways)}
        print(json.dumps(facts | {"least_tokens_per_second": speed}))
    else:
        print("\n".join(_lines(made, ways)))
        if speed is not None:
            print(f"Experts are read from disk as they are chosen: at least {speed:.2g} tokens/s.")
    if not made.fits:
        raise typer.Exit(1)


def _read(name: str) -> tuple[Model, Path]:
    """From the headers of a model that is here, and its largest file. Its tokenizer counts with the
    process."""
    from localllm import hub
    from localllm.checkpoint import open_checkpoint
    from localllm.models import load_spec
    from localllm.planning import model_of
    from localllm.tokenizer import load_tokenizer

    stored = hub.resolve(name, offline=True)
    checkpoint = open_checkpoint(stored.path)
    try:
        _tokenizers.append(load_tokenizer(stored.path, checkpoint.config))
        spec = load_spec(checkpoint)
        checkpoint.forget_vocabulary()
        largest = max(checkpoint.files(), key=lambda file: file.stat().st_size)
        return model_of(checkpoint, spec), largest
    finally:
        checkpoint.close()


_tokenizers: list[object] = []  # kept, since a running model keeps its own


def _facts(plan: Plan, ways: list[WayOut]) -> dict[str, Any]:
    return {
        "context": plan.context,
        "batch": plan.wish.max_batch,
        "kv_tokens": plan.kv_tokens,
        "kv_bits": plan.kv_bits,
        "group_blocks": plan.group_blocks,
        "state_slots": plan.state_slots,
        "items": [
            {"name": item.name, "bytes": item.nbytes, "detail": item.detail} for item in plan.items
        ],
        "total_bytes": plan.total,
        "peak_bytes": plan.peak,
        "available_bytes": plan.available,
        "fits": plan.fits,
        "ways_out": [{"change": way.change, "peak_bytes": way.plan.peak} for way in ways],
    }


def _lines(plan: Plan, ways: list[WayOut]) -> list[str]:
    from localllm.engine.ways_out import shown
    from localllm.hub.progress import human_bytes as size

    rows = [(item.name, size(item.nbytes), item.detail) for item in plan.items]
    detail = f"context {shown(plan.context)}, batch {plan.wish.max_batch}"
    rows.append(("total", size(plan.total), detail))
    if plan.peak > plan.total:
        rows.append(("while loading", size(plan.peak), "the largest tensor as it is read, twice"))
    rows.append(("may be used", size(plan.available), "by this process, all it holds included"))
    names, sizes = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{name:<{names}}  {took:>{sizes}}  {what}".rstrip() for name, took, what in rows]
    if plan.fits:
        return [*lines, "", f"It fits, with {size(plan.available - plan.peak)} to spare."]
    lines += ["", f"It does not fit: {size(plan.peak - plan.available)} are missing."]
    if not ways:
        return [*lines, "No setting makes it fit: choose a smaller model."]
    lines.append("What fits instead:")
    return [*lines, *(f"  {way.change}  ({size(way.plan.peak)})" for way in ways)]
