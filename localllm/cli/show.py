"""`localllm show`: what a model is, and the memory it will need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli import options

if TYPE_CHECKING:
    from localllm.description import Description
    from localllm.hub import CatalogEntry, StoredModel
    from localllm.outlook import Outlook


def show(
    model: options.Model,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Show a model: architecture, size, quantization, context, memory.

    Of a known model that is not here yet: what it would take on machines of 16 to 64 GB.
    """
    from dataclasses import asdict

    from localllm import hub
    from localllm.description import describe
    from localllm.errors import DownloadError, ModelNotFound

    try:
        stored = hub.resolve(model, offline=True)
    except (DownloadError, ModelNotFound):
        entry = hub.load_catalog().get(model)
        if entry is None or entry.config is None:
            raise
        _show_entry(entry, json_out=json_out)
        return
    description = describe(stored.path)
    if json_out:
        print(json.dumps({"name": stored.name, **asdict(description)}, ensure_ascii=False))
        return
    for label, text in _lines(stored, description):
        print(f"{label:<15}{text}")


def _show_entry(entry: CatalogEntry, *, json_out: bool) -> None:
    from dataclasses import asdict

    from localllm.backend.select import choose_backend
    from localllm.outlook import outlook

    assert entry.config is not None
    look = outlook(entry.config, choose_backend(None))
    if json_out:
        facts = {"name": entry.name, "installed": False, "checked": entry.checked, **asdict(look)}
        print(json.dumps(facts, ensure_ascii=False))
        return
    for label, text in _entry_lines(entry, look):
        print(f"{label:<15}{text}")


def _entry_lines(entry: CatalogEntry, look: Outlook) -> list[tuple[str, str]]:
    from localllm.hub.progress import human_bytes as size

    count = f"{look.parameters / 1e9:,.2f} B"
    if look.active_parameters != look.parameters:
        count += f", {look.active_parameters / 1e9:,.2f} B active a token"
    weights = ", ".join(f"{size(taken)} at {bits} bits" for bits, taken in look.weights.items())
    lines = [
        ("name", f"{entry.name}, {entry.title}: not here; `localllm pull {entry.name}` fetches it"),
        ("checked", entry.checked),
        ("architecture", look.architecture),
        ("parameters", count),
        ("context", f"{look.context:,} positions"),
        ("template", entry.template),
        ("licence", entry.licence),
        ("weights", f"{weights}, as {look.backend} keeps them"),
        ("KV cache", f"{size(look.kv_bytes_per_1k)} for 1,024 positions"),
    ]
    for fit in look.fits:
        if fit.bits is None:
            fate = "does not fit, not even at 4 bits"
        else:
            fate = f"at {fit.bits} bits, with a context of {fit.context:,}"
            if fit.experts is not None:
                fate += f" and {fit.experts:.0%} of its experts in memory, the others on disk"
        lines.append((f"on {fit.gigabytes} GB", fate))
    return lines


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
