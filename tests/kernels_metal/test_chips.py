"""Public figures, cited, and an estimate that is the longer of two times."""

from __future__ import annotations

import pytest

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator.chips import CHIPS, Chip, estimate, find_chip


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_every_figure_names_its_source(chip: Chip) -> None:
    for figure in (chip.bandwidth, chip.tflops):
        assert figure.value > 0
        assert figure.source.startswith("https://")


def test_only_apple_is_official() -> None:
    assert CHIPS["m4-max"].bandwidth.official
    assert not CHIPS["m4-max"].tflops.official
    assert CHIPS["m1"].tflops.official
    assert not CHIPS["m1"].bandwidth.official


def test_memory_decides_where_operations_are_not_counted() -> None:
    found = estimate(CHIPS["m2"], moved=100_000_000)
    assert found.microseconds == pytest.approx(1000)  # 100 MB at 100 GB/s
    assert found.arithmetic is None
    assert found.bound_by == "memory"


def test_the_longer_of_the_two_decides() -> None:
    found = estimate(CHIPS["m2"], moved=100_000, operations=3_600_000_000)
    assert found.memory == pytest.approx(1)
    assert found.arithmetic == pytest.approx(1000)  # 3.6 G operations at 3.6 T/s
    assert (found.microseconds, found.bound_by) == (found.arithmetic, "arithmetic")


@pytest.mark.parametrize("name", ["m4-max", "M4 Max", "m4_max"])
def test_a_chip_is_found_by_any_spelling(name: str) -> None:
    assert find_chip(name).name == "M4 Max"


def test_an_unknown_chip_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(LocalLLMError, match="no chip is called 'm9'") as raised:
        find_chip("m9")
    assert "m5-max" in (raised.value.hint or "")
