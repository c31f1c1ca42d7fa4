from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from textual.widgets import Input, Static

from localllm import hub
from localllm.errors import DownloadError, LocalLLMError
from localllm.tui.library import HubLibrary, ModelRow, Pull
from localllm.tui.screens.models import ModelsScreen
from localllm.tui.widgets.table import Table
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import HostApp, run, until


def row(name: str, state: str = "here", needs: int = 500_000_000, **more: Any) -> ModelRow:
    return ModelRow(
        name,
        f"{name} [b]title[/b]",
        state,  # type: ignore[arg-type]
        needs // 2,
        135_000_000,
        8192,
        "Apache-2.0",
        needs,
        state == "here",
        **more,
    )


class FakeLibrary:
    """pulls: those that were begun; the test moves and ends them."""

    def __init__(self) -> None:
        self.pulling: Pull | None = None
        self.pulls: list[Pull] = []
        self.removed: list[str] = []
        self.shown = [
            row("smollm2:135m"),
            row("gemma3:270m"),
            row("broken", "damaged", problem="a file is missing"),
            row("qwen3:8b", "known", 5_300_000_000),
            row("huge:70b", "known", 40_000_000_000),
        ]

    def rows(self) -> list[ModelRow]:
        return list(self.shown)

    def available(self) -> int:
        return 6_000_000_000

    def pull(self, name: str, on_change: Callable[[Pull], None]) -> Pull:
        self.pulling = Pull(name, on_change)
        self.pulls.append(self.pulling)
        return self.pulling

    async def details(self, name: str) -> list[tuple[str, str]]:
        if name == "broken":
            raise LocalLLMError("the header is damaged", hint="pull it again")
        return [("architecture", "llama, 30 layers"), ("context", "8,192 positions")]

    async def plan(self, name: str) -> dict[str, Any]:
        return {
            "items": [{"name": "weights", "bytes": 96_000_000, "detail": "as cpu keeps them"}],
            "peak_bytes": 620_000_000,
            "available_bytes": 400_000_000,
            "fits": False,
            "ways_out": [{"change": "a context of 4k", "peak_bytes": 390_000_000}],
        }

    async def remove(self, name: str) -> str:
        self.removed.append(name)
        self.shown = [one for one in self.shown if one.name != name]
        return f"removed {name}, 250.0 MB freed"


def make() -> HostApp:
    library = FakeLibrary()
    host = HostApp(FakeEngine(), ModelsScreen(library))
    host.library = library  # type: ignore[attr-defined]
    host.with_chat("Hello", "Hi", adapter="/some/adapter")
    return host


@pytest.fixture
def app():
    return make()


def facts(app: HostApp) -> str:
    return str(app.screen.query_one("#facts", Static).content)


async def go(app: HostApp, pilot: Any, name: str) -> None:
    table = app.screen.query_one(Table)
    await until(pilot, lambda: table.row_count >= 4)
    table.move_cursor(row=table.get_row_index(name))
    await pilot.pause()


@run()
async def test_the_list_says_what_is_here_and_what_fits(app, pilot):
    await go(app, pilot, "qwen3:8b")
    table = app.screen.query_one(Table)
    cells = {key.value: [str(c) for c in table.get_row(key)] for key in table.rows}
    assert cells["smollm2:135m"][1] == "in use"
    assert cells["broken"][1] == "damaged"
    assert cells["smollm2:135m"][3] == "~500.0 MB fits"
    assert cells["qwen3:8b"][3] == "~5.3 GB tight"
    assert cells["huge:70b"][3] == "~40.0 GB too large"
    assert cells["qwen3:8b"][4] == "qwen3:8b [b]title[/b]"


@run()
async def test_details_are_read_from_the_models_files(app, pilot):
    await go(app, pilot, "gemma3:270m")
    await until(pilot, lambda: "30 layers" in facts(app))


@run()
async def test_the_memory_plan_tells_what_would_fit(app, pilot):
    await go(app, pilot, "gemma3:270m")
    await pilot.press("m")
    await until(pilot, lambda: "does not fit" in facts(app))
    assert "a context of 4k (390.0 MB)" in facts(app)


