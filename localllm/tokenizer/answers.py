"""How a model's family writes an answer, and the answer read: text, reasoning, function calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from localllm.errors import InvalidRequest
from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.call_bodies import ToolCall
from localllm.tokenizer.harmony import HarmonySplitter, channel_ids
from localllm.tokenizer.stream import StreamDecoder
from localllm.tokenizer.thinking import GEMMA, MARKS, THINK, ThinkingSplitter
from localllm.tokenizer.tool_calls import MARKS as CALL_MARKS
from localllm.tokenizer.tool_calls import ToolCallParser, mark_ids

_END = 16  # tokens of the prompt that may open the thinking


@dataclass(frozen=True)
class AnswerFormat:
    """channels: every part says where it goes (harmony). thinking: the marks around it. calls: the
    marks that open a call."""

    name: str
    thinking: tuple[tuple[str, str], ...] = MARKS
    calls: tuple[str, ...] = tuple(CALL_MARKS)
    channels: bool = False


FORMATS: Mapping[str, AnswerFormat] = {
    one.name: one
    for one in (
        AnswerFormat("harmony", channels=True),
        AnswerFormat("gemma4", (GEMMA,), ("<|tool_call>",)),
        AnswerFormat("lfm2", (THINK,), ("<|tool_call_start|>",)),
        AnswerFormat("tags", (THINK,), ("<tool_call>",)),  # Qwen, GLM, Hermes, SmolLM3
        AnswerFormat("common"),  # whatever any family but harmony writes
    )
}


@dataclass(frozen=True)
class Said:
    """What a piece of an answer adds."""

    text: str = ""
    reasoning: str = ""

    def __add__(self, other: Said) -> Said:
        return Said(self.text + other.text, self.reasoning + other.reasoning)


def named_format(name: str) -> AnswerFormat:
    """Raises InvalidRequest for a name there is not."""
    if name not in FORMATS:
        raise InvalidRequest(
            f"there is no answer format {name!r}", hint=f"one of {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def answer_format_of(tokenizer: Tokenizer, name: str | None = None) -> AnswerFormat:
    """The named format, or the one that the chat template and its control tokens give away."""
    if name is not None:
        return named_format(name)
    template = tokenizer.template_for(with_tools=True) or ""

    def writes(mark: str) -> bool:
        return mark in template and tokenizer.special_id(mark) is not None

    if writes("<|channel|>"):
        return FORMATS["harmony"]
    if writes("<|channel>") or writes("<|tool_call>"):
        return FORMATS["gemma4"]
    if tokenizer.special_id("<|tool_call_start|>") is not None:
        return FORMATS["lfm2"]
    return FORMATS["tags" if "<tool_call>" in template else "common"]


class AnswerParser:
    """An answer's text in pieces goes in, what it says comes out; `calls` and `notes` grow.

    The same answer gives the same however it is cut. tools: the names of functions that may be
    called; None: calls are text. prompt_end: the end of the prompt, spelled. continued: the text
    goes on with an answer. plain: a call that cannot be read is text too, and a note says so; else
    it is a `ToolCall` without arguments.
    """

    def __init__(
        self,
        form: AnswerFormat,
        tools: Sequence[str] | None = None,
        *,
        prompt_end: str = "",
        continued: bool = False,
        plain: bool = True,
    ) -> None:
        self._splitter: HarmonySplitter | ThinkingSplitter
        if form.channels:
            self._splitter = HarmonySplitter(continued=continued, plain=plain)
        else:
            self._splitter = ThinkingSplitter("" if continued else prompt_end, form.thinking)
        self._calls: ToolCallParser | None = None
        if tools is not None and not form.channels:
            self._calls = ToolCallParser(tools, marks=form.calls, plain=plain)

    def feed(self, piece: str) -> Said:
        return self._said(self._splitter.feed(piece))

    def finish(self) -> Said:
        """What was held back, now that no more comes."""
        said = self._said(self._splitter.finish())
        return said if self._calls is None else said + Said(self._calls.finish())

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        told = () if self._calls is None else self._calls.calls
        return (*self._splitter.calls, *told)

    @property
    def notes(self) -> tuple[str, ...]:
        told = () if self._calls is None else self._calls.notes
        return (*self._splitter.notes, *told)

    def _said(self, parts: tuple[str, str]) -> Said:
        text, reasoning = parts
        return Said(text if self._calls is None else self._calls.feed(text), reasoning)


@dataclass(frozen=True)
class AnswerReader:
    """Reads the answers to one prompt: from their tokens to what they say.

    tools: as of `AnswerParser`. prompt: its token ids. continued: how many at its end belong to the
    answer. plain: a call that cannot be read is text.
    """

    tokenizer: Tokenizer
    form: AnswerFormat
    prompt: Sequence[int]
    tools: tuple[str, ...] | None = None
    continued: int = 0
    plain: bool = True

    def detokenizer(self) -> StreamDecoder:
        """Spells what marks a part, and takes a continued answer for no beginning of a text."""
        stream = self.tokenizer.stream(keep=self._kept())
        # A space which begins the rest is no beginning of a text.
        for token in self.prompt[len(self.prompt) - self.continued :]:
            stream.push(token)
        return stream

    def parser(self) -> AnswerParser:
        end = self.tokenizer.decode(self.prompt[-_END:], skip_special=False)
        return AnswerParser(
            self.form,
            self.tools,
            prompt_end=end,
            continued=bool(self.continued),
            plain=self.plain,
        )

    def _kept(self) -> frozenset[int]:
        if self.form.channels:
            return channel_ids(self.tokenizer)
        spelled = (mark.strip() for pair in self.form.thinking for mark in pair)
        ids = (self.tokenizer.special_id(mark.removesuffix("thought")) for mark in spelled)
        thinking = frozenset(token for token in ids if token is not None)
        return thinking | (mark_ids(self.tokenizer) if self.tools is not None else frozenset())
