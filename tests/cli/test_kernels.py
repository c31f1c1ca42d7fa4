"""The table of Metal kernels that a Mac's owner sees and can send back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from localllm.cli.kernels import bench_kernels, show_verdicts
from localllm.errors import BackendUnavailable, InvalidRequest
from localllm.kernels_metal import device
from localllm.kernels_metal.contest import Contest
from localllm.measure import kernels as measured


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU with two kernels to measure: one right, one wrong. Returns the store."""

    def contests(**_: Any) -> Iterator[Contest]:
        for name, value in (("qmv", 2.0), ("lora", 3.0)):

            def ours(value: float = value) -> list[mx.array]:
                return [mx.array([value])]

            yield Contest(name, "1 row", ours, None, lambda: [np.array([2.0])], 1e-6, 8)

    monkeypatch.setattr(device, "is_available", lambda: True)
    monkeypatch.setattr(device, "info", lambda: {"device_name": "Apple M9"})
    monkeypatch.setattr(measured, "all_contests", contests)
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))
    return tmp_path


def test_without_a_gpu_nothing_is_timed_and_the_emulator_is_named() -> None:
    if device.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match="Apple GPU only") as error:
        bench_kernels(json_out=False, out=None)
    assert "kernels_metal.emulator" in (error.value.hint or "")


def test_what_was_measured_is_shown_kept_and_written_for_sending(
    mac: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_verdicts(json_out=False)
    assert "None has been measured here yet: `localllm bench --kernels`" in capsys.readouterr().out
    bench_kernels(json_out=False, out=mac / "report.json")
    said = capsys.readouterr()
    assert "used: MLX has no way of its own" in said.out
    assert "not used: wrong: error 5.0e-01" in said.out
    assert "report.json" in said.err
    report = json.loads((mac / "report.json").read_text())
    assert report["machine"]["chip"] == "Apple M9"
    assert [v["used"] for v in report["verdicts"]] == [True, False]
    show_verdicts(json_out=True)
    kept = json.loads(capsys.readouterr().out)
    assert kept["verdicts"] == report["verdicts"]
    show_verdicts(json_out=False)
    assert "lora" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_told_before_the_measuring(mac: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no folder"):
        bench_kernels(json_out=False, out=mac / "missing" / "report.json")
