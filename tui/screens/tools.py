"""Tools the model may call: which are on, what they may read, the MCP servers behind some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localllm.errors import LocalLLMError
from localllm.tui.screens.view import View
from localllm.tui.text import plain
from localllm.tui.tool_settings import (
    MOST_ROUNDS,
    ToolSettings,
    allow,
    allowed,
    read_tool_settings,
    write_tool_settings,
)
from localllm.tui.widgets.approval import shown_json
from localllm.tui.widgets.confirm import AskText, Confirm
from localllm.tui.widgets.table import Table, cell

_EVERY = 1.0  # seconds between two looks at the servers


@dataclass(frozen=True)
class ToolFacts:
    """name: "server/tool" for one of an MCP server. parameters: a JSON schema."""

    name: str
    source: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class ServerFacts:
    """state: "off", "starting", "running" or "failed"; error: why it failed."""

    name: str
    command: str
    state: str
    tools: int = 0
    error: str = ""


class ToolBox(Protocol):
    """What the screen asks of the app's tools."""

    def tools(self) -> Sequence[ToolFacts]:
        """All that could be turned on now."""
        ...

    def servers(self) -> Sequence[ServerFacts]: ...

    def changed(self, settings: ToolSettings) -> None:
        """Servers are started or ended, and the rest holds from the next answer on."""
        ...

    @property
    def config(self) -> Path:
        """Where the servers are written down: mcp.toml."""
        ...


