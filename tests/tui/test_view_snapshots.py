"""Pictures of the screens beside the chat. `pytest --snapshot-update` takes them anew."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input, TextArea

from localllm.tui.screens.adapters import KNOWN, AdaptersScreen
from localllm.tui.screens.compare import CompareScreen, Variant
from localllm.tui.screens.dataset import DatasetScreen
from localllm.tui.screens.engine_views import TABS, EngineScreen
from localllm.tui.screens.finetune import FinetuneScreen
from localllm.tui.screens.inspector import InspectorScreen
from localllm.tui.screens.learning import TeachScreen
from localllm.tui.screens.models import ModelsScreen
from localllm.tui.screens.parameters import ParametersScreen
from localllm.tui.screens.prompts import PromptsScreen
from localllm.tui.screens.tools import ToolsScreen
from localllm.tui.store import Preset, Prompt
from localllm.tui.tokens import TokenView, keep_tokens
from localllm.tui.trace import trace_of
from localllm.tui.widgets.approval import ApprovalScreen
from tests.tui.fake_engine import RECEIPT, FakeEngine
from tests.tui.screens.test_engine_views import BLOCKS, EVENTS
from tests.tui.screens.test_models import FakeLibrary
from tests.tui.screens.test_tools import FakeBox
from tests.tui.view_host import HostApp

WIDE, NARROW = (120, 36), (60, 30)
# The other two of each four are slow tests.
LOOKS = [
    pytest.param(WIDE, "textual-dark", id="wide-dark"),
    pytest.param(NARROW, "textual-light", id="narrow-light"),
    pytest.param(WIDE, "textual-light", id="wide-light", marks=pytest.mark.slow),
    pytest.param(NARROW, "textual-dark", id="narrow-dark", marks=pytest.mark.slow),
]
ANSWER = "Air scatters [b]blue[/b] light more\nthan red light does, so the sky is blue."


class _Job:
    name = "smollm2-135m-20260101-120000"
    out = Path("/runs") / name

    def status(self) -> str:
        return "running"

    def metrics(self) -> list[dict[str, Any]]:
        def loss(step: int) -> float:
            return 0.3 + 2.5 * math.exp(-step / 30) + 0.1 * math.sin(step)

        steps = [
            {
                "type": "step",
                "step": step,
                "steps": 200,
                "loss": loss(step),
                "tokens_per_second": 812.3,
                "memory_bytes": 1_200_000_000,
                "seconds": 0.5,
            }
            for step in range(1, 121)
        ]
        valid = [{"type": "eval", "step": n, "loss": loss(n) + 0.2} for n in range(20, 121, 20)]
        answers = [{"prompt": "Why is the sky [b]blue[/b]?", "answer": "Because of the air."}]
        return [*steps, *valid, {"type": "samples", "step": 100, "answers": answers}]

    def log_tail(self) -> str:
        return ""

    def adapter(self) -> Path:
        return self.out


class _Jobs:
    def __init__(self) -> None:
        self._job = _Job()

    def all(self) -> list[Any]:
        return [self._job]


SCREENS: dict[str, Callable[[HostApp, int], Screen[Any]]] = {
    "models": lambda app, head: ModelsScreen(FakeLibrary()),
    "adapters": lambda app, head: AdaptersScreen(_Jobs()),  # type: ignore[arg-type]
    "parameters": lambda app, head: ParametersScreen(),
    "prompts": lambda app, head: PromptsScreen(),
    "compare": lambda app, head: CompareScreen(
        [Variant(temperature=0.0), Variant(temperature=1.2), Variant(seed=5)], run=True
    ),
    "compare-form": lambda app, head: CompareScreen(),
    "tokens": lambda app, head: InspectorScreen(head),
    "dataset": lambda app, head: DatasetScreen(),
    "finetune": lambda app, head: FinetuneScreen(_Jobs()),  # type: ignore[arg-type]
    "teach": lambda app, head: TeachScreen(app.store.message(head)),
    "tools": lambda app, head: ToolsScreen(FakeBox()),
    "approval": lambda app, head: ApprovalScreen(
        "read_file", {"path": "notes/[b]todo[/b].txt"}, source="built in", description="Reads it"
    ),
    **{f"engine-{tab}": lambda app, head, tab=tab: EngineScreen(tab) for tab in TABS},
}


def make(theme: str) -> tuple[HostApp, int]:
    """A chat with something of everything; its last answer."""
    app = HostApp(FakeEngine(script=_answer, blocks=BLOCKS))
    app.theme = theme
    chat = app.with_chat("Why is the sky [b]blue[/b]?", ANSWER, system="Be brief.")
    store, head = app.store, app.store.chat(chat).head
    assert head is not None
    store.edit_message(head, receipt=dict(RECEIPT))
    prompt = [{"role": "user", "content": "Why is the sky [b]blue[/b]?"}]
    store.add_pair(prompt, "Because of the air.", "It just is.", "rating", chat)
    store.add_pair(prompt, "Air scatters blue light.", None, "edit", chat)
    store.save_prompt(Prompt("pirate", "system", "You are a pirate."))
    store.save_prompt(Prompt("translate", "user", "To {{language=French}}: {{text}}"))
    store.save_preset(Preset("careful", {"temperature": 0.2}))
    store.set_setting(KNOWN, ["/adapters/poet"])
    trace = trace_of(app.engine)
    for name, event in EVENTS:
        trace.add(name, event)
    return app, head


def _answer(request: Any) -> str:
    at = request.params.get("temperature", 1)
    return ANSWER if request.logprobs else f"{ANSWER} (at {at})"


@pytest.fixture(autouse=True)
def noon(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    fixed = SimpleNamespace(time=lambda: 1_767_268_800.0)
    monkeypatch.setattr("localllm.tui.store.store.time", fixed)
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(("size", "theme"), LOOKS)
@pytest.mark.parametrize("name", SCREENS)
def test_the_screen_looks_as_it_did(snap_compare, name, size, theme):
    app, head = make(theme)
    if name == "engine-guesses":
        words = enumerate(ANSWER.replace(" ", "| ").split("|"))
        fates = {2: "accepted", 3: "accepted", 6: "rejected"}
        keep_tokens(app, head, [TokenView(n, word, fate=fates.get(n, "own")) for n, word in words])

    async def settle(pilot: Pilot[None]) -> None:
        await app.push_screen(SCREENS[name](app, head))
        for _ in range(4):  # workers end, then what they changed is drawn
            await pilot.pause()
            await app.workers.wait_for_complete(
                [worker for worker in app.workers if worker.group not in ("rows",)]
            )
        if name == "models":
            await _until(pilot, lambda: "30 layers" in str(app.screen.query_one("#facts").content))
        for field in app.screen.query("Input, TextArea"):
            assert isinstance(field, Input | TextArea)
            field.cursor_blink = False
        await pilot.pause()

    assert snap_compare(app, terminal_size=size, run_before=settle)


async def _until(pilot: Pilot[None], done: Callable[[], bool]) -> None:
    for _ in range(500):
        if done():
            return
        await pilot.pause(0.01)
    raise AssertionError("it did not settle")
