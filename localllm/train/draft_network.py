"""The draft head's loss and gradients, written out: a network of two matrices, applied K times.

    z = [s ; e]     n = rmsnorm(z) * g     u = W_in n     s' = s + W_out silu(u)

Each s' makes logits over the tokens it may guess, with the model's own head, which stays as it is.
The loss of a step is the cross-entropy against what the model itself predicts there, and how far
s' is from the model's own state; it is a mean over positions, later steps weighing less. Tokens
are those that the model drew; states are the network's own from the second step on, as when it
drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

_EPS = np.float32(1e-6)


@dataclass(frozen=True)
class Target:
    """The model's head, confined to the tokens that are guessed. matrix: float32 [M, D]."""

    matrix: np.ndarray
    scale: float = 1.0
    softcap: float | None = None

    def rows(self, index: np.ndarray) -> Target:
        """Confined further, to these rows."""
        return replace(self, matrix=self.matrix[index])

    def logits(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 [n, M], and what their derivatives are multiplied with, None for 1."""
        logits = states @ self.matrix.T
        if self.scale != 1.0:
            logits *= np.float32(self.scale)
        if self.softcap is None:
            return logits, None
        bent = np.tanh(logits / np.float32(self.softcap))
        return np.float32(self.softcap) * bent, 1 - bent * bent


@dataclass
class Network:
    """norm: float32 [2D]. inside: float32 [I, 2D]. outside: float32 [D, I]."""

    norm: np.ndarray
    inside: np.ndarray
    outside: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.norm, self.inside, self.outside


@dataclass(frozen=True)
class Sums:
    """Of one batch. hits: by step, how many positions agree with the model's likeliest token in
    this step and in all before it."""

    loss: float
    positions: int
    hits: tuple[int, ...]


@dataclass
class _Kept:
    """What a step's way back needs."""

    scaled: np.ndarray  # z / rms
    inverse: np.ndarray  # 1 / rms, [n, 1]
    normed: np.ndarray
    u: np.ndarray
    gate: np.ndarray  # sigmoid(u)


def initial(hidden: int, inner: int, sizes: tuple[float, float], seed: int) -> Network:
    """The guess that nothing changes. sizes: root mean squares of states and of embeddings, which
    the norm's gains bring to one size."""
    random = np.random.default_rng(seed)
    whole = np.sqrt((sizes[0] ** 2 + sizes[1] ** 2) / 2)
    norm = np.repeat([whole / sizes[0], whole / sizes[1]], hidden).astype(np.float32)
    inside = random.normal(0, (2 * hidden) ** -0.5, (inner, 2 * hidden)).astype(np.float32)
    return Network(norm, inside, np.zeros((hidden, inner), np.float32))


def run(
    network: Network,
    target: Target,
    states: np.ndarray,
    embeddings: np.ndarray,
    *,
    closeness: float,
    decay: float,
    gradients: Network | None = None,
) -> Sums:
    """Loss of a batch; its gradient is added to `gradients`.

    states: float32 [n, K + 1, D], the model's own, from the first on. embeddings: float32 [n, K, D]
    of the tokens drawn from states 0 … K - 1. closeness: weight of the distance between states.
    """
    count, steps = len(states), embeddings.shape[1]
    guess = states[:, 0]
    kept: list[_Kept] = []
    back: list[np.ndarray] = []  # of each step, the gradient at its guess
    loss, right, hits = 0.0, np.ones(count, bool), []
    for step in range(steps):
        guess, keep = _advance(network, guess, embeddings[:, step])
        wanted = states[:, step + 1]
        weight = decay**step / count
        part, gradient, same = _compare(target, guess, wanted, weight, closeness)
        right &= same
        hits.append(int(right.sum()))
        loss += part
        kept.append(keep)
        back.append(gradient)
    if gradients is not None:
        following = np.zeros_like(guess)
        for keep, gradient in zip(reversed(kept), reversed(back), strict=True):
            following = _retreat(network, keep, gradient + following, gradients)
    return Sums(loss, count, tuple(hits))


def _advance(
    network: Network, states: np.ndarray, embeddings: np.ndarray
) -> tuple[np.ndarray, _Kept]:
    both = np.concatenate([states, embeddings], axis=1)
    inverse = 1 / np.sqrt(np.mean(both * both, axis=1, keepdims=True) + _EPS)
    scaled = both * inverse
    normed = scaled * network.norm
    u = normed @ network.inside.T
    with np.errstate(over="ignore"):
        gate = 1 / (1 + np.exp(-u))
    return states + (u * gate) @ network.outside.T, _Kept(scaled, inverse, normed, u, gate)


def _retreat(network: Network, kept: _Kept, gradient: np.ndarray, gradients: Network) -> np.ndarray:
    """The gradient at the step's states; those of the matrices are added to `gradients`."""
    hidden = gradient.shape[1]
    gradients.outside += gradient.T @ (kept.u * kept.gate)
    du = (gradient @ network.outside) * kept.gate * (1 + kept.u * (1 - kept.gate))
    gradients.inside += du.T @ kept.normed
    dn = du @ network.inside
    gradients.norm += (dn * kept.scaled).sum(axis=0)
    dz = dn * network.norm
    along = np.mean(dz * kept.scaled, axis=1, keepdims=True)
    dz = (dz - kept.scaled * along) * kept.inverse
    back: np.ndarray = gradient + dz[:, :hidden]
    return back


def _compare(
    target: Target, guess: np.ndarray, wanted: np.ndarray, weight: float, closeness: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Weighted loss, its gradient at the guess, and where both find the same token likeliest."""
    logits, bend = target.logits(guess)
    theirs, _ = target.logits(wanted)
    same = logits.argmax(axis=1) == theirs.argmax(axis=1)
    p = _softmax(theirs)
    top = logits.max(axis=1, keepdims=True)
    expected = np.einsum("ij,ij->i", p, logits)  # before the logits are overwritten
    q = np.exp(logits - top)
    total = q.sum(axis=1, keepdims=True)
    cross = np.log(total[:, 0]) + top[:, 0] - expected
    q /= total
    q -= p
    if bend is not None:
        q *= bend
    gradient = (q @ target.matrix) * np.float32(weight * target.scale)
    apart = guess - wanted
    near = np.clip(apart, -1, 1)  # Huber's: quadratic near 0, linear beyond 1
    distance = (near * (apart - near / 2)).mean(axis=1)
    gradient += near * np.float32(weight * closeness / guess.shape[1])
    return weight * float(cross.sum() + closeness * distance.sum()), gradient, same


def _softmax(logits: np.ndarray) -> np.ndarray:
    p: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p
