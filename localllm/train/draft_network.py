"""The draft head's loss and gradients, written out: a decoder layer, applied K times.

    x = F_h (rmsnorm(h) * g_h) + F_e (rmsnorm(e) * g_e)
    x += W_o attention(rmsnorm(x) * g_1)
    x += W_down (silu(W_gate n) * (W_up n)),   n = rmsnorm(x) * g_2
    h' = rmsnorm(x) * g_f

Each h' makes logits over the tokens it may guess, with the model's own head, which stays as it is.
The loss of a step is the cross-entropy against what the model itself predicts there, and how far
h' is from the model's own state; it is a mean over positions, later steps weighing less. Tokens
are those that the model drew. States are the model's own in the first step; in step j the h' that
step j - 1 made one position before, and a row attends to keys of the model's own states up to j
positions before it, then to those of its own guesses: as when it drafts (Zhang et al., "HASS",
arXiv:2408.15766).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from localllm.spec import DecoderSpec, FeedForwardSpec
from localllm.spec.rope import tables

_FAR = -1e9  # of a score that does not count

Arrays = dict[str, np.ndarray]

HIDDEN_NORM, EMBEDDING_NORM = "hidden_norm.weight", "embedding_norm.weight"
FROM_HIDDEN, FROM_EMBEDDING = "fuse.hidden.weight", "fuse.embedding.weight"
_ATTN_NORM, _FFN_NORM = "layers.0.attn_norm.weight", "layers.0.ffn_norm.weight"
_Q, _K, _V, _O = (f"layers.0.attn.{name}.weight" for name in "qkvo")
_GATE, _UP, _DOWN = (f"layers.0.ffn.{name}.weight" for name in ("gate", "up", "down"))
_FINAL_NORM = "final_norm.weight"


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


@dataclass(frozen=True)
class Texts:
    """Sequences side by side, shorter ones filled up at their ends.

    states: float32 [B, L, D], the model's own. embeddings: float32 [B, L, D], of the token that
    follows each. wanted: bool [B, L]: positions whose next state is the model's at a token of its
    own and known; from these on it learns to guess. inputs: as states, what it is given instead.
    """

    states: np.ndarray
    embeddings: np.ndarray
    wanted: np.ndarray
    inputs: np.ndarray | None = None

    def some(self, which: slice) -> Texts:
        inputs = None if self.inputs is None else self.inputs[which]
        return Texts(self.states[which], self.embeddings[which], self.wanted[which], inputs)


@dataclass(frozen=True)
class Sums:
    """Of one batch. hits: by step, how many positions agree with the model's likeliest token in
    this step and in all before it; tries: of how many."""

    loss: float
    hits: tuple[int, ...]
    tries: tuple[int, ...]


@dataclass
class _Norm:
    """x / rms, and 1 / rms, for the way back."""

    scaled: np.ndarray
    inverse: np.ndarray


@dataclass
class _Kept:
    """What a step's way back needs. Keys and values are [B, kv_heads, L, head_dim]."""

    hidden: _Norm
    attn: _Norm
    ffn: _Norm
    final: _Norm
    fused: np.ndarray
    normed: np.ndarray
    q: np.ndarray  # [B, kv_heads, group, L, head_dim]
    k: np.ndarray
    v: np.ndarray
    p: np.ndarray  # [B, kv_heads, group, L, L + own]
    mixed: np.ndarray
    entering: np.ndarray
    gate: np.ndarray
    sigmoid: np.ndarray
    up: np.ndarray
    guess: np.ndarray


def positions(wanted: np.ndarray, steps: int) -> list[int]:
    """At how many positions each step learns."""
    return [int((wanted & _later(wanted, step)).sum()) for step in range(steps)]


