"""The command as a user runs it: a process of its own, with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model

COMMAND = [sys.executable, "-c", "from localllm.cli import main; main()"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("cli") / "tiny", max_position_embeddings=100_000
    )


@pytest.fixture
def localllm(tmp_path):
    """Runs `localllm ARGUMENTS` and returns the finished process, output as text."""

    def run(*arguments: object, stdin: str | bytes = b"", **environment: str):
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=data,
            capture_output=True,
            timeout=120,
            env={**os.environ, "LOCALLLM_HOME": str(tmp_path / "home"), **environment},
        )
        done.stdout = done.stdout.decode()
        done.stderr = done.stderr.decode()
        return done

    return run
