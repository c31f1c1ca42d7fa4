"""The store: what is there is whole, and what is wrong is told."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.errors import ModelNotFound, StoreError
from localllm.hub import installed, pull, remove, resolve, verify
from localllm.hub import store as store_module
from localllm.hub.hub_client import _Meter
from localllm.hub.manifest import MANIFEST, Manifest
from localllm.hub.store import Store, default_home, store_key
from tests.hub.conftest import Recorder
from tests.hub.hub_server import HubServer, Repository
from tests.hub.wheels import gguf

NAME = "hf:o/m"


@pytest.fixture
def source(hub: HubServer) -> HubServer:
    """A hub that has the model."""
    hub.repositories["o/m"] = Repository({"m.gguf": gguf(5000)})
    return hub


@pytest.fixture
def model(source: HubServer) -> Path:
    """A pulled model; its .gguf."""
    return resolve(NAME).path


def test_the_store_is_where_localllm_home_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALLLM_HOME", "/somewhere")
    assert default_home() == Path("/somewhere")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LOCALLLM_HOME", "~/models")
    assert default_home() == Path("/home/me/models")


@pytest.mark.parametrize(
    ("platform", "cache", "home"),
    [
        ("linux", None, "/home/me/.cache/localllm"),
        ("linux", "", "/home/me/.cache/localllm"),
        ("linux", "relative", "/home/me/.cache/localllm"),
        ("linux", "/cache", "/cache/localllm"),
        ("darwin", "/cache", "/home/me/Library/Caches/localllm"),
    ],
)
def test_without_it_the_store_is_in_the_platforms_cache_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, cache: str | None, home: str
) -> None:
    monkeypatch.delenv("LOCALLLM_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", platform)
    if cache is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert default_home() == Path(home)


def test_looking_creates_nothing(home: Path) -> None:
    assert installed() == []
    with pytest.raises(ModelNotFound, match="not in the store"):
        remove("smollm2:135m")
    assert not home.exists()


def test_a_model_that_is_here_is_used_without_writing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", lambda *a, **k: pytest.fail("the store was written"))
    assert resolve(NAME).path == model


def test_installed_models_are_listed_with_their_facts(model: Path) -> None:
    [found] = installed()
    assert found.name == NAME
    assert found.path == model
    assert found.manifest is not None
    assert found.manifest.source == NAME
    assert found.manifest.pulled_at.endswith("+00:00")


def test_a_file_of_another_size_is_found_and_pulling_repairs_it(model: Path) -> None:
    model.write_bytes(gguf(4999))
    with pytest.raises(StoreError, match=r"has 4999 bytes, not 5000") as caught:
        resolve(NAME)
    assert f"localllm pull {NAME}" in (caught.value.hint or "")
    assert installed() == []
    progress = Recorder()
    assert pull(NAME, progress=progress).path.read_bytes() == gguf(5000)
    assert any("damaged" in line for line in progress.said)
    assert resolve(NAME).path.read_bytes() == gguf(5000)


def test_a_file_that_is_gone_is_found(model: Path) -> None:
    model.unlink()
    with pytest.raises(StoreError, match=r"m\.gguf is missing"):
        resolve(NAME)


def test_a_changed_byte_is_found_by_verify_and_repaired(model: Path) -> None:
    data = bytearray(model.read_bytes())
    data[100] ^= 1
    model.write_bytes(data)
    assert resolve(NAME).path == model  # sizes alone do not tell
    progress = Recorder()
    assert verify(NAME, progress=progress).path.read_bytes() == gguf(5000)
    assert any("sha256" in line for line in progress.said)


def test_verify_reads_every_byte_of_a_sound_model_and_pulls_nothing(
    model: Path, source: HubServer
) -> None:
    source.requests.clear()
    progress = Recorder()
    assert verify(NAME, progress=progress).path == model
    assert source.requests == []
    assert progress.steps[-1] == (f"checking {NAME}", 5000, 5000)


def corrupt(edit: Callable[[dict[str, object]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        data = json.loads(text)
        edit(data)
        return json.dumps(data)

    return apply


def file_with(**changes: object) -> Callable[[dict[str, object]], object]:
    good = {"name": "m.gguf", "size": 1, "sha256": "0" * 64}
    return lambda data: data.update(files=[{**good, **changes}])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:50],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\x00" * 100,
        lambda text: "[" * 100_000,
        corrupt(lambda data: data.pop("files")),
        corrupt(lambda data: data.update(files=[])),
        corrupt(lambda data: data.update(files="m.gguf")),
        corrupt(lambda data: data.update(format=99)),
        corrupt(lambda data: data.update(name=None)),
        corrupt(lambda data: data.update(name="pypi:other")),
        corrupt(file_with(name="../../outside.gguf")),
        corrupt(file_with(name="/etc/passwd")),
        corrupt(file_with(size=-1)),
        corrupt(file_with(size="many")),
        corrupt(file_with(sha256="abc")),
        corrupt(file_with(extra=1)),
    ],
)
def test_a_damaged_manifest_is_told_and_can_be_removed(
    model: Path, damage: Callable[[str], str]
) -> None:
    path = model.parent / MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError, match=r"localllm\.json") as caught:
        resolve(NAME)
    assert f"localllm pull {NAME}" in (caught.value.hint or "")
    assert installed() == []
    [kept] = Store().kept()
    assert kept.problem
    assert remove(NAME) >= 5000
    assert Store().kept() == []


def test_removing_frees_what_it_says(model: Path, home: Path) -> None:
    size = sum(p.stat().st_size for p in model.parent.iterdir())
    assert remove(NAME) == size
    assert not model.parent.exists()
    assert list((home / "trash").iterdir()) == []
    with pytest.raises(ModelNotFound):
        remove(NAME)


def test_removing_never_touches_a_path_of_the_users(model: Path) -> None:
    with pytest.raises(ModelNotFound, match="a file of yours"):
        remove(str(model))
    assert model.exists()


def test_a_model_whose_name_left_the_catalog_can_still_be_used_and_removed(
    model: Path, home: Path
) -> None:
    folder = home / "models" / store_key("oldie:1b")
    model.parent.rename(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"name": "hf:o/m"', '"name": "oldie:1b"'))
    assert [found.name for found in installed()] == ["oldie:1b"]
    assert resolve("oldie:1b").path == folder / "m.gguf"
    assert remove("Oldie:1b") > 5000


@pytest.mark.parametrize("where", ["", "models", "locks", "partial"])
def test_a_file_in_the_way_is_told(source: HubServer, home: Path, where: str) -> None:
    (home / where).parent.mkdir(exist_ok=True)
    (home / where).write_text("not a folder")
    with pytest.raises(StoreError, match="in the way") as caught:
        resolve(NAME)
    assert "LOCALLLM_HOME" in (caught.value.hint or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_told(source: HubServer, home: Path) -> None:
    home.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="no permission") as caught:
        resolve(NAME)
    assert "LOCALLLM_HOME" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOSPC, "disk became full"),
        (errno.EDQUOT, "disk became full"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_told_with_a_way_out(
    source: HubServer, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), "/the/store")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=reason) as caught:
        resolve(NAME)
    assert "LOCALLLM_HOME" in (caught.value.hint or "")


def test_a_disk_that_fills_up_while_writing_leaves_nothing_visible(
    source: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: _Meter, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_Meter, "write", full)
    with pytest.raises(StoreError, match="disk became full"):
        resolve(NAME)
    assert installed() == []
    assert list((home / "models").iterdir()) == []


def test_too_old_leftovers_of_other_pulls_are_swept_and_young_ones_kept(
    source: HubServer, home: Path
) -> None:
    old, young = (home / "partial" / store_key(f"pypi:{age}") for age in ("old", "young"))
    for folder in (old, young):
        (folder / "wheels").mkdir(parents=True)
        (folder / "name").write_text("pypi:something")
        (folder / "wheels" / "a.whl").write_bytes(b"half")
        (folder / "source" / store_module.SCRATCH).mkdir(parents=True)
    week_ago = time.time() - store_module.KEEP_PARTIAL - 60
    os.utime(old / "name", (week_ago, week_ago))
    resolve(NAME)
    assert not old.exists()
    assert (young / "wheels" / "a.whl").exists()
    assert not (young / "source" / store_module.SCRATCH).exists()


def test_trash_of_a_killed_removal_is_swept(source: HubServer, home: Path) -> None:
    (home / "trash" / "gone").mkdir(parents=True)
    resolve(NAME)
    assert list((home / "trash").iterdir()) == []


def test_a_failure_while_the_old_model_is_replaced_is_no_loss(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(staged: Path, manifest: Manifest) -> None:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(Store, "commit", lambda self, staged, manifest: broken(staged, manifest))
    with pytest.raises(StoreError):
        pull(NAME, force=True)
    monkeypatch.undo()
    assert model.read_bytes() == gguf(5000)
