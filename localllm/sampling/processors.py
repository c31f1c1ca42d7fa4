"""Changes made to the logits before a token is drawn. Order: bias, penalties, then filters.

The filters follow temperature: top-k, top-p, min-p, each on what the one before left.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def add_bias(logits: np.ndarray, bias: Mapping[int, float]) -> None:
    """Adds the bias in place."""
    for token_id, value in bias.items():
        logits[token_id] += value


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    """CTRL's penalty, in place, on the distinct token ids `seen`."""
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def penalize_presence(
    logits: np.ndarray, counts: Mapping[int, int], presence: float, frequency: float
) -> None:
    """OpenAI's penalties, in place; `counts`: how often each id stands in the answer."""
    ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    times = np.fromiter(counts.values(), dtype=np.float64, count=len(counts))
    logits[ids] -= presence + frequency * times


def candidates(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The token ids that survive the filters, in ascending order. The likeliest always does.

    Ties at a border are broken by the lower id, so that the result is one definite set.
    """
    least = _below_top(logits, top_k)
    ids = np.flatnonzero(logits >= least) if least > -np.inf else np.flatnonzero(logits > -np.inf)
    if 0 < top_k < len(ids):
        ids = ids[np.argsort(-logits[ids], kind="stable")[:top_k]]
    if top_p < 1.0:
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        probabilities = softmax(logits[ids])
        before = np.cumsum(probabilities) - probabilities
        keep = before < top_p
        keep[0] = True
        ids = ids[keep]
    if min_p > 0.0:
        values = logits[ids]
        ids = ids[values >= values.max() + np.log(min_p)]
    return np.sort(ids)


def _below_top(logits: np.ndarray, top_k: int) -> float:
    """A cheap bound that at least the top_k largest reach: the k-th of the maxima of rows of 16."""
    rows = len(logits) // 16
    if not 0 < top_k * 4 < rows:
        return -np.inf
    maxima = logits[: rows * 16].reshape(rows, 16).max(axis=1)
    return float(np.partition(maxima, rows - top_k)[rows - top_k])


def softmax(values: np.ndarray) -> np.ndarray:
    """float64 probabilities."""
    exponentials = np.exp(values - values.max())
    result: np.ndarray = exponentials / exponentials.sum()
    return result


def log_softmax(values: np.ndarray) -> np.ndarray:
    """float64 log-probabilities."""
    shifted = values - values.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result