@run()
async def test_choosing_one_that_is_here_makes_it_the_chats(app, pilot):
    await go(app, pilot, "gemma3:270m")
    await pilot.press("enter")
    await until(pilot, lambda: app.engine.opened == ["gemma3:270m"] and bool(app.opened))
    chat = app.store.chat(app.chat_id)
    assert chat.model == "gemma3:270m"
    assert app.answers.opened == "gemma3:270m"  # the next answer loads nothing
    assert chat.adapter is None  # it was another model's


@run()
async def test_choosing_one_that_is_not_here_pulls_it_and_uses_it(app, pilot):
    await go(app, pilot, "qwen3:8b")
    await pilot.press("enter")
    (pull,) = app.library.pulls
    pull.update("downloading", 1_000_000_000, 4_600_000_000)
    await until(
        pilot,
        lambda: "1.0 GB of 4.6 GB" in str(app.screen.query_one("#pull-label", Static).content),
    )
    assert app.screen.has_class("-pulling")
    pull.finished = True
    pull.on_change(pull)
    await until(pilot, lambda: app.engine.opened == ["qwen3:8b"])
    assert not app.screen.has_class("-pulling")


@run()
async def test_a_pull_is_cancelled_and_one_at_a_time(app, pilot):
    await go(app, pilot, "qwen3:8b")
    await pilot.press("p")
    await pilot.press("p")
    assert len(app.library.pulls) == 1
    await pilot.press("c")
    assert app.library.pulls[0]._stop.is_set()


@run()
async def test_a_pull_goes_on_when_the_screen_is_left_and_shows_again(app, pilot):
    await go(app, pilot, "qwen3:8b")
    await pilot.press("p", "escape")
    await pilot.pause()
    app.library.pulls[0].update("downloading", 1, 2)
    await app.push_screen(ModelsScreen(app.library))
    await pilot.pause()
    assert app.screen.has_class("-pulling")


@run()
async def test_a_pull_that_failed_is_told(app, pilot):
    await go(app, pilot, "qwen3:8b")
    await pilot.press("p")
    (pull,) = app.library.pulls
    pull.error, pull.finished = DownloadError("[b]no network[/b]", hint="go online"), True
    pull.on_change(pull)
    await until(pilot, lambda: bool(app._notifications))
    (note,) = list(app._notifications)
    assert note.message == "[b]no network[/b]\ngo online"
    assert not note.markup


@run()
async def test_another_name_can_be_typed(app, pilot):
    await go(app, pilot, "qwen3:8b")
    await pilot.press("n")
    assert isinstance(app.focused, Input)
    await pilot.press(*"hf:a/b", "enter")
    assert app.library.pulls[0].name == "hf:a/b"


@run()
async def test_removing_asks_first(app, pilot):
    await go(app, pilot, "gemma3:270m")
    await pilot.press("d")
    await pilot.pause()
    await pilot.press("escape")
    await pilot.pause()
    assert app.library.removed == []
    await pilot.press("d")
    await pilot.pause()
    await pilot.press("y")
    await until(pilot, lambda: app.library.removed == ["gemma3:270m"])
    await until(pilot, lambda: app.screen.query_one(Table).row_count == 4)


@run()
async def test_the_model_in_use_and_one_that_is_not_here_are_not_removed(app, pilot):
    for name in ("smollm2:135m", "qwen3:8b"):
        await go(app, pilot, name)
        await pilot.press("d")
        await pilot.pause()
        assert app.screen.query(Table)
    assert app.library.removed == []


class TestHubLibrary:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path))

    def test_without_models_the_catalog_is_there(self):
        rows = HubLibrary().rows()
        assert {one.state for one in rows} == {"known"}
        assert [one.name for one in rows] == hub.load_catalog().names()
        assert all(one.needs > one.size for one in rows if one.needs is not None)

    def test_a_pull_ends_with_what_the_hub_says(self):
        told: list[bool] = []
        pull = Pull("no-such-model", lambda pull: told.append(pull.finished))
        pull.run()
        assert isinstance(pull.error, LocalLLMError)
        assert told[-1]

    def test_a_cancelled_pull_is_no_error(self, monkeypatch):
        def endless(name, *, progress, **options):
            while True:
                progress.update("downloading", 1, 2)

        monkeypatch.setattr(hub, "pull", endless)
        pull = Pull("smollm2:135m", lambda pull: pull.cancel())
        pull.run()
        assert pull.cancelled
        assert pull.error is None
        assert pull.finished
