"""Tells a model's thinking from its answer while both stream by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from localllm.tokenizer.call_bodies import ToolCall

THINK = ("<think>", "</think>")
GEMMA = ("<|channel>thought\n", "<channel|>")
# What thinking stands between, by the families that write it as text.
MARKS = (
    THINK,
    GEMMA,
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)


class ThinkingSplitter:
    """Pieces of text in, (answer, thinking) out. Thinking comes first or not at all: later a mark
    is text like any other. Line ends around a mark belong to neither.

    prompt_end: the end of the prompt, which may have opened the thinking already.
    """

    calls: Sequence[ToolCall] = ()  # they are no part of this
    notes: Sequence[str] = ()

    def __init__(self, prompt_end: str = "", marks: Sequence[tuple[str, str]] = MARKS) -> None:
        self._marks = tuple(marks)
        self._state: Literal["before", "thinking", "answer"] = "before"
        self._close = ""  # the mark that ends the thinking under way
        self._held = ""  # not yet given out
        self._trim = False  # line ends are left out until something else comes
        for opening, closing in self._marks:
            if prompt_end.rstrip().endswith(opening.rstrip()):
                self._think(closing)

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        answer, thinking = "", ""
        if self._state == "before":
            self._begin()
        if self._state == "thinking":
            at = self._held.find(self._close)
            if at >= 0:
                thinking = self._take(at)
                self._held = self._held[len(self._close) :]
                self._state, self._trim = "answer", True
            else:
                thinking = self._take(len(self._held) - _may_begin(self._held, [self._close]))
        if self._state == "answer":
            answer = self._take(len(self._held))
        return answer, thinking

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more comes."""
        rest = self._take(len(self._held))
        return ("", rest) if self._state == "thinking" else (rest, "")

    def _begin(self) -> None:
        start = self._held.lstrip()
        for opening, closing in self._marks:
            if start.startswith(opening):
                self._held = start[len(opening) :]
                self._think(closing)
                return
        if start and not any(opening.startswith(start) for opening, _ in self._marks):
            self._state = "answer"

    def _think(self, closing: str) -> None:
        self._state, self._close, self._trim = "thinking", closing, True

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        if self._trim:
            taken = taken.lstrip("\n")
            self._trim = not taken
        return taken


def _may_begin(text: str, marks: list[str]) -> int:
    """Length of the longest end of `text` that begins a mark."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
