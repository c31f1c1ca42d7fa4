"""The disk cache gives back exactly what was saved or nothing, and stays within its limit."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.engine.disk_cache import HEADER_BYTES, DiskCache
from tests.examples import examples

BLOCK = 5000
FILE = 8192  # what such a block takes on disk, header and all, in pages


def digest(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def payload(number: int, size: int = BLOCK) -> bytes:
    return np.random.default_rng(number).bytes(size)


def open_cache(folder: Path, blocks: int = 100, **settings: int) -> DiskCache:
    chosen = {"limit_bytes": blocks * FILE, "block_bytes": BLOCK, "reserve_bytes": 0, **settings}
    return DiskCache(folder, **chosen)


def loaded(cache: DiskCache, number: int) -> bytes | None:
    into = np.zeros(cache.block_bytes, np.uint8)
    return into.tobytes() if cache.load(digest(number), into) else None


def path_of(folder: Path, number: int) -> Path:
    name = digest(number).hex()
    return folder / name[:2] / f"{name}.kv"


def bytes_on_disk(folder: Path) -> int:
    """In whole pages, as a file system counts."""
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


def run(program: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import sys\nfrom tests.engine.test_disk_cache import *\nfolder = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_saved_block_comes_back_also_after_a_restart(tmp_path):
    cache = open_cache(tmp_path / "kv")
    assert digest(1) not in cache
    assert loaded(cache, 1) is None
    assert cache.save(digest(1), payload(1))
    assert cache.save(digest(1), payload(1))
    for again in (cache, open_cache(tmp_path / "kv")):
        assert digest(1) in again
        assert loaded(again, 1) == payload(1)
        assert (again.blocks, again.bytes) == (1, FILE)


def test_every_kind_of_buffer_is_a_payload(tmp_path):
    cache = open_cache(tmp_path)
    array = np.frombuffer(payload(0), np.uint8)
    for number, data in enumerate(
        (array, array.view(np.float16), memoryview(array), bytearray(array))
    ):
        assert cache.save(digest(number), data)
        assert loaded(cache, number) == payload(0)


def test_only_the_owner_may_read_what_was_said(tmp_path):
    cache = open_cache(tmp_path / "kv")
    cache.save(digest(1), payload(1))
    modes = {p.stat().st_mode & 0o077 for p in (tmp_path / "kv").rglob("*")}
    assert modes == {0}
    assert (tmp_path / "kv").stat().st_mode & 0o077 == 0


def test_many_blocks_load_at_once_and_each_tells_whether_it_did(tmp_path):
    cache = open_cache(tmp_path)
    for number in range(0, 40, 2):
        cache.save(digest(number), payload(number))
    into = np.zeros((40, BLOCK), np.uint8)
    found = cache.load_many([(digest(n), into[n]) for n in range(40)])
    assert found == [n % 2 == 0 for n in range(40)]
    assert all(into[n].tobytes() == payload(n) for n in range(0, 40, 2))
    cache.close()
    assert cache.load_many([]) == []


@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, 59, 60, HEADER_BYTES - 1, HEADER_BYTES, 65, 4096, HEADER_BYTES + BLOCK - 1]
)
def test_a_truncated_file_is_removed(tmp_path, size):
    cache = open_cache(tmp_path)
    cache.save(digest(1), payload(1))
    os.truncate(path_of(tmp_path, 1), size)
    assert loaded(cache, 1) is None
    assert not path_of(tmp_path, 1).exists()
    assert digest(1) not in cache
    assert cache.save(digest(1), payload(1))
    assert loaded(cache, 1) == payload(1)


def test_a_file_that_grew_or_whose_end_was_never_written_is_removed(tmp_path):
    cache = open_cache(tmp_path)
    for spoil in (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(
            path.read_bytes()[:4096] + bytes(HEADER_BYTES + BLOCK - 4096)
        ),
        lambda path: path.write_bytes(bytes(HEADER_BYTES + BLOCK)),
    ):
        cache.save(digest(1), payload(1))
        spoil(path_of(tmp_path, 1))
        assert loaded(cache, 1) is None
        assert not path_of(tmp_path, 1).exists()


@given(
    bit=st.one_of(
        st.integers(0, 8 * HEADER_BYTES - 1), st.integers(0, 8 * (HEADER_BYTES + BLOCK) - 1)
    )
)
@settings(max_examples=examples(200))
def test_a_flipped_bit_anywhere_is_found(tmp_path_factory, bit):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    cache = open_cache(folder)
    cache.save(digest(1), payload(1))
    data = bytearray(path_of(folder, 1).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path_of(folder, 1).write_bytes(data)
    assert loaded(cache, 1) is None
    assert not path_of(folder, 1).exists()


def test_every_bit_of_the_header_is_checked(tmp_path):
    cache = open_cache(tmp_path)
    for bit in range(8 * HEADER_BYTES):
        cache.save(digest(1), payload(1))
        data = bytearray(path_of(tmp_path, 1).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path_of(tmp_path, 1).write_bytes(data)
        assert loaded(cache, 1) is None


def test_another_block_under_this_name_is_not_believed(tmp_path):
    cache = open_cache(tmp_path)
    cache.save(digest(1), payload(1))
    cache.save(digest(2), payload(2))
    os.replace(path_of(tmp_path, 1), path_of(tmp_path, 2))
    assert loaded(cache, 2) is None
    assert not path_of(tmp_path, 2).exists()
    assert loaded(cache, 1) is None


def test_what_is_no_block_is_left_alone_and_never_read(tmp_path):
    cache = open_cache(tmp_path)
    cache.save(digest(1), payload(1))
    inside = path_of(tmp_path, 1).parent
    strangers = [tmp_path / "README", tmp_path / "zz" / "x", inside / "note.txt"]
    strangers += [
        inside / f"{digest(1).hex()}.txt",
        inside / f"{'é' * 64}.kv",
        inside / f"{'+1' * 32}.kv",
    ]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("mine")
    again = open_cache(tmp_path, 1)
    assert again.blocks == 1
    assert again.save(digest(2), payload(2))
    assert all(stranger.read_text() == "mine" for stranger in strangers)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_something_else_in_a_blocks_place_neither_blocks_nor_breaks(tmp_path, kind):
    cache = open_cache(tmp_path)
    path = path_of(tmp_path, 1)
    path.parent.mkdir(parents=True)
    if kind == "folder":
        (path / "sub").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert digest(1) not in cache
    assert loaded(cache, 1) is None
    assert cache.save(digest(1), payload(1)) is (kind != "folder")
    assert (loaded(cache, 1) == payload(1)) is (kind != "folder")
    assert (cache.note is None) is (kind != "folder")


def test_blocks_of_other_sizes_share_the_limit_but_are_not_ours(tmp_path):
    other = DiskCache(tmp_path, limit_bytes=4 * FILE, block_bytes=2 * BLOCK, reserve_bytes=0)
    assert other.save(digest(1), payload(1, 2 * BLOCK))
    cache = open_cache(tmp_path, 4)
    assert digest(1) not in cache
    for number in range(2, 6):
        assert cache.save(digest(number), payload(number))
        assert bytes_on_disk(tmp_path) <= 4 * FILE
    assert digest(1) not in DiskCache(tmp_path, limit_bytes=FILE, block_bytes=2 * BLOCK)


@given(
    limit=st.integers(1, 6),
    steps=st.lists(
        st.tuples(st.sampled_from(["save", "load", "restart", "lose", "spoil"]), st.integers(0, 9)),
        max_size=40,
    ),
)
def test_it_is_an_lru_cache_that_never_takes_more_than_its_limit(tmp_path_factory, limit, steps):
    folder = tmp_path_factory.mktemp("lru")
    cache = open_cache(folder, limit)
    expected: list[int] = []  # least recently used first
    spoiled: set[int] = set()
    for step, number in steps:
        known = number in expected
        if step == "save":
            assert cache.save(digest(number), payload(number))
            if known:
                expected.remove(number)
            expected = [*expected, number][-limit:]
            spoiled &= set(expected)
        elif step == "load":
            good = known and number not in spoiled
            assert loaded(cache, number) == (payload(number) if good else None)
            if known:
                expected.remove(number)
                spoiled.discard(number)
            if good:
                expected.append(number)
        elif step == "restart":
            cache = open_cache(folder, limit)
        elif known and step == "spoil":
            with open(path_of(folder, number), "r+b") as file:
                stamp = os.fstat(file.fileno()).st_mtime_ns
                file.seek(70)
                byte = file.read(1)[0]
                file.seek(70)
                file.write(bytes([byte ^ 1]))
                file.flush()
                os.utime(file.fileno(), ns=(stamp, stamp))
            spoiled = spoiled ^ {number}
        elif known and step == "lose":
            path_of(folder, number).unlink()
            expected.remove(number)
            spoiled.discard(number)
            loaded(cache, number)
        assert bytes_on_disk(folder) == len(expected) * FILE <= limit * FILE
    again = open_cache(folder, limit)
    assert {n for n in range(10) if digest(n) in again} == set(expected)
    assert again.bytes == bytes_on_disk(folder)


def test_a_limit_below_one_block_keeps_nothing_and_says_so(tmp_path):
    cache = open_cache(tmp_path, limit_bytes=FILE - 1)
    assert not cache.save(digest(1), payload(1))
    assert "limit" in cache.note
    assert bytes_on_disk(tmp_path) == 0


def test_a_smaller_limit_than_before_removes_what_is_too_much(tmp_path):
    cache = open_cache(tmp_path, 20)
    for number in range(20):
        cache.save(digest(number), payload(number))
    smaller = open_cache(tmp_path, 3)
    assert smaller.save(digest(20), payload(20))
    assert [n for n in range(21) if digest(n) in smaller] == [18, 19, 20]
    assert bytes_on_disk(tmp_path) == 3 * FILE


def test_it_leaves_the_disk_its_reserve(tmp_path):
    open_cache(tmp_path, 1).save(digest(1), payload(1))
    cache = open_cache(tmp_path, 1, reserve_bytes=1 << 60)
    assert not cache.save(digest(2), payload(2))
    assert "free on the disk" in cache.note
    assert loaded(cache, 1) == payload(1)


def test_a_file_in_place_of_the_folder_is_told_not_raised(tmp_path):
    (tmp_path / "kv").write_text("a file")
    cache = open_cache(tmp_path / "kv")
    assert not cache.save(digest(1), payload(1))
    assert str(tmp_path / "kv") in cache.note
    assert digest(1) not in cache
    assert loaded(cache, 1) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_still_gives_what_it_has(tmp_path):
    open_cache(tmp_path).save(digest(1), payload(1))
    folders = [tmp_path, *(p for p in tmp_path.iterdir() if p.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        cache = open_cache(tmp_path)
        assert loaded(cache, 1) == payload(1)
        assert not cache.save(digest(2), payload(2))
        assert "ermission" in cache.note
    finally:
        for folder in folders:
            folder.chmod(0o700)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["writev", "replace"])
def test_a_failing_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch, code, call):
    cache = open_cache(tmp_path)
    cache.save(digest(1), payload(1))

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert not cache.save(digest(2), payload(2))
    assert os.strerror(code) in cache.note
    assert bytes_on_disk(tmp_path) == FILE
    assert cache.save(digest(2), payload(2))


def test_a_folder_that_cannot_be_listed_for_a_moment_is_not_taken_for_empty(tmp_path, monkeypatch):
    cache = open_cache(tmp_path, 2)
    for number in (1, 2):
        cache.save(digest(number), payload(number))

    def fail(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        assert digest(1) in cache
        assert digest(3) not in cache
        assert not cache.save(digest(3), payload(3))
        assert "Too many open files" in cache.note
    assert cache.blocks == 2
    assert cache.save(digest(3), payload(3))
    assert bytes_on_disk(tmp_path) == 2 * FILE


def test_blocks_that_cannot_be_opened_for_a_moment_still_count(tmp_path, monkeypatch):
    cache = open_cache(tmp_path, 2)
    for number in (1, 2):
        cache.save(digest(number), payload(number))

    def fail(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert loaded(cache, 1) is None
        assert not cache.save(digest(1), payload(1))
    assert cache.bytes == 2 * FILE
    assert cache.save(digest(3), payload(3))
    assert bytes_on_disk(tmp_path) == 2 * FILE
    assert loaded(cache, 2) == payload(2)


def test_a_disk_that_fills_in_the_middle_of_a_block_keeps_no_half_of_it(tmp_path):
    resource_limit = HEADER_BYTES + BLOCK - 1000
    child = run(
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({resource_limit}, {resource_limit}))\n"
        "cache = open_cache(folder)\n"
        "assert not cache.save(digest(1), payload(1))\n"
        "assert 'too large' in cache.note, cache.note\n"
        "assert bytes_on_disk(folder) == 0\n",
        tmp_path,
    )
    assert child.wait(60) == 0, child.stderr.read()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_two_processes_share_a_folder_and_its_limit(tmp_path):
    program = (
        "cache = open_cache(folder, 8)\n"
        "rng = np.random.default_rng(int(sys.argv[2]))\n"
        "for number in map(int, rng.integers(0, 20, 600)):\n"
        "    if number % 2:\n"
        "        assert cache.save(digest(number), payload(number)), cache.note\n"
        "    else:\n"
        "        got = loaded(cache, number + 1)\n"
        "        assert got is None or got == payload(number + 1)\n"
        "print('fine')\n"
    )
    children = [run(program, tmp_path, seed) for seed in (1, 2)]
    most = 0
    while any(child.poll() is None for child in children):
        seen = 0
        for path in tmp_path.rglob("*.*"):
            try:
                seen += -(-path.stat().st_size // 4096) * 4096
            except FileNotFoundError:
                continue
        most = max(most, seen)
        time.sleep(0.001)
    for child in children:
        assert child.stdout.read() == "fine\n", child.stderr.read()
    # Looking takes a while, in which one file may be removed and another appear.
    assert most <= (8 + 2 + 2) * FILE
    assert bytes_on_disk(tmp_path) <= (8 + 1) * FILE
    cache = open_cache(tmp_path, 8)
    assert 0 < cache.blocks <= 9
    assert all(loaded(cache, n) == payload(n) for n in range(20) if digest(n) in cache)


def test_what_another_process_saved_or_used_is_seen(tmp_path, monkeypatch):
    mine, theirs = open_cache(tmp_path, 3), open_cache(tmp_path, 3)
    for number in (1, 2, 3):
        mine.save(digest(number), payload(number))
    assert loaded(theirs, 1) == payload(1)
    assert mine.save(digest(4), payload(4))  # 2 goes: the other cache used 1
    assert [n for n in (1, 2, 3, 4) if path_of(tmp_path, n).exists()] == [1, 3, 4]
    assert loaded(theirs, 4) == payload(4)
    assert loaded(theirs, 2) is None
    theirs.save(digest(5), payload(5))
    monkeypatch.setattr("localllm.engine.disk_cache._LOOK_AGAIN", 0)
    assert digest(5) in mine


def test_killed_writers_leave_only_whole_blocks_or_what_the_next_start_removes(tmp_path):
    program = (
        "cache = open_cache(folder, 30)\n"
        "print('go', flush=True)\n"
        "for number in range(10**9):\n"
        "    cache.save(digest(number % 50), payload(number % 50))\n"
    )
    rng = np.random.default_rng(0)
    for _ in range(examples(8)):
        child = run(program, tmp_path)
        child.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.03)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert bytes_on_disk(tmp_path) <= 30 * FILE
        for number in range(50):
            if path_of(tmp_path, number).exists():
                assert loaded(open_cache(tmp_path), number) == payload(number)
        assert not list(tmp_path.glob("parts/*"))


def test_an_unfinished_file_counts_until_its_writer_is_dead(tmp_path):
    (tmp_path / "parts").mkdir()
    child = run(
        "from localllm.hub.lock import locked_part\n"
        "handle, part = locked_part(folder / 'parts')\n"
        "print(part, flush=True)\n"
        "sys.stdin.read() or __import__('time').sleep(60)\n",
        tmp_path,
    )
    part = Path(child.stdout.readline().strip())
    cache = open_cache(tmp_path, 3)
    for number in range(3):
        assert cache.save(digest(number), payload(number))
    assert part.exists()
    assert cache.blocks == 2  # the third place is the unfinished one's
    child.kill()
    child.wait()
    assert cache.save(digest(3), payload(3))
    assert (cache.blocks, part.exists()) == (3, False)
