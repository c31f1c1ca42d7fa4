"""Token ids of rows, and which of them the model has to learn.

The ids are those that serving uses: up to an answer, exactly the prompt it would get; then the
answer as the template writes it, with the token that ends its turn. Where the template writes a
turn otherwise once it is past (without its reasoning, say), the turn gets an example that ends with
it, so that none is trained on a text the model would never write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tokenizer import Tokenizer
from localllm.tokenizer.messages import check_unicode
from localllm.train.data.example import Example
from localllm.train.data.formats import Chat, Completion, Text
from localllm.train.data.joining import follow
from localllm.train.data.turns import Turn, TurnFinder

_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Made:
    """Examples of one row, and what is to be reported of it; see `DataReport`."""

    examples: tuple[Example, ...]
    empty: bool = False
    unanswered: bool = False
    empty_turns: int = 0
    unmarked: int = 0
    trailing: int = 0
    expanded: bool = False
    rejoined: int = 0
    endless: int = 0
    unlike: int = 0


class Masker:
    """train_on: "assistant" every answer, "last" and "completion" the last one, "all" all."""

    def __init__(self, tokenizer: Tokenizer, train_on: str, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._template = chat_template
        self._finder = TurnFinder(tokenizer, chat_template)

    @property
    def dated(self) -> bool:
        """Whether the template writes a date."""
        source = self._source or ""
        return "strftime_now" in source or "date_string" in source

    @property
    def has_template(self) -> bool:
        return bool(self._source)

    @property
    def _source(self) -> str | None:
        named = self._tokenizer.chat_templates
        if self._template is not None:
            return named.get(self._template, self._template)
        return named.get("default") or next(iter(named.values()), None)

    def chat(self, chat: Chat, origin: str) -> Made:
        """Raises InvalidRequest naming the row, for messages that the template refuses."""
        try:
            return (
                self._whole(chat, origin) if self._train_on == "all" else self._chat(chat, origin)
            )
        except LocalLLMError as error:
            raise InvalidRequest(f"{origin}: {error}", hint=error.hint) from error

    def completion(self, pair: Completion, origin: str) -> Made:
        """As a chat of two messages where there is a template, else one text after the other."""
        if self.has_template:
            messages = (
                {"role": "user", "content": pair.prompt},
                {"role": "assistant", "content": pair.completion},
            )
            return self.chat(Chat(messages, prompt=1), origin)
        if not pair.completion.strip():
            return Made((), empty=True)
        try:
            start = _without_end(self._tokenizer.encode(pair.prompt), self._tokenizer)
            check_unicode(pair.completion, "the completion")
        except LocalLLMError as error:
            raise InvalidRequest(f"{origin}: {error}", hint=error.hint) from error
        before = [pair.prompt] if pair.prompt else []
        end, rejoined = follow(self._tokenizer, before, [pair.completion])
        ids = [*start, *end, *self._end_of_text()]
        example = self._example(ids, [(len(start), len(ids))], origin)
        return Made((example,), rejoined=int(rejoined), endless=int(not self._end_of_text()))

    def text(self, text: Text, origin: str) -> Made:
        if not text.text.strip():
            return Made((), empty=True)
        try:
            ids = _without_end(self._tokenizer.encode(text.text), self._tokenizer)
        except LocalLLMError as error:
            raise InvalidRequest(f"{origin}: {error}", hint=error.hint) from error
        ids = [*ids, *self._end_of_text()]
        return Made((self._example(ids, [(0, len(ids))], origin),))

    # ---- inside

    def _chat(self, chat: Chat, origin: str) -> Made:
        messages = chat.messages
        answers = [
            n for n, said in enumerate(messages) if n >= chat.prompt and said["role"] == "assistant"
        ]
        if not answers:
            return Made((), unanswered=True)
        facts = Made((), trailing=len(messages) - 1 - answers[-1])
        if self._train_on in ("last", "completion"):
            answers = answers[-1:]
        said = [n for n in answers if _says(messages[n])]
        if not said:
            return replace(facts, empty=True)
        turns = [self._finder.turn(messages[: n + 1], chat.tools) for n in said]
        examples = self._together([turn for turn in turns if turn.spans], origin)
        return replace(
            facts,
            examples=tuple(examples),
            unanswered=not examples,
            empty_turns=len(answers) - len(said),
            unmarked=sum(not turn.spans for turn in turns) if examples else 0,
            rejoined=sum(turn.rejoined for turn in turns),
            endless=sum(turn.endless for turn in turns),
            unlike=sum(turn.unlike for turn in turns),
            expanded=len(examples) > 1,
        )

    def _together(self, turns: Sequence[Turn], origin: str) -> list[Example]:
        """As few examples as there can be: a turn is trained within a later one's, if that begins
        with the very same ids."""
        examples: list[Example] = []
        left = list(turns)
        while left:
            last = left[-1]
            inside = [turn for turn in left if turn.ids == last.ids[: len(turn.ids)]]
            spans = [span for turn in inside for span in turn.spans]
            examples.append(self._example(last.ids, spans, origin))
            left = [turn for turn in left if turn not in inside]
        return examples[::-1]

    def _whole(self, chat: Chat, origin: str) -> Made:
        if not any(_says(message) for message in chat.messages):
            return Made((), empty=True)
        ids = self._finder.whole(chat.messages, chat.tools)
        return Made((self._example(ids, [(0, len(ids))], origin),))

    def _end_of_text(self) -> list[int]:
        """The token that ends a text, where the model has one."""
        tokenizer = self._tokenizer
        named = [tokenizer.special_id(name) for name in _ENDS_OF_TEXT]
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
    """Whether a message holds anything: words, or calls of functions."""
    if message.get("tool_calls"):
        return True
    content = message.get("content")
    if isinstance(content, list | tuple):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return any(isinstance(text, str) and text.strip() for text in texts)
    return isinstance(content, str) and bool(content.strip())


def _without_end(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Some tokenizers put an end after every text; here it comes once, at the true end."""
    return ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids
