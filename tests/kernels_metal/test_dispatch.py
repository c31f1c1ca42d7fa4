"""A kernel is used where it was checked and found faster, and nowhere else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal import dispatch
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.dispatch import Measured, Verdict, judge, signature

TRUTH = np.arange(1.0, 9.0)
Way = Callable[[], list[mx.array]]


def way(seconds: float = 0.0, error: float = 0.0) -> Way:
    def run() -> list[mx.array]:
        time.sleep(seconds)
        return [mx.array((TRUTH + error).astype(np.float32))]

    return run


def contest(ours: Way, mlx: Way | None, work: str = "1 row") -> Contest:
    return Contest("qmv", work, ours, mlx, lambda: [TRUTH], tolerance=1e-3, least_bytes=64)


def test_a_kernel_that_is_right_and_faster_is_used() -> None:
    verdict = judge(contest(way(), way(0.003)))
    assert verdict.used
    assert verdict.reason == "faster than MLX"
    assert verdict.ours_us is not None
    assert verdict.mlx_us is not None
    assert verdict.ours_us < verdict.mlx_us


def test_a_slower_kernel_is_not_used() -> None:
    verdict = judge(contest(way(0.003), way()))
    assert not verdict.used
    assert verdict.reason == "slower than MLX"


@pytest.mark.parametrize("error", [0.01, float("nan"), float("inf")])
def test_a_wrong_kernel_is_never_used_however_fast(error: float) -> None:
    verdict = judge(contest(way(error=error), way(0.003)))
    assert not verdict.used
    assert verdict.reason.startswith("wrong: error")
    assert verdict.ours_us is None  # it was not even timed
    json.dumps(verdict.error, allow_nan=False)


def test_an_error_within_the_tolerance_is_allowed() -> None:
    assert judge(contest(way(error=0.005), way(0.003))).used  # 0.005 / 8 < 1e-3


def test_a_result_of_another_shape_is_wrong() -> None:
    verdict = judge(contest(lambda: [mx.zeros((4,))], way(0.003)))
    assert not verdict.used
    assert verdict.reason.startswith("wrong")


def test_a_kernel_that_does_not_compile_is_not_used_and_the_verdict_says_why() -> None:
    def broken() -> list[mx.array]:
        raise RuntimeError("[metal::Device] unable to build: error: use of undeclared 'x'\nmore")

    verdict = judge(contest(broken, way()))
    assert not verdict.used
    assert "undeclared 'x'" in verdict.reason
    assert "more" not in verdict.reason


def test_where_mlx_has_no_way_a_right_kernel_is_used_and_a_wrong_one_not() -> None:
    assert judge(contest(way(), None)).used
    assert not judge(contest(way(error=1), None)).used


class Counted:
    """Makes a contest when asked, and counts how often."""

    def __init__(self, ours: Way, mlx: Way) -> None:
        self.made = 0
        self._ways = ours, mlx

    def __call__(self) -> Contest:
        self.made += 1
        return contest(*self._ways)


def test_a_verdict_is_kept_on_disk_and_not_measured_again(tmp_path: Path) -> None:
    faster = Counted(way(), way(0.003))
    assert Measured(tmp_path).uses("qmv", "1 row", faster)
    again = Measured(tmp_path)
    assert again.uses("qmv", "1 row", faster)
    assert faster.made == 1
    assert [v.used for v in again] == [True]
    other = Counted(way(0.003), way())
    assert not again.uses("qmv", "2 rows", other)
    assert other.made == 1


def test_another_chip_mlx_or_kernel_source_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = Counted(way(), way(0.003))
    Measured(tmp_path).uses("qmv", "1 row", faster)
    for name, value in (("sources_hash", "0123456789ab"), ("version", "9.9")):
        monkeypatch.setattr(dispatch, name, lambda *_, value=value: value)
        Measured(tmp_path).uses("qmv", "1 row", faster)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9 Max"})
    assert signature() == "apple-m9-max-mlx-9.9-0123456789ab"
    Measured(tmp_path).uses("qmv", "1 row", faster)
    assert faster.made == 4
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff", b"[]", b'{"verdicts": [{"kernel": 1}]}', b'{"verdicts": 3}']
)
def test_a_broken_file_is_measured_again_and_written_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{signature()}.json").write_bytes(content)
    faster = Counted(way(), way(0.003))
    assert Measured(tmp_path).uses("qmv", "1 row", faster)
    assert faster.made == 1
    assert [v.work for v in Measured(tmp_path)] == ["1 row"]


def test_a_folder_that_cannot_be_written_costs_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chooser = Measured(tmp_path / "file" / "below")
    faster = Counted(way(), way(0.003))
    assert chooser.uses("qmv", "1 row", faster)
    assert chooser.uses("qmv", "1 row", faster)
    assert faster.made == 1


def test_verdicts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MAX_VERDICTS", 3)
    chooser = Measured(tmp_path)
    for n in range(5):
        chooser.keep(Verdict("qmv", f"{n} rows", True, "faster than MLX"))
    assert [v.work for v in Measured(tmp_path)] == ["2 rows", "3 rows", "4 rows"]
