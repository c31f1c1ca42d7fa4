"""Recurrent token mixers of the `metal` backend.

What makes of each row what its recurrence takes, and what comes after it, is done for all rows of
a step at once. Between, `recur` carries the state of each sequence over its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from localllm.backend.metal_ops import Ops, activate
from localllm.backend.metal_parts import Adapt, Weights, adapted, linear_of, vector_of
from localllm.kernels_metal import gated_delta
from localllm.kernels_metal.runs import Runs
from localllm.spec import GatedDeltaNetSpec, RecurrentSpec, ShortConvSpec

# What a recurrence takes of each row, T [n, …] each.
Inputs = tuple[mx.array, ...]
# float32: the convolution's last inputs [kernel - 1, channels], the oldest first; of a delta net
# also S of each head, [value_heads, value_dim, key_dim].
State = tuple[mx.array, ...]
# (inputs of all rows, the rows of some sequences, their states) -> [rows, …] of these, the states
# after those of them that are sure.
Advance = Callable[[Inputs, Runs, Sequence[State]], tuple[mx.array, list[State]]]
# (layer, how it advances, inputs) -> [n, …], every sequence carried on.
Recur = Callable[[int, Advance, Inputs], mx.array]


class GatedDeltaNet:
    """See `GatedDeltaNetSpec`."""

    def __init__(self, spec: GatedDeltaNetSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._qkv, self._z, self._beta, self._decay, self._o = (
            linear_of(weights, f"{at}{name}", False) for name in ("qkv", "z", "beta", "decay", "o")
        )
        self._taps = _taps(weights, f"{at}conv.weight", spec.channels)
        self._rate = vector_of(weights, f"{at}rate.weight")
        self._step = vector_of(weights, f"{at}step.weight")
        self._norm = vector_of(weights, f"{at}norm.weight")

    def __call__(self, layer: int, x: mx.array, recur: Recur, adapt: Adapt | None) -> mx.array:
        """T [n, hidden] -> [n, hidden]."""
        ops, spec = self._ops, self._spec
        qkv = adapted(adapt, layer, "delta.qkv", x, ops.linear(x, self._qkv))
        inputs = (qkv, ops.linear(x, self._beta), ops.linear(x, self._decay))
        y = recur(layer, self.advance, inputs)  # float32 [n, value_heads * value_dim]
        heads = y.reshape(-1, spec.value_heads, spec.value_dim)
        y = mx.fast.rms_norm(heads, self._norm, spec.eps).reshape(y.shape)
        z = adapted(adapt, layer, "delta.z", x, ops.linear(x, self._z)).astype(mx.float32)
        mixed = (y * activate(z, "silu")).astype(x.dtype)
        return adapted(adapt, layer, "delta.o", mixed, ops.linear(mixed, self._o))

    def advance(
        self, inputs: Inputs, runs: Runs, states: Sequence[State]
    ) -> tuple[mx.array, list[State]]:
        """See `Advance`. inputs: q, k and v of all heads, then beta and decay of each."""
        qkv, beta, decay = inputs
        seen, s = ([state[part] for state in states] for part in range(2))
        qkv, seen = self._ops.causal_conv("delta", qkv, seen, self._taps, runs)
        taken = gated_delta.Inputs(qkv, beta, decay, self._rate, self._step)
        y, s = self._ops.gated_delta(taken, s, runs)
        return y, list(zip(seen, s, strict=True))

    def empty(self) -> State:
        """The state before a sequence."""
        spec = self._spec
        seen = mx.zeros((spec.kernel - 1, spec.channels))
        return seen, mx.zeros((spec.value_heads, spec.value_dim, spec.key_dim))


class ShortConv:
    """See `ShortConvSpec`."""

    def __init__(self, spec: ShortConvSpec, weights: Weights, at: str, ops: Ops) -> None:
        self._spec = spec
        self._ops = ops
        self._in = linear_of(weights, f"{at}in", spec.bias)
        self._out = linear_of(weights, f"{at}out", spec.bias)
        self._taps = _taps(weights, f"{at}taps.weight", spec.channels)
        if spec.bias:
            bias = vector_of(weights, f"{at}taps.bias")
            self._taps = mx.concatenate([self._taps, bias[None]])

    def __call__(self, layer: int, x: mx.array, recur: Recur, adapt: Adapt | None) -> mx.array:
        """T [n, hidden] -> [n, hidden]."""
        ops = self._ops
        three = adapted(adapt, layer, "conv.in", x, ops.linear(x, self._in))
        mixed = recur(layer, self.advance, (three,))
        return adapted(adapt, layer, "conv.out", mixed, ops.linear(mixed, self._out))

    def advance(
        self, inputs: Inputs, runs: Runs, states: Sequence[State]
    ) -> tuple[mx.array, list[State]]:
        """See `Advance`. inputs: the gate before, the gate after, and what passes them."""
        before = [seen for (seen,) in states]
        y, seen = self._ops.causal_conv("short", inputs[0], before, self._taps, runs)
        return y, [(part,) for part in seen]

    def empty(self) -> State:
        """The state before a sequence."""
        return (mx.zeros((self._spec.kernel - 1, self._spec.channels)),)


Recurrent = GatedDeltaNet | ShortConv


def recurrent(spec: RecurrentSpec, weights: Weights, at: str, ops: Ops) -> Recurrent:
    """The mixer of a layer, whose weights begin with `at`."""
    if isinstance(spec, GatedDeltaNetSpec):
        return GatedDeltaNet(spec, weights, f"{at}delta.", ops)
    return ShortConv(spec, weights, f"{at}conv.", ops)


def _taps(weights: Weights, name: str, channels: int) -> mx.array:
    """float32 [kernel, channels], the oldest row's first."""
    return mx.contiguous(vector_of(weights, name).reshape(channels, -1).T)
