"""QK-norm, RoPE and the quantization of new rows in one kernel, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.reference import rope_kv as reference
from localllm.kernels_metal.rope_kv import Angles, HeadNorm, KVRows, contests, rope_kv
from tests.examples import some
from tests.kernels_metal.lanes import ROUNDING, bits, in_every_order, wide

FLOAT = ROUNDING[mx.float32]
# In float32, relative to the largest value of a head: a sum of squares (at most 16 + 5 roundings,
# halved by the root), the root, three products, and a rotation by rounded products of two entries.
BEFORE_ROUNDING = 20 * FLOAT


@dataclass(frozen=True)
class Case:
    head_dim: int
    dim: int  # entries that turn; 0: no RoPE
    bits: int
    heads: tuple[int, int] = (3, 2)
    rows: int = 2
    interleaved: bool = False
    q_norm: bool = False
    k_norm: bool = False
    offset: float = 0.0

    def __str__(self) -> str:
        return f"{self.head_dim}-{self.dim}-{self.bits}"


CASES = [
    Case(128, 128, 8, heads=(9, 2), rows=1, q_norm=True, k_norm=True),
    Case(64, 24, 4, interleaved=True),
    Case(80, 80, 4, rows=3, q_norm=True, k_norm=True, offset=1.0),
    Case(256, 0, 8, heads=(1, 1), k_norm=True),
    Case(96, 96, 16, rows=3, k_norm=True, offset=1.0),
    Case(72, 4, 16, heads=(5, 3), rows=1, interleaved=True, q_norm=True),
]


class Inputs:
    def __init__(self, case: Case, dtype: mx.Dtype) -> None:
        self.case, self.random = case, np.random.default_rng(case.head_dim)
        q_heads, kv_heads = case.heads
        self.q, self.k, self.v = (
            mx.array(self.random.standard_normal((case.rows, heads * case.head_dim)) * 3).astype(
                dtype
            )
            for heads in (q_heads, kv_heads, kv_heads)
        )
        self.norm = HeadNorm(
            self._weight(dtype) if case.q_norm else None,
            self._weight(mx.float32) if case.k_norm else None,
            1e-6,
            case.offset,
        )
        phases = self.random.uniform(-4, 4, (case.rows, case.dim // 2))
        self.angles = None
        if case.dim:
            cos, sin = (mx.array(turn(phases).astype(np.float32)) for turn in (np.cos, np.sin))
            self.angles = Angles(cos, sin, case.interleaved)

    def _weight(self, dtype: mx.Dtype) -> mx.array:
        values = 1 - self.case.offset + 0.2 * self.random.standard_normal(self.case.head_dim)
        return mx.array(values.astype(np.float32)).astype(dtype)

    def run(self, rows: slice = slice(None)) -> tuple[mx.array, KVRows, KVRows]:
        angles = self.angles
        if angles is not None:
            angles = Angles(angles.cosines[rows], angles.sines[rows], angles.interleaved)
        return rope_kv(
            self.q[rows], self.k[rows], self.v[rows], self.case.head_dim,
            norm=self.norm, angles=angles, bits=self.case.bits,
        )  # fmt: skip

    def truth(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values before quantization, float64 [n, heads, head_dim]."""
        weights = (self.norm.q_weight, self.norm.k_weight, None)
        found = []
        for x, weight in zip((self.q, self.k, self.v), weights, strict=True):
            heads = wide(x).reshape(self.case.rows, -1, self.case.head_dim)
            if weight is not None:
                heads = reference.normed_heads(heads, wide(weight), 1e-6, self.case.offset)
            if self.angles is not None and x is not self.v:
                tables = wide(self.angles.cosines), wide(self.angles.sines)
                heads = reference.rotated(heads, *tables, interleaved=self.case.interleaved)
            found.append(heads)
        return found[0], found[1], found[2]


def listed(rows: KVRows) -> list[mx.array]:
    return [part for part in (rows.values, rows.scales, rows.biases) if part is not None]


