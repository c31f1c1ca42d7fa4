"""The command starts quickly because it loads nothing that it does not need yet.

The time itself is measured by benchmarks/startup.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from localllm.cli import at_once
from localllm.cli.app import program
from localllm.tui.opening import Opening

HEAVY = (
    "huggingface_hub",
    "jinja2",
    "mlx",
    "numpy",
    "pydantic",
    "rich",
    "sentencepiece",
    "textual",
    "tokenizers",
    "torch",
    "transformers",
)
COMMAND = """
import sys
sys.argv = ["localllm", *{arguments!r}]
from localllm.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def loaded_heavy_modules(program: str, folder: Path) -> list[str]:
    """Runs `program` in a new interpreter and asks which of the heavy packages it loaded."""
    ask = f"\nimport sys\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program + ask],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()[-1].removeprefix("loaded:").split()


def test_importing_localllm_loads_nothing_heavy(tmp_path: Path) -> None:
    assert loaded_heavy_modules("import localllm", tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["chat", "--help"],
        ["batch", "--help"],
        ["finetune", "--help"],
        ["runs", "--help"],
        ["doctor", "--help"],
        ["bench", "--help"],
    ],
    ids=" ".join,
)
def test_asking_the_command_for_help_loads_nothing_heavy(
    arguments: list[str], tmp_path: Path
) -> None:
    assert loaded_heavy_modules(COMMAND.format(arguments=arguments), tmp_path) == []


REACHED = "import localllm.tui.start as app\napp.start = print\n"
REACHED += "import localllm.cli.at_once as screen\nscreen.has_screen = lambda: True\n"


def test_the_chat_app_is_reached_without_a_library_that_checks_options(tmp_path: Path) -> None:
    program = REACHED + "import localllm.cli.chat as command\ncommand.has_screen = lambda: True\n"
    arguments = ["chat", "some:model", "--system", "Be brief", "--resume"]
    program += COMMAND.format(arguments=arguments)
    assert loaded_heavy_modules(program, tmp_path) == []


def test_the_chat_app_is_reached_without_the_parser_where_there_is_nothing_to_parse(
    tmp_path: Path,
) -> None:
    program = REACHED + COMMAND.format(arguments=["chat", "some:model", "--resume"])
    program += "\nassert 'typer' not in sys.modules"
    assert loaded_heavy_modules(program, tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["some:model"], ["--resume"], ["--new"], ["some:model", "--resume"], ["--new", "a/path"]],
    ids=" ".join,
)
def test_without_the_parser_it_begins_as_with_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Opening] = []
    monkeypatch.setattr("localllm.tui.start.start", opened.append)
    for module in ("at_once", "chat"):
        monkeypatch.setattr(f"localllm.cli.{module}.has_screen", lambda: True)
    program(["chat"])(["chat", *arguments], standalone_mode=False)
    assert [at_once.opening(["chat", *arguments])] == opened


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--help"],
        ["chat", "--top-k", "40"],
        ["chat", "one:model", "another:model"],
        ["chat", "--resume", "--new"],
        ["chat", ""],
        ["run", "some:model"],
        [],
    ],
    ids=" ".join,
)
def test_what_has_to_be_parsed_or_refused_is_left_to_the_parser(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localllm.cli.at_once.has_screen", lambda: True)
    assert at_once.opening(arguments) is None


def test_options_are_checked_all_the_same(tmp_path: Path) -> None:
    for wrong in (["--port", "0"], ["--top-k", "many"], ["--temperature", "-1"]):
        run = subprocess.run(
            [sys.executable, "-c", COMMAND.format(arguments=["chat", *wrong])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 1  # the program's own check that it ended well
        assert f"Invalid value for '{wrong[0]}'" in run.stderr


def test_the_check_sees_a_heavy_import(tmp_path: Path) -> None:
    assert loaded_heavy_modules("import numpy", tmp_path) == ["numpy"]


def test_public_names_load_when_they_are_used(tmp_path: Path) -> None:
    loaded = loaded_heavy_modules("from localllm import SamplingParams", tmp_path)
    assert "mlx" not in loaded
    assert "transformers" not in loaded
