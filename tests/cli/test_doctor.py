"""`localllm doctor`: it tells what is here, and fails only where something essential is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from localllm.backend import select
from localllm.backend.select import BackendStatus
from localllm.cli import diagnosis
from localllm.cli.doctor import doctor
from localllm.machine import Cores, Memory


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "store"
    monkeypatch.setenv("LOCALLLM_HOME", str(home))
    monkeypatch.delenv("LOCALLLM_NO_PACKED_CACHE", raising=False)
    return home


def report(capsys: pytest.CaptureFixture[str], fails: bool = False) -> dict[str, Any]:
    if fails:
        with pytest.raises(typer.Exit) as end:
            doctor(json=True)
        assert end.value.exit_code == 1
    else:
        doctor(json=True)
    parsed = json.loads(capsys.readouterr().out)
    assert isinstance(parsed, dict)
    return parsed


def test_a_sound_machine_has_no_problems(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    found = report(capsys)
    assert found["problems"] == []
    assert found["python"]["executable"] == sys.executable
    assert found["processor"]["cores"]["usable"] >= 1
    assert found["memory"]["available"] > 0
    assert found["mlx"]["device"] in ("cpu", "gpu")
    assert found["backends"]["chosen"] in [entry["name"] for entry in found["backends"]["all"]]
    assert found["store"] == {
        "path": str(store),
        "models": 0,
        "damaged": [],
        "packed": {"models": 0, "bytes": 0, "not_kept": None},
        "free": found["store"]["free"],
        "writable": True,
    }


def test_the_text_names_the_backend_that_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = report(capsys)["backends"]["chosen"]
    doctor()
    text = capsys.readouterr().out
    assert f"{chosen} will run: " in text
    assert text.endswith("Everything essential is here.\n")


def test_limits_of_a_container_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localllm.machine.cores", lambda: Cores(8, 8, 2.5))
    monkeypatch.setattr(
        "localllm.machine.memory", lambda: Memory(2_000_000_000, 1_500_000_000, 2_000_000_000)
    )
    doctor()
    text = capsys.readouterr().out
    assert "2 of 8 cores usable (the control group grants 2.5)" in text
    assert "2.0 GB, 1.5 GB available (limited by the control group)" in text


def test_a_missing_native_module_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "localllm.kernels_cpu._native", None)
    found = report(capsys, fails=True)
    assert "native module" in found["problems"][0]["what"]
    assert "C++ compiler" in found["problems"][0]["hint"]


def test_a_missing_mlx_is_a_problem_with_the_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    found = report(capsys, fails=True)
    assert any(
        "MLX does not work" in problem["what"] and "pip install 'mlx" in problem["hint"]
        for problem in found["problems"]
    )


def test_a_machine_where_no_backend_runs_is_told_how_to_get_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [BackendStatus("reference", False, "MLX is not installed", hint="pip install mlx")]
    monkeypatch.setattr(select, "available_backends", lambda: broken)
    found = report(capsys, fails=True)
    assert found["backends"]["chosen"] is None
    assert {"what": "no backend can run here", "hint": "pip install mlx"} in found["problems"]


def test_a_backend_that_cannot_run_is_listed_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = [
        BackendStatus("fast", False, "needs another processor", hint="buy one"),
        BackendStatus("plain", True, "runs anywhere"),
    ]
    monkeypatch.setattr(select, "available_backends", lambda: statuses)
    doctor()
    text = capsys.readouterr().out
    assert "fast cannot run: needs another processor" in text
    assert "buy one" in text
    assert "plain will run: runs anywhere" in text


def test_a_store_that_cannot_be_a_folder_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "file" / "store"))
    found = report(capsys, fails=True)
    assert any("LOCALLLM_HOME" in str(problem["hint"]) for problem in found["problems"])


def test_a_damaged_model_is_listed_and_not_counted(
    capsys: pytest.CaptureFixture[str], store: Path
) -> None:
    (store / "models" / "half-a-model").mkdir(parents=True)
    found = report(capsys)["store"]
    assert (found["models"], found["damaged"]) == (0, ["half-a-model"])


def test_packed_weights_are_counted_and_what_keeps_more_from_coming_is_told(
    capsys: pytest.CaptureFixture[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "packed").mkdir(parents=True)
    (store / "packed" / "some.packed").write_bytes(bytes(3_000_000))
    doctor()
    assert "packed weights of 1 model, 3.0 MB\n" in capsys.readouterr().out
    monkeypatch.setenv("LOCALLLM_NO_PACKED_CACHE", "1")
    doctor()
    text = capsys.readouterr().out
    assert "3.0 MB; no others are kept: LOCALLLM_NO_PACKED_CACHE is set" in text


def test_missing_packages_of_an_extra_are_named_but_no_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = diagnosis._missing
    monkeypatch.setattr(
        diagnosis, "_missing", lambda names: [*really(names), *({"torch"} & set(names))]
    )
    found = report(capsys)
    assert "torch" in found["extras"]["parity"]["missing"]
    doctor()
    assert "[parity]'" in capsys.readouterr().out


def test_a_missing_dependency_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        diagnosis, "_missing", lambda names: [name for name in names if name == "tokenizers"]
    )
    found = report(capsys, fails=True)
    assert [problem["what"] for problem in found["problems"]] == [
        "the package tokenizers is missing"
    ]


@pytest.mark.parametrize(
    ("requirement", "parsed"),
    [
        ("numpy<3,>=1.26", ("numpy", "")),
        ('mlx[cpu]<1; sys_platform == "linux"', ("mlx", "")),
        ('gguf<0.20,>=0.17; extra == "test"', ("gguf", "test")),
        ("a.b-c; python_version < '4' and extra == 'x-y'", ("a.b-c", "x-y")),
    ],
)
def test_a_requirement_is_read_as_package_and_extra(
    requirement: str, parsed: tuple[str, str]
) -> None:
    assert diagnosis._parse(requirement) == parsed


@pytest.mark.parametrize(
    ("direct_url", "command"),
    [
        (None, "pip install 'localllm[dev]'"),
        (
            '{"url": "file:///a%20b/{c}", "dir_info": {"editable": true}}',
            f"{sys.executable} -m pip install -e '/a b/{{c}}[dev]'",
        ),
        (
            '{"url": "file:///clone", "dir_info": {}}',
            f"{sys.executable} -m pip install '/clone[dev]'",
        ),
    ],
)
def test_extras_are_installed_the_way_localllm_was(direct_url: str | None, command: str) -> None:
    assert diagnosis._install_command(direct_url).format(extra="[dev]") == command


def test_the_kernels_that_will_run_are_named(
    capsys: pytest.CaptureFixture[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALLLM_CPU", "scalar")
    doctor()
    assert "kernels: scalar will run" in capsys.readouterr().out
    monkeypatch.setenv("LOCALLLM_CPU", "nosuch")
    problems = report(capsys, fails=True)["problems"]
    assert any("'nosuch'" in str(problem) for problem in problems)
