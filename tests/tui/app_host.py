"""The whole app on an engine that needs no model, for Pilot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localllm.tui.app import ChatApp
from localllm.tui.opening import Opening
from localllm.tui.settings import Settings
from localllm.tui.store import Store
from tests.tui.fake_engine import FakeEngine

NOWHERE = Path("/nonexistent/localllm-config")


def chat_app(
    engine: FakeEngine | None = None,
    store: Store | None = None,
    *,
    config: Path = NOWHERE,
    settings: Settings | None = None,
    **opening: Any,
) -> ChatApp:
    return ChatApp(
        Store(":memory:") if store is None else store,
        engine or FakeEngine(),
        settings or Settings(titles=False),
        Opening(**opening),
        config=config,
    )


async def until(condition: Callable[[], Any], what: str = "", seconds: float = 20) -> None:
    """Waits for a condition; a test never waits for a time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what or condition}"
        await asyncio.sleep(0.01)


async def say(pilot: Any, text: str) -> None:
    """Types a message and sends it."""
    app = pilot.app
    await until(lambda: app.ready, "the commands are bound")
    app.chat_screen.composer.focus()
    app.chat_screen.composer.put(text)
    await pilot.press("enter")
    await pilot.pause()


async def answered(pilot: Any) -> None:
    app = pilot.app
    await until(lambda: not app.answers.live, "the answer ended")
    await pilot.pause()


def told(app: ChatApp) -> list[tuple[str, str]]:
    """The open branch as (role, text)."""
    chat = app.chat
    assert chat is not None
    return [(m.role, m.content) for m in app.store.branch(chat.head)]


def shown(app: ChatApp) -> str:
    """The text on the screen, lines in order."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())
