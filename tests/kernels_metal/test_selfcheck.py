"""Kernels that ship with MLX come out right in the emulator, and the check would notice if not."""

from __future__ import annotations

import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.emulator import mlx_sources as sources
from localllm.kernels_metal.emulator.mlx_kernels import MlxRun
from localllm.kernels_metal.emulator.selfcheck import Case, all_cases, check
from tests.examples import some

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")

CASES = all_cases()


@pytest.mark.parametrize("case", some(CASES, 3, lambda case: f"{case.kernel}: {case.work}"))
def test_a_shipped_kernel_matches_float64(case: Case) -> None:
    outcome = check(Emulator(), case)
    if outcome.missing:
        pytest.skip(outcome.problem or "")
    assert outcome.problem is None
    assert outcome.passed, f"error {outcome.error:.2e}, allowed {outcome.tolerance:.2e}"


SOFTMAX = next(case for case in CASES if case.kernel == "softmax_single_row")


def with_truth(change: np.ufunc, by: float) -> Case:
    def run(emulator: Emulator) -> tuple[MlxRun, np.ndarray]:
        found, truth = SOFTMAX.run(emulator)
        return found, change(truth, by)

    return replace(SOFTMAX, run=run)


@pytest.mark.parametrize("by", [1.002, -1.0])
def test_a_wrong_result_fails(by: float) -> None:
    assert not check(Emulator(), with_truth(np.multiply, by)).passed


def test_a_result_that_is_not_a_number_fails() -> None:
    def run(emulator: Emulator) -> tuple[MlxRun, np.ndarray]:
        found, truth = SOFTMAX.run(emulator)
        return MlxRun(found.output * mx.nan, found.runs), truth

    outcome = check(Emulator(), replace(SOFTMAX, run=run))
    assert outcome.error == np.inf
    assert not outcome.passed


def test_another_kernel_than_the_one_meant_fails() -> None:
    outcome = check(Emulator(), replace(SOFTMAX, kernel="softmax_looped"))
    assert outcome.problem == "softmax_single_row ran instead"
    assert not outcome.passed


def test_an_mlx_without_the_source_is_told_and_not_blamed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    sources.shipped_source.cache_clear()
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    try:
        outcome = check(Emulator(), SOFTMAX)
    finally:
        sources.shipped_source.cache_clear()
    assert outcome.missing
    assert "ships no softmax.h" in (outcome.problem or "")


def test_an_mlx_whose_source_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = "[[kernel]] void softmax_single_row(device half* out) { gone(); }"
    monkeypatch.setattr(
        "localllm.kernels_metal.emulator.mlx_kernels.shipped_source", lambda *files: changed
    )
    outcome = check(Emulator(), SOFTMAX)
    assert not outcome.missing
    assert f"MLX {sources.mlx_version()}" in (outcome.problem or "")


def test_every_edit_for_clang_still_has_its_text() -> None:
    """Not a fault of MLX if it fails: then the list of edits has something to drop or to change."""
    assert sources.unused_edits() == []
