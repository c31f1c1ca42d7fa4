"""Causal convolutions of each channel by itself, in numpy float64."""

from __future__ import annotations

import numpy as np


def delta_conv(
    x: np.ndarray, state: np.ndarray, taps: np.ndarray, sure: int
) -> tuple[np.ndarray, np.ndarray]:
    """silu(convolution) [n, channels], and the state after `sure` rows: its last inputs.

    x: [n, channels]. state: [kernel - 1, channels], the inputs before it, the oldest first.
    taps: [kernel, channels].
    """
    y, after = _convolved(x, state, taps, sure)
    return y / (1 + np.exp(-y)), after


def short_conv(
    x: np.ndarray, state: np.ndarray, taps: np.ndarray, sure: int
) -> tuple[np.ndarray, np.ndarray]:
    """after * convolution(before * inner), x [n, 3 * channels] being before, after and inner; taps
    may have a row more, which is added."""
    before, after, inner = np.split(x, 3, axis=1)
    y, kept = _convolved(before * inner, state, taps, sure)
    return after * y, kept


def _convolved(
    x: np.ndarray, state: np.ndarray, taps: np.ndarray, sure: int
) -> tuple[np.ndarray, np.ndarray]:
    kernel = len(state) + 1
    seen = np.concatenate((state, x))
    y = sum(seen[tap : tap + len(x)] * taps[tap] for tap in range(kernel))
    return y + sum(taps[kernel:]), seen[sure : sure + kernel - 1]
