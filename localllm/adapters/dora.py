"""DoRA: each row of an adapted weight is brought to a length of its own.

    y = m / |W + s B A| * (W + s B A) x + bias

A file holds m; the norms need the base model's weights, so loading such an adapter reads them once,
and keeps the norms beside it (`dora_lengths.py`).
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from localllm.adapters.dora_lengths import LENGTHS, KeptLengths
from localllm.adapters.lora import Gains, LowRank
from localllm.checkpoint.opening import content_digest, open_checkpoint
from localllm.checkpoint.tensor import Tensor
from localllm.errors import CheckpointError
from localllm.models.registry import load_weights
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes

_ROWS = 1 << 20  # entries of W that are widened at a time
_CANCELLED = 1e-2  # of the terms of a squared length: less keeps too few digits


@dataclass(frozen=True)
class Base:
    """The base model's weights. read: those that are named, as far as it has them; digest: of all
    its content."""

    read: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]
    digest: Callable[[], bytes]


def weights_in(path: Path, spec: DecoderSpec, digest: Callable[[], bytes] | None = None) -> Base:
    """The weights of the checkpoint at `path`, opened when they are read.

    digest: its `content_digest`, where that is known without reading every byte.
    """

    def read(only: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = weight_shapes(spec).keys() & only
        if not wanted:
            return
        checkpoint = open_checkpoint(path)
        try:
            yield from load_weights(checkpoint, spec, only=wanted)
        finally:
            checkpoint.close()

    return Base(read, cache(digest or (lambda: content_digest(path))))


def with_gains(
    path: Path,
    pairs: Mapping[str, LowRank],
    magnitudes: Mapping[str, np.ndarray],
    base: Base,
    *,
    keep: bool = True,
) -> dict[str, LowRank]:
    """magnitudes: float32 [out] of each target. keep: the lengths, for the next time.

    Raises CheckpointError for a row without length.
    """
    kept = KeptLengths(path / LENGTHS, pairs, base.digest())
    norms = kept.read()
    offsets: dict[str, np.ndarray] = {}
    kinds = ("bias",) if norms else ("weight", "bias")
    found = dict(norms or {})
    for name, tensor in base.read({f"{target}.{kind}" for target in pairs for kind in kinds}):
        target, _, kind = name.rpartition(".")
        if kind == "bias":
            offsets[target] = tensor.to_float32()
        else:
            found[target] = _norms(tensor, pairs[target])
    if keep and norms is None:
        kept.write(found)
    gains: dict[str, np.ndarray] = {}
    for target in pairs:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            gains[target] = magnitudes[target] / found[target]
        if not np.isfinite(gains[target]).all():
            raise CheckpointError(
                f"{path}: {target} has a row of no length, so DoRA cannot scale it",
                hint="The adapter belongs to another model.",
            )
    return {
        target: replace(pair, gains=_gains(gains[target], offsets.get(target)))
        for target, pair in pairs.items()
    }


def _gains(values: np.ndarray, bias: np.ndarray | None) -> Gains:
    return Gains(values, None if bias is None else bias * (1 - values))


def _norms(weight: Tensor, pair: LowRank) -> np.ndarray:
    """float32 [out]: the length of each row of W + s B A; some rows at a time.

    |w + b A|^2 = |w|^2 + 2 (W A^T) b + b (A A^T) b, which never makes the sum of [out, in]; where
    little is left of the terms, the row is added up after all.
    """
    out, inner = weight.shape
    a, b = pair.a.to_float32() * np.float32(pair.scale), pair.b.to_float32()
    step = max(1, _ROWS // inner)
    norms = np.empty(out, np.float32)
    added = np.einsum("or,or->o", b @ (a @ a.T), b)
    for at in range(0, out, step):
        rows = slice(at, at + step)
        wide, factors = weight.rows(rows).to_float32(), b[rows]
        own = np.einsum("oi,oi->o", wide, wide)
        squared = own + 2 * np.einsum("or,or->o", wide @ a.T, factors) + added[rows]
        for row in np.flatnonzero(squared <= _CANCELLED * (own + added[rows])):
            squared[row] = np.square(wide[row] + factors[row] @ a).sum()
        norms[rows] = np.sqrt(squared)
    return norms
