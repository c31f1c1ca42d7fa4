"""`localllm list`: what is here, and what could be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from localllm.hub import CatalogEntry
    from localllm.hub.store import Kept


def list_models(
    catalog: Annotated[
        bool, typer.Option("--catalog", help="Show what can be pulled by name.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the models in the store."""
    from localllm.hub import load_catalog
    from localllm.hub.store import Store

    store = Store()
    kept = store.kept()
    if catalog:
        here = {item.manifest.name for item in kept if item.manifest and not item.problem}
        entries = list(load_catalog())
        if as_json:
            _print_json([_entry_facts(entry, entry.name in here) for entry in entries])
        else:
            _print_catalog(entries, here)
        return
    unfinished = store.unfinished()
    if as_json:
        _print_json([_facts(item) for item in kept])
        return
    if not kept:
        typer.echo(f"no models in {store.home} yet; try `localllm pull smollm2:135m`")
    else:
        _print_kept(kept)
    for name, size in unfinished:
        typer.echo(
            f"unfinished: {name} ({_bytes(size)}); `localllm pull {name}` goes on, "
            f"`localllm rm {name}` discards it"
        )


def _print_kept(kept: Sequence[Kept]) -> None:
    rows = []
    for item in kept:
        if item.manifest is None or item.problem:
            name = item.manifest.name if item.manifest else item.folder.name
            rows.append((name, _bytes(item.size), f"DAMAGED: {item.problem}", "", ""))
            continue
        manifest = item.manifest
        files = manifest.files
        what = files[0].name if len(files) == 1 else f"{len(files)} files"
        rows.append(
            (manifest.name, _bytes(manifest.size), what, manifest.source, _day(manifest.pulled_at))
        )
    _print_table(("NAME", "SIZE", "FILE", "SOURCE", "PULLED"), rows)


def _print_catalog(entries: Sequence[CatalogEntry], here: set[str]) -> None:
    rows = []
    for entry in entries:
        source = entry.sources[0]
        size = "?"
        if source.download_bytes is not None:
            size = ("" if source.exact else "~") + _bytes(source.download_bytes)
        state = "here" if entry.name in here else ""
        rows.append((entry.name, _count(entry.parameters), size, entry.licence, state, entry.title))
    _print_table(("NAME", "PARAMETERS", "DOWNLOAD", "LICENCE", "", "MODEL"), rows)


def _facts(item: Kept) -> dict[str, Any]:
    manifest = item.manifest
    if manifest is None:
        return {"name": None, "folder": str(item.folder), "problem": item.problem}
    return {
        "name": manifest.name,
        "size": manifest.size,
        "source": manifest.source,
        "revision": manifest.revision,
        "licence": manifest.licence,
        "pulled_at": manifest.pulled_at,
        "folder": str(item.folder),
        "files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in manifest.files],
        "problem": item.problem,
    }


def _entry_facts(entry: CatalogEntry, here: bool) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "kind": entry.kind,
        "parameters": entry.parameters,
        "context": entry.context,
        "licence": entry.licence,
        "draft": entry.draft,
        "checked": entry.checked,
        "installed": here,
        "sources": [
            {
                "source": str(source.ref),
                "download_bytes": source.download_bytes,
                "exact": source.exact,
            }
            for source in entry.sources
        ],
    }


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _bytes(count: int) -> str:
    from localllm.hub.progress import human_bytes

    return human_bytes(count)


def _count(parameters: int) -> str:
    billions = parameters / 1e9
    return f"{billions:.1f}B" if billions >= 0.95 else f"{parameters / 1e6:.0f}M"


def _day(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return moment
