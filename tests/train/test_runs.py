"""Runs on disk: found, named, deleted; their metrics and curves."""

from __future__ import annotations

import json
import math
import xml.dom.minidom

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.train import runs
from localllm.train.metrics import MetricsFile, read_metrics
from localllm.train.plots import braille, save_plot


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_runs_are_found_by_name_folder_and_last(home, tmp_path):
    one = runs.create_run(None, {"model": "smollm2:135m"})
    two = runs.create_run(None, {"model": "smollm2:135m"})
    elsewhere = runs.create_run(str(tmp_path / "mine"), {"model": "x"})
    assert (one.name, two.name, elsewhere.name) == ("smollm2-135m-1", "smollm2-135m-2", "mine")
    assert runs.all_runs()[0].name == "mine"
    assert runs.open_run("smollm2-135m-1").folder == one.folder
    assert runs.open_run(tmp_path / "mine").facts["model"] == "x"
    assert runs.open_run("last").name == "mine"
    with pytest.raises(InvalidRequest, match="there is no run 'nope'"):
        runs.open_run("nope")


def test_a_folder_with_a_run_is_not_taken_for_another(home, tmp_path):
    runs.create_run(str(tmp_path / "mine"), {})
    with pytest.raises(InvalidRequest, match="holds a run already") as error:
        runs.create_run(str(tmp_path / "mine"), {})
    assert "--resume" in (error.value.hint or "")


def test_two_runs_in_folders_of_one_name_are_told_apart(home, tmp_path):
    names = []
    for parent in ("a", "b"):
        names.append(runs.create_run(str(tmp_path / parent / "run"), {}).name)
    assert names == ["run", "run-2"]
    assert runs.open_run("run-2").folder == tmp_path / "b" / "run"


def test_a_run_whose_process_is_gone_was_killed(home):
    run = runs.create_run(None, {"status": "running"})
    with runs.training(run):
        assert run.status == "running"
        with pytest.raises(InvalidRequest, match="is training"), runs.training(run):
            pass
        with pytest.raises(InvalidRequest, match="is training now"):
            runs.delete_run(run)
    assert run.status == "killed"


def test_deleting_leaves_what_is_the_users(home, tmp_path):
    folder = tmp_path / "mine"
    run = runs.create_run(str(folder), {})
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "x").write_bytes(b"1" * 1000)
    (folder / "adapter_model.safetensors").write_bytes(b"2" * 500)
    (folder / "thesis.txt").write_text("mine")
    assert runs.delete_run(run, keep_adapter=True) >= 1000
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_model.safetensors", "thesis.txt"]
    assert runs.all_runs() == []
    other = runs.create_run(None, {})
    runs.delete_run(other)
    assert not other.folder.exists()


def test_a_damaged_run_is_left_out_of_the_list(home):
    run = runs.create_run(None, {})
    (run.folder / "run.json").write_text("{")
    assert runs.all_runs() == []
    with pytest.raises(InvalidRequest, match=r"run\.json cannot be read"):
        runs.open_run(run.folder)


@given(st.lists(st.dictionaries(st.text(), st.floats() | st.integers() | st.text()), max_size=8))
def test_metrics_read_back_but_for_what_json_cannot_say(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    file = MetricsFile(path)
    for line in lines:
        file.write(line)
    file.close()
    expected = [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        for line in lines
    ]
    assert list(read_metrics(path)) == expected


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    position = file.position()
    file.write({"step": 2})
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    file = MetricsFile(path, position=position)
    file.write({"step": 2, "again": True})
    file.close()
    assert path.read_text().splitlines() == ['{"step":1}', '{"step":2,"again":true}']
    assert all(json.loads(line) for line in path.read_text().splitlines())


POINTS = st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=300)


@given(POINTS, POINTS, st.integers(8, 100), st.integers(2, 20))
def test_any_curve_fits_its_frame(one, other, width, height):
    lines = braille({"loss": one, "valid": other}, width=width, height=height)
    drawn = [line.partition("┤")[2] for line in lines if "┤" in line]
    assert len(drawn) in (0, height)
    assert all(len(line) == width for line in drawn)


def test_a_falling_curve_falls():
    lines = braille({"loss": [(x, 10 - x) for x in range(11)]}, width=10, height=5)
    drawn = [line.partition("┤")[2] for line in lines if "┤" in line]
    first = [next(i for i, c in enumerate(line) if c != "\u2800") for line in drawn]
    assert first == sorted(first)
    assert len(set(first)) == 5
    assert lines[0].startswith("10.000")
    assert "loss 0.0000" in lines[-1]


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_plots_as_files(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"loss{ending}"
    save_plot(path, {"loss": [(1, 2.0), (2, 1.5)], "valid": [(2, 1.6)]}, title="a run")
    data = path.read_bytes()
    if ending == ".png":
        assert data.startswith(b"\x89PNG")
    else:
        assert xml.dom.minidom.parseString(data).documentElement.tagName == "svg"


def test_other_plots_are_refused(tmp_path):
    with pytest.raises(InvalidRequest, match=r"neither \.png nor \.svg"):
        save_plot(tmp_path / "loss.gif", {}, title="")
