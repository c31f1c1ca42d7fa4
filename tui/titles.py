"""A chat's title: written by the model after the first answer, or taken from the first message."""

from __future__ import annotations

import re

from localllm.tui.engine.client import Engine
from localllm.tui.text import one_line

MOST_WORDS = 6
_MOST_CHARACTERS = 48
_SHOWN = 600  # characters of the question and of the answer that the model is shown
_MOST_TOKENS = 24
_ASK = (
    "Give this conversation a title of three to six words that names its topic. "
    "Write the title alone.\n\nUser: {question}\n\nAssistant: {answer}"
)
_LABEL = re.compile(r"^\W*(?:title|topic|subject|name)\s*[:\u2013-]\s*", re.IGNORECASE)
_LEADING = " \t\"'`*_#>-\u201c\u201d\u2018\u2019\u00ab\u00bb"
_AROUND = _LEADING + ".,;:!?\u2026"
_CODE = re.compile(r"[{}\[\]<>|=;\\]")
# A title that was cut must not end with one of these.
_LOOSE_ENDS = frozenset(
    {"a", "an", "the", "of", "to", "in", "on", "at", "by", "for", "from", "with", "and", "or"}
    | {"but", "as", "is", "are", "was", "be", "this", "that", "your", "my", "its", "into", "about"}
    | {"how", "what", "why", "when", "where", "which", "if"}
)


async def make_title(engine: Engine, question: str, answer: str) -> str:
    """At most six words for a chat that begins so. Raises what the engine raises.

    Where the model writes nothing that can be a title, the question's beginning is the title.
    """
    prompt = _ASK.format(question=_shown(question), answer=_shown(answer))
    asked = engine.ask(
        [{"role": "user", "content": prompt}],
        {"max_tokens": _MOST_TOKENS, "temperature": 0.0},
    )
    written = ""
    async for piece in asked:
        written += piece.text
        if "\n" in written.strip():
            asked.stop()
    return clean_title(written) or title_of(question)


def clean_title(written: str) -> str:
    """What a model wrote, as a title; "" where it is none."""
    lines = [line for line in written.splitlines() if line.strip()]
    if not lines:
        return ""
    line = _LABEL.sub("", one_line(lines[0]))
    if lines[0].lstrip().startswith("```") or _CODE.search(line):
        return ""  # an answer like the one before, and no title
    return _short(line.rstrip(_AROUND).lstrip(_LEADING))


def title_of(message: str) -> str:
    """The beginning of a chat's first message, as a title; "" where it has no words."""
    sentence = re.split(r"(?<=[.!?])\s|\n", one_line(message.strip()), maxsplit=1)[0]
    return _short(sentence.strip(_AROUND))


def _short(line: str) -> str:
    words = line.split()
    cut = words[:MOST_WORDS]
    while len(" ".join(cut)) > _MOST_CHARACTERS and len(cut) > 1:
        cut.pop()
    if len(cut) < len(words):
        while len(cut) > 1 and cut[-1].lower().strip(_AROUND) in _LOOSE_ENDS:
            cut.pop()
    title = " ".join(cut)[:_MOST_CHARACTERS].rstrip(_AROUND)
    return title if any(character.isalnum() for character in title) else ""


def _shown(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "\u2026"
