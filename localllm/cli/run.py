"""`localllm run`: answer one prompt and exit."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from localllm.cli import options

if TYPE_CHECKING:
    from localllm.tokenizer.reasoning import Reasoning


def run(
    model: options.Model,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="The prompt; without one, or for a lone -, stdin is read."),
    ] = None,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the text as it is, without the chat template.")
    ] = False,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed to stderr.")] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Report this many likeliest tokens (with --json).")
    ] = None,
    more: options.Set = None,
    adapter: options.Adapter = None,
    draft_model: options.DraftModel = None,
    draft_head: options.DraftHead = None,
    kv_disk: options.KvDisk = None,
    expert_memory: options.ExpertMemory = None,
    chat_template: options.ChatTemplate = None,
    reasoning: options.Reasoning = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    context: options.Context = None,
    activations: options.Activations = None,
    kv_bits: options.KvBits = None,
    offline: options.Offline = False,
) -> None:
    """Answer one prompt and exit. The answer streams to stdout, everything else to stderr."""
    if raw and system is not None:
        raise typer.BadParameter("--system needs the chat template, which --raw leaves out")
    if raw and chat_template is not None:
        raise typer.BadParameter("--chat-template and --raw contradict each other")
    if raw and reasoning is not None:
        raise typer.BadParameter("--reasoning needs the chat template, which --raw leaves out")
    if logprobs is not None and not json_out:
        raise typer.BadParameter("--logprobs goes with --json")
    text = _prompt_text(prompt)
    template = options.read_template(chat_template)

    from localllm.cli.loading import load_with_progress, tell_kv_disk
    from localllm.cli.streaming import describe_speed, explain_end, print_answer, print_answers

    llm = load_with_progress(
        model,
        backend=backend,
        threads=threads,
        context=context,
        activations=activations,
        kv_bits=kv_bits,
        chat_template=template,
        draft_model=draft_model,
        draft_head=draft_head,
        kv_disk=options.optional_bytes(kv_disk),
        expert_memory=options.optional_bytes(expert_memory),
        offline=offline or None,
    )
    with llm:
        used = None if adapter is None else llm.load_adapter(adapter)
        params = options.sampling_params(
            llm.default_params,
            more,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )
        templated = not raw and llm.tokenizer is not None and llm.tokenizer.chat_template
        if templated:
            messages = [{"role": "user", "content": text}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            wish = cast("Reasoning | None", reasoning)
            if params.samples > 1:
                result = llm.chat(messages, params, reasoning=wish, adapter=used)
            else:
                stream = llm.stream_chat(messages, params, reasoning=wish, adapter=used)
                result = print_answer(stream, echo=not json_out)
        elif system is not None or reasoning is not None:
            option = "--reasoning" if system is None else "--system"
            raise typer.BadParameter(
                f"{model} has no chat template, so it takes no {option}; use --chat-template FILE"
            )
        elif params.samples > 1:
            result = llm.generate(text, params, adapter=used)
        else:
            result = print_answer(llm.stream(text, params, adapter=used), echo=not json_out)
        if params.samples > 1 and not json_out:
            print_answers(result)
        if json_out:
            answer = {"model": model, "prompt": text, **result.to_dict()}
            print(json.dumps(answer, ensure_ascii=False))
        if not json_out:
            for note in (*result.notes, explain_end(result)):
                if note:
                    print(note, file=sys.stderr)
        if stats:
            print(describe_speed(result), file=sys.stderr)
    tell_kv_disk(llm)
    if result.finish_reason == "cancelled":
        raise typer.Exit(130)


def _prompt_text(words: list[str] | None) -> str:
    """Words joined by spaces, a lone - replaced by what stdin holds."""
    if not words:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one in")
        words = ["-"]
    if words.count("-") > 1:
        raise typer.BadParameter("- stands for stdin and may be given once")
    text = " ".join(_read_stdin() if word == "-" else word for word in words)
    if not text.strip():
        raise typer.BadParameter("the prompt is empty")
    return text


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"stdin is not UTF-8 text: {error}") from None
