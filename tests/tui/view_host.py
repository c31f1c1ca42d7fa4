"""A small app to test screens in: what they ask of the chat app, and nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen

from localllm.tui.store import Chat, Message, Store


class Answers:
    """gone_on: the messages that were to be continued."""

    def __init__(self) -> None:
        self.gone_on: list[int] = []
        self.live: dict[int, Any] = {}
        self.opened: str | None = None

    def params(self, chat: Chat) -> dict[str, Any]:
        return {"max_tokens": 64, **chat.params}

    def usual(self) -> dict[str, Any]:
        return {"temperature": 0.6}

    def offered(self) -> list[Any]:
        return []

    def go_on(self, message: Message) -> None:
        self.gone_on.append(message.id)


class HostApp(App[None]):
    """screen: what is opened first. opened: the chats and messages that were shown."""

    def __init__(self, engine: Any, screen: Screen[Any] | None = None) -> None:
        super().__init__()
        self.store = Store(":memory:")
        self.engine = engine
        self.answers = Answers()
        self.chat_id: int | None = None
        self.opened: list[tuple[int, int | None]] = []
        self._first = screen
        self.animation_level = "none"

    def on_mount(self) -> None:
        if self._first is not None:
            self.push_screen(self._first)

    async def open_chat(self, chat: int, message: int | None = None) -> None:
        self.chat_id = chat
        self.opened.append((chat, message))

    def need_chat(self) -> Chat:
        if self.chat_id is None:
            self.chat_id = self.store.new_chat(model="smollm2:135m").id
        return self.store.chat(self.chat_id)

    def with_chat(self, *said: str, system: str = "", **fields: Any) -> int:
        """A chat in which user and assistant took turns; returns its number."""
        chat = self.store.new_chat(model="smollm2:135m", system=system, **fields)
        parent = None
        for number, text in enumerate(said):
            role = "assistant" if number % 2 else "user"
            parent = self.store.add_message(chat.id, parent, role, text).id  # type: ignore[arg-type]
        self.chat_id = chat.id
        return chat.id


async def until(pilot: Pilot[None], done: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for a condition; fails when it does not come true in time."""
    async with asyncio.timeout(seconds):
        while not done():
            await pilot.pause(0.01)


def run(
    make: Callable[[], HostApp] | None = None, size: tuple[int, int] = (110, 36)
) -> Callable[[Callable[[HostApp, Pilot[None]], Awaitable[None]]], Callable[..., None]]:
    """A test that drives an app, of the fixture `app` or made by `make`."""

    def wrap(test: Callable[[HostApp, Pilot[None]], Awaitable[None]]) -> Callable[..., None]:
        async def drive(app: HostApp) -> None:
            async with app.run_test(size=size) as pilot:
                await pilot.pause()
                await test(app, pilot)

        if make is None:

            def driven(app: HostApp) -> None:
                asyncio.run(drive(app))
        else:

            def driven() -> None:  # type: ignore[misc]
                asyncio.run(drive(make()))

        # Not functools.wraps: pytest would look at the wrapped one's arguments.
        driven.__name__, driven.__doc__ = test.__name__, test.__doc__
        return driven

    return wrap