class ToolsScreen(View):
    """Nothing is on until it is turned on here; every call asks first, unless allowed."""

    TITLE_TEXT = "Tools"
    DEFAULT_CSS = """
    ToolsScreen Horizontal.columns { height: 1fr; }
    ToolsScreen Table { width: 3fr; height: 1fr; }
    ToolsScreen #detail { width: 2fr; height: 1fr; padding: 0 1; border-left: vkey $panel; }
    ToolsScreen.-narrow Horizontal.columns { layout: vertical; }
    ToolsScreen.-narrow Table { width: 1fr; }
    ToolsScreen.-narrow #detail { width: 1fr; border-left: none; border-top: hkey $panel; }
    ToolsScreen #settings { height: auto; padding: 0 1; background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "folder", "Folder to read"),
        Binding("m", "servers", "MCP servers on or off"),
        Binding("s", "again", "Start ended servers"),
        Binding("r", "rounds", "Rounds"),
        Binding("a", "ask_again", "Ask again for all"),
    ]

    def __init__(self, box: ToolBox | None = None) -> None:
        super().__init__()
        self._given = box
        self._tools: dict[str, ToolFacts] = {}
        self._settings = ToolSettings()

    @property
    def _box(self) -> ToolBox:
        return self._given or cast(ToolBox, self.app.tools)  # type: ignore[attr-defined]

    def body(self) -> ComposeResult:
        yield Static("", id="settings", markup=False)
        with Horizontal(classes="columns"):
            tool, source = (28, 16) if self.app.size.width >= 120 else (18, 8)
            yield Table(
                ("", 2), ("tool", tool), ("from", source), ("what it does", None), enter="On or off"
            )
            with VerticalScroll(id="detail"):
                yield Static("", id="facts", markup=False)

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self._read()
        self.set_interval(_EVERY, self._look)

    def _look(self) -> None:
        if self.is_current and self._settings.servers:
            self._read()

    def _read(self) -> None:
        self._settings = settings = read_tool_settings(self.store)
        self._tools = {tool.name: tool for tool in self._box.tools()}
        self.query_one(Table).fill(
            [
                (
                    tool.name,
                    (
                        cell("on" if tool.name in settings.on else "", "green"),
                        cell(tool.name),
                        cell(tool.source),
                        cell(tool.description),
                    ),
                )
                for tool in self._tools.values()
            ]
        )
        on = sum(1 for name in self._tools if name in settings.on)
        self.title_is(f"Tools — {on} of {len(self._tools)} on")
        self.query_one("#settings", Static).update(self._settings_text(settings))
        self._show()

    def _settings_text(self, settings: ToolSettings) -> Content:
        rows = [
            ("folder to read", settings.folder or "none: no file can be read"),
            ("rounds of calls", f"{settings.rounds} for one answer at most"),
        ]
        servers = self._box.servers()
        if not servers:
            rows.append(("MCP servers", f"none; {self._box.config} names them"))
        elif not settings.servers:
            rows.append(("MCP servers", f"{len(servers)}, not started: m starts them"))
        for server in servers if settings.servers else ():
            state = f"{server.state}, {server.tools} tools" if server.tools else server.state
            rows.append((server.name, f"{state}: {server.error or server.command}"))
        chat = self.chat
        if chat is not None and (names := allowed(self.store, chat.id)):
            rows.append(("allowed in this chat", ", ".join(names)))
        lines = [Content.assemble((f"{n:<21}", "dim"), plain(text)) for n, text in rows]
        return Content("\n").join(lines)

    def on_data_table_row_highlighted(self) -> None:
        self._show()

    def _show(self) -> None:
        tool = self._tools.get(self.query_one(Table).current or "")
        if tool is None:
            return
        self.query_one("#facts", Static).update(
            Content("\n").join(
                [
                    Content.styled(plain(tool.name), "bold $primary"),
                    Content.styled(plain(tool.source), "dim"),
                    Content(plain(tool.description)),
                    Content(""),
                    Content(shown_json(dict(tool.parameters))),
                ]
            )
        )

    def _change(self, settings: ToolSettings) -> None:
        write_tool_settings(self.store, settings)
        try:
            self._box.changed(settings)
        except LocalLLMError as error:
            self.tell(error)
        self._read()

    def on_data_table_row_selected(self) -> None:
        name = self.query_one(Table).current
        if name is not None:
            self._change(self._settings.turned(name, name not in self._settings.on))

    @work(exclusive=True)
    async def action_folder(self) -> None:
        typed = await self.app.push_screen_wait(
            AskText(
                "Folder whose files the model may ask to read; a dot alone is none",
                self._settings.folder or str(Path.home()),
            )
        )
        if typed is None:
            return
        if typed == ".":
            self._change(replace(self._settings, folder=""))
            return
        folder = Path(typed).expanduser().absolute()
        if not folder.is_dir():
            self.tell(f"there is no folder {folder}")
            return
        self._change(replace(self._settings, folder=str(folder)))

    @work(exclusive=True)
    async def action_servers(self) -> None:
        """Starting servers runs programs: that is asked about, with their commands."""
        if self._settings.servers:
            self._change(replace(self._settings, servers=False))
            return
        servers = self._box.servers()
        if not servers:
            self.tell(f"no MCP servers are written down in {self._box.config}")
            return
        commands = "\n".join(f"  {server.name}: {server.command}" for server in servers)
        if await self.app.push_screen_wait(
            Confirm(f"Start these programs on this machine?\n{commands}", yes="Start", no="No")
        ):
            self._change(replace(self._settings, servers=True))

    def action_again(self) -> None:
        """Those that run are left alone."""
        if not self._settings.servers:
            self.tell("the MCP servers are off; m starts them")
            return
        ended = [one.name for one in self._box.servers() if one.state in ("off", "failed")]
        self._change(self._settings)
        self.notify(f"Started: {', '.join(ended)}" if ended else "Every server runs")

    @work(exclusive=True)
    async def action_rounds(self) -> None:
        typed = await self.app.push_screen_wait(
            AskText("Rounds of tool calls for one answer at most", str(self._settings.rounds))
        )
        if typed is None:
            return
        if not typed.isdecimal() or not 1 <= int(typed) <= MOST_ROUNDS:
            self.tell(f"rounds are a number from 1 to {MOST_ROUNDS}")
            return
        self._change(replace(self._settings, rounds=int(typed)))

    def action_ask_again(self) -> None:
        chat = self.chat
        if chat is not None:
            allow(self.store, chat.id, [])
            self._read()
            self.notify("Every call in this chat is asked about again")
