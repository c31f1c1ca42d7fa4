"""The emulator finds every fault of a list, and passes the same kernels made right."""

from __future__ import annotations

import pytest

from tests.examples import some
from tests.kernels_metal.planted import PLANTS, Plant, judge

each = pytest.mark.parametrize("plant", some(PLANTS, 6, lambda plant: plant.title))


@each
def test_a_planted_fault_is_found_and_told(plant: Plant) -> None:
    verdict = judge(plant)
    assert verdict.stage == plant.stage, verdict.message
    assert plant.says in verdict.message


@each
def test_the_mended_twin_passes(plant: Plant) -> None:
    verdict = judge(plant.mended())
    assert verdict.stage == "not caught", verdict.message


def test_there_are_enough_of_them() -> None:
    assert len({plant.title for plant in PLANTS}) == len(PLANTS) >= 50
