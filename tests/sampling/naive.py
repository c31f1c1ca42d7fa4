"""Samplers as their authors define them, one token after the other, with dicts and loops.

Nothing here knows how localllm.sampling computes; the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Probabilities = dict[int, float]


def softmax(logits: dict[int, float]) -> Probabilities:
    top = max(logits.values())
    weights = {t: math.exp(x - top) for t, x in logits.items()}
    total = math.fsum(weights.values())
    return {t: w / total for t, w in weights.items()}


def entropy(probabilities: Probabilities) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities.values() if p > 0)


def top_n_sigma(logits: dict[int, float], n: float) -> set[int]:
    """Tang et al. 2024, as llama.cpp computes it: the deviation over all tokens."""
    mean = math.fsum(logits.values()) / len(logits)
    variance = math.fsum((x - mean) ** 2 for x in logits.values()) / len(logits)
    least = max(logits.values()) - n * math.sqrt(variance)
    return {t for t, x in logits.items() if x >= least}


def typical(logits: dict[int, float], mass: float) -> set[int]:
    """Meister et al. 2022."""
    probabilities = softmax(logits)
    center = entropy(probabilities)
    order = sorted(probabilities, key=lambda t: (abs(-math.log(probabilities[t]) - center), t))
    kept, held = set(), 0.0
    for token in order:
        kept.add(token)
        held += probabilities[token]
        if held >= mass:
            break
    return kept


def exclude_top(logits: dict[int, float], threshold: float) -> set[int]:
    """XTC: of the tokens above the threshold only the least likely stays."""
    probabilities = softmax(logits)
    above = sorted(
        (t for t, p in probabilities.items() if p >= threshold),
        key=lambda t: (-logits[t], t),
    )
    return set(logits) - set(above[:-1])


def dynamic_temperature(
    logits: dict[int, float], temperature: float, spread: float, exponent: float
) -> float:
    """llama.cpp's "entropy-based dynamic temperature"."""
    low, high = max(0.0, temperature - spread), temperature + spread
    if len(logits) < 2:
        return temperature
    normalized = max(0.0, entropy(softmax(logits))) / math.log(len(logits))
    return low + (high - low) * normalized**exponent


def mirostat_step(logits: dict[int, float], limit: float) -> tuple[set[int], Probabilities]:
    """Which tokens mirostat 2 keeps for a limit on the surprise, and their probabilities."""
    probabilities = softmax(logits)
    kept = {t for t, p in probabilities.items() if -math.log2(p) <= limit}
    if not kept:
        kept = {min(logits, key=lambda t: (-logits[t], t))}
    return kept, softmax({t: logits[t] for t in kept})


def dry_penalties(
    tokens: Sequence[int],
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    reach: int,
    breakers: frozenset[int],
) -> dict[int, float]:
    """The pull request's own loops: extend every earlier occurrence of the last token backwards."""
    text = list(tokens[-reach:] if reach > 0 else tokens)
    if not text or text[-1] in breakers:
        return {}
    longest: dict[int, int] = {}
    for place in range(len(text) - 1):
        if text[place] != text[-1]:
            continue
        following = text[place + 1]
        if following in breakers:
            continue
        length = 1
        while (
            length <= place
            and text[place - length] == text[-1 - length]
            and text[-1 - length] not in breakers
        ):
            length += 1
        longest[following] = max(longest.get(following, 0), length)
    return {
        token: multiplier * base ** (length - allowed_length)
        for token, length in longest.items()
        if length >= allowed_length
    }
