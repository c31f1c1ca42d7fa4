"""An example as people read it: what is trained stands out."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from localllm.tokenizer import Tokenizer
from localllm.train.data.example import Example

if TYPE_CHECKING:
    from rich.text import Text

TRAINED, OTHER = "bold green", "dim"


def preview(example: Example, tokenizer: Tokenizer) -> Text:
    """What is trained in green, the rest dimmed; control tokens as they are spelled."""
    from rich.text import Text

    shown = Text(overflow="fold")
    for part, trained in _parts(example, tokenizer):
        shown.append(_visible(part), TRAINED if trained else OTHER)
    return shown


def plain_preview(example: Example, tokenizer: Tokenizer) -> str:
    """The same for a pipe: what is trained between ⟦ and ⟧."""
    return "".join(
        f"⟦{_visible(part)}⟧" if trained else _visible(part)
        for part, trained in _parts(example, tokenizer)
    )


def _parts(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Runs of tokens that are alike; a character whose tokens differ shows as a mark in both."""
    marked = zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    runs = [
        (tokenizer.decode([t for t, _ in run], skip_special=False), trained)
        for trained, run in groupby(marked, key=lambda pair: pair[1])
    ]
    return [(text, trained) for text, trained in runs if text]


def _visible(text: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
