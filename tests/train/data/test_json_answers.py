"""The example's data are what its script writes, held out from training, and scored rightly."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "json_answers"


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_those_that_the_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script("make_data")
    monkeypatch.setattr(made, "__file__", str(tmp_path / "make_data.py"))
    made.main()
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_nothing_that_is_held_out_is_trained() -> None:
    asked = [
        {json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()}
        for path in (FOLDER / "train.jsonl", FOLDER / "held_out.jsonl")
    ]
    assert [len(one) for one in asked] == [300, 60]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("answer", "judged"),
    [
        ('{"a": 1, "b": "x"}', (True, True, True)),
        ('{"a": 1, "b": "y"}', (True, True, False)),
        ('{"b": "x", "a": 1}', (True, False, False)),
        ('{"a": 1}', (True, False, False)),
        ("[1]", (True, False, False)),
        ('Sure: {"a": 1, "b": "x"}', (False, False, False)),
        ("", (False, False, False)),
    ],
)
def test_answers_are_judged_by_shape_keys_and_values(
    answer: str, judged: tuple[bool, bool, bool]
) -> None:
    assert script("score").judge(answer, {"a": 1, "b": "x"}) == judged
