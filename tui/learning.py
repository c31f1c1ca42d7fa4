"""What people preferred, as files that `localllm finetune` reads.

Pairs are written as conversational preferences (`prompt`, `chosen`, `rejected`), good answers as
chats (`messages`): the formats of docs/training-data.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localllm.errors import StoreError
from localllm.files import replace_file
from localllm.tui.store import Pair

PAIRS, EXAMPLES = "pairs.jsonl", "examples.jsonl"


def preferences(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """A line for each pair that has both sides."""
    for pair in pairs:
        if pair.rejected is not None:
            yield {
                "prompt": [dict(message) for message in pair.prompt],
                "chosen": [_answer(pair.chosen)],
                "rejected": [_answer(pair.rejected)],
            }


def examples(pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """A chat for each good answer, once: the chosen sides and what was written by hand."""
    seen = set()
    for pair in pairs:
        messages = [*(dict(message) for message in pair.prompt), _answer(pair.chosen)]
        key = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        if key not in seen:
            seen.add(key)
            yield {"messages": messages}


def doubles(pairs: Sequence[Pair]) -> list[int]:
    """Ids of pairs that say what an earlier one says, spaces and letter case aside."""
    seen: set[str] = set()
    again = []
    for pair in pairs:
        sides = [pair.chosen, pair.rejected or "", *(str(m.get("content")) for m in pair.prompt)]
        key = json.dumps([pair.rejected is None, *(" ".join(s.lower().split()) for s in sides)])
        if key in seen:
            again.append(pair.id)
        seen.add(key)
    return again


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Writes JSON lines, whole or not at all, and returns how many. Raises StoreError."""
    count = 0

    def written() -> Iterator[bytes]:
        nonlocal count
        for line in lines:
            yield (json.dumps(line, ensure_ascii=False) + "\n").encode()
            count += 1

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, written())
    except (OSError, UnicodeEncodeError) as error:
        raise StoreError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}",
            hint="choose another folder",
        ) from error
    return count


def export(pairs: Sequence[Pair], folder: Path) -> dict[str, int]:
    """Both files; the name of each that was written -> its lines. Raises StoreError."""
    written = {}
    for name, lines in ((PAIRS, list(preferences(pairs))), (EXAMPLES, list(examples(pairs)))):
        if lines:
            written[name] = write_lines(folder / name, lines)
    return written


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
