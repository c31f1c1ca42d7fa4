"""Every text of a data file, whatever its format: for a vocabulary, which needs no roles."""

from __future__ import annotations

from collections.abc import Iterator

from localllm.train.data.formats import Chat, Completion, Item, Kind, Pair, Text, item_of, kind_of
from localllm.train.data.reading import rows


def texts_of(source: str) -> Iterator[str]:
    """Raises what reading raises: InvalidRequest naming file, line and field."""
    kind: Kind | None = None
    for origin, row in rows(source):
        kind = kind or kind_of(origin, row)
        yield from _texts(item_of(origin, row, kind))


def _texts(item: Item) -> Iterator[str]:
    if isinstance(item, Text):
        yield item.text
    elif isinstance(item, Completion):
        yield from (item.prompt, item.completion)
    elif isinstance(item, Pair):
        yield from _texts(item.chosen)
        yield from _texts(item.rejected)
    elif isinstance(item, Chat):
        for message in item.messages:
            content = message["content"]
            yield from [content] if isinstance(content, str) else _parts(content)


def _parts(content: list[object]) -> Iterator[str]:
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]
