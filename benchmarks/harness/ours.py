"""This engine as a side: the cpu backend, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness.side import PREFILL_CHUNK, token_ids
from localllm.backend.cpu import CpuBackend
from localllm.backend.protocol import Batch, Chunk
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.tensor import Tensor
from localllm.models import load_spec, load_weights
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes

BLOCK = 32  # positions
_BATCH_BLOCKS = 8  # of each sequence in a batch


class Ours:
    """The cpu backend with its default arithmetic: int8 activations, a float16 cache.

    context, sequences: as many positions for one sequence, and as many sequences of 256.
    kernels: an instruction set; None for the best. layers: only so many of them, the first ones.
    """

    name = "localllm"

    def __init__(
        self,
        model: Path,
        *,
        threads: int = 1,
        context: int = 4352,
        sequences: int = 32,
        kernels: str | None = None,
        layers: int | None = None,
    ) -> None:
        checkpoint = open_checkpoint(model)
        spec, weights = _shortened(load_spec(checkpoint), checkpoint, layers)
        own = -(-context // BLOCK)
        self._backend = CpuBackend(
            spec,
            weights,
            num_blocks=own + sequences * _BATCH_BLOCKS,
            block_size=BLOCK,
            threads=threads,
            kernels=kernels,
        )
        self._table = np.arange(own, dtype=np.int32)
        self._tables = [
            np.arange(own + i * _BATCH_BLOCKS, own + (i + 1) * _BATCH_BLOCKS, dtype=np.int32)
            for i in range(sequences)
        ]
        self._filled = 0
        self._batch_filled = 0  # positions in each sequence of the batch

    def about(self) -> str:
        return f"{self._backend.kernels}, {self._backend.threads} thread(s)"

    def prefill(self, count: int) -> list[float]:
        self._filled = 0
        return [self._run(_chunk(self._table, 0, count))]

    def decode(self, context: int, count: int) -> list[float]:
        self._fill(context)
        return [self._run(_chunk(self._table, context + i, 1)) for i in range(count)]

    def batch(self, sequences: int, context: int, count: int) -> list[float]:
        tables = self._tables[:sequences]
        if self._batch_filled != context:
            for table in self._tables:
                self._run(_chunk(table, 0, context))
            self._batch_filled = context
        step = [_chunk(table, context, 1) for table in tables]
        return [self._run(*step) for _ in range(count)]

    def verify(self, drafts: int, context: int, count: int) -> list[float]:
        self._fill(context)
        step = _chunk(self._table, context, drafts + 1, all_logits=True)
        return [self._run(step) for _ in range(count)]

    def pause(self) -> None:
        """Its threads stop spinning by themselves, within a fraction of a millisecond."""

    def close(self) -> None:
        self._backend.close()

    def _fill(self, context: int) -> None:
        while self._filled < context:
            count = min(PREFILL_CHUNK, context - self._filled)
            self._run(_chunk(self._table, self._filled, count))
            self._filled += count

    def _run(self, *chunks: Chunk) -> float:
        start = time.perf_counter()
        self._backend.forward(Batch(chunks)).argmax(axis=1)
        return time.perf_counter() - start


def _shortened(
    whole: DecoderSpec, checkpoint: Checkpoint, layers: int | None
) -> tuple[DecoderSpec, Iterator[tuple[str, Tensor]]]:
    """The spec with its first layers alone, and their weights."""
    weights = load_weights(checkpoint, whole)
    if layers is None:
        return whole, iter(weights)
    spec = replace(whole, layers=whole.layers[:layers])
    shapes = weight_shapes(spec)
    return spec, (pair for pair in weights if pair[0] in shapes)


def _chunk(table: np.ndarray, start: int, count: int, *, all_logits: bool = False) -> Chunk:
    ids = np.array(token_ids(start, count), np.int32)
    rows = tuple(range(count)) if all_logits else (count - 1,)
    return Chunk(ids, start, table, rows, start + count)