def flat(result: tuple[mx.array, KVRows, KVRows]) -> list[mx.array]:
    return [result[0], *listed(result[1]), *listed(result[2])]


def assert_rounded(got: mx.array, truth: np.ndarray, error: np.ndarray) -> None:
    """error: float64 [n, heads, 1], before the result is rounded to its dtype."""
    allowed = ROUNDING[got.dtype] * np.abs(truth) + error + 2.0**-25
    assert np.max(np.abs(wide(got) - truth) / allowed) <= 1.0


def assert_quantized(
    words: mx.array, scales: mx.array, biases: mx.array, truth: np.ndarray,
    error: np.ndarray, bits: int,
) -> None:  # fmt: skip
    """Codes are those of the reference, but for ties; every value is read back to half a step."""
    group = reference.group_size(truth.shape[-1])
    codes = reference.unpacked(np.array(words), bits)
    assert codes.shape == truth.shape
    expected, scale, bias = reference.quantized(truth, bits, group)

    groups = truth.reshape(*truth.shape[:2], -1, group)
    least, most = groups.min(-1), groups.max(-1)
    edge, step = np.where(-least > most, least, most), (most - least) / (2**bits - 1)
    # Where both ends are as far from 0, or the farther end lies between two steps, either choice
    # gives codes of its own.
    steps = np.abs(edge) / step
    tied_ends = np.abs(np.abs(least) - np.abs(most)) <= 2 * error
    tied_steps = np.abs(steps % 1 - 0.5) <= steps * (4 * error / step / (2**bits - 1) + 8 * FLOAT)
    clear = np.repeat(~(tied_ends | tied_steps), group, -1)
    assert clear.mean() > 0.5  # else this would show little

    # A code moves by one where the value lies halfway, to within what float32 lost.
    wide_scale, wide_bias = np.repeat(scale, group, -1), np.repeat(bias, group, -1)
    place = (truth - wide_bias) / wide_scale
    lost = 3 * error / np.abs(wide_scale) + 2**bits * 8 * FLOAT
    halfway = np.abs(place - np.floor(place) - 0.5) <= lost
    apart = np.abs(codes.astype(np.int64) - expected)
    assert np.all(apart[clear & ~halfway] == 0)
    assert np.all(apart[clear & halfway] <= 1)

    unit, clear_groups = ROUNDING[scales.dtype], clear[..., ::group]
    relative = unit + 4 * error / np.abs(edge) + 8 * FLOAT
    for got, true in ((scales, scale), (biases, bias)):
        off = np.abs(wide(got) - true) <= relative * np.abs(true) + 2.0**-25
        assert np.all(off[clear_groups])

    # Whatever was tied, to half a step, the error before, and scale and bias rounded to T. As the
    # steps to one end are made whole, all codes together may fall short of the range by one step.
    read = np.repeat(wide(scales), group, -1) * codes + np.repeat(wide(biases), group, -1)
    largest, wide_step = np.repeat(np.abs(edge), group, -1), np.repeat(step, group, -1)
    rounding = unit * (2**bits * wide_step * 1.1 + largest) + 2.0**-24 * 2**bits
    assert np.all(np.abs(read - truth) <= wide_step + 4 * error + rounding)
    assert np.median(np.abs(read - truth) / (0.54 * wide_step + 4 * error + rounding)) <= 1.0


