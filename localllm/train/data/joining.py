"""Ids of a text that follows another, when the first is already ids and cannot change."""

from __future__ import annotations

from collections.abc import Sequence

from localllm.tokenizer import Tokenizer

Runs = Sequence[str | int]
_ANCHORS: tuple[str, ...] = ("\n", "a", ".", "0", "-\n")


def follow(tokenizer: Tokenizer, before: Runs, after: Runs) -> tuple[list[int], bool]:
    """The ids of `after` behind `before`, and whether the two would have merged if encoded as one.

    A model in use is given the ids of a prompt and goes on from there; a token that would lie
    across is none it can write.
    """
    encode = tokenizer.encode_runs
    head = encode(before)
    joined = encode(_one(before, after))
    if joined[: len(head)] == head:
        return joined[len(head) :], False
    wanted = b"".join(
        run.encode() if isinstance(run, str) else tokenizer.token_bytes(run) for run in after
    )
    # Encoded behind something else than the true prompt, and only taken if it says the same.
    closest: list[int] | None = None
    for anchor in (*sorted(tokenizer.special_ids)[:1], *_ANCHORS):
        start = encode([anchor])
        found = encode(_one([anchor], after))
        if found[: len(start)] != start:
            continue
        rest = found[len(start) :]
        if b"".join(map(tokenizer.token_bytes, rest)) == wanted:
            return rest, True
        closest = closest or rest  # normalization may change the text itself
    return (encode(after) if closest is None else closest), True


def _one(before: Runs, after: Runs) -> list[str | int]:
    """Side by side; text that meets text becomes one run."""
    if before and after and isinstance(before[-1], str) and isinstance(after[0], str):
        return [*before[:-1], before[-1] + after[0], *after[1:]]
    return [*before, *after]
