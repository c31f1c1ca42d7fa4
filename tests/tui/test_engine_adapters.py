from __future__ import annotations

from pathlib import Path

import pytest

from localllm.errors import CheckpointError, InvalidRequest
from localllm.tui.engine.adapters import MOST_WEIGHTED, Adapters


class Loader:
    """Stands for a model: remembers what is loaded, and what requests use."""

    def __init__(self) -> None:
        self.loaded: dict[str, tuple[Path, float]] = {}
        self.loads = 0
        self.used: set[str] = set()

    def load_adapter(self, path, name=None, *, pin=False, weight=1.0):
        assert name not in self.loaded
        self.loads += 1
        self.loaded[name] = Path(path), weight
        return name

    def unload_adapter(self, name):
        if name in self.used:
            raise InvalidRequest(f"adapter {name!r} is used")
        del self.loaded[name]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def adapters(loader) -> Adapters:
    return Adapters(loader)


def folder(place: Path, content: str = "{}") -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "adapter_config.json").write_text(content)
    return place


def test_a_folder_is_read_once_while_it_does_not_change(tmp_path, loader, adapters):
    one = folder(tmp_path / "poet")
    assert [adapters.load(str(one)) for _ in range(3)] == ["poet"] * 3
    assert loader.loads == 1
    folder(one, '{"r": 8}')
    assert adapters.load(str(one)) == "poet"  # trained anew: in the place of the old one
    assert loader.loads == 2


def test_one_in_use_is_not_replaced(tmp_path, loader, adapters):
    one = folder(tmp_path / "poet")
    adapters.load(str(one))
    loader.used.add("poet")
    folder(one, '{"r": 8}')
    assert adapters.load(str(one)) == "poet-2"
    assert adapters.names == ["poet", "poet-2"]


def test_folders_of_one_name_get_names_apart(tmp_path, adapters):
    assert adapters.load(str(folder(tmp_path / "a" / "adapter"))) == "adapter"
    assert adapters.load(str(folder(tmp_path / "b" / "adapter"))) == "adapter-2"


def test_weights_are_names_of_their_own_and_bounded(tmp_path, loader, adapters):
    name = adapters.load(str(folder(tmp_path / "poet")))
    assert adapters.with_weight(name, 1.0) == name
    assert adapters.with_weight(name, 0.0) is None
    assert adapters.with_weight(None, 0.5) is None
    assert adapters.with_weight(name, 0.5) == adapters.with_weight(name, 0.5) == "poet x 0.5"
    assert loader.loaded["poet x 0.5"][1] == 0.5
    loader.used.add("poet x 0.5")
    for number in range(30):
        adapters.with_weight(name, 2 + number)
    assert len(loader.loaded) <= MOST_WEIGHTED + 1
    assert "poet x 0.5" in loader.loaded
    assert adapters.names == ["poet"]


def test_an_adapter_goes_with_its_weights(tmp_path, loader, adapters):
    adapters.with_weight(str(folder(tmp_path / "poet")), 0.5)
    adapters.unload("poet")
    assert loader.loaded == {}
    assert adapters.names == []


def test_no_folder(tmp_path, adapters):
    with pytest.raises(CheckpointError, match="nowhere"):
        adapters.load(str(tmp_path / "nowhere"))
