"""`localllm evaluate`: perplexity, divergence, multiple choice and matching answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli import options

if TYPE_CHECKING:
    from localllm.eval import EvalReport


def evaluate(
    model: options.Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help='One JSON object a line: {"text"}, or {"prompt" or "messages"} with "choices" and '
            '"answer", with "answer", or with "pattern" (a regular expression).',
        ),
    ],
    adapter: options.Adapter = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="A model whose predictions are compared (KL divergence). With --adapter and "
            "without this: the model itself, the adapter off."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Cut texts into pieces of so many tokens; 2048 unless told."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many lines.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of an answer that is matched, at most.")
    ] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests computed together.")] = 32,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    chat_template: options.ChatTemplate = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    context: options.Context = None,
    activations: options.Activations = None,
    kv_bits: options.KvBits = None,
    expert_memory: options.ExpertMemory = None,
    offline: options.Offline = False,
) -> None:
    """Measure a model on a file of texts, choices or questions; greedy, with errors stated."""
    template = options.read_template(chat_template)

    from localllm.cli.loading import load_with_progress
    from localllm.eval import evaluate as run
    from localllm.eval import read_tasks

    tasks = read_tasks(data, limit)
    settings = {
        "backend": backend,
        "threads": threads,
        "context": context,
        "activations": activations,
        "expert_memory": options.optional_bytes(expert_memory),
        "offline": offline or None,
    }
    with load_with_progress(
        model, max_batch=max_batch, kv_bits=kv_bits, chat_template=template, **settings
    ) as llm:
        name = None if adapter is None else llm.load_adapter(adapter)
        other = None if base is None else load_with_progress(base, **settings)
        try:
            report = run(
                llm,
                tasks,
                adapter=name,
                base=other,
                window=window,
                max_tokens=max_tokens,
                progress=_progress if sys.stderr.isatty() else lambda done, of: None,
            )
        finally:
            if other is not None:
                other.close()
    if json_out:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))


def _progress(done: int, of: int) -> None:
    print(f"\r  {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _lines(report: EvalReport) -> Iterator[str]:
    beside = "" if report.adapter is None else f" with {report.adapter}"
    yield f"{report.model}{beside}"
    if (p := report.perplexity) is not None:
        yield (
            f"  perplexity      {p.perplexity:.4f}  (loss {p.loss:.4f} +- {p.error:.4f} nats over "
            f"{p.tokens:,} tokens of {p.texts:,} texts)"
        )
    if (c := report.choices) is not None:
        yield (
            f"  choices         {c.correct / c.count:.1%} right, {c.normalized / c.count:.1%} by "
            f"likelihood per byte, of {c.count:,}"
        )
    if (m := report.matches) is not None:
        yield f"  answers         {m.correct / m.count:.1%} match, of {m.count:,}"
    if (d := report.divergence) is not None:
        yield (
            f"  from the base   KL {d.mean:.6f} nats a token, largest {d.largest:.4f}; the same "
            f"likeliest token at {d.same_top:.2%} of {d.tokens:,}"
        )