def initial(spec: DecoderSpec, size: float, seed: int) -> Arrays:
    """Its first guess is that nothing changes. size: root mean square of the model's states."""
    random = np.random.default_rng(seed)
    width, ffn = spec.hidden, spec.layers[0].ffn
    attention = spec.layers[0].attention
    assert isinstance(ffn, FeedForwardSpec)
    q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim

    def normal(out: int, inner: int, scale: float = 1.0) -> np.ndarray:
        return random.normal(0, scale * inner**-0.5, (out, inner)).astype(np.float32)

    ones = np.ones(width, np.float32)
    return {
        HIDDEN_NORM: ones,
        EMBEDDING_NORM: ones.copy(),
        FROM_HIDDEN: np.eye(width, dtype=np.float32),
        FROM_EMBEDDING: normal(width, width, 0.5),
        _ATTN_NORM: ones.copy(),
        _Q: normal(q, width),
        _K: normal(kv, width),
        _V: normal(kv, width),
        _O: np.zeros((width, q), np.float32),
        _FFN_NORM: ones.copy(),
        _GATE: normal(ffn.hidden, width),
        _UP: normal(ffn.hidden, width),
        _DOWN: normal(width, ffn.hidden, 0.25),
        _FINAL_NORM: np.full(width, size, np.float32),
    }


