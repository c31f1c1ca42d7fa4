"""QK-norm, RoPE and quantization of new key and value rows, in one pass over q, k and v."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel
from localllm.kernels_metal.reference import rope_kv as reference

HEADS_A_GROUP = 8  # heads, and so simdgroups, in a threadgroup

_INPUTS = ["q_weight", "k_weight", "cosines", "sines", "settings"]
_PLAIN = MetalKernel("rope_kv", ["q", "k", *_INPUTS], ["q_out", "k_out"])
_QUANTIZED = MetalKernel(
    "rope_kv_quantized",
    ["q", "k", "v", *_INPUTS],
    ["q_out", "k_codes", "k_scales", "k_biases", "v_codes", "v_scales", "v_biases"],
)


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm over each head. weight: [head_dim], float32 or the dtype of q; gain weight + offset.

    None: those heads are not normalized.
    """

    q_weight: mx.array | None
    k_weight: mx.array | None
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Angles:
    """cosines, sines: float32 [n, dim / 2], a row for each row of q, with the attention factor in.

    The first dim <= head_dim entries of a head turn, in pairs (2 i, 2 i + 1) if interleaved, else
    (i, i + dim / 2).
    """

    cosines: mx.array
    sines: mx.array
    interleaved: bool = False


@dataclass(frozen=True)
class KVRows:
    """Key or value rows as the pool keeps them.

    16 bits: values [n, kv_heads, head_dim] and no scales or biases. 8 or 4: values uint32 [n,
    kv_heads, head_dim * bits / 32], scales and biases [n, kv_heads, head_dim / group].
    """

    values: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None


