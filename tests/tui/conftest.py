"""Engines that many tests share: to begin a process and load a model takes seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localllm.tui.engine.remote import RemoteEngine
from localllm.tui.widgets import approval
from tests.tiny_model import write_tiny_model


class SharedEngine:
    """An engine with a model, and the event loop it belongs to."""

    def __init__(self, model: Path, context: int) -> None:
        self.model = model
        self._engine = RemoteEngine()
        self._runner = asyncio.Runner()
        self._runner.run(self._engine.open(str(model), context=context))

    def run(self, scenario: Callable[[RemoteEngine], Awaitable[Any]]) -> Any:
        return self._runner.run(asyncio.wait_for(scenario(self._engine), 100))

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()


@pytest.fixture(autouse=True)
def answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters answer an approval without a pause before them."""
    monkeypatch.setattr(approval, "PAUSE", 0.0)


@pytest.fixture(scope="session")
def real_engine(smollm2: Path) -> Iterator[SharedEngine]:
    """With SmolLM2."""
    shared = SharedEngine(smollm2, 2048)
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedEngine]:
    """Where it does not matter what is said."""
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    shared = SharedEngine(write_tiny_model(folder, max_position_embeddings=16_384), 4096)
    yield shared
    shared.close()
