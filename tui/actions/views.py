"""Commands that open the screens beside the chat, rate answers and answer again.

The screens are imported when they are opened: the app's start must not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest
from localllm.tui.commands import Command, register

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp
    from localllm.tui.store import Message


def models(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.models import ModelsScreen

    app.push_screen(ModelsScreen())


def adapters(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.adapters import AdaptersScreen

    app.push_screen(AdaptersScreen())


def parameters(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.parameters import ParametersScreen

    app.push_screen(ParametersScreen())


def prompts(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.prompts import PromptsScreen

    app.push_screen(PromptsScreen())


def compare(app: ChatApp, argument: str) -> None:
    """N: so many answers at once; nothing: the form."""
    from localllm.tui.screens.compare import MOST, CompareScreen, Variant

    if not argument.strip():
        app.push_screen(CompareScreen())
        return
    if not argument.strip().isdecimal() or not 2 <= int(argument) <= MOST:
        raise InvalidRequest(f"/compare takes a number of answers from 2 to {MOST}")
    app.push_screen(CompareScreen([Variant()] * int(argument), run=True))


def engine(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.engine_views import TABS, EngineScreen

    tab = argument.strip() or TABS[0]
    if tab not in TABS:
        raise InvalidRequest(f"/engine shows {', '.join(TABS)}, not {tab!r:.40}")
    app.push_screen(EngineScreen(tab))


def tokens(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.inspector import InspectorScreen

    app.push_screen(InspectorScreen(answer(app).id))


def dataset(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.dataset import DatasetScreen

    app.push_screen(DatasetScreen())


def finetune(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.finetune import FinetuneScreen

    app.push_screen(FinetuneScreen())


def tools(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens.tools import ToolsScreen

    app.push_screen(ToolsScreen())


async def good(app: ChatApp, argument: str) -> None:
    await _rate(app, 1)


async def bad(app: ChatApp, argument: str) -> None:
    await _rate(app, -1)


async def _rate(app: ChatApp, rating: int) -> None:
    from localllm.tui.screens.learning import rate

    message = answer(app)
    made = rate(app.store, message.id, rating)
    now = app.store.message(message.id).rating
    said = {1: "Rated as good", -1: "Rated as bad", 0: "Rating taken back"}[now]
    if made:
        said += f"; {made} preference {'pair' if made == 1 else 'pairs'} kept"
    app.notify(said)
    await app.open_chat(message.chat, None)


async def replay(app: ChatApp, argument: str) -> None:
    """The answer once more, everything as it was: the same model gives the same text."""
    message = answer(app)
    seed = message.params.get("seed", message.receipt.get("seed"))
    chat = app.store.chat(message.chat)
    changed = [
        f"{what} {then or 'none'} then, {now or 'none'} now"
        for what, then, now in (
            ("model", message.model, chat.model or message.model),
            ("adapter", message.adapter, chat.adapter),
        )
        if then != now
    ]
    if changed:
        app.warn(f"The answer may differ: {'; '.join(changed)}")
    # What was set in the chat since did not hold then.
    params = {**message.params, "seed": seed}
    again = app.answers.ask(message.chat, message.parent, params=params, only=True)
    await app.open_chat(message.chat, again.id)


async def teach(app: ChatApp, argument: str) -> None:
    from localllm.tui.screens import learning

    message = answer(app)

    async def keep(better: str | None) -> None:
        sibling = None if better is None else learning.teach(app.store, message.id, better)
        if sibling is not None:
            app.notify("Kept as an example to learn from; the model's answer stays as a sibling")
            await app.open_chat(message.chat, sibling.id)

    app.push_screen(learning.TeachScreen(message), keep)


def answer(app: ChatApp) -> Message:
    """The answer that is chosen in the transcript, else the last one. Raises InvalidRequest."""
    from localllm.tui.actions.tree import chosen

    found = chosen(app, "assistant")
    if found.role != "assistant":
        raise InvalidRequest("this is no answer of the model", hint="choose one, or leave it")
    return found


register(
    Command(
        "models",
        "Models",
        "Choose, pull, inspect and remove models",
        "Model",
        models,
        keys=("f3",),
        slash="models",
        shown_in_footer=True,
    ),
    Command(
        "adapters",
        "Adapters",
        "Turn adapters on and off in this chat, and weigh them",
        "Model",
        adapters,
        slash="adapters",
    ),
    Command(
        "parameters",
        "Parameters",
        "Every sampling parameter, and presets of them",
        "Model",
        parameters,
        keys=("f4",),
        slash="parameters",
        shown_in_footer=True,
    ),
    Command(
        "prompts",
        "Prompts",
        "The system prompt, and a library of prompts with {{variables}}",
        "Chat",
        prompts,
        keys=("alt+p",),
        slash="prompts",
    ),
    Command(
        "compare",
        "Compare answers",
        "Several answers to the last question, side by side; the best goes on",
        "Tree",
        compare,
        keys=("f5",),
        slash="compare",
        argument="[N]",
        complete=lambda app, text: [n for n in "23456" if n.startswith(text)],
    ),
    Command(
        "engine",
        "Engine at work",
        "Speed, context, KV blocks, guesses and the scheduler's lanes",
        "Engine",
        engine,
        keys=("f6",),
        slash="engine",
        shown_in_footer=True,
        argument="[speed|blocks|guesses|lanes]",
        complete=lambda app, text: [
            tab for tab in ("speed", "blocks", "guesses", "lanes") if tab.startswith(text)
        ],
    ),
    Command(
        "tokens",
        "Inspect tokens",
        "How likely each token of an answer was, what else there was; go on from another one",
        "Engine",
        tokens,
        keys=("f7",),
        slash="tokens",
    ),
    Command(
        "rate-good",
        "Good answer",
        "Rate the answer as good; again takes it back",
        "Learning",
        good,
        keys=("plus",),
        slash="good",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "rate-bad",
        "Bad answer",
        "Rate the answer as bad; again takes it back",
        "Learning",
        bad,
        keys=("minus",),
        slash="bad",
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "replay",
        "Answer again with the same seed",
        "Everything as it was, so that the same text comes: the proof that nothing is left to luck",
        "Message",
        replay,
        slash="replay",
    ),
    Command(
        "teach",
        "Write a better answer",
        "Write the answer as it should have been: an example to learn from",
        "Learning",
        teach,
        keys=("w",),
        slash="teach",
        where="message",
    ),
    Command(
        "dataset",
        "Dataset",
        "What there is to learn from: review, delete, find doubles, export",
        "Learning",
        dataset,
        keys=("f8",),
        slash="dataset",
    ),
    Command(
        "finetune",
        "Fine-tune",
        "Train an adapter on your ratings, edits or a file; watch it live",
        "Learning",
        finetune,
        keys=("f9",),
        slash="finetune",
    ),
    Command(
        "tools",
        "Tools",
        "Tools the model may call, their folder, and MCP servers. Off by default",
        "Tools",
        tools,
        keys=("alt+t",),
        slash="tools",
    ),
)
