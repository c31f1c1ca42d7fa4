"""The folder of packed weights: found by content, bounded, and clean after any end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localllm.backend import packed_folder
from localllm.backend.packed_folder import PackedFolder
from localllm.checkpoint.opening import content_digest, files_digest, open_checkpoint
from tests.backend.random_models import llama
from tests.tiny_model import write_tiny_model

SPEC = llama()


@pytest.fixture
def folder(tmp_path: Path) -> PackedFolder:
    return PackedFolder(tmp_path / "packed")


def weights(path: Path, content: bytes = b"weights", age: float = 3600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def keep(folder: PackedFolder, file: Path, content: bytes = b"packed") -> Path:
    key = folder.key(SPEC, [file])
    with folder.writing(key) as part:
        part.write_bytes(content)
    return folder.packed(key)


def test_the_key_is_that_of_the_content_wherever_it_lies(folder, tmp_path):
    one, copy = weights(tmp_path / "a.gguf"), weights(tmp_path / "b" / "c.gguf")
    assert folder.key(SPEC, [one]) == folder.key(SPEC, [copy])
    assert folder.key(SPEC, [one]) != folder.key(SPEC, [weights(tmp_path / "d.gguf", b"other")])
    assert folder.key(SPEC, [one]) != folder.key(SPEC, [one, copy])
    assert folder.key(SPEC, [one]) != folder.key(llama(layers=3), [one])


def test_another_version_or_build_of_localllm_packs_anew(folder, tmp_path, monkeypatch):
    file = weights(tmp_path / "a.gguf")
    before = folder.key(SPEC, [file])
    assert folder.key(SPEC, [file], "another build") != before
    monkeypatch.setattr("localllm.__version__", "99")
    assert folder.key(SPEC, [file]) != before


def test_what_a_new_version_packed_is_the_models_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_folder, "_SETTLED", -1.0)
    file = weights(tmp_path / "a.gguf")
    old = keep(folder, file)
    monkeypatch.setattr("localllm.__version__", "99")
    new = keep(folder, file, b"12345678")
    assert folder.size_of(file) == 8
    folder.forget_removed()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_settled_file_is_hashed_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_folder, "_SETTLED", -1.0)  # what was written just now counts too
    file = weights(tmp_path / "a.gguf")
    key = folder.key(SPEC, [file])
    monkeypatch.setattr(packed_folder.hashlib, "file_digest", None)
    assert folder.key(SPEC, [file]) == key


def test_hashes_of_files_are_told_without_reading_them_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_folder, "_SETTLED", -1.0)
    write_tiny_model(tmp_path / "tiny")
    files = open_checkpoint(tmp_path / "tiny").files()
    digest = content_digest(tmp_path / "tiny")
    assert files_digest(files, folder.sha256s) == digest
    key = folder.key(SPEC, files)
    with folder.writing(key) as part:
        part.write_bytes(b"packed")
    with monkeypatch.context() as patch:
        patch.setattr(packed_folder.hashlib, "file_digest", None)
        assert files_digest(files, folder.sha256s) == digest
    assert folder.forget_removed() == 0
    assert folder.packed(key).exists()
    weights = next(file for file in files if file.suffix == ".safetensors")
    with weights.open("r+b") as stream:  # the last bytes of a weight, size as before
        stream.seek(-4, os.SEEK_END)
        stream.write(b"1234")
    assert files_digest(files, folder.sha256s) == content_digest(tmp_path / "tiny") != digest


def test_a_file_changed_just_now_is_hashed_again(folder, tmp_path):
    file = weights(tmp_path / "a.gguf")
    before = folder.key(SPEC, [file])
    status = file.stat()
    with file.open("r+b") as stream:  # in place, same size, same time stamp as far as can be set
        stream.write(b"WEIGHTS")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert folder.key(SPEC, [file]) != before


def test_a_damaged_memory_of_hashes_is_no_matter(folder, tmp_path):
    file = weights(tmp_path / "a.gguf")
    key = folder.key(SPEC, [file])
    (source,) = folder.path.glob("*.source")
    for damage in (b"", b"{}", b'{"files": 3}', b'{"files": [[1, 2, 3]], "key": 1}', b"\xff\x00"):
        source.write_bytes(damage)
        assert folder.key(SPEC, [file]) == key


def test_writing_that_fails_leaves_nothing(folder):
    def write() -> None:
        with folder.writing("key") as part:
            part.write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert list(folder.path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_is_not(folder):
    code = (
        "import sys, time; from pathlib import Path;"
        "from localllm.backend.packed_folder import PackedFolder\n"
        f"with PackedFolder(Path({str(folder.path)!r})).writing('key') as part:\n"
        "    part.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        folder.tidy()
        assert len(list(folder.path.glob("*.part"))) == 1
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
        folder.tidy()
        assert list(folder.path.iterdir()) == []
    finally:
        writer.kill()


def test_models_beyond_the_count_or_the_bytes_go_oldest_first(folder, tmp_path, monkeypatch):
    kept = [keep(folder, weights(tmp_path / f"{n}.gguf", b"%d" % n)) for n in range(6)]
    for age, path in enumerate(reversed(kept)):
        os.utime(path, (time.time() - age,) * 2)
    folder.used(kept[0].stem)
    folder.tidy()
    assert [path.exists() for path in kept] == [True, False, False, True, True, True]
    monkeypatch.setattr(packed_folder, "KEPT_BYTES", 2 * len(b"packed"))
    folder.tidy()
    assert [path.exists() for path in kept] == [True, False, False, False, False, True]


def test_a_model_that_is_gone_takes_its_packed_form_along(folder, tmp_path):
    gone, stays = weights(tmp_path / "m" / "a.gguf", b"a"), weights(tmp_path / "b.gguf", b"b")
    lost, kept = keep(folder, gone, b"12345"), keep(folder, stays)
    assert folder.size_of(tmp_path / "m") == folder.size_of(gone) == 5
    gone.unlink()
    assert folder.forget_removed() >= 5
    assert (lost.exists(), kept.exists()) == (False, True)
    assert folder.usage().models == 1


def test_a_copy_of_a_removed_model_keeps_its_packed_form(folder, tmp_path):
    one, copy = weights(tmp_path / "a.gguf"), weights(tmp_path / "b.gguf")
    packed = keep(folder, one)
    folder.key(SPEC, [copy])
    one.unlink()
    folder.forget_removed()
    assert packed.exists()


def test_a_folder_that_is_not_there_is_empty(folder, tmp_path):
    assert (folder.usage().models, folder.usage().nbytes) == (0, 0)
    assert folder.forget_removed() == folder.size_of(tmp_path) == 0
    folder.tidy()
    assert folder.obstacle() is None


def test_what_keeps_weights_from_being_kept_is_named(folder, tmp_path):
    assert "are to stay so" in folder.obstacle(1 << 60)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in PackedFolder(tmp_path / "file" / "packed").obstacle()
