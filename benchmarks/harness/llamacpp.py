"""llama.cpp as a side: `llama_decode` called directly, without JavaScript."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.side import PREFILL_CHUNK, token_ids
from scripts.parity.llamacpp import LlamaCpp as Library
from scripts.parity.llamacpp_abi import VERSION, PeerMissing, libraries

__all__ = ["LlamaCpp", "PeerMissing", "libraries"]

Rows = Sequence[tuple[int, int, int, bool]]


class LlamaCpp:
    """llama.cpp with its own defaults: float16 cache, repacked weights, a thread pool attached.

    context: positions of one sequence; sequences: if more than one, this side answers `batch`
    alone, with caches of 256 positions. variant: "haswell" …; None for its own choice.
    """

    name = "llama.cpp"

    def __init__(
        self,
        model: Path,
        *,
        threads: int = 1,
        context: int = 4352,
        sequences: int = 1,
        variant: str | None = None,
        flash_attention: str = "auto",
    ) -> None:
        self._sequences = sequences
        self._threads = threads
        self._library = Library(
            model,
            threads=threads,
            context=256 if sequences > 1 else context,
            sequences=sequences,
            variant=variant,
            flash_attention=flash_attention,
        )
        self._filled = 0

    def about(self) -> str:
        return (
            f"v{VERSION}, {self._library.kernels or 'only'} kernels, {self._threads} thread(s) "
            f"[{self._library.system}]"
        )

    def prefill(self, count: int) -> list[float]:
        self._library.clear()
        self._filled = count
        return [self._run(_rows(0, count))]

    def decode(self, context: int, count: int) -> list[float]:
        self._fill(context)
        seconds = [self._run(_rows(context + i, 1)) for i in range(count)]
        self._library.rewind(context)
        return seconds

    def batch(self, sequences: int, context: int, count: int) -> list[float]:
        assert sequences <= self._sequences
        if self._filled != context:
            self._library.clear()
            for sequence in range(self._sequences):
                self._library.step(_rows(0, context, sequence))
            self._filled = context
        rows = [row for sequence in range(sequences) for row in _rows(context, 1, sequence)]
        return [self._again(rows, range(sequences), context) for _ in range(count)]

    def verify(self, drafts: int, context: int, count: int) -> list[float]:
        self._fill(context)
        rows = [(*row[:3], True) for row in _rows(context, drafts + 1)]
        return [self._again(rows, (0,), context) for _ in range(count)]

    def pause(self) -> None:
        self._library.pause()

    def close(self) -> None:
        self._library.close()

    def _fill(self, context: int) -> None:
        if self._filled > context:
            self._library.rewind(context)
        else:
            for at in range(self._filled, context, PREFILL_CHUNK):
                self._library.step(_rows(at, min(PREFILL_CHUNK, context - at)))
        self._filled = context

    def _again(self, rows: Rows, sequences: Sequence[int], context: int) -> float:
        """One step whose rows are forgotten afterwards."""
        seconds = self._run(rows)
        for sequence in sequences:
            self._library.rewind(context, sequence)
        return seconds

    def _run(self, rows: Rows) -> float:
        start = time.perf_counter()
        self._library.step(rows).argmax(axis=1)
        return time.perf_counter() - start


def _rows(start: int, count: int, sequence: int = 0) -> list[tuple[int, int, int, bool]]:
    """Consecutive rows of one sequence, the last with logits."""
    return [
        (token, start + i, sequence, i == count - 1)
        for i, token in enumerate(token_ids(start, count))
    ]
