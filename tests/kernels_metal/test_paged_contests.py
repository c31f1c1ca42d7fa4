"""The contests of paged attention: both sides do the same work, and ours moves little more than
the least."""

from __future__ import annotations

import mlx.core as mx
import pytest

from localllm.kernels_metal import paged_decode, paged_prefill
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.paged_contests import Shape
from tests.examples import some
from tests.kernels_metal.paged import error

CONTESTS = [
    paged_decode.contest(Shape("one split", 9, 3, 64, (255,)), mx.float16),
    paged_decode.contest(Shape("splits", 8, 2, 64, (700, 300)), mx.float16),
    paged_decode.contest(Shape("8 bits", 8, 2, 128, (700,), bits=8), mx.bfloat16),
    paged_decode.contest(Shape("4 bits", 8, 2, 128, (1200,), bits=4), mx.float16),
    paged_decode.contest(Shape("window", 16, 2, 64, (500,), window=128, sinks=True), mx.float16),
    paged_decode.contest(Shape("drafts", 8, 2, 64, (150, 90), rows=4), mx.float32),
    paged_prefill.contest(Shape("prompt", 9, 3, 64, (0,), 70), mx.float16),
    paged_prefill.contest(Shape("prefix", 4, 1, 128, (200,), 40), mx.bfloat16),
    paged_prefill.contest(Shape("8 bits", 4, 1, 128, (100,), 40, bits=8), mx.float16),
    paged_prefill.contest(Shape("4 bits", 4, 1, 64, (100, 100), 20, bits=4), mx.float32),
    paged_prefill.contest(
        Shape("window", 8, 1, 64, (150,), 32, window=128, sinks=True), mx.float16
    ),
]


@pytest.mark.parametrize("contest", some(CONTESTS, 3, lambda c: f"{c.kernel} {c.work}"))
def test_both_sides_do_the_same_and_ours_moves_little_more_than_the_least(contest: Contest) -> None:
    (truth,) = contest.truth()
    emulator = Emulator(strict=True)
    with executed_by(emulator):
        (ours,) = contest.ours()
    assert error(ours, truth) <= contest.tolerance
    assert contest.mlx is not None
    (theirs,) = contest.mlx()
    # MLX rounds to the dtype along the way, dequantized KV and weights included.
    assert error(theirs, truth) <= 4 * contest.tolerance
    moved = sum(dispatch.counters.moved for dispatch in emulator.dispatches)
    assert contest.least_bytes <= moved <= 1.05 * contest.least_bytes


@pytest.mark.parametrize("module", [paged_decode, paged_prefill])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_each_contest_has_a_name_of_its_own(module: object, dtype: mx.Dtype) -> None:
    names = [contest.work for contest in module.contests(dtype)]  # type: ignore[attr-defined]
    assert len(set(names)) == len(names) > 8
    assert all(str(dtype).rsplit(".", 1)[-1] in name for name in names)


def test_a_contest_without_a_way_of_mlx_says_so() -> None:
    capped = Shape("softcap", 8, 4, 256, (40,), softcap=50.0)
    assert paged_decode.contest(capped, mx.float16).mlx is None
    sixteen = Shape("groups of 16", 2, 2, 80, (40,), bits=8)
    assert paged_decode.contest(sixteen, mx.float16).mlx is None


def test_least_bytes_count_what_is_seen_once() -> None:
    shape = Shape("one head", 1, 1, 64, (99,), bits=4)
    per_position = 64 // 2 + 2 * 2 * 2  # codes, then scale and bias of two groups
    assert paged_decode.contest(shape, mx.float16).least_bytes == (
        2 * 100 * per_position + 2 * 64 * 2 + 4 * 4 + 4
    )
