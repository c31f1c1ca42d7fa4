"""python -m localllm.kernels_metal.emulator, as a user drives it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from localllm.kernels_metal.emulator import plain
from localllm.kernels_metal.emulator.command import FAULT, OK, USAGE, main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux")

PACKAGE = Path(plain.__file__).parent.parent
SOURCE = """
#include <metal_stdlib>
#include "shared.h"
using namespace metal;
kernel void add(device const float* a, device const float* b, device float* out,
                constant uint& n, uint i [[thread_position_in_grid]]) {
  if (i < n) out[i] = plus(a[i], b[i]);
}
template <typename T, int N>
[[kernel]] void scale(const device T* x, device T* y, uint i [[thread_position_in_grid]]) {
  y[i] = x[i] * T(N);
}
"""
SHARED = "inline float plus(float a, float b) { return a + b; }\n"
REVERSE = """
#include <metal_stdlib>
using namespace metal;
kernel void reverse(device const float* a, device float* out,
                    uint i [[thread_position_in_threadgroup]]) {
  threadgroup float kept[64];
  kept[i] = a[i];
  BARRIER
  out[i] = kept[63 - i];
}
"""
RUN = ["--kernel", "add", "--grid", "100", "1", "1", "--threadgroup", "64", "1", "1"]
BUFFERS = ["--buffer", "a=100:ones", "b=100:arange", "out=100", "n=100"]


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "shared.h").write_text(SHARED)
    (tmp_path / "two.metal").write_text(SOURCE)
    return str(tmp_path / "two.metal")


def reverse(tmp_path: Path, barrier: str) -> list[str]:
    file = tmp_path / "reverse.metal"
    file.write_text(REVERSE.replace("BARRIER", barrier))
    sizes = ["--grid", "64", "1", "1", "--threadgroup", "64", "1", "1"]
    return [str(file), *sizes, "--buffer", "a=64:arange", "out=64", "--orders"]


def test_without_a_grid_the_types_are_checked(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([source]) == OK
    out = capsys.readouterr().out
    assert "types are right: add" in out
    assert "not checked: scale is a template" in out
    assert main([source, "--kernel", "scale", "--template", "T=half", "N=4"]) == OK


def test_a_run_is_reported(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "out.npy"
    assert main([source, *RUN, *BUFFERS, "--save", f"out={saved}", "--chip", "m4-max"]) == OK
    out = capsys.readouterr().out
    assert "no fault found" in out
    assert "estimate for M4 Max" in out
    assert "not a measurement" in out
    assert np.load(saved).tolist() == list(range(1, 101))


def test_a_run_is_reported_as_json(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([source, *RUN, *BUFFERS, "--json", "--chip", "m1", "m2", "--orders"]) == OK
    report = json.loads(capsys.readouterr().out)
    assert report["orders"] == ["forward", "reverse", "random"]
    assert report["least_bytes"] == 3 * 400 + 4
    assert report["counters"]["moved"] >= report["least_bytes"]
    assert [each["chip"] for each in report["estimates"]] == ["M1", "M2"]
    assert report["buffers"][2]["first"] == [1, 2, 3, 4]


def test_reading_past_a_buffer_is_a_fault(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = [text.replace("b=100:arange", "b=96:arange") for text in BUFFERS]
    assert main([source, *RUN, *short]) == FAULT
    assert "load from buffer `b` (384 bytes): 0 bytes past its end" in capsys.readouterr().err


def test_a_missing_barrier_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(reverse(tmp_path, "")) == FAULT
    assert capsys.readouterr().err.startswith("fault: ")
    assert main(reverse(tmp_path, "threadgroup_barrier(mem_flags::mem_threadgroup);")) == OK


def test_a_source_that_does_not_compile_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.metal"
    file.write_text("#include <metal_stdlib>\nkernel void bad(device float* out) { out[0] = x; }")
    assert main([str(file)]) == FAULT
    assert "x" in capsys.readouterr().err
    assert main([str(file), "--json"]) == FAULT
    assert "fault" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no file"),
        (["/nowhere.metal"], "No such file"),
        (["FILE", "--kernel", "no"], "no kernel is called no"),
        (["FILE", "--kernel", "scale"], "--template needs T, N"),
        (["FILE", "--kernel", "scale", "--template", "Q=1"], "there is no Q"),
        (["FILE", "--kernel", "add", "--constant", "c=1"], "there is no c"),
        (["FILE", *RUN], "needs a --buffer for: a, b, out, n"),
        (["FILE", *RUN[:6]], "--grid needs --threadgroup"),
        (["FILE", *RUN, *BUFFERS, "--grid", "0", "1", "1"], "every size must be at least 1"),
        (["FILE", *RUN, *BUFFERS, "--chip", "m9"], "no chip is called 'm9'"),
        (["FILE", *RUN, *BUFFERS, "--save", "nothing=x.npy"], "there is no nothing"),
        (["FILE", "--kernel", "add", "--orders"], "--orders needs --grid"),
    ],
)
def test_bad_usage_is_named(
    arguments: list[str], message: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [source if argument == "FILE" else argument for argument in arguments]
    assert main(given) == USAGE
    assert message in capsys.readouterr().err


def test_options_that_argparse_refuses_are_bad_usage(source: str) -> None:
    assert main([source, "--grid", "1"]) == USAGE


def test_a_source_of_the_package_runs_with_its_contests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(PACKAGE / "rms_norm.metal"), "--orders", "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found
    assert all(each["right"] and each["moved"] >= each["least_bytes"] for each in found)


def test_a_part_of_another_source_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(PACKAGE / "rms_rows.metal")]) == USAGE
    assert "part of another kernel" in capsys.readouterr().err
    assert main([str(PACKAGE / "rms_norm.metal"), "--grid", "1", "1", "1"]) == USAGE
    assert "runs with its own contests" in capsys.readouterr().err


def test_the_chips_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--chips"]) == OK
    out = capsys.readouterr().out
    assert "M5 Ultra" in out
    assert "not stated by Apple" in out