def rope_kv(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    head_dim: int,
    *,
    norm: HeadNorm | None = None,
    angles: Angles | None = None,
    bits: int = 16,
) -> tuple[mx.array, KVRows, KVRows]:
    """(queries, key rows, value rows): q and k normalized per head, then rotated; k and v made
    ready for the pool.

    q: [n, heads * head_dim], k, v: [n, kv_heads * head_dim], of one dtype T: half, bfloat16 or
    float32. All is float32 until the result: queries, and 16-bit key rows, are rounded to T once;
    codes (MLX's affine quantization, groups of 32, or of 16 where head_dim % 32 != 0) are made
    from the float32 values, then scales and biases rounded to T. Queries: T [n, heads, head_dim].
    16-bit value rows are v itself. A row's bits depend on that row alone.

    Raises ValueError for other shapes, dtypes and bits.
    """
    _check(q, k, v, head_dim, norm, angles, bits)
    n, heads, kv_heads = q.shape[0], q.shape[1] // head_dim, k.shape[1] // head_dim
    plain = KVRows(v.reshape(n, kv_heads, head_dim))
    norm = norm or HeadNorm(None, None, 0.0)
    if bits == 16 and angles is None and norm.q_weight is None and norm.k_weight is None:
        return q.reshape(n, heads, head_dim), KVRows(k.reshape(n, kv_heads, head_dim)), plain

    unused = _unused()
    inputs = [
        unused if norm.q_weight is None else norm.q_weight,
        unused if norm.k_weight is None else norm.k_weight,
        unused if angles is None else angles.cosines,
        unused if angles is None else angles.sines,
        _settings(norm.eps, norm.offset),
    ]
    template: list[tuple[str, mx.Dtype | int | bool]] = [
        ("T", q.dtype),
        ("D", head_dim),
        ("DIM", 0 if angles is None else 2 * angles.cosines.shape[1]),
        ("INTERLEAVED", angles is not None and angles.interleaved),
        ("Q_NORM", norm.q_weight is not None),
        ("K_NORM", norm.k_weight is not None),
        ("HEADS_A_GROUP", HEADS_A_GROUP),
    ]
    queries = (n, heads, head_dim)
    if bits == 16:
        q_out, k_out = _PLAIN(
            Launch(
                inputs=[q, k, *inputs],
                grid=(32, heads + kv_heads, n),
                threadgroup=(32, HEADS_A_GROUP, 1),
                output_shapes=[queries, (n, kv_heads, head_dim)],
                output_dtypes=[q.dtype, q.dtype],
                template=template,
            )
        )
        return q_out, KVRows(k_out), plain
    group = reference.group_size(head_dim)
    codes, scales = (n, kv_heads, head_dim * bits // 32), (n, kv_heads, head_dim // group)
    outputs = _QUANTIZED(
        Launch(
            inputs=[q, k, v, *inputs],
            grid=(32, heads + 2 * kv_heads, n),
            threadgroup=(32, HEADS_A_GROUP, 1),
            output_shapes=[queries, codes, scales, scales, codes, scales, scales],
            output_dtypes=[q.dtype, *[mx.uint32, q.dtype, q.dtype] * 2],
            template=[*template, ("BITS", bits), ("GROUP", group)],
        )
    )
    return outputs[0], KVRows(*outputs[1:4]), KVRows(*outputs[4:7])


def _check(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    head_dim: int,
    norm: HeadNorm | None,
    angles: Angles | None,
    bits: int,
) -> None:
    if bits not in (16, 8, 4):
        raise ValueError(f"a KV cache has 16, 8 or 4 bits, not {bits}")
    step = 1 if bits == 16 else 16
    if not 16 <= head_dim <= 512 or head_dim % step:
        raise ValueError(f"heads of {head_dim} cannot be kept with {bits} bits")
    if q.dtype not in (mx.float16, mx.bfloat16, mx.float32):
        raise ValueError(f"half, bfloat16 or float32 is needed, not {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 2 or x.shape[0] != q.shape[0] or x.shape[1] % head_dim or x.size == 0:
            raise ValueError(f"{name} has the shape {x.shape}, not [n, heads * {head_dim}]")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k has the shape {k.shape} and v {v.shape}")
    for weight in () if norm is None else (norm.q_weight, norm.k_weight):
        if weight is not None and (
            weight.shape != (head_dim,) or weight.dtype not in (mx.float32, q.dtype)
        ):
            raise ValueError(f"the norm of heads of {head_dim} has a weight {weight.shape}")
    for table in () if angles is None else (angles.cosines, angles.sines):
        if (
            table.ndim != 2
            or table.shape[0] != q.shape[0]
            or not 0 < 2 * table.shape[1] <= head_dim
            or table.dtype != mx.float32
        ):
            raise ValueError(
                f"angles are float32 [n, dim / 2] with dim <= {head_dim}, "
                f"not {table.dtype} {table.shape}"
            )
    if angles is not None and angles.cosines.shape != angles.sines.shape:
        raise ValueError("there are not as many cosines as sines")


@lru_cache(maxsize=1)
def _unused() -> mx.array:
    """Stands for an input that the template leaves unread."""
    return mx.zeros(1, dtype=mx.float32)


@lru_cache(maxsize=64)
def _settings(eps: float, offset: float) -> mx.array:
    return mx.array([eps, offset], dtype=mx.float32)


_BASE = 10000.0


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """Heads as of Qwen3 8B: decode steps of one row and of eight, and a prefill chunk."""
    for bits in (16, 8):
        for rows in (1, 8, 256):
            yield contest(rows, 32, 8, 128, bits, dtype)


def kernel_name(bits: int) -> str:
    return "rope_kv" if bits == 16 else "rope_kv_quantized"


def work(rows: int, heads: int, kv_heads: int, head_dim: int, bits: int, dtype: mx.Dtype) -> str:
    """The entry of the dispatch table."""
    name = str(dtype).removeprefix("mlx.core.")
    return f"{rows} rows, {heads} + {kv_heads} heads of {head_dim}, {bits}-bit KV, {name}"


def contest(
    rows: int, heads: int, kv_heads: int, head_dim: int, bits: int, dtype: mx.Dtype
) -> Contest:
    """Random rows with norms and RoPE. MLX quantizes no groups of 16: heads that need them are
    measured at the next size that does not."""
    size = head_dim if bits == 16 else -(-head_dim // 32) * 32
    case = _Work.of(rows, heads, kv_heads, size, bits, dtype)
    return Contest(
        kernel=kernel_name(bits),
        work=work(rows, heads, kv_heads, head_dim, bits, dtype),
        ours=case.ours,
        mlx=case.mlx,
        truth=case.truth,
        # MLX finds its angles in float32, from positions up to 4000. Read back, quantized rows
        # may lie a step apart, as MLX rounds k to T before it quantizes.
        tolerance=4.0 * mx.finfo(dtype).eps + 4000 * 2.0**-24 + (0.0 if bits == 16 else 2 / 255),
        least_bytes=case.least_bytes(),
    )


@dataclass(frozen=True)
class _Work:
    """The same rows for us, for MLX and in float64; quantized rows are compared as they are read
    back, since codes of the other sign, from the other end, are as good."""

    q: mx.array
    k: mx.array
    v: mx.array
    norm: HeadNorm
    angles: Angles
    positions: mx.array
    head_dim: int
    bits: int

    @staticmethod
    def of(n: int, heads: int, kv_heads: int, head_dim: int, bits: int, dtype: mx.Dtype) -> _Work:
        random = np.random.default_rng(n)

        def rows(count: int) -> mx.array:
            values = random.standard_normal((n, count * head_dim), np.float32)
            return mx.array(values).astype(dtype)

        weights = [
            mx.array(1 + 0.1 * random.standard_normal(head_dim)).astype(dtype) for _ in range(2)
        ]
        # Decode rows stand at the ends of different texts, those of a chunk one after another.
        positions = 100 + (np.arange(n) if n > 8 else random.integers(0, 4000, n))
        turns = _BASE ** (-np.arange(0, head_dim, 2) / head_dim)
        phases = positions[:, None] * turns  # [n, head_dim / 2]
        return _Work(
            rows(heads),
            rows(kv_heads),
            rows(kv_heads),
            HeadNorm(weights[0], weights[1], 1e-6),
            Angles(
                mx.array(np.cos(phases).astype(np.float32)),
                mx.array(np.sin(phases).astype(np.float32)),
            ),
            mx.array(positions.astype(np.int32)),
            head_dim,
            bits,
        )

    def ours(self) -> list[mx.array]:
        q, k, v = rope_kv(
            self.q, self.k, self.v, self.head_dim,
            norm=self.norm, angles=self.angles, bits=self.bits,
        )  # fmt: skip
        return [q, *self._listed(k), *self._listed(v)]

    def mlx(self) -> list[mx.array]:
        heads = [x.reshape(x.shape[0], -1, self.head_dim) for x in (self.q, self.k, self.v)]
        assert self.norm.q_weight is not None
        assert self.norm.k_weight is not None
        q = self._rotated(mx.fast.rms_norm(heads[0], self.norm.q_weight, self.norm.eps))
        k = self._rotated(mx.fast.rms_norm(heads[1], self.norm.k_weight, self.norm.eps))
        return [q, *self._mlx_rows(k), *self._mlx_rows(heads[2])]

    def _rotated(self, x: mx.array) -> mx.array:
        """x: [n, heads, head_dim]."""
        turn = partial(mx.fast.rope, dims=self.head_dim, traditional=False, base=_BASE, scale=1.0)
        if x.shape[0] > 8:
            return turn(x.transpose(1, 0, 2)[None], offset=100)[0].transpose(1, 0, 2)
        return turn(x[:, :, None], offset=self.positions)[:, :, 0]

    def _mlx_rows(self, x: mx.array) -> list[mx.array]:
        if self.bits == 16:
            return [x]
        codes, scales, biases = mx.quantize(x, group_size=32, bits=self.bits)
        return self._listed(KVRows(codes, scales, biases))

    def _listed(self, rows: KVRows) -> list[mx.array]:
        if rows.scales is None or rows.biases is None:
            return [rows.values]
        return [mx.dequantize(rows.values, rows.scales, rows.biases, group_size=32, bits=self.bits)]

    def truth(self) -> list[np.ndarray]:
        def heads(x: mx.array) -> np.ndarray:
            return _wide(x).reshape(x.shape[0], -1, self.head_dim)

        def rows(x: np.ndarray) -> Sequence[np.ndarray]:
            if self.bits == 16:
                return [x]
            codes, scales, biases = reference.quantized(x, self.bits, 32)
            return [np.repeat(scales, 32, -1) * codes + np.repeat(biases, 32, -1)]

        tables = _wide(self.angles.cosines), _wide(self.angles.sines)
        turned = []
        for x, weight in ((self.q, self.norm.q_weight), (self.k, self.norm.k_weight)):
            assert weight is not None
            normed = reference.normed_heads(heads(x), _wide(weight), self.norm.eps, 0.0)
            turned.append(reference.rotated(normed, *tables, interleaved=False))
        return [turned[0], *rows(turned[1]), *rows(heads(self.v))]

    def least_bytes(self) -> int:
        read = self.q.nbytes + self.k.nbytes + self.angles.cosines.nbytes * 2
        read += 2 * self.head_dim * self.q.dtype.size
        if self.bits == 16:
            return read + self.q.nbytes + self.k.nbytes
        group = reference.group_size(self.head_dim)
        row_bytes = self.k.size * self.bits // 8 + 2 * self.k.size // group * self.k.dtype.size
        return read + self.v.nbytes + self.q.nbytes + 2 * row_bytes


def _wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)
