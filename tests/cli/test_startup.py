"""The command starts quickly because it loads nothing that it does not need yet.

The time itself is measured by benchmarks/startup.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "huggingface_hub",
    "jinja2",
    "mlx",
    "numpy",
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


def test_the_check_sees_a_heavy_import(tmp_path: Path) -> None:
    assert loaded_heavy_modules("import numpy", tmp_path) == ["numpy"]


def test_public_names_load_when_they_are_used(tmp_path: Path) -> None:
    loaded = loaded_heavy_modules("from localllm import SamplingParams", tmp_path)
    assert "mlx" not in loaded
    assert "transformers" not in loaded