class Network:
    """The head of `spec` with these weights; `run` is its loss and gradient."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, np.ndarray]) -> None:
        self.spec = spec
        self.weights = weights
        layer = spec.layers[0]
        self._attention, self._eps = layer.attention, layer.norm.eps

    def run(
        self,
        target: Target,
        texts: Texts,
        *,
        steps: int,
        closeness: float,
        decay: float,
        gradients: Arrays | None = None,
        counts: Sequence[int] | None = None,
    ) -> Sums:
        """Loss of a batch; its gradient is added to `gradients`.

        closeness: weight of the distance between states. counts: see `positions`, of the batch
        that these texts are a part of, whose loss is the sum of its parts'; None: they are all.
        """
        counts = positions(texts.wanted, steps) if counts is None else counts
        kept, embedding, scaled = self._forward(texts, steps)
        back: list[np.ndarray] = []  # of each step, the gradient at its guesses
        loss, hits, tries = 0.0, [], []
        right = np.ones(texts.wanted.shape, bool)
        ahead = _earlier(texts.states, 1)
        for step, guess in enumerate(made.guess for made in kept):
            wanted = texts.wanted & _later(texts.wanted, step)
            weight = decay**step / max(1, counts[step])
            part, gradient, same = _compare(target, guess[wanted], ahead[wanted], weight, closeness)
            right = _later(right, 1) if step else right
            right[wanted] &= same
            hits.append(int(right[wanted].sum()))
            tries.append(int(wanted.sum()))
            loss += part
            back.append(np.zeros_like(guess))
            back[-1][wanted] = gradient
        if gradients is not None:
            self._retreat(kept, back, gradients, embedding, scaled)
        return Sums(loss, tuple(hits), tuple(tries))

    def guesses(self, texts: Texts, steps: int) -> list[np.ndarray]:
        """float32 [B, L, D] of each step: its guess at the state after each position."""
        return [step.guess for step in self._forward(texts, steps)[0]]

    def _forward(self, texts: Texts, steps: int) -> tuple[list[_Kept], np.ndarray, _Norm]:
        """Every step, and the embeddings as they enter all of them."""
        embedding, scaled = self._norm(texts.embeddings, EMBEDDING_NORM)
        following = embedding @ self.weights[FROM_EMBEDDING].T
        kept: list[_Kept] = []
        hidden = texts.states if texts.inputs is None else texts.inputs
        for _ in range(steps):
            kept.append(self._advance(hidden, following, kept))
            hidden = _later(kept[-1].guess, 1)
        return kept, embedding, scaled

    def _norm(self, x: np.ndarray, name: str) -> tuple[np.ndarray, _Norm]:
        inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._eps)
        scaled = x * inverse
        return scaled * self.weights[name], _Norm(scaled, inverse)

    def _norm_back(self, dy: np.ndarray, name: str, kept: _Norm, gradients: Arrays) -> np.ndarray:
        gradients[name] += _rows(dy * kept.scaled).sum(axis=0)
        dx = dy * self.weights[name]
        along = np.mean(dx * kept.scaled, axis=-1, keepdims=True)
        result: np.ndarray = (dx - kept.scaled * along) * kept.inverse
        return result

    def _linear_back(
        self, dy: np.ndarray, name: str, x: np.ndarray, gradients: Arrays
    ) -> np.ndarray:
        gradients[name] += _rows(dy).T @ _rows(x)
        result: np.ndarray = dy @ self.weights[name]
        return result

    def _advance(self, hidden: np.ndarray, following: np.ndarray, before: list[_Kept]) -> _Kept:
        w = self.weights
        fused, hidden_norm = self._norm(hidden, HIDDEN_NORM)
        x = fused @ w[FROM_HIDDEN].T + following
        normed, attn_norm = self._norm(x, _ATTN_NORM)
        q = self._turn(self._heads(normed @ w[_Q].T, self._attention.heads), 1)
        k = self._turn(self._heads(normed @ w[_K].T, self._attention.kv_heads), 1)
        v = self._heads(normed @ w[_V].T, self._attention.kv_heads)
        q = q.reshape(*k.shape[:2], -1, *k.shape[2:]) * np.float32(self._attention.scale)
        p, mixed = self._attend(q, [*(kept.k for kept in before), k], [*(b.v for b in before), v])
        x = x + mixed @ w[_O].T
        entering, ffn_norm = self._norm(x, _FFN_NORM)
        gate, up = entering @ w[_GATE].T, entering @ w[_UP].T
        with np.errstate(over="ignore"):
            sigmoid = 1 / (1 + np.exp(-gate))
        x = x + (gate * sigmoid * up) @ w[_DOWN].T
        guess, final_norm = self._norm(x, _FINAL_NORM)
        return _Kept(
            hidden_norm, attn_norm, ffn_norm, final_norm, fused, normed, q, k, v, p, mixed,
            entering, gate, sigmoid, up, guess,
        )  # fmt: skip

    def _attend(
        self, q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shares, and what they make of the values, [B, L, heads * head_dim].

        A row of step j sees keys of step 0 up to j positions before it, then one of each later
        step, its own the last.
        """
        step, length = len(keys) - 1, q.shape[-2]
        row = np.arange(length)
        scores = q @ keys[0][:, :, None].swapaxes(-1, -2)
        scores[..., row[None, :] > row[:, None] - step] = _FAR
        own = [
            (q * _later(key, step - of, axis=2)[:, :, None]).sum(axis=-1, keepdims=True)
            for of, key in enumerate(keys[1:], 1)
        ]
        p = np.concatenate([scores, *own], axis=-1)
        p -= p.max(axis=-1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        mixed = p[..., :length] @ values[0][:, :, None]
        for of, value in enumerate(values[1:], 1):
            share = p[..., length + of - 1 : length + of]
            mixed += share * _later(value, step - of, axis=2)[:, :, None]
        return p, self._joined(mixed)

    def _retreat(
        self,
        kept: list[_Kept],
        back: list[np.ndarray],
        gradients: Arrays,
        embedding: np.ndarray,
        scaled: _Norm,
    ) -> None:
        dk = [np.zeros_like(step.k) for step in kept]
        dv = [np.zeros_like(step.v) for step in kept]
        from_later: np.ndarray | float = 0.0
        following = np.zeros_like(embedding)
        for at in reversed(range(len(kept))):
            step = kept[at]
            dx = self._norm_back(back[at] + from_later, _FINAL_NORM, step.final, gradients)
            inner = step.gate * step.sigmoid
            d_inner = self._linear_back(dx, _DOWN, inner * step.up, gradients)
            d_gate = d_inner * step.up * step.sigmoid * (1 + step.gate * (1 - step.sigmoid))
            entering = self._linear_back(d_gate, _GATE, step.entering, gradients)
            entering += self._linear_back(d_inner * inner, _UP, step.entering, gradients)
            dx = dx + self._norm_back(entering, _FFN_NORM, step.ffn, gradients)
            mixed = self._linear_back(dx, _O, step.mixed, gradients)
            dq = self._attend_back(mixed, at, kept, dk, dv)
            normed = self._linear_back(self._joined(dq), _Q, step.normed, gradients)
            dk_turned = self._turn(dk[at], -1)
            normed += self._linear_back(self._joined(dk_turned), _K, step.normed, gradients)
            normed += self._linear_back(self._joined(dv[at]), _V, step.normed, gradients)
            dx = dx + self._norm_back(normed, _ATTN_NORM, step.attn, gradients)
            following += dx
            fused = self._linear_back(dx, FROM_HIDDEN, step.fused, gradients)
            hidden = self._norm_back(fused, HIDDEN_NORM, step.hidden, gradients)
            from_later = _earlier(hidden, 1)
        embedding_back = self._linear_back(following, FROM_EMBEDDING, embedding, gradients)
        self._norm_back(embedding_back, EMBEDDING_NORM, scaled, gradients)

    def _attend_back(
        self,
        mixed: np.ndarray,
        at: int,
        kept: list[_Kept],
        dk: list[np.ndarray],
        dv: list[np.ndarray],
    ) -> np.ndarray:
        """The gradient at the queries before RoPE, like `_Kept.q`; those at keys and values of
        this step and of all before it are added to dk and dv."""
        step = kept[at]
        q, p, length = step.q, step.p, step.q.shape[-2]
        out = self._heads(mixed, self._attention.heads).reshape(q.shape)
        dp = np.empty_like(p)
        dp[..., :length] = out @ kept[0].v[:, :, None].swapaxes(-1, -2)
        dv[0] += (p[..., :length].swapaxes(-1, -2) @ out).sum(axis=2)
        for of in range(1, at + 1):
            column = length + of - 1
            value = _later(kept[of].v, at - of, axis=2)[:, :, None]
            dp[..., column] = (out * value).sum(axis=-1)
            dv[of] += _earlier((p[..., column, None] * out).sum(axis=2), at - of, axis=2)
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
        dq = ds[..., :length] @ kept[0].k[:, :, None]
        dk[0] += (ds[..., :length].swapaxes(-1, -2) @ q).sum(axis=2)
        for of in range(1, at + 1):
            d = ds[..., length + of - 1, None]
            dq += d * _later(kept[of].k, at - of, axis=2)[:, :, None]
            dk[of] += _earlier((d * q).sum(axis=2), at - of, axis=2)
        dq = dq.reshape(dq.shape[0], -1, *dq.shape[3:]) * np.float32(self._attention.scale)
        return self._turn(dq, -1)

    def _heads(self, x: np.ndarray, heads: int) -> np.ndarray:
        """[B, L, heads * head_dim] -> [B, heads, L, head_dim]."""
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    @staticmethod
    def _joined(x: np.ndarray) -> np.ndarray:
        """[B, …, L, head_dim] -> [B, L, heads * head_dim]."""
        batch, length, size = x.shape[0], x.shape[-2], x.shape[-1]
        heads = x.reshape(batch, -1, length, size)
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(batch, length, -1)

    def _turn(self, x: np.ndarray, way: int) -> np.ndarray:
        """RoPE of [B, heads, L, head_dim]; way: -1 turns back."""
        rope = self._attention.rope
        assert rope is not None
        positions = np.arange(x.shape[-2])
        cos, sin = (part.astype(x.dtype) for part in tables(rope, positions, positions + 1))
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        sin = sin * way
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _later(x: np.ndarray, by: int, axis: int = 1) -> np.ndarray:
    """Everything so many positions later, zeros before it."""
    if by == 0:
        return x
    moved = np.zeros_like(x)
    from_, to = [slice(None)] * x.ndim, [slice(None)] * x.ndim
    from_[axis], to[axis] = slice(None, -by), slice(by, None)
    moved[tuple(to)] = x[tuple(from_)]
    return moved


def _earlier(x: np.ndarray, by: int, axis: int = 1) -> np.ndarray:
    """Everything so many positions earlier, zeros after it."""
    return np.flip(_later(np.flip(x, axis), by, axis), axis)


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
