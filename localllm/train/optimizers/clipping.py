"""The gradient's length, and how it is cut."""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 16


def clip(gradient: np.ndarray, limit: float) -> float:
    """The gradient's norm; the gradient, float32 [n], is scaled down in place to `limit`.

    limit: 0 for none. A norm that is not finite changes nothing: whoever called must look at it.
    Squares are summed in float64, chunk by chunk from first to last, whatever the machine.
    """
    total = 0.0
    for start in range(0, len(gradient), _CHUNK):
        part = gradient[start : start + _CHUNK].astype(np.float64)
        total += float(np.add.reduce(np.square(part)))
    norm = float(np.sqrt(total))
    if limit and np.isfinite(norm) and norm > limit:
        gradient *= np.float32(limit / norm)
    return norm
