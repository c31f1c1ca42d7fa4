"""MCP servers: programs that offer tools, spoken to over their stdin and stdout.

Written down in mcp.toml in the folder of settings:

    [servers.files]
    command = "npx"
    args = ["-y", "@modelcontextprotocol/server-filesystem", "/home/me/notes"]
    env = { KEY = "value" }     # beside a few harmless variables; nothing else is passed on
    folder = "/home/me"
    timeout = 60                # seconds for a call

The protocol is the official `mcp` package's (the extra `mcp`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from localllm.errors import InvalidRequest
from localllm.tui.text import plain
from localllm.tui.tools.tool import Tool, ToolFailed

if TYPE_CHECKING:
    from mcp import ClientSession

FILE = "mcp.toml"
MOST_SERVERS = 32
MOST_TOOLS = 128  # of a server
_MOST_BYTES = 1 << 20  # of the file
_MOST_DESCRIPTION = 2000  # characters
_MOST_SCHEMA = 20_000  # characters of JSON
_START_SECONDS = 30.0
_CALL_SECONDS = 60.0
_END_SECONDS = 3.0
_LAST_WORDS = 500

State = Literal["off", "starting", "running", "failed"]


@dataclass(frozen=True)
class ServerEntry:
    """A server as mcp.toml names it. timeout: seconds for a call."""

    name: str
    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    timeout: float = _CALL_SECONDS

    @property
    def line(self) -> str:
        """The command as it is typed."""
        return " ".join([self.command, *self.args])


def read_servers(path: Path) -> list[ServerEntry]:
    """Empty where there is no such file. Raises InvalidRequest naming what is wrong in it."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise InvalidRequest(f"{path} has more than {_MOST_BYTES:,} bytes")
        found = tomllib.loads(data.decode())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of TOML and of UTF-8
        raise InvalidRequest(f"{path}: {error}") from error
    servers = found.get("servers", {})
    if not isinstance(servers, dict) or len(servers) > MOST_SERVERS:
        raise InvalidRequest(f"{path}: servers must be tables, {MOST_SERVERS} at most")
    return [_entry(path, name, fields) for name, fields in servers.items()]