EVERY_HEAD_SIZE = [
    Case(head_dim, dim, bits, interleaved=interleaved, q_norm=normed, k_norm=normed, rows=5)
    for head_dim in (64, 80, 96, 112, 128, 192, 256)
    for dim, interleaved, normed in ((head_dim, False, True), (head_dim // 2, True, False))
    for bits in (16, 8, 4)
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("case", EVERY_HEAD_SIZE, ids=str)
def test_every_head_size(case: Case, dtype: mx.Dtype) -> None:
    test_new_rows_are_made_ready(case, dtype)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("case", some(CASES, 3))
def test_new_rows_are_made_ready(case: Case, dtype: mx.Dtype) -> None:
    inputs = Inputs(case, dtype)
    q, *kv = in_every_order(lambda: flat(inputs.run()))
    q_truth, k_truth, v_truth = inputs.truth()
    errors = [
        BEFORE_ROUNDING * np.abs(truth).max(-1, keepdims=True) * 1.5 for truth in (q_truth, k_truth)
    ]
    assert_rounded(q, q_truth, errors[0])
    if case.bits == 16:
        assert_rounded(kv[0], k_truth, errors[1])
        assert bits(kv[1]) == bits(inputs.v)
    else:
        assert_quantized(kv[0], kv[1], kv[2], k_truth, errors[1], case.bits)
        assert_quantized(kv[3], kv[4], kv[5], v_truth, np.zeros_like(errors[1]), case.bits)


def test_values_are_quantized_as_mlx_does() -> None:
    inputs = Inputs(CASES[0], mx.float16)
    with executed_by(Emulator()):
        _, _, rows = inputs.run()
    heads = inputs.v.reshape(1, 2, 128)
    # The stream of MLX's CPU backend, which shares this rounding of ties.
    expected = mx.quantize(heads, group_size=32, bits=8, stream=mx.cpu)
    assert [bits(got) for got in listed(rows)] == [bits(array) for array in expected]


def test_a_group_of_one_value_is_kept() -> None:
    case = Case(32, 0, 4, heads=(1, 1), rows=1)
    inputs = Inputs(case, mx.float32)
    for value in (0.0, 1.5, -2.0):
        inputs.v = mx.full((1, 32), value)
        with executed_by(Emulator()):
            _, _, rows = inputs.run()
        words, scales, biases = (np.array(part) for part in listed(rows))
        read = scales * reference.unpacked(words, 4) + biases
        assert np.all(np.abs(read - value) <= 1e-6)


@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_a_row_does_not_depend_on_the_others(case: Case) -> None:
    inputs = Inputs(case, mx.bfloat16)
    with executed_by(Emulator()):
        together, alone = flat(inputs.run()), flat(inputs.run(slice(1, 2)))
    assert [bits(part[1:2]) for part in together] == [bits(part) for part in alone]


def test_rows_that_need_nothing_are_passed_on() -> None:
    x = mx.ones((2, 128), mx.float16)
    q, k, v = rope_kv(x, x, x, 64)  # no kernel runs: neither GPU nor emulator is at hand
    assert q.shape == k.values.shape == v.values.shape == (2, 2, 64)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    x = mx.ones((2, 144))
    with pytest.raises(ValueError, match="4 bits, not 3"):
        rope_kv(x, x, x, 48, bits=3)
    with pytest.raises(ValueError, match="heads of 72 cannot be kept with 8 bits"):
        rope_kv(x, x, x, 72, bits=8)
    with pytest.raises(ValueError, match="k has the shape"):
        rope_kv(x, x, x[:, :72], 72)
    with pytest.raises(ValueError, match="dim <= 72"):
        rope_kv(x, x, x, 72, angles=Angles(mx.ones((2, 37)), mx.ones((2, 37))))


def test_mlx_and_the_kernel_agree_where_they_compete() -> None:
    for contest in contests(mx.float16):
        if contest.work.startswith("8 rows"):
            assert contest.mlx is not None
            with executed_by(Emulator()):
                ours = contest.ours()
            for outputs in (ours, contest.mlx()):
                for got, truth in zip(outputs, contest.truth(), strict=True):
                    largest = np.abs(truth).max()
                    assert np.abs(wide(got) - truth).max() <= contest.tolerance * largest


def test_little_more_moves_than_must() -> None:
    for contest in contests(mx.float16):
        if contest.work.startswith("256 rows"):
            continue  # long to run, and no other case
        emulator = Emulator()
        with executed_by(emulator):
            contest.ours()
        (dispatch,) = emulator.dispatches
        assert contest.least_bytes <= dispatch.counters.moved <= 1.05 * contest.least_bytes
