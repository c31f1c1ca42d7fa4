"""Token ids of conversations, and which of them the model has to learn.

The ids are those that serving uses: up to an answer, exactly the prompt it would get; the answer as
the template writes it, with the token that ends its turn. No template has to mark anything. What
the template renders for the first i messages is the prompt of answer i; where that is no beginning
of the whole conversation (templates that drop past reasoning), each answer gets an example of its
own, so that none is trained on a text it never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tokenizer import Tokenizer
from localllm.train.data.example import Example
from localllm.train.data.formats import Chat, Completion, Text

# Templates that write today's date would make another data set of it every day.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Made:
    """Examples of one row, and what is to be reported of it; see `DataReport`."""

    examples: tuple[Example, ...]
    empty: bool = False
    unanswered: bool = False
    empty_turns: int = 0
    trailing: int = 0
    expanded: bool = False
    rejoined: int = 0
    endless: int = 0


@dataclass(frozen=True)
class _Turn:
    """prompt, end: the ids of the whole up to the answer, and up to its end. rejoined: whether
    prompt and answer would have merged into one token."""

    ids: list[int]
    start: int
    rejoined: bool
    endless: bool


class Masker:
    """train_on: "assistant" every answer, "last" and "completion" the last one, "all" all."""

    def __init__(self, tokenizer: Tokenizer, train_on: str, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._template = chat_template

    @property
    def dated(self) -> bool:
        """Whether the template writes a date."""
        source = self._template or self._tokenizer.chat_template or ""
        return "strftime_now" in source or "date_string" in source

    @property
    def has_template(self) -> bool:
        return bool(self._template or self._tokenizer.chat_template)

    def chat(self, chat: Chat, origin: str) -> Made:
        messages = list(chat.messages)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return Made((), unanswered=True)
        trailing = len(messages) - 1 - answers[-1]
        messages = messages[: answers[-1] + 1]
        said = [n for n in answers if _says(messages[n])]
        empty_turns = len(answers) - len(said)
        if not said or (self._train_on in ("last", "completion") and said[-1] != answers[-1]):
            return Made((), empty=True)
        if self._train_on in ("last", "completion"):
            said = said[-1:]
        try:
            turns = [self._turn(messages[: n + 1], chat.tools) for n in said]
        except LocalLLMError as error:
            raise InvalidRequest(f"{origin}: {error}", hint=error.hint) from error
        whole = turns[-1].ids
        facts = Made(
            (),
            empty_turns=empty_turns,
            trailing=trailing,
            rejoined=sum(turn.rejoined for turn in turns),
            endless=sum(turn.endless for turn in turns),
        )
        if all(turn.ids == whole[: len(turn.ids)] for turn in turns):
            spans = [(turn.start, len(turn.ids)) for turn in turns]
            return replace(facts, examples=(self._example(whole, spans, origin),))
        examples = tuple(
            self._example(turn.ids, [(turn.start, len(turn.ids))], origin) for turn in turns
        )
        return replace(facts, examples=examples, expanded=True)

    def completion(self, pair: Completion, origin: str) -> Made:
        """As a chat of two messages where there is a template, else one text after the other."""
        if self.has_template:
            messages = (
                {"role": "user", "content": pair.prompt},
                {"role": "assistant", "content": pair.completion},
            )
            return self.chat(Chat(messages), origin)
        if not pair.completion.strip():
            return Made((), empty=True)
        start = self._tokenizer.encode(pair.prompt, add_special=True)
        start = _without_end(start, self._tokenizer)
        end = self._tokenizer.encode(pair.completion, add_special=False)
        ids = [*start, *end, *self._end_of_text()]
        return Made((self._example(ids, [(len(start), len(ids))], origin),))

    def text(self, text: Text, origin: str) -> Made:
        if not text.text.strip():
            return Made((), empty=True)
        ids = _without_end(self._tokenizer.encode(text.text, add_special=True), self._tokenizer)
        ids = [*ids, *self._end_of_text()]
        return Made((self._example(ids, [(0, len(ids))], origin),))

    # ---- inside

    def _turn(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> _Turn:
        """The conversation up to its last message, an answer, and where the answer begins."""
        prompt = self._ids(messages[:-1], tools, prompt=True)
        whole = self._ids(messages, tools, prompt=False)
        rejoined = False
        if whole[: len(prompt)] != prompt:
            joined = self._joined(messages, tools, prompt)
            if joined is None:
                prompt = whole[: _common(prompt, whole)]
            else:
                whole, rejoined = joined, True
        end = self._turn_end(whole, len(prompt))
        return _Turn(
            whole if end is None else whole[:end], len(prompt), rejoined, endless=end is None
        )

    def _joined(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        prompt: list[int],
    ) -> list[int] | None:
        """The prompt's own ids with the answer's after them, where the texts follow each other and
        only a token lies across; None where the template writes the past otherwise."""
        before = self._text(messages[:-1], tools, prompt=True)
        after = self._text(messages, tools, prompt=False)
        if not after.startswith(before):
            return None
        answer, content = after[len(before) :], str(messages[-1].get("content") or "")
        # What the answer itself spells is text; what the template puts around it may be a token.
        if not content or content not in answer:
            return [*prompt, *self._tokenizer.encode(answer, add_special=False, parse_special=True)]
        at = answer.index(content)
        return [
            *prompt,
            *self._tokenizer.encode(answer[:at], add_special=False, parse_special=True),
            *self._tokenizer.encode(content, add_special=False),
            *self._tokenizer.encode(
                answer[at + len(content) :], add_special=False, parse_special=True
            ),
        ]

    def _turn_end(self, ids: Sequence[int], start: int) -> int | None:
        """Past the token that ends the answer, where serving stops; None where none does."""
        for at in range(start, len(ids)):
            if ids[at] in self._tokenizer.eos_ids:
                return at + 1
        return None

    def _ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
    ) -> list[int]:
        return self._tokenizer.apply_chat(list(messages), **self._given(tools, prompt))

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
    ) -> str:
        return self._tokenizer.render_chat(list(messages), **self._given(tools, prompt))

    def _given(self, tools: Sequence[Mapping[str, Any]], prompt: bool) -> dict[str, Any]:
        return {
            "tools": list(tools) or None,
            "add_generation_prompt": prompt,
            "chat_template": self._template,
            "date_string": _DATE,
        }

    def _end_of_text(self) -> list[int]:
        """The token that ends a text, where the model has one."""
        tokenizer = self._tokenizer
        named = [tokenizer.special_id(name) for name in ("<|endoftext|>", "</s>", "<eos>")]
        ends = [token for token in named if token is not None and token in tokenizer.eos_ids]
        return ends[:1] or sorted(tokenizer.eos_ids)[:1]

    def _example(self, ids: list[int], spans: Sequence[tuple[int, int]], origin: str) -> Example:
        trained = np.zeros(len(ids), bool)
        for start, end in spans:
            trained[start:end] = True
        if self._train_on == "all":
            trained[:] = True
        trained[:1] = False
        return Example(np.array(ids, np.int32), trained, origin)


def _says(message: Mapping[str, Any]) -> bool:
    """Whether an answer holds anything: words, or calls of functions."""
    content = message.get("content")
    if isinstance(content, str):
        return bool(content.strip()) or bool(message.get("tool_calls"))
    return bool(content) or bool(message.get("tool_calls"))


def _without_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Some tokenizers put an end after every text; here it comes once, at the true end."""
    return ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
