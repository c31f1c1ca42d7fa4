"""Real model files, from the model store; fetched once if they are not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from localllm.errors import LocalLLMError


def _real_model(name: str) -> Path:
    from localllm.hub import resolve

    try:
        return resolve(name).path
    except LocalLLMError as error:
        pytest.skip(f"{name} cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return _real_model("smollm2:135m")


@pytest.fixture(scope="session")
def gemma3_file() -> Path:
    return _real_model("gemma3:270m")
