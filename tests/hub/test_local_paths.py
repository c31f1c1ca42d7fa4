"""Models that are on this machine already."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.errors import ModelNotFound
from localllm.hub import pull, resolve


def test_a_gguf_file_is_itself(tmp_path: Path, home: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for model in (resolve(str(file)), pull(str(file)), resolve(str(file), offline=True)):
        assert model.path == file
        assert model.manifest is None
        assert model.entry is None
    assert not home.exists()


def test_a_folder_with_a_config_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "extra.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path)).path == tmp_path


def test_a_folder_with_one_gguf_means_that_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path)).path == tmp_path / "m.gguf"


def test_a_folder_with_several_ggufs_is_met_with_their_names(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="several models") as caught:
        resolve(str(tmp_path))
    assert "a.gguf, b.gguf" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["nowhere.gguf", "./nowhere", "notes.txt", "empty"])
def test_what_is_no_model_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound) as caught:
        resolve(name)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint
