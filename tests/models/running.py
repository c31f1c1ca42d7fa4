"""Logits of a checkpoint on the reference backend, and golden cases to compare them with."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from localllm.backend.protocol import Batch, Chunk, StateSlots
from localllm.backend.reference import ReferenceBackend
from localllm.checkpoint.opening import open_checkpoint
from localllm.models import load_spec, load_weights
from tests.models.tiny import random_tensors, write_checkpoint

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # of the largest |logit|
_STATES = 2
_BLOCK_SIZE = 5  # blocks that no window and no prompt is a multiple of


@dataclass(frozen=True)
class Golden:
    """What transformers answers for a tiny random model.

    whole, stepwise: float32 [T, V], of the whole prompt at once and of one token after the
    other; the two differ only where RoPE depends on the length.
    """

    name: str
    config: dict[str, Any]
    saved_config: dict[str, Any]
    tokens: list[int]
    shapes: dict[str, list[int]]
    whole: np.ndarray
    stepwise: np.ndarray

    def tensors(self) -> dict[str, np.ndarray]:
        return random_tensors(self.shapes)

    def write(self, folder: Path) -> Path:
        return write_checkpoint(folder, self.config, self.tensors())


def golden_names() -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob("*.npz"))


def golden_version() -> str:
    """Of the transformers that computed them."""
    return (GOLDEN / "transformers.txt").read_text().strip()


def golden(name: str) -> Golden:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        whole = arrays["whole"]
        return Golden(name=name, **facts, whole=whole, stepwise=arrays.get("stepwise", whole))


def backend(path: Path, positions: int) -> ReferenceBackend:
    """With a KV pool for that many positions."""
    checkpoint = open_checkpoint(path)
    try:
        spec = load_spec(checkpoint)
        blocks = -(-positions // _BLOCK_SIZE)
        weights = load_weights(checkpoint, spec)
        return ReferenceBackend(
            spec, weights, num_blocks=blocks, block_size=_BLOCK_SIZE, state_slots=_STATES
        )
    finally:
        checkpoint.close()


def whole_prompt(
    running: ReferenceBackend, tokens: list[int], rows: tuple[int, ...] | None = None
) -> np.ndarray:
    """float32 [T, V], or of the chosen rows only."""
    chunk = _chunk(running, tokens, 0, len(tokens), len(tokens))
    return running.forward(Batch((chunk if rows is None else replace(chunk, logit_rows=rows),)))


def token_by_token(
    running: ReferenceBackend, tokens: list[int], *, prompt_length: int = 1
) -> np.ndarray:
    """float32 [T, V], each row from one token and the cache of those before."""
    rows = [
        running.forward(Batch((_chunk(running, tokens, n, n + 1, prompt_length),)))
        for n in range(len(tokens))
    ]
    return np.concatenate(rows)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference, as a share of the largest |logit|."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _chunk(
    running: ReferenceBackend, tokens: list[int], first: int, stop: int, prompt_length: int
) -> Chunk:
    return Chunk(
        token_ids=np.array(tokens[first:stop], np.int32),
        start=first,
        # Not in order: a sequence's blocks may lie anywhere in the pool.
        block_table=np.arange(running.num_blocks, dtype=np.int32)[::-1],
        logit_rows=tuple(range(stop - first)),
        prompt_length=prompt_length,
        state=_state(running, first),
    )


def _state(running: ReferenceBackend, first: int) -> StateSlots | None:
    """From one slot into the other, and back."""
    if not running.state_slots:
        return None
    return StateSlots(None if first == 0 else first % 2, 1 - first % 2)
