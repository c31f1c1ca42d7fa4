"""A second start takes the weights as the first one packed them, on good days and bad."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from localllm import LLM, SamplingParams
from localllm.checkpoint.gguf import GGUFCheckpoint
from localllm.checkpoint.safetensors import SafetensorsFile
from tests.tiny_model import write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOCALLLM_NO_PACKED_CACHE")
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def start(model: Path):
    """The greedy answer, and what the model says of itself."""
    with LLM(str(model), backend="cpu") as llm:
        return llm.generate("Hello", GREEDY).token_ids, llm.info


def packed(home: Path) -> Path:
    (path,) = (home / "packed").glob("*.packed")
    return path


def test_the_second_start_reads_no_weight_and_answers_the_same(home, model, monkeypatch):
    answer, info = start(model)
    assert (info.from_cache, info.load_note) == (False, None)
    for reader in (SafetensorsFile, GGUFCheckpoint):
        for method in {"dense", "words", "tensor"} & set(dir(reader)):
            monkeypatch.setattr(reader, method, None)
    again, info = start(model)
    assert again == answer
    assert (info.from_cache, info.load_note) == (True, None)


def test_a_start_does_not_load_mlx(home, model):
    code = (
        "import sys; from localllm import LLM, SamplingParams\n"
        f"llm = LLM({str(model)!r}, backend='cpu')\n"
        "llm.generate('Hello', SamplingParams(max_tokens=2))\n"
        "assert 'mlx.core' not in sys.modules\nprint(llm.info.from_cache)"
    )
    said = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)]
    assert said == ["False\n", "True\n"]


def test_changed_weights_are_packed_anew_even_with_their_old_size_and_time(home, model):
    before, _ = start(model)
    file = model / "model.safetensors"
    status, content = file.stat(), bytearray(file.read_bytes())
    for at in range(len(content) - 20000, len(content) - 1000, 4):
        content[at + 3] ^= 0x80  # the sign of a float32
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, info = start(model)
    assert not info.from_cache
    assert after != before


def test_another_config_beside_the_same_weights_is_another_model(home, model):
    start(model)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 50.0'))
    assert not start(model)[1].from_cache


@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_packed_weights_are_told_and_made_anew(home, model, damage, place):
    answer, _ = start(model)
    path = packed(home)
    content = bytearray(path.read_bytes())
    at = {"start": 60, "middle": len(content) // 2, "end": len(content) - 70}[place]
    if damage == "flipped":
        content[at] ^= 0x10
    else:
        del content[at:]
    path.write_bytes(content)
    again, info = start(model)
    assert again == answer
    assert not info.from_cache
    assert "damaged" in info.load_note
    assert start(model)[1].from_cache


def test_a_disk_that_fills_while_writing_costs_only_time(home, model):
    """A limit on file sizes ends the write in the middle, as a full disk does."""
    code = (
        "import resource; from localllm import LLM, SamplingParams\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"llm = LLM({str(model)!r}, backend='cpu')\n"
        "print(len(llm.generate('Hi', SamplingParams(max_tokens=2, ignore_eos=True)).token_ids))\n"
        "print(llm.info.load_note)"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert said[0] == "2"
    assert "could not be kept" in said[1]
    assert "too large" in said[1]
    assert not list((home / "packed").glob("*.pa*"))


def test_little_free_disk_space_is_named(home, model, monkeypatch):
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    _, info = start(model)
    assert "could not be kept" in info.load_note
    assert "1 MiB are free" in info.load_note


def test_a_store_that_cannot_be_written_is_named_and_what_it_holds_is_used(
    home, model, monkeypatch
):
    answer, _ = start(model)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("open", "utime", "unlink", "mkdir", "replace"):
        really = getattr(os, name)
        blocked = lambda path, *a, _really=really, **k: (  # noqa: E731
            refuse() if str(path).startswith(str(home)) else _really(path, *a, **k)
        )
        monkeypatch.setattr(os, name, blocked)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(home)))
    again, info = start(model)
    assert (again, info.from_cache) == (answer, True)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    again, info = start(model)
    assert again == answer
    assert "cannot be written" in info.load_note


def test_a_start_holds_little_more_than_the_weights_in_memory(home, smollm2):
    code = (
        "from localllm.loading import load; from localllm.machine import resident_memory\n"
        f"model = load({str(smollm2)!r}, backend='cpu')\n"
        "print(model.backend.from_cache, *resident_memory())"
    )
    limit = 1.25 * smollm2.stat().st_size + 60e6  # the KV cache is not touched yet
    for cached in ("False", "True"):
        said = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert said[0] == cached
        assert int(said[1]) < limit
        assert said[2] == "None" or int(said[2]) < limit + 40e6  # while loading


def test_two_at_once_both_answer(home, model):
    code = (
        "from localllm import LLM, SamplingParams\n"
        f"llm = LLM({str(model)!r}, backend='cpu')\n"
        "print(llm.generate('Hello', SamplingParams(temperature=0, max_tokens=8)).token_ids)"
    )
    with ThreadPoolExecutor(3) as pool:
        run = [pool.submit(subprocess.check_output, [sys.executable, "-c", code]) for _ in range(3)]
    assert len({one.result() for one in run}) == 1
    assert start(model)[1].from_cache
    assert not list((home / "packed").glob("*.part"))


def test_the_environment_turns_it_off(home, model, monkeypatch):
    monkeypatch.setenv("LOCALLLM_NO_PACKED_CACHE", "1")
    assert not start(model)[1].from_cache
    assert not start(model)[1].from_cache
    assert not (home / "packed").exists()


def test_the_reference_backend_keeps_nothing(home, model):
    with LLM(str(model), backend="reference") as llm:
        assert (llm.info.from_cache, llm.info.load_note) == (False, None)
    assert not (home / "packed").exists()
