"""Sampling in numpy float64, by sorting: filters in the order of `localllm.sampling.processors`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampled:
    """token: -1 if the row is broken. logprob: under the kept tokens, in rising order in `kept`."""

    token: int
    logprob: float
    kept: np.ndarray


def candidates(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """The tokens that the filters leave, likeliest first, the lower one first among equals."""
    order = np.argsort(-logits, kind="stable")
    order = order[logits[order] > -np.inf]
    if top_k > 0:
        order = order[:top_k]
    scaled = (logits[order] - logits[order[0]]) / temperature
    if top_p < 1.0:
        probabilities = np.exp(scaled) / np.exp(scaled).sum()
        before = np.cumsum(probabilities) - probabilities
        keep = before < top_p
        keep[0] = True
        order, scaled = order[keep], scaled[keep]
    if min_p > 0.0:
        order = order[scaled >= np.log(min_p)]
    return order


def sample_row(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> Sampled:
    """logits: float64 [V]. The token is the first, by rising id, at which the probability of the
    kept ones so far exceeds `uniform`."""
    if not np.isfinite(logits.max()):
        return Sampled(-1, np.nan, np.empty(0, dtype=np.int64))
    if temperature == 0.0:
        best = int(np.argmax(logits))
        return Sampled(best, 0.0, np.array([best]))
    kept = np.sort(candidates(logits, temperature, top_k, top_p, min_p))
    scaled = (logits[kept] - logits[kept].max()) / temperature
    sums = np.cumsum(np.exp(scaled))
    place = min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(kept) - 1)
    return Sampled(int(kept[place]), float(scaled[place] - np.log(sums[-1])), kept)
