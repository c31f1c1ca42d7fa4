"""`localllm fuse`: an adapter merged into its model, as a folder, and how far that moved it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli import options
from localllm.cli.exporting import bar, dtype_named, read_text, to_megabytes
from localllm.errors import InvalidRequest

if TYPE_CHECKING:
    from localllm.export import Kept, Moved


def fuse(
    model: Annotated[str, typer.Argument(help="The model that the adapter was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="A folder with a PEFT or MLX-LM adapter.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; new or empty.")],
    dequantize: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Write all weights as bf16, f16 or f32."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Round what changed to the bits it had in the model."),
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="A text file to compare both on; one is built in.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run both and say how far they are.")
    ] = True,
    threads: options.Threads = None,
    offline: options.Offline = False,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of sentences.")
    ] = False,
) -> None:
    """Merge an adapter into its model and say what rounding cost.

    The folder holds safetensors, config and tokenizer, as transformers and vLLM read them, and runs
    here. A quantized model is never rounded again unasked: choose --dequantize or --requantize.
    """
    from localllm.export import how_far, open_source, write_folder

    if dequantize is not None and requantize:
        raise InvalidRequest("--dequantize and --requantize exclude each other")
    form: Kept = "requantize" if requantize else "keep"
    if dequantize is not None:
        form = dtype_named(dequantize)
    content = None if text is None else read_text(text)
    moved: Moved | None = None
    with (
        bar("writing", quiet=json_out) as progress,
        open_source(model, adapter, offline=offline or None) as source,
    ):
        written = write_folder(source, out, form, progress=progress)
    if compare:
        with bar("comparing", quiet=json_out) as progress:
            moved = how_far(
                model, out, content, adapter=adapter, threads=threads, progress=progress
            )
    if json_out:
        facts = {**asdict(written), "folder": str(out)}
        print(json.dumps({**facts, "moved": None if moved is None else asdict(moved)}))
        return
    print(
        f"{out}: {written.tensors} tensors, {to_megabytes(written.nbytes)}; "
        f"the adapter changed {written.changed}"
    )
    if moved is not None:
        print(
            f"unfused against fused on {moved.tokens} tokens ({moved.backend}): "
            f"KL {moved.kl:.2g} nats (largest {moved.largest_kl:.2g}), logits differ by "
            f"{moved.largest_difference:.2g} at most, same likeliest token "
            f"{moved.same_top:.1%}"
        )
