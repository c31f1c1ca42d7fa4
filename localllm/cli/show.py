"""`localllm show`: what a model is, and the memory it will need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli import options

if TYPE_CHECKING:
    from localllm.description import Description
    from localllm.hub import StoredModel


def show(
    model: options.Model,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Show a model on this machine: architecture, size, quantization, context, memory."""
    from dataclasses import asdict

    from localllm import hub
    from localllm.description import describe

    stored = hub.resolve(model, offline=True)
    description = describe(stored.path)
    if json_out:
        print(json.dumps({"name": stored.name, **asdict(description)}, ensure_ascii=False))
        return
    for label, text in _lines(stored, description):
        print(f"{label:<15}{text}")


def _lines(stored: StoredModel, d: Description) -> list[tuple[str, str]]:
    from localllm.backend.packed_folder import PackedFolder
    from localllm.hub.progress import human_bytes as size
    from localllm.hub.store import Store

    parameters = f"{d.parameters / 1e6:,.1f} M"
    if d.active_parameters != d.parameters:
        parameters += f", {d.active_parameters / 1e6:,.1f} M active a token"
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in d.quantization.items())
    kv = d.memory_bytes - d.weight_bytes
    lines = [
        ("name", stored.name),
        ("path", f"{d.path} ({size(d.file_bytes)}, {d.format})"),
        ("architecture", f"{d.architecture}, {d.layers} layers, hidden {d.hidden}"),
        ("attention", d.attention),
        ("feed-forward", d.feed_forward),
        ("parameters", parameters),
        ("quantization", shares),
        ("context", f"{d.context:,} positions"),
        ("vocabulary", f"{d.vocabulary:,} tokens, {d.tokenizer or 'no tokenizer'}"),
        ("chat template", "yes" if d.chat_template else "none"),
        (
            "memory",
            f"{size(d.memory_bytes)} on {d.backend}: {size(d.weight_bytes)} weights + {size(kv)} "
            f"for {d.planned_context:,} positions ({size(d.kv_bytes_per_token)} each) and the rest",
        ),
    ]
    packed = PackedFolder(Store().packed).size_of(stored.path)
    lines.append(("packed", f"{size(packed)} on disk, for quick starts" if packed else "not yet"))
    if stored.manifest is not None:
        lines.insert(2, ("source", stored.manifest.source))
        lines.append(("licence", stored.manifest.licence or "not stated"))
    return lines
