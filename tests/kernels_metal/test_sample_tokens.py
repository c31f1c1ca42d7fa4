"""Sampling by the kernel against float64: filters, ties, draws, broken rows, in every lane order.

Away from ties the token must be that of the reference. Near them, where float32 exponentials may
tip the balance, it may be that of the reference with top_p, min_p or the uniform number moved by
`SLACK` either way, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.reference.sample_tokens import Sampled, sample_row
from localllm.kernels_metal.sample_tokens import Settings, contests, sample_tokens
from localllm.sampling import processors
from tests.examples import some
from tests.kernels_metal.lanes import ROUNDING, bits, in_every_order, wide

# A logit over the temperature is rounded twice in float32. At 30 below the likeliest, where a
# probability is the last unit of mass, that moves the probability by 30 * 2 * 2^-24 = 3.6e-6.
SLACK = 4e-6


@dataclass(frozen=True)
class Row:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5

    def reference(self, logits: np.ndarray) -> Sampled:
        return sample_row(
            logits, _single(self.temperature), self.top_k, _single(self.top_p),
            _single(self.min_p), _single(self.uniform),
        )  # fmt: skip

    def allowed(self, logits: np.ndarray) -> list[Sampled]:
        """The reference's answer, first, and those a little to each side."""
        found = [self.reference(logits)]
        for p, m, u in product((-SLACK, SLACK), repeat=3):
            top_p = self.top_p if self.top_p == 1.0 else max(self.top_p + p, 0.0)
            min_p = min(self.min_p * (1 + m), 1.0)
            uniform = max(self.uniform + u, 0.0)
            moved = replace(self, top_p=top_p, min_p=min_p, uniform=uniform)
            found.append(moved.reference(logits))
        return found


def _single(x: float) -> float:
    return float(np.float32(x))


def arrays(rows: list[Row]) -> tuple[Settings, mx.array]:
    def column(name: str, dtype: mx.Dtype) -> mx.array:
        return mx.array([getattr(row, name) for row in rows], dtype=dtype)

    single = mx.float32
    return Settings(
        column("temperature", single),
        column("top_k", mx.int32),
        column("top_p", single),
        column("min_p", single),
    ), column("uniform", single)


def run(logits: mx.array, rows: list[Row]) -> list[mx.array]:
    return list(sample_tokens(logits, *arrays(rows)))


