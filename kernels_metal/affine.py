"""A matrix in affine codes, and what is common to the kernels that multiply by it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

from localllm.kernels_metal.kernel import Template

Activation = Literal["silu", "gelu_tanh"]

BITS = (4, 8)
GROUPS = (32, 64, 128)
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")

# What `qmv` and `qmm_small` bind, in order.
INPUTS = (
    *("x", "w", "scales", "biases", "w_up", "scales_up", "biases_up"),
    *("bias", "bias_up", "residual"),
)


class Affine(NamedTuple):
    """[N, K] as `mx.quantize` packs it: value = scale * code + bias.

    codes: uint32 [N, K * bits / 32], little end first. scales, biases: [N, K / group].
    bits: 4 or 8. group: 32, 64 or 128.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1] * 32 // self.bits

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.biases.nbytes


def quantized(weight: mx.array, *, bits: int, group: int) -> Affine:
    """[N, K] in codes."""
    codes, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    return Affine(codes, scales, biases, bits, group)


def check(x: mx.array, weight: Affine, **added: tuple[mx.array | None, tuple[int, ...]]) -> None:
    """Raises ValueError, naming the argument, for what a kernel would read wrongly.

    added: by name, an optional array and the shape it must have.
    """
    n, k = weight.shape
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float16, bfloat16 or float32, not {x.dtype}")
    if weight.codes.dtype != mx.uint32 or weight.bits not in BITS or weight.group not in GROUPS:
        raise ValueError(
            f"codes must be uint32 of {BITS} bits in groups of {GROUPS}, not {weight.codes.dtype} "
            f"of {weight.bits} in {weight.group}"
        )
    if x.ndim != 2 or x.shape[1] != k or k % weight.group:
        raise ValueError(f"x is {list(x.shape)}: it does not fit weights {[n, k]}")
    groups = (n, k // weight.group)
    wanted = {"scales": (weight.scales, groups), "biases": (weight.biases, groups), **added}
    for name, (array, shape) in wanted.items():
        if array is not None and (array.shape != shape or array.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {x.dtype} {list(shape)}, not {array.dtype} {list(array.shape)}"
            )


def check_gated(
    x: mx.array, gate: Affine, up: Affine, gate_bias: mx.array | None, up_bias: mx.array | None
) -> None:
    """`check` for two matrices that one kernel reads side by side. Raises ValueError."""
    if (gate.shape, gate.bits, gate.group) != (up.shape, up.bits, up.group):
        raise ValueError(
            f"gate {list(gate.shape)} of {gate.bits} bits in {gate.group} and up {list(up.shape)} "
            f"of {up.bits} bits in {up.group} must be packed alike"
        )
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate and up have a bias both, or none")
    n = gate.shape[0]
    check(x, gate, gate_bias=(gate_bias, (n,)))
    check(x, up, up_bias=(up_bias, (n,)))


def inputs(
    x: mx.array,
    weight: Affine,
    up: Affine,
    bias: mx.array | None,
    up_bias: mx.array | None,
    residual: mx.array | None,
) -> list[mx.array]:
    """As INPUTS names them. x stands in for what is absent, and is not read as such."""
    optional = [x if array is None else array for array in (bias, up_bias, residual)]
    return [x, *weight[:3], *up[:3], *optional]


def template(
    x: mx.array,
    weight: Affine,
    bias: mx.array | None,
    residual: mx.array | None,
    activation: Activation | None,
) -> Template:
    return [
        ("T", x.dtype),
        ("BITS", weight.bits),
        ("GROUP", weight.group),
        ("ACTIVATION", 0 if activation is None else 1 + ACTIVATIONS.index(activation)),
        ("HAS_BIAS", bias is not None),
        ("HAS_RESIDUAL", residual is not None),
    ]


def least_bytes(
    rows: int, shape: tuple[int, int], bits: int, group: int, dtype: mx.Dtype, matrices: int = 1
) -> int:
    """What x [rows, K] times `matrices` of `shape` (N, K) reads and writes at least: all once."""
    n, k = shape
    weights = n * k * bits // 8 + 2 * (n * k // group) * dtype.size
    return matrices * weights + rows * (n + k) * dtype.size
