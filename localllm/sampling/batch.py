"""Many rows at once: the native sampler decides what is certain, the definition the rest.

`_native.sample_rows` reads each row once and returns -1 where a row is broken or where rounding
could turn the choice; those go through `Sampler.choose`, as every row does without the module. So
both ways give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from localllm.errors import LocalLLMError
from localllm.sampling.native import kernels, native_module
from localllm.sampling.sampler import Draw, RowChanges, Sampler

_ROOM = 1024  # tokens of a row that are handed over to be filtered further
_NO_MASKS = np.empty((0, 0), dtype=np.uint32)


def draw_batch(
    samplers: Sequence[Sampler], logits: np.ndarray, positions: Sequence[int]
) -> list[Draw | Exception]:
    """Draws one token for each sampler, and advances them: as `Sampler.draw` in turn, but faster.

    logits: float32 [n, V], row i for the token that will stand at positions[i]; left unchanged.
    A row that fails gives its `LocalLLMError` and leaves the others alone.
    """
    assert len(samplers) == len(positions) == len(logits)
    if len(samplers) > 1 and len(set(map(id, samplers))) < len(samplers):
        # The same sampler twice: its second draw depends on its first.
        return [
            draw_batch([one], logits[i : i + 1], [positions[i]])[0]
            for i, one in enumerate(samplers)
        ]
    results: list[Draw | Exception | None] = [None] * len(samplers)
    changes: list[RowChanges] = []
    for row, sampler in enumerate(samplers):
        try:
            changes.append(sampler.changes(logits[row]))
        except LocalLLMError as error:
            results[row] = error
            changes.append(RowChanges(np.empty(0, np.int64), np.empty(0), None))
    tokens = _certain_tokens(samplers, logits, positions, changes, results)
    for row, sampler in enumerate(samplers):
        if results[row] is not None:
            continue
        try:
            token = tokens[row]
            if token < 0:
                token = sampler.choose(logits[row], changes[row], positions[row])
            results[row] = sampler.take(token, logits[row])
        except LocalLLMError as error:
            results[row] = error
    return [result for result in results if result is not None]


def _certain_tokens(
    samplers: Sequence[Sampler],
    logits: np.ndarray,
    positions: Sequence[int],
    changes: Sequence[RowChanges],
    results: Sequence[Draw | Exception | None],
) -> list[int]:
    """The tokens of the rows that the native module can decide or cut, -1 for the others."""
    tokens = [-1] * len(samplers)
    native = native_module()
    rows, wishes = [], []
    for row, sampler in enumerate(samplers):
        if sampler.native is not None and results[row] is None:
            rows.append(row)
            wishes.append(sampler.native)
    if native is None or not rows or logits.dtype != np.float32:
        return tokens
    chosen = [changes[row] for row in rows]
    masks = [change.allowed for change in chosen if change.allowed is not None]
    mask_rows, next_mask = [], 0
    for change in chosen:
        mask_rows.append(-1 if change.allowed is None else next_mask)
        next_mask += change.allowed is not None
    edits = [len(change.ids) for change in chosen]
    changed = [change for change in chosen if len(change.ids)]
    only_cut = [wish.only_cut for wish in wishes]
    room = _ROOM if any(only_cut) else 0
    out = np.empty(len(rows), dtype=np.int32)
    kept_ids = np.empty((len(rows), room), dtype=np.int32)
    kept_scaled = np.empty((len(rows), room), dtype=np.float64)
    native.sample_rows(
        kernels(),
        np.ascontiguousarray(logits),
        np.array(rows, dtype=np.int32),
        np.array([wish.settings for wish in wishes], dtype=np.float64),
        np.array([samplers[row].seed for row in rows], dtype=np.uint64),
        np.array([positions[row] for row in rows], dtype=np.uint32),
        # Of so few numbers in a list, np.cumsum takes a third of a draw.
        np.array(list(accumulate(edits)), dtype=np.int32),
        _joined([change.ids for change in changed], np.int32),
        _joined([change.values for change in changed], np.float64),
        np.array(mask_rows, dtype=np.int32),
        np.stack(masks) if masks else _NO_MASKS,
        np.array(only_cut, dtype=np.uint8),
        out,
        kept_ids,
        kept_scaled,
    )
    for i, (row, answer) in enumerate(zip(rows, out.tolist(), strict=True)):
        if only_cut[i] and answer > 0:
            kept = kept_ids[i, :answer].astype(np.int64), kept_scaled[i, :answer]
            answer = samplers[row].choose_from(*kept, positions[row])
        tokens[row] = answer
    return tokens


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    if not parts:
        return np.empty(0, dtype=dtype)
    return np.ascontiguousarray(np.concatenate(parts), dtype=dtype)
