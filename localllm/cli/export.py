"""`localllm export`: a model, an adapter, or both in one, as files for other programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from localllm.cli import options
from localllm.cli.exporting import bar, dtype_named, to_megabytes
from localllm.errors import InvalidRequest


def export(
    model: Annotated[str, typer.Argument(help="The model, by any name that it loads by.")],
    adapter: options.Adapter = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", help="Write one GGUF file, for llama.cpp and others.")
    ] = None,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="With --gguf: the adapter alone, for llama.cpp's --lora."),
    ] = False,
    safetensors: Annotated[
        Path | None,
        typer.Option("--safetensors", help="Write a folder for transformers, vLLM and MLX."),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            help="Of matrices: keep, f32, f16, bf16; in GGUF also q8_0, q6_k, q5_1, q5_0, q4_k, "
            "q4_1, q4_0.",
        ),
    ] = "keep",
    offline: options.Offline = False,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")
    ] = False,
) -> None:
    """Write a model for other programs, with an adapter merged in or on its own.

    Tokenizer and chat template go along. With --type keep, weights stay as they are stored, and
    what an adapter changes is written in 16 bits; `localllm fuse` says how far that moves a model.
    """
    from localllm.export import open_source, write_adapter_gguf, write_folder, write_gguf
    from localllm.export.gguf import KINDS

    if (gguf is None) == (safetensors is None):
        raise InvalidRequest("name what to write: --gguf FILE or --safetensors DIR")
    if lora and (gguf is None or adapter is None):
        raise InvalidRequest("--lora needs --gguf FILE and --adapter DIR")
    if lora and kind != "keep":
        raise InvalidRequest("--lora writes float32; --type has no say in it")
    chosen = next((one for one in KINDS if one == kind), None)
    if chosen is None:
        raise InvalidRequest(f"no type {kind!r}", hint=f"types: {', '.join(KINDS)}")
    if gguf is not None and gguf.exists():
        raise InvalidRequest(f"{gguf}: is there already", hint="name a new file")
    with (
        bar("writing", quiet=json_out) as progress,
        open_source(model, adapter, offline=offline or None) as source,
    ):
        if gguf is not None and lora:
            pairs = write_adapter_gguf(source, gguf)
            facts = {**asdict(pairs), "path": str(gguf)}
            line = f"{gguf}: {pairs.pairs} pairs, {to_megabytes(pairs.nbytes)}"
        elif gguf is not None:
            file = write_gguf(source, gguf, chosen, progress=progress)
            facts = {**asdict(file), "path": str(gguf)}
            kinds = ", ".join(f"{count} {name}" for name, count in file.kinds.items())
            line = f"{gguf}: {to_megabytes(file.nbytes)}, {kinds}"
            for note in file.notes:
                print(f"note: {note}", file=sys.stderr)
        else:
            assert safetensors is not None
            form = "keep" if chosen == "keep" else dtype_named(chosen)
            folder = write_folder(source, safetensors, form, progress=progress)
            facts = {**asdict(folder), "folder": str(safetensors)}
            line = f"{safetensors}: {folder.tensors} tensors, {to_megabytes(folder.nbytes)}"
        if source.adapter is not None and not lora:
            line += f"; the adapter changed {facts['changed']}"
    if json_out:
        print(json.dumps(facts))
    else:
        print(line)
