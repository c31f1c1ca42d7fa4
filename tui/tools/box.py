"""All tools of the app: the built in ones and those of the MCP servers that run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localllm.errors import InvalidRequest
from localllm.tui.tool_settings import ToolSettings
from localllm.tui.tools.calculator import CALCULATOR
from localllm.tui.tools.clock import CLOCK
from localllm.tui.tools.files import reader
from localllm.tui.tools.servers import FILE, Server, State, read_servers
from localllm.tui.tools.tool import Tool


@dataclass(frozen=True)
class ServerFacts:
    """For the screen of tools. command: as it is typed; error: why it failed."""

    name: str
    command: str
    state: State
    tools: int = 0
    error: str = ""


class AppTools:
    """config: the folder of settings, where mcp.toml is. Used from one event loop."""

    def __init__(self, config: Path, settings: ToolSettings | None = None) -> None:
        self._config = config
        self._settings = settings or ToolSettings()
        self._servers: dict[str, Server] = {}
        self._wrong = ""  # with mcp.toml
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def config(self) -> Path:
        """Where the servers are written down."""
        return self._config / FILE

    def start(self) -> None:
        """Starts the servers, if they are on. Never raises: `servers` tells what is wrong."""
        try:
            self.changed(self._settings)
        except InvalidRequest as error:
            self._wrong = str(error)

    def tools(self) -> Sequence[Tool]:
        """All that could be turned on now."""
        built_in = [CALCULATOR, CLOCK]
        if self._settings.folder:
            built_in.append(reader(Path(self._settings.folder)))
        found = {tool.name: tool for tool in built_in}
        for server in self._servers.values():
            for tool in server.tools:
                found.setdefault(tool.name, tool)
        return tuple(found.values())

    def on(self) -> list[Tool]:
        """Those that the model is offered: turned on, and there."""
        chosen: dict[str, Tool] = {}
        for tool in self.tools():
            if tool.name in self._settings.on:
                chosen.setdefault(tool.called, tool)
        return list(chosen.values())

    @property
    def rounds(self) -> int:
        return self._settings.rounds

    def servers(self) -> Sequence[ServerFacts]:
        """As mcp.toml names them now; a damaged file shows as one that failed."""
        try:
            entries = read_servers(self.config)
        except InvalidRequest as error:
            return [ServerFacts(FILE, str(self.config), "failed", error=str(error))]
        facts = []
        for entry in entries:
            server = self._servers.get(entry.name)
            if server is None:
                facts.append(ServerFacts(entry.name, entry.line, "off"))
            else:
                count = len(server.tools)
                facts.append(ServerFacts(entry.name, entry.line, server.state, count, server.error))
        return facts

    def changed(self, settings: ToolSettings) -> None:
        """Servers are started or ended, and the rest holds from the next answer on.

        Raises InvalidRequest for a damaged mcp.toml; the rest holds all the same.
        """
        self._settings = settings
        wanted = {}
        if settings.servers:
            wanted = {entry.name: entry for entry in read_servers(self.config)}
        for name, server in list(self._servers.items()):
            if wanted.get(name) != server.entry:
                del self._servers[name]
                self._spawn(server)
        for name, entry in wanted.items():
            if name not in self._servers:
                self._servers[name] = Server(entry)
            self._servers[name].start()

    async def settled(self) -> None:
        """Returns once every server runs or has failed."""
        await asyncio.gather(*(server.settled() for server in self._servers.values()))

    async def close(self) -> None:
        servers, self._servers = list(self._servers.values()), {}
        await asyncio.gather(*(server.stop() for server in servers), *self._ending)

    def _spawn(self, server: Server) -> None:
        task = asyncio.create_task(server.stop())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
