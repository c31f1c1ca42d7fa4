"""A process that fills everything takes what was planned."""

from __future__ import annotations

import sys

import pytest

from benchmarks.fill_memory import fill


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to tell the peak")
@pytest.mark.parametrize("bits", [16, 4])
def test_a_filled_process_takes_what_was_planned_within_5_percent(smollm2, bits):
    pytest.importorskip("localllm.kernels_cpu._native")
    found = fill(
        model=str(smollm2), context=1024, kv_tokens=2048, max_batch=4, kv_bits=bits, backend="cpu"
    )
    assert found["unused"] == [0]
    assert found["planned"] == pytest.approx(found["grown"], rel=0.05)
