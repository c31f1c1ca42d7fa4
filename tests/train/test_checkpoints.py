"""Checkpoints on bad days: killed, damaged, out of disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from localllm.errors import CheckpointError
from localllm.train import checkpoint as module
from localllm.train.checkpoint import Checkpoints, Snapshot


def snapshot(step: int, size: int = 1000) -> Snapshot:
    random = np.random.default_rng(step)
    arrays = {
        "parameters": random.normal(size=size).astype(np.float32),
        "optimizer.m": random.normal(size=size).astype(np.float32),
        "optimizer.codes": random.integers(0, 255, size).astype(np.uint8),
        "optimizer.t": np.array(step, np.int64),
    }
    return Snapshot(step, arrays, {"loss": 0.1 * step, "nested": {"text": "ä\n"}, "none": None})


@pytest.fixture
def store(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield store
    store.close()


def save(store: Checkpoints, *steps: int, best: int | None = None) -> None:
    for step in steps:
        store.save(snapshot(step), best=best)
    store.wait()


def assert_same(read: Snapshot | None, expected: Snapshot) -> None:
    assert read is not None
    assert read.step == expected.step
    assert read.facts == expected.facts
    assert read.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert read.arrays[name].dtype == array.dtype
        assert read.arrays[name].tobytes() == array.tobytes()


def test_what_is_read_is_what_was_saved_bit_for_bit(store):
    save(store, 7)
    newest, complaints = store.newest()
    assert_same(newest, snapshot(7))
    assert complaints == []


def test_the_newest_and_the_best_are_kept(store):
    save(store, 10, 20)
    save(store, 30, 40, 50, best=20)
    assert store.steps() == [20, 40, 50]
    save(store, 60, best=60)
    assert store.steps() == [50, 60]


@pytest.mark.parametrize("name", ["parameters.npy", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "cut", "gone"])
def test_a_damaged_one_is_passed_over_and_named(store, name, fault):
    save(store, 10, 20)
    path = store.folder / "step-00000020" / name
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 1
    if fault == "cut":
        del data[-1:]
    path.write_bytes(data)
    if fault == "gone":
        path.unlink()
    newest, complaints = store.newest()
    assert_same(newest, snapshot(10))
    assert len(complaints) == 1
    assert "step-00000020" in complaints[0]


def test_with_all_damaged_there_is_none(store):
    save(store, 10)
    (store.folder / "step-00000010" / "parameters.npy").write_bytes(b"")
    newest, complaints = store.newest()
    assert newest is None
    assert len(complaints) == 1


def test_a_manifest_cannot_name_files_elsewhere(store, tmp_path):
    save(store, 10)
    (tmp_path / "x.npy").write_bytes(b"")
    (store.folder / "step-00000010" / "manifest.json").write_text(
        '{"state.json": "0", "../../x.npy": "0"}'
    )
    with pytest.raises(CheckpointError, match="damaged"):
        store.read(10)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_is_told_and_leaves_the_one_before(store, monkeypatch, code):
    save(store, 10)
    real = module._write_array

    def failing(path, array):
        if path.name.startswith("optimizer.c"):
            raise OSError(code, os.strerror(code))
        return real(path, array)

    monkeypatch.setattr(module, "_write_array", failing)
    save(store, 20)
    [problem] = store.problems()
    assert ("disk is full" in str(problem)) == (code == errno.ENOSPC)
    assert store.problems() == []
    assert_same(store.newest()[0], snapshot(10))
    assert not list(store.folder.glob(".part-*"))
    monkeypatch.setattr(module, "_write_array", real)
    save(store, 30)
    assert store.problems() == []
    assert store.steps() == [10, 30]


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux"
)
def test_a_disk_that_is_really_full(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        store = Checkpoints(place / "checkpoints", keep=5)
        save(store, 1)
        store.save(snapshot(2, size=100_000), best=None)
        store.wait()
        [problem] = store.problems()
        assert "the disk is full" in str(problem)
        save(store, 3)
        store.close()
        assert store.steps() == [1, 3]
        assert_same(store.newest()[0], snapshot(3))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_resumed_run_forgets_what_came_later_and_sweeps(store):
    save(store, 10, 20)
    (store.folder / ".part-dead").mkdir()
    store.drop_after(10)
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == ["step-00000010"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.train.test_checkpoints import snapshot
from localllm.train.checkpoint import Checkpoints
store = Checkpoints(Path(sys.argv[1]), keep=2)
for step in range(1, 10_000):
    store.save(snapshot(step, 20_000), best=None)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_only_sound_ones(tmp_path):
    root = str(__import__("pathlib").Path(__file__).parents[2])
    for delay in (0.0, 0.003, 0.011, 0.02, 0.05):
        folder = tmp_path / f"{delay}"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER.format(root=root), folder], stdout=subprocess.PIPE
        )
        begun = 0
        while begun < 3:
            begun = int(writer.stdout.readline())
        time.sleep(delay)
        writer.kill()
        rest = writer.stdout.read().split()
        writer.wait()
        begun = int(rest[-1]) if rest else begun
        store = Checkpoints(folder)
        newest, complaints = store.newest()
        store.close()
        assert complaints == []
        assert newest is not None
        assert newest.step >= begun - 2  # the one being written, and the one waiting for it
        assert_same(newest, snapshot(newest.step, 20_000))