def once(logits: mx.array, rows: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with executed_by(Emulator()):
        token, logprob, kept = (np.array(output) for output in run(logits, rows))
    return token, logprob, kept


def assert_sampled(logits: mx.array, rows: list[Row], outputs: list[mx.array]) -> int:
    """Returns in how many rows only one answer is allowed."""
    clear = 0
    for values, row, token, logprob, kept in zip(
        wide(logits), rows, *(np.array(output).tolist() for output in outputs), strict=True
    ):
        allowed = row.allowed(values)
        assert token in {answer.token for answer in allowed}, row
        sizes = [len(answer.kept) for answer in allowed]
        assert min(sizes) <= kept <= max(sizes), row
        same = [a for a in allowed if a.token == token and len(a.kept) == kept]
        # The sum of the probabilities is as exact as each; then a logarithm and a difference.
        assert any(abs(logprob - a.logprob) <= 2 * SLACK * (1 + abs(a.logprob)) for a in same), row
        clear += len({answer.token for answer in allowed}) == 1
    return clear


ROWS = [
    Row(),
    Row(temperature=0.0),
    Row(temperature=0.7, top_k=20, top_p=0.95, uniform=0.93),
    Row(temperature=1.5, top_k=40, min_p=0.05, uniform=0.0),
    Row(top_k=1, uniform=0.999),
    Row(top_p=0.9, uniform=0.2),
    Row(temperature=2.0, top_p=0.6, min_p=0.01, uniform=0.7),
    Row(min_p=0.1, uniform=0.4),
    Row(top_k=300, top_p=0.8, uniform=0.6),
    Row(temperature=5.0, top_k=700, uniform=0.99999),
    Row(top_p=0.0, uniform=0.9),
    Row(temperature=1e-4, top_p=0.99, uniform=0.3),
    Row(temperature=1e4, uniform=0.55),
    Row(top_k=10**9, min_p=1.0, uniform=0.1),
]


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("vocabulary", some([777, 8, 5003], 3))
def test_a_token_is_drawn_from_what_the_filters_leave(vocabulary: int, dtype: mx.Dtype) -> None:
    random = np.random.default_rng(vocabulary)
    values = random.standard_normal((len(ROWS), vocabulary)).astype(np.float32) * 3
    values[:, random.integers(0, vocabulary, vocabulary // 5)] = -np.inf  # banned
    logits = mx.array(values).astype(dtype)
    outputs = in_every_order(lambda: run(logits, ROWS))
    assert assert_sampled(logits, ROWS, outputs) >= len(ROWS) - 3


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_ties_at_a_border_are_broken_by_the_lower_token(dtype: mx.Dtype) -> None:
    random = np.random.default_rng(3)
    # Few distinct values, both zeros among them, so that every border falls among equals.
    values = random.integers(-2, 3, 1500).astype(np.float32) * random.choice([1.0, 0.0, -0.0], 1500)
    logits = mx.array(np.tile(values, (24, 1))).astype(dtype)
    rows = [
        Row(temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
        for temperature, uniform in ((1.0, 0.01), (0.5, 0.5), (3.0, 0.97))
        for top_k, top_p in product((0, 7, 255, 900), (1.0, 0.61))
    ]
    outputs = in_every_order(lambda: run(logits, rows))
    assert assert_sampled(logits, rows, outputs) >= 20
    for row, kept in zip(rows, np.array(outputs[2]).tolist(), strict=True):
        shifted = wide(logits[0]) - wide(logits[0]).max()
        ids = processors.candidates(shifted / row.temperature, row.top_k, _single(row.top_p), 0.0)
        assert kept == len(ids)


@pytest.mark.parametrize("top_k", some([3, 250, 0, 1900], 2))
def test_every_token_is_drawn_as_often_as_it_should_be(top_k: int) -> None:
    random = np.random.default_rng(top_k)
    # In steps of a quarter, so that the last tokens kept are some of many equals, which a
    # stretch of the row holds in several rounds of 32.
    values = mx.array(np.round(random.standard_normal(5000) * 4).astype(np.float32) / 4)
    rows = [Row(top_k=top_k, top_p=0.9, uniform=(u + 0.5) / 100) for u in range(100)]
    token, _, _ = once(mx.tile(values[None], (100, 1)), rows)
    expected = [row.reference(wide(values)).token for row in rows]
    assert np.count_nonzero(token != expected) <= 1  # as near as that to a border hardly any falls
    assert np.all(np.diff(token) >= 0)


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    values = np.full((3, 2000), -1.0, np.float32)
    values[0, [1999, 513, 700]] = 2.0
    values[1] = -5.0
    values[2, :] = -np.inf
    values[2, [40, 1030]] = -0.0, 0.0
    rows = [Row(temperature=0.0, uniform=0.99)] * 3
    for dtype in ROUNDING:
        outputs = in_every_order(lambda dtype=dtype: run(mx.array(values).astype(dtype), rows))
        token, logprob, kept = (np.array(output) for output in outputs)
        assert token.tolist() == [513, 0, 40]
        assert logprob.tolist() == [0, 0, 0]
        assert kept.tolist() == [1, 1, 1]


@pytest.mark.parametrize("row", [Row(), Row(temperature=0.0), Row(top_k=5, top_p=0.9)], ids=str)
def test_a_broken_row_gives_no_token(row: Row) -> None:
    values = np.zeros((5, 600), np.float32)
    values[0, 599] = np.nan
    values[1, 3] = -np.nan
    values[2, 100] = np.inf
    values[3] = -np.inf
    for dtype in ROUNDING:
        token, logprob, kept = once(mx.array(values).astype(dtype), [row] * 5)
        assert token.tolist()[:4] == [-1] * 4
        assert np.isnan(logprob[:4]).all()
        assert kept.tolist()[:4] == [0] * 4
        assert token[4] >= 0


def test_more_candidates_than_fit_take_the_other_way() -> None:
    # The greatest all belong to one thread, so that the 200th greatest maximum says little.
    values = np.random.default_rng(5).standard_normal((2, 512 * 600)).astype(np.float32)
    values[:, 7::512] += 20
    rows = [Row(top_k=200, uniform=0.5), Row(top_k=256, top_p=0.7, temperature=3.0, uniform=0.9)]
    logits = mx.array(values)
    assert_sampled(logits, rows, [mx.array(output) for output in once(logits, rows)])


def test_a_vocabulary_of_few_tokens() -> None:
    logits = mx.array([[0.5, 1.5, -0.5]])
    rows = [Row(uniform=0.2)]
    assert assert_sampled(logits, rows, [mx.array(o) for o in once(logits, rows)]) == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: mx.Dtype) -> None:
    values = np.random.default_rng(8).standard_normal((len(ROWS), 900)).astype(np.float32)
    logits = mx.array(values).astype(dtype)
    with executed_by(Emulator()):
        together = run(logits, ROWS)
        for r in (2, 5, 9):
            alone = run(logits[r : r + 1], [ROWS[r]])
            assert [bits(a[r : r + 1]) for a in together] == [bits(a) for a in alone]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    temperature=st.floats(0.05, 4.0),
    top_k=st.sampled_from([0, 2, 50, 256, 257, 800]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_whatever_the_settings(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float,
    dtype: mx.Dtype,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    logits = mx.array(random.standard_normal((4, 1111)).astype(np.float32) * spread).astype(dtype)
    rows = [
        Row(temperature, top_k, top_p, min_p, float(np.float32(random.random()) * 0.999))
        for _ in range(4)
    ]
    assert_sampled(logits, rows, [mx.array(output) for output in once(logits, rows)])


@pytest.mark.slow
@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.integers(1, 200_000),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    row=st.builds(
        Row,
        temperature=st.floats(0.02, 10.0),
        top_k=st.integers(0, 2000),
        top_p=st.floats(0.0, 1.0),
        min_p=st.floats(0.0, 1.0),
        uniform=st.floats(0.0, 1.0 - 2.0**-24, width=32),
    ),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_whatever_the_vocabulary(
    seed: int, vocabulary: int, spread: float, row: Row, dtype: mx.Dtype
) -> None:
    values = np.random.default_rng(seed).standard_normal((1, vocabulary)).astype(np.float32)
    logits = mx.array(values * spread).astype(dtype)
    assert_sampled(logits, [row], [mx.array(output) for output in once(logits, [row])])


def test_what_the_kernel_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="V <= 2\\^19"):
        run(mx.zeros((1, 2**19 + 1)), [Row()])
    with pytest.raises(ValueError, match=r"temperature must be .* \[2\]"):
        run(mx.zeros((2, 100)), [Row()])


def test_mlx_and_the_kernel_agree_where_they_compete() -> None:
    for contest in contests(mx.float16):
        assert contest.mlx is not None
        with executed_by(Emulator()):
            ours = contest.ours()
        for outputs in (ours, contest.mlx()):
            for got, truth in zip(outputs, contest.truth(), strict=True):
                assert np.abs(wide(got) - truth).max() <= contest.tolerance * np.abs(truth).max()


def test_a_whole_vocabulary_in_every_order() -> None:
    some = [contest for contest in contests(mx.bfloat16) if contest.work.startswith("1 x")]
    assert len(some) == 3
    for contest in some:
        in_every_order(contest.ours)


def test_little_more_moves_than_must() -> None:
    for contest in list(contests(mx.float16))[:3]:
        emulator = Emulator()
        with executed_by(emulator):
            contest.ours()
        (dispatch,) = emulator.dispatches
        assert contest.least_bytes <= dispatch.counters.moved <= 1.05 * contest.least_bytes
