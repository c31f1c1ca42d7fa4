"""Pictures of the chat app for docs/tui.md, as SVG in docs/img/tui/.

    python -m scripts.tui_screenshots

The chats are made up, and the engine answers from a script: no model is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from localllm.tui.store import Store
from tests.tui.app_host import chat_app, until
from tests.tui.fake_engine import RECEIPT, FakeEngine

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "img" / "tui"
WIDE, NARROW = (112, 34), (60, 24)
ANSWER = """\
Sunlight holds all colours. Air scatters **short waves** far more than long ones, as \
$I \\propto 1/\\lambda^4$ (Rayleigh, 1871):

| colour | wavelength | scattered |
| --- | --- | --- |
| violet | 400 nm | 9.4 x |
| blue | 450 nm | 5.9 x |
| red | 700 nm | 1 x |

```python
def scattered(wavelength: float) -> float:
    return (700 / wavelength) ** 4
```
"""
TITLES = ("Plan a garden", "Sourdough in winter", "Taxes 2026", "A name for a boat", "Regex help")


def chats() -> Store:
    store = Store(":memory:")
    for number, title in enumerate(TITLES):
        store.new_chat(title=title, folder="home" if number in (0, 1) else "", pinned=number == 0)
    chat = store.new_chat(title="Why is the sky blue?", model="smollm2:135m")
    first = store.add_message(chat.id, None, "user", "Why is the sky blue?")
    facts = {"model": "smollm2:135m", "receipt": RECEIPT}
    store.add_message(chat.id, first.id, "assistant", "Because of the air around us.", **facts)
    answer = store.add_message(
        chat.id,
        first.id,
        "assistant",
        ANSWER,
        reasoning="Rayleigh scattering: the intensity goes with the fourth power.",
        **facts,
    )
    for question, reply in (
        ("And on Mars?", "There dust scatters the red, and sunsets are blue."),
        ("And at sunset?", "The light's way through the air is long: red is left."),
    ):
        more = store.add_message(chat.id, answer.id, "user", question)
        store.add_message(chat.id, more.id, "assistant", reply, **facts)
    return store


async def picture(
    name: str,
    keys: Sequence[str] = (),
    *,
    wait: str = "",
    size: tuple[int, int] = WIDE,
    theme: str = "textual-dark",
) -> None:
    app = chat_app(FakeEngine(), chats(), resume=len(TITLES) + 1)
    async with app.run_test(size=size) as pilot:
        await until(lambda: app.ready and app.chat_screen.transcript.views)
        app.theme = theme
        await pilot.press(*keys)
        await until(lambda: wait.replace(" ", "&#160;") in app.export_screenshot(simplify=False))
        await pilot.pause(0.3)
        text = app.export_screenshot(title="localllm chat")
    (FOLDER / f"{name}.svg").write_text(text + "\n", encoding="utf-8")
    print(FOLDER / f"{name}.svg")


async def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    await picture("chat", ("ctrl+g", "k", "k"))
    await picture("tree", ("ctrl+t",), wait="shared")
    await picture("siblings", ("ctrl+g", "k", "k", "v"), wait="2/2")
    await picture("search", ("ctrl+f", *"scatter"), wait="messages")
    await picture("help", ("f1",), wait="new-chat")
    await picture("commands", tuple("/re"), wait="/re")
    await picture("narrow", size=NARROW, theme="ansi-light")


if __name__ == "__main__":
    asyncio.run(main())
