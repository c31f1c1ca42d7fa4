"""How the chat's own screens look, narrow and wide, in two themes."""

from __future__ import annotations

import pytest

from localllm.tui.store import Store
from tests.tui.app_host import chat_app, until
from tests.tui.fake_engine import RECEIPT, FakeEngine
from tests.tui.snapshots import screens

pytest.importorskip("pytest_textual_snapshot")

NOW = 1_800_000_000.0
ANSWER = """\
The sky is blue because **short waves** of light are scattered more, as $1/\\lambda^4$:

| colour | wavelength |
| --- | --- |
| blue | 450 nm |
| red | 700 nm |

```python
def scattered(wavelength):
    return wavelength ** -4
```
"""


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr("time.time", lambda: NOW)
    store = Store(":memory:")
    for number, title in enumerate(["Poems about rain", "Taxes", "A recipe for bread"]):
        store.new_chat(title=title, folder="home" if number else "", pinned=number == 2)
    chat = store.new_chat(title="Why is the sky blue?", model="smollm2:135m")
    first = store.add_message(chat.id, None, "user", "Why is the sky blue?")
    store.add_message(chat.id, first.id, "assistant", "Because of air.", model="smollm2:135m")
    answer = store.add_message(
        chat.id,
        first.id,
        "assistant",
        ANSWER,
        reasoning="Rayleigh scattering, so the fourth power.",
        model="smollm2:135m",
        receipt=RECEIPT,
    )
    more = store.add_message(chat.id, answer.id, "user", "And at sunset?")
    store.add_message(chat.id, more.id, "assistant", "Red.", model="smollm2:135m", receipt=RECEIPT)
    return store


def app_of(store):
    return chat_app(FakeEngine(), store, resume=4)


async def opened(pilot):
    await until(lambda: pilot.app.ready and pilot.app.chat_screen.transcript.views)
    await pilot.pause()


@screens
def test_chat(look, snap_compare, store):
    assert look.same(snap_compare, app_of(store), opened)


@screens
def test_engine_gone(look, snap_compare, store):
    async def before(pilot):
        await opened(pilot)
        pilot.app.engine.die()
        await pilot.pause()

    assert look.same(snap_compare, app_of(store), before)


def keys_to(screen, *keys, then=""):
    async def before(pilot):
        await opened(pilot)
        await pilot.press(*keys)
        await until(lambda: type(pilot.app.screen).__name__ == screen)
        await until(lambda: then in pilot.app.export_screenshot(simplify=True))
        await pilot.pause()

    return before


@screens
def test_tree(look, snap_compare, store):
    before = keys_to("TreeScreen", "ctrl+t", then="shared")
    assert look.same(snap_compare, app_of(store), before)


@screens
def test_search(look, snap_compare, store):
    before = keys_to("SearchScreen", "ctrl+f", *"blue", then="messages")
    assert look.same(snap_compare, app_of(store), before)


@screens
def test_siblings(look, snap_compare, store):
    before = keys_to("SiblingsScreen", "ctrl+g", "k", "k", "v", then="2/2")
    assert look.same(snap_compare, app_of(store), before)


@screens
def test_list_of_chats(look, snap_compare, store):
    async def before(pilot):
        await opened(pilot)
        await pilot.press("ctrl+l", "j")
        await pilot.pause()

    assert look.same(snap_compare, app_of(store), before)
