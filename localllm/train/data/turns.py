"""Where an answer begins and ends in a conversation, whatever template writes it.

Nothing is guessed from a template's text. The prompt of an answer is what serving renders for the
messages before it; the answer is what follows, up to the token that would end it when it is
generated. Where a template ends its prompts otherwise than it begins past turns (with an opened
thought, say), two renderings that differ in this answer alone show where it begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from localllm.errors import InvalidRequest, TemplateError
from localllm.tokenizer import Tokenizer
from localllm.tokenizer.rendering import Rendering
from localllm.train.data.joining import follow

Messages = Sequence[Mapping[str, Any]]

# Templates that write today's date would make other data of the same rows every day.
_DAY = date(2024, 7, 26)
_DATE = {"date_string": _DAY.strftime("%d %b %Y"), "strftime_now": _DAY.strftime}
_PROBES = ("Q1 probe", "7z other")  # nothing in common, at either end


@dataclass(frozen=True)
class Turn:
    """An answer with all that comes before it.

    ids: up to the answer's end; start: how many of them are the prompt. spans: (start, end) of the
    ids to be trained; less than the answer where the template marks what is the model's own, none
    where it marks other turns alone. rejoined: prompt and answer would have merged into one token.
    endless: no token ends the turn. unlike: the prompt in use ends otherwise.
    """

    ids: list[int]
    start: int
    spans: tuple[tuple[int, int], ...]
    rejoined: bool
    endless: bool
    unlike: bool


class TurnFinder:
    """Finds turns as one tokenizer and one template write them."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template

    def turn(self, messages: Messages, tools: Messages) -> Turn:
        """The last message as an answer. Raises what rendering raises, and InvalidRequest where
        nothing tells where the answer begins."""
        whole = self.render(messages, tools)
        begin, unlike = self._begin(messages, tools, whole)
        end, endless = self._end(whole, begin)
        head = whole.runs(0, begin)
        start = self._tokenizer.encode_runs(head)
        rest, rejoined = follow(self._tokenizer, head, whole.runs(begin, end))
        ids = [*start, *rest]
        spans: list[tuple[int, int]] = []
        for first, last in self._own(whole, begin, end):
            low = len(start) if first == begin else self._index(whole, ids, first)
            high = len(ids) if last == end else self._index(whole, ids, last)
            if high > low:
                spans.append((low, high))
        return Turn(ids, len(start), tuple(spans), rejoined, endless, unlike)

    def whole(self, messages: Messages, tools: Messages) -> list[int]:
        """The ids of a conversation, nothing left out."""
        return self._tokenizer.encode_runs(self.render(messages, tools).runs())

    def render(self, messages: Messages, tools: Messages, *, prompt: bool = False) -> Rendering:
        return self._tokenizer.render_control(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=prompt,
            chat_template=self._template,
            **_DATE,
        )

    def _begin(self, messages: Messages, tools: Messages, whole: Rendering) -> tuple[int, bool]:
        """The position of the answer, and whether the prompt in use ends otherwise."""
        prompt = self._prompt(messages[:-1], tools)
        if prompt is not None and whole.begins_with(prompt):
            return len(prompt.text), False
        first, second = (
            self.render([*messages[:-1], {**messages[-1], "content": probe}], tools)
            for probe in _PROBES
        )
        begin = first.common(second)
        if whole.common(first) < begin or begin == len(first.text):
            raise InvalidRequest(
                f"the chat template writes message {len(messages)} in a way that does not show "
                "where the answer begins",
                hint="use another template (--chat-template), or train on everything "
                "(--train-on all)",
            )
        return begin, prompt is not None

    def _prompt(self, messages: Messages, tools: Messages) -> Rendering | None:
        if not messages:  # the assistant speaks first
            return None
        try:
            return self.render(messages, tools, prompt=True)
        except TemplateError:  # some refuse what is no whole conversation
            return None

    def _end(self, whole: Rendering, begin: int) -> tuple[int, bool]:
        """Past the first token at which generation would stop."""
        ends = self._tokenizer.eos_ids
        stops = [at for at, token in whole.control.items() if at >= begin and token in ends]
        return (min(stops) + 1, False) if stops else (len(whole.text), True)

    def _own(self, whole: Rendering, begin: int, end: int) -> list[tuple[int, int]]:
        """What of the answer the template marks as the model's, with the end of the turn."""
        if not whole.generated:
            return [(begin, end)]
        found = []
        for first, last in whole.generated:
            rest = whole.text[last:end]
            if last < end and not rest[:-1].strip() and end - 1 in whole.control:
                last = end
            if min(last, end) > max(first, begin):
                found.append((max(first, begin), min(last, end)))
        return found

    def _index(self, whole: Rendering, ids: Sequence[int], position: int) -> int:
        """How many ids lie before a position; one that lies across it counts as before."""
        before = self._tokenizer.encode_runs(whole.runs(0, position))
        shared = common(before, ids)
        return shared if shared == len(before) else shared + 1


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists share at their beginning."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))
