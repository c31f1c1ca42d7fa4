"""Recurrent token mixers in plain MLX ops.

A mixer has three parts: `enter` makes of each row by itself what the recurrence takes, `advance`
carries one sequence's state over its rows, one after the other, and `leave` ends each row by
itself. So a row's result does not depend on where a chunk begins or ends.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from localllm.backend.reference_linear import Part
from localllm.backend.reference_parts import Adapt, Norm, Weights, activate
from localllm.spec import GatedDeltaNetSpec, NormSpec, RecurrentSpec, ShortConvSpec

# Rows as `enter` gives them [n, width] -> what `advance` makes of each sequence's [n, out_width].
Recur = Callable[[mx.array], mx.array]
# A convolution's weights: what `advance` knows beside its rows, an input where that is
# differentiated.
Filters = tuple[mx.array, ...]


class GatedDeltaNet(Part):
    """See `GatedDeltaNetSpec`. A state holds the convolution's last inputs, then S of each head."""

    def __init__(self, spec: GatedDeltaNetSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.qkv = weights.linear("qkv")
        self.z = weights.linear("z")
        self.beta = weights.linear("beta")
        self.decay = weights.linear("decay")
        self.o = weights.linear("o")
        self.conv = weights.vector("conv.weight").reshape(spec.channels, spec.kernel)
        self.rate = weights.vector("rate.weight")
        self.step = weights.vector("step.weight")
        self.norm = Norm(NormSpec(eps=spec.eps), weights.under("norm"))

    def __call__(self, x: mx.array, recur: Recur, adapt: Adapt) -> mx.array:
        """float32 [n, hidden] -> [n, hidden]."""
        y = recur(self.enter(x, adapt))
        z = adapt("delta.z", x, self.z(x))
        heads = (x.shape[0], self.spec.value_heads, self.spec.value_dim)
        mixed = self.norm(y.reshape(heads)) * activate(z.reshape(heads), "silu")
        mixed = mixed.reshape(y.shape)
        return adapt("delta.o", mixed, self.o(mixed))

    def enter(self, x: mx.array, adapt: Adapt) -> mx.array:
        """q, k and v of all heads, then beta and the decay of each value head: [n, width]."""
        qkv = adapt("delta.qkv", x, self.qkv(x))
        beta = mx.sigmoid(self.beta(x))
        slowed = mx.logaddexp(self.decay(x) + self.step, mx.array(0.0))  # softplus
        return mx.concatenate([qkv, beta, mx.exp(-mx.exp(self.rate) * slowed)], axis=-1)

    @property
    def filters(self) -> Filters:
        return (self.conv,)

    def advance(
        self, state: mx.array, rows: mx.array, filters: Filters | None = None
    ) -> tuple[mx.array, mx.array]:
        """[n, value_heads * value_dim] and the state after the rows [n, width]."""
        (conv,) = filters or self.filters
        spec, count = self.spec, rows.shape[0]
        heads, repeat = spec.key_heads, spec.value_heads // spec.key_heads
        taken = (spec.kernel - 1) * spec.channels
        seen = mx.concatenate([state[:taken].reshape(-1, spec.channels), rows[:, : spec.channels]])
        qkv = activate(_convolved(seen, conv), "silu")
        q, k, v = mx.split(qkv, [heads * spec.key_dim, 2 * heads * spec.key_dim], axis=-1)
        q = _unit(q.reshape(count, heads, spec.key_dim)) * spec.key_dim**-0.5
        k = _unit(k.reshape(count, heads, spec.key_dim))
        q, k = (mx.repeat(part, repeat, axis=1)[..., None] for part in (q, k))  # [n, H, dk, 1]
        v = v.reshape(count, spec.value_heads, spec.value_dim)
        beta, decay = mx.split(rows[:, spec.channels :][..., None], 2, axis=1)  # [n, H, 1]
        s = state[taken:].reshape(spec.value_heads, spec.key_dim, spec.value_dim)
        outputs = []
        for row in range(count):
            s = s * decay[row][..., None]
            change = beta[row] * (v[row] - mx.sum(k[row] * s, axis=1))  # [H, dv]
            s = s + k[row] * change[:, None]
            outputs.append(mx.sum(q[row] * s, axis=1).reshape(-1))
        after = mx.concatenate([seen[count:].reshape(-1), s.reshape(-1)])
        return mx.stack(outputs), after


class ShortConv(Part):
    """See `ShortConvSpec`. A state holds the convolution's last inputs."""

    def __init__(self, spec: ShortConvSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.into = weights.linear("in", spec.bias)
        self.out = weights.linear("out", spec.bias)
        self.taps = weights.vector("taps.weight").reshape(spec.channels, spec.kernel)
        self.bias = weights.vector("taps.bias") if spec.bias else None

    def __call__(self, x: mx.array, recur: Recur, adapt: Adapt) -> mx.array:
        """float32 [n, hidden] -> [n, hidden]."""
        before, after, inner = mx.split(adapt("conv.in", x, self.into(x)), 3, axis=-1)
        mixed = after * recur(before * inner)
        return adapt("conv.out", mixed, self.out(mixed))

    @property
    def filters(self) -> Filters:
        return (self.taps,) if self.bias is None else (self.taps, self.bias)

    def advance(
        self, state: mx.array, rows: mx.array, filters: Filters | None = None
    ) -> tuple[mx.array, mx.array]:
        """[n, channels] and the state after the rows [n, channels]."""
        seen = mx.concatenate([state.reshape(-1, self.spec.channels), rows])
        taps, *biases = filters or self.filters
        y = _convolved(seen, taps)
        for bias in biases:
            y = y + bias
        return y, seen[rows.shape[0] :].reshape(-1)


Recurrent = GatedDeltaNet | ShortConv


def recurrent(spec: RecurrentSpec, weights: Weights) -> Recurrent:
    """The mixer of a layer. weights: those under `layers.N`."""
    if isinstance(spec, GatedDeltaNetSpec):
        return GatedDeltaNet(spec, weights.under("delta"))
    return ShortConv(spec, weights.under("conv"))


def _convolved(seen: mx.array, taps: mx.array) -> mx.array:
    """[n, channels] of inputs [kernel - 1 + n, channels], the oldest first; taps: [channels, k]."""
    kernel = taps.shape[1]
    count = seen.shape[0] - kernel + 1
    total = seen[:count] * taps[:, 0]
    for tap in range(1, kernel):
        total = total + seen[tap : tap + count] * taps[:, tap]
    return total


def _unit(x: mx.array) -> mx.array:
    """Scaled to length 1 along the last axis."""
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + 1e-6)
