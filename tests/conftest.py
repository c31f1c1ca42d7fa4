"""What every test may use: real models, and how hypothesis searches.

Tests marked `slow` run with `make test-all`; `make test` leaves them out.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from localllm.hub import resolve
from tests import examples

# No deadline: the machines that run these tests are shared. In CI the same examples every time.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "not slow":
        examples.share = examples.QUICK


@pytest.fixture(scope="session", autouse=True)
def no_packed_weights_of_tests_in_the_store():
    """Tiny models would push the user's own out of it. Tests of the cache have stores of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCALLLM_NO_PACKED_CACHE", "1")
        yield


@pytest.fixture
def ctrl_c():
    """Ctrl-C is heard here and in processes that the test starts, even where a shell that runs
    pytest in the background has it ignored: that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2 135M Instruct as GGUF: Llama architecture, BPE. Fetched once, kept in the store."""
    return resolve("smollm2:135m").path


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M as GGUF: sliding windows, SentencePiece. Fetched once, kept in the store."""
    return resolve("gemma3:270m").path
