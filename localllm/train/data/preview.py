"""An example as people read it: what is trained stands out."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from localllm.tokenizer import Tokenizer
from localllm.train.data.example import Example

if TYPE_CHECKING:
    from rich.text import Text

TRAINED, OTHER = "bold green", "dim"
_CONTROL = " underline"  # text that spells a control token is not underlined


def preview(example: Example, tokenizer: Tokenizer) -> Text:
    """What is trained in green, the rest dimmed; control tokens as they are spelled, underlined."""
    from rich.text import Text

    shown = Text(overflow="fold")
    for part, trained, control in _parts(example, tokenizer):
        style = TRAINED if trained else OTHER
        shown.append(_visible(part), style + _CONTROL if control else style)
    return shown


def plain_preview(example: Example, tokenizer: Tokenizer) -> str:
    """The same for a pipe: what is trained between ⟦ and ⟧."""
    shown = []
    for trained, parts in groupby(_parts(example, tokenizer), key=lambda part: part[1]):
        text = "".join(_visible(part) for part, _, _ in parts)
        shown.append(f"⟦{text}⟧" if trained else text)
    return "".join(shown)


def _parts(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool, bool]]:
    """(text, trained, control) of runs of tokens that are alike; a character whose tokens differ
    shows as a mark in both."""
    marked = [
        (token, trained, token in tokenizer.special_ids)
        for token, trained in zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    ]
    runs = []
    for (trained, control), run in groupby(marked, key=lambda one: one[1:]):
        text = b"".join(tokenizer.token_bytes(token) for token, _, _ in run)
        runs.append((text.decode("utf-8", "replace"), trained, control))
    return [run for run in runs if run[0]]


def _visible(text: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
