"""Filters: which tokens may be drawn. Each works on what the one before left.

They take logits after temperature, float64 [V], shifted so that the largest is 0, and token ids.
"""

from __future__ import annotations

import numpy as np


def candidates(
    logits: np.ndarray,
    top_k: int,
    top_p: float,
    min_p: float,
    *,
    typical_p: float = 1.0,
    top_n_sigma: float = 0.0,
) -> np.ndarray:
    """The token ids that survive the filters, in ascending order. The likeliest always does,
    except that typical_p may prefer tokens nearer to the entropy.

    Ties at a border are broken by the lower id, so that the result is one definite set.
    """
    least = _below_top(logits, top_k)
    if min_p > 0.0 and top_p == 1.0 and typical_p == 1.0:
        # No sum in between depends on what is cut, so most can go at once.
        least = max(least, float(logits.max() + np.log(min_p)))
    ids = np.flatnonzero(logits >= least) if least > -np.inf else np.flatnonzero(logits > -np.inf)
    if top_n_sigma > 0.0:
        # The deviation is that of all tokens; cutting before or after top_k is the same.
        finite = logits[logits > -np.inf]
        with np.errstate(over="ignore"):
            ids = ids[logits[ids] >= finite.max() - top_n_sigma * finite.std()]
    if 0 < top_k < len(ids):
        # Ascending ids, so that sums run in the same order however the cut was found.
        ids = np.sort(ids[np.argsort(-logits[ids], kind="stable")[:top_k]])
    kept: np.ndarray = ids[refined(logits[ids], top_p, min_p, typical_p)]
    return kept


def refined(values: np.ndarray, top_p: float, min_p: float, typical_p: float) -> np.ndarray:
    """Places, ascending, of those of these logits that typical_p, top_p and min_p leave."""
    places = np.arange(len(values))
    if typical_p < 1.0:
        places = typical(values, typical_p)
    if top_p < 1.0:
        places = np.sort(places)
        places = places[np.argsort(-values[places], kind="stable")]
        probabilities = softmax(values[places])
        before = np.cumsum(probabilities) - probabilities
        keep = before < top_p
        keep[0] = True
        places = places[keep]
    if min_p > 0.0:
        left = values[places]
        places = places[left >= left.max() + np.log(min_p)]
    return np.sort(places)


def typical(logits: np.ndarray, mass: float) -> np.ndarray:
    """Places of the tokens whose surprise is nearest to the entropy, until they hold `mass`.

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666).
    """
    logprobs = log_softmax(logits)
    probabilities = np.exp(logprobs)
    entropy = -(probabilities * logprobs).sum()
    distance = np.abs(-logprobs - entropy)
    near = np.arange(len(distance))
    for count in (256, 4096):  # mostly few are needed, and sorting all takes long
        if count < len(distance):
            nearest = np.flatnonzero(distance <= np.partition(distance, count)[count])
            if probabilities[nearest].sum() > mass + 1e-9:
                near = nearest
                break
    order = near[np.argsort(distance[near], kind="stable")]
    held = np.cumsum(probabilities[order])
    keep = held - probabilities[order] < mass
    keep[0] = True
    places: np.ndarray = order[keep]
    return places


def exclude_top(logits: np.ndarray, threshold: float) -> np.ndarray:
    """A mask that drops the tokens of at least this probability, except the least likely of them.

    XTC (github.com/oobabooga/text-generation-webui, pull request 6335), where its coin says so.
    """
    above = np.flatnonzero(softmax(logits) >= threshold)
    keep = np.ones(len(logits), dtype=bool)
    if len(above) > 1:
        last = above[np.argsort(-logits[above], kind="stable")[-1]]
        keep[above] = False
        keep[last] = True
    return keep


def below_surprise(logits: np.ndarray, bits: float) -> np.ndarray:
    """A mask of the tokens whose surprise is at most so many bits; the likeliest always is kept.

    Mirostat version 2's cut (Basu et al. 2020, arXiv:2007.14966).
    """
    keep: np.ndarray = -log_softmax(logits) / np.log(2.0) <= bits
    keep[np.argmax(logits)] = True
    return keep


def dynamic_temperature(
    logits: np.ndarray, temperature: float, spread: float, exponent: float
) -> float:
    """Between temperature - spread and + spread, by the entropy of the logits over its maximum."""
    finite = logits[logits > -np.inf]
    low, high = max(0.0, temperature - spread), temperature + spread
    if len(finite) < 2:
        return temperature
    logprobs = log_softmax(finite)
    entropy = max(0.0, float(-(np.exp(logprobs) * logprobs).sum()))
    share = min(1.0, entropy / float(np.log(len(finite))))
    return float(max(low + (high - low) * share**exponent, 1e-300))


def _below_top(logits: np.ndarray, top_k: int) -> float:
    """A cheap bound that at least the top_k largest reach: the k-th of the maxima of groups."""
    groups = len(logits) // 16
    if not 0 < top_k * 4 < groups:
        return -np.inf
    maxima = logits[: groups * 16].reshape(16, groups).max(axis=0)
    return float(np.partition(maxima, groups - top_k)[groups - top_k])


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


def likeliest(logprobs: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest, likeliest first, the lower id first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    least = _below_top(logprobs, count)
    ids = np.flatnonzero(logprobs >= least) if least > -np.inf else np.arange(len(logprobs))
    return ids[np.argsort(-logprobs[ids], kind="stable")[:count]]
