"""Printing an answer while it comes, and stopping it with Ctrl-C without losing what was said."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from localllm.pump import Stream
    from localllm.results import GenerationResult

_CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def print_answer(stream: Stream, *, echo: bool) -> GenerationResult:
    """Prints the pieces as they come (unless `echo` is off) and returns the whole answer."""
    result = None
    with _interruptible(stream):
        for delta in stream:
            if echo and delta.reasoning:
                _show_reasoning(delta.reasoning)
            if echo and delta.text:
                sys.stdout.write(_printable(delta.text))
                sys.stdout.flush()
            result = delta.result
    assert result is not None
    if echo:
        print()
        for call in result.tool_calls:
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            print(_printable(f"[calls {call.name}({arguments})]"), file=sys.stderr)
    return result


def print_answers(result: GenerationResult) -> None:
    """Several answers, one after the other, numbered on lines of their own."""
    for number, one in enumerate((result, *result.alternatives), start=1):
        print(f"--- {number} ---")
        print(_printable(one.text))


def _show_reasoning(text: str) -> None:
    """Beside the answer, dimmed where there is a screen to dim on."""
    dim, bright = ("\x1b[2m", "\x1b[22m") if sys.stderr.isatty() else ("", "")
    shown = text.translate(_CONTROL_PICTURES) if dim else text
    sys.stderr.write(f"{dim}{shown}{bright}")
    sys.stderr.flush()


def _printable(text: str) -> str:
    """On a terminal, control characters are shown, not obeyed: a model may write escape codes."""
    return text.translate(_CONTROL_PICTURES) if sys.stdout.isatty() else text


def explain_end(result: GenerationResult) -> str | None:
    """Why the answer is not complete, for stderr; None if it is."""
    match result.receipt.stopped_by:
        case "max_tokens":
            count = result.receipt.generated_tokens
            return f"[stopped at {count} new tokens; --max-tokens sets the limit]"
        case "context":
            return "[stopped: the context is full; --context sets its size]"
        case "cancelled":
            return "[interrupted]"
    return None


def describe_speed(result: GenerationResult) -> str:
    receipt = result.receipt
    parts = [f"{receipt.prompt_tokens} prompt + {receipt.generated_tokens} new tokens"]
    if receipt.time_to_first_token is not None:
        parts.append(f"first after {receipt.time_to_first_token:.2f} s")
    if receipt.cached_tokens:
        parts.append(f"{receipt.cached_tokens} of them cached")
    if receipt.drafted_tokens:
        parts.append(f"{receipt.accepted_tokens} of {receipt.drafted_tokens} drafts right")
    if receipt.decode_tokens_per_second is not None:
        parts.append(f"{receipt.decode_tokens_per_second:.1f} tok/s")
    parts.append(receipt.backend)
    return f"[{', '.join(parts)}]"


@contextmanager
def _interruptible(stream: Stream) -> Iterator[None]:
    """The first Ctrl-C ends the answer after the running step; the second leaves at once."""

    def handle(signum: int, frame: FrameType | None) -> None:
        stream.cancel()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