def _entry(path: Path, name: str, fields: Any) -> ServerEntry:
    where = f"{path}: servers.{name}"
    forms = {"command": str, "args": list, "env": dict, "folder": str, "timeout": (int, float)}
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{where} must be a table")
    for key, value in fields.items():
        form = forms.get(key)
        if form is None:
            raise InvalidRequest(f"{where} knows no {key!r}", hint=f"it knows {', '.join(forms)}")
        if not isinstance(value, form) or isinstance(value, bool):  # type: ignore[arg-type]
            raise InvalidRequest(f"{where}.{key} is of the wrong type")
    if not fields.get("command"):
        raise InvalidRequest(f"{where} needs a command")
    texts = [*fields.get("args", ()), *fields.get("env", {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{where}: args and env hold texts")
    if not 0 < fields.get("timeout", _CALL_SECONDS) <= 3600:
        raise InvalidRequest(f"{where}.timeout must be seconds, 3600 at most")
    return ServerEntry(
        name,
        fields["command"],
        tuple(fields.get("args", ())),
        fields.get("env", {}),
        fields.get("folder"),
        float(fields.get("timeout", _CALL_SECONDS)),
    )


class Server:
    """One server, from its start to its end. A task of its own holds the connection: what the
    protocol's library opens must be closed by the task that opened it."""

    def __init__(self, entry: ServerEntry) -> None:
        self.entry = entry
        self.state: State = "off"
        self.error = ""
        self.tools: tuple[Tool, ...] = ()
        self._session: ClientSession | None = None
        self._task: asyncio.Task[None] | None = None
        self._end = asyncio.Event()
        self._settled = asyncio.Event()  # it runs, or has failed

    def start(self) -> None:
        if self._task is None or self._task.done():
            self.state, self.error = "starting", ""
            self._end, self._settled = asyncio.Event(), asyncio.Event()
            self._task = asyncio.create_task(self._run(), name=f"MCP server {self.entry.name}")

    async def settled(self) -> None:
        """Returns once it runs or has failed."""
        if self._task is not None:
            await self._settled.wait()

    async def stop(self) -> None:
        self._end.set()
        task, self._task = self._task, None
        if task is not None:
            _, pending = await asyncio.wait([task], timeout=_END_SECONDS)
            for one in pending:
                one.cancel()
                await asyncio.wait([one], timeout=_END_SECONDS)
        self.state = "off"

    async def _run(self) -> None:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
            try:
                await self._live(words)
                self.state = "off"
            except asyncio.CancelledError:
                self.state = "off"
                raise
            except BaseException as error:
                self.state, self.error = "failed", _why(error, words)
            finally:
                self._session, self.tools = None, ()
                self._settled.set()

    async def _live(self, words: IO[str]) -> None:
        try:
            from mcp import ClientSession, StdioServerParameters
            from mcp.client.stdio import stdio_client
        except ImportError as error:
            raise InvalidRequest(
                "MCP servers need the package mcp: pip install 'localllm[mcp]'"
            ) from error
        entry = self.entry
        parameters = StdioServerParameters(
            command=entry.command,
            args=list(entry.args),
            env=dict(entry.env),
            cwd=None if entry.folder is None else Path(entry.folder).expanduser(),
            encoding_error_handler="replace",
        )
        # The type of errlog asks for a text file; it must be a real one, as the child writes to it.
        async with (
            stdio_client(parameters, errlog=words) as (read, write),  # type: ignore[arg-type]
            ClientSession(read, write) as session,
        ):
            async with asyncio.timeout(_START_SECONDS):
                await session.initialize()
                self.tools = await self._list(session)
            self._session = session
            self.state = "running"
            self._settled.set()
            await self._until_end(session)

    async def _until_end(self, session: ClientSession) -> None:
        """Looks now and then whether it still answers; one that has gone would never be told of."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), 5.0)
            if self._end.is_set():
                return
            async with asyncio.timeout(_START_SECONDS):
                await session.send_ping()

    async def _list(self, session: ClientSession) -> tuple[Tool, ...]:
        from mcp.types import PaginatedRequestParams

        tools: dict[str, Tool] = {}
        cursor: str | None = None
        for _ in range(MOST_TOOLS):
            page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
            for told in page.tools:
                tool = self._tool(told)
                if tool is not None and len(tools) < MOST_TOOLS:
                    tools.setdefault(tool.called, tool)
            cursor = page.next_cursor
            if not cursor or len(tools) >= MOST_TOOLS:
                break
        return tuple(tools.values())

    def _tool(self, told: Any) -> Tool | None:
        """None for one whose schema is beyond all bounds."""
        schema = told.input_schema or {}
        if not isinstance(schema, dict) or len(json.dumps(schema, default=str)) > _MOST_SCHEMA:
            return None

        async def call(arguments: Mapping[str, Any], name: str = told.name) -> str:
            return await self._call(name, arguments)

        description = plain(told.description or "")[:_MOST_DESCRIPTION]
        name = plain(told.name)[:64]
        return Tool(f"{self.entry.name}/{name}", description, schema, call, self.entry.name)

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        session = self._session
        if session is None:
            raise ToolFailed(f"the server {self.entry.name} is not running")
        try:
            async with asyncio.timeout(self.entry.timeout):
                result: Any = await session.call_tool(name, dict(arguments))
        except TimeoutError:
            raise ToolFailed(
                f"the server {self.entry.name} did not answer within {self.entry.timeout:g} seconds"
            ) from None
        except Exception as error:  # whatever the protocol's library makes of a bad answer
            raise ToolFailed(f"the server {self.entry.name}: {plain(str(error))[:500]}") from error
        text = content_text(result.content)
        if result.is_error:
            raise ToolFailed(text or "the tool failed")
        return text


def content_text(content: Sequence[Any]) -> str:
    """A result's texts; of what is no text, that it was there."""
    parts = []
    for part in content:
        kind = getattr(part, "type", "")
        inner = getattr(part, "resource", None)
        text = getattr(part, "text", None) or getattr(inner, "text", None)
        if isinstance(text, str):
            parts.append(plain(text))
        elif kind == "resource_link":
            parts.append(f"[a link to {plain(str(getattr(part, 'uri', '')))[:500]}]")
        else:
            form = (
                getattr(part, "mime_type", None) or getattr(inner, "mime_type", None) or "unknown"
            )
            parts.append(f"[{kind or 'something'} of type {plain(str(form))[:80]}, no text]")
    return "\n".join(parts)


def _why(error: BaseException, words: IO[str]) -> str:
    """In one line, with the last thing the program said."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no {error.filename or 'such program'}"
    told = "it did not answer in time" if isinstance(error, TimeoutError) else str(error)
    try:
        words.seek(0)
        last = plain(words.read()[-_LAST_WORDS:]).strip().splitlines()
    except (OSError, ValueError):
        last = []
    name = type(error).__name__
    return "; ".join([told or name, *last[-1:]])[:_LAST_WORDS]
