"""Random numbers that belong to a request: a function of (seed, position, token) and nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is
counter-based: the noise of any token at any position is found without drawing the others, so
that a request's stream does not depend on what runs beside it or on which tokens a filter left.
"""

from __future__ import annotations

import numpy as np

from localllm.sampling.native import native_module

_ROUNDS = 10
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """uint32 [n, 4] of random words for uint32 counters [n, 4] and a key of two 32-bit words."""
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gumbel(seed: int, position: int, token_ids: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise float64 [n] for each token id, at one position of one request."""
    words = noise_words(seed, position, token_ids)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32  # never 0 and never 1
    noise: np.ndarray = -np.log(-np.log(uniform))
    return noise


def noise_words(seed: int, position: int, token_ids: np.ndarray) -> np.ndarray:
    """uint32 [n]: what each token's noise is made of."""
    native = native_module()
    if native is not None:
        found = np.empty(len(token_ids), dtype=np.uint32)
        native.noise_words(seed, position, np.ascontiguousarray(token_ids, np.int64), found)
        return found
    # Four tokens share a counter: token t is word t % 4 of block t // 4.
    blocks, inverse = np.unique(token_ids >> 2, return_inverse=True)
    counters = np.zeros((len(blocks), 4), dtype=np.uint32)
    counters[:, 0] = blocks
    counters[:, 1] = position
    words: np.ndarray = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))[
        inverse, token_ids & 3
    ]
    return words


def coin(seed: int, position: int) -> float:
    """A uniform number in (0, 1) for one position, from a stream apart from the tokens' noise.

    Word 0 of the counter (0, position, 1, 0), in plain integers: for one counter arrays are slow.
    """
    c0, c1, c2, c3 = 0, position, 1, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * int(_M0), c2 * int(_M1)
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return (c0 + 0.5) * 2.0**-32
