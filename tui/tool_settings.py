"""Which tools the model may call, and which calls were allowed for good. Off until turned on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.app import App

    from localllm.tui.store import Store
    from localllm.tui.widgets.approval import Approval

_SETTING = "tools"
_MOST_TOOLS = 200
MOST_ROUNDS = 20


@dataclass(frozen=True)
class ToolSettings:
    """on: names of tools, "server/tool" for those of MCP servers. folder: that files may be read
    in, "" for none. rounds: of calls for one answer, at most. servers: whether the MCP servers of
    mcp.toml are started.
    """

    on: tuple[str, ...] = ()
    folder: str = ""
    rounds: int = 5
    servers: bool = False

    def turned(self, tool: str, on: bool) -> ToolSettings:
        others = tuple(name for name in self.on if name != tool)
        return replace(self, on=(*others, tool)[-_MOST_TOOLS:] if on else others)


def read_tool_settings(store: Store) -> ToolSettings:
    """What is kept; what makes no sense in it is as if it were not there."""
    kept = store.setting(_SETTING, {})
    settings = ToolSettings()
    if not isinstance(kept, dict):
        return settings
    on, folder, rounds = kept.get("on"), kept.get("folder"), kept.get("rounds")
    if isinstance(on, list):
        settings = replace(settings, on=tuple(str(name) for name in on[:_MOST_TOOLS]))
    if isinstance(folder, str):
        settings = replace(settings, folder=folder)
    if isinstance(rounds, int) and 1 <= rounds <= MOST_ROUNDS:
        settings = replace(settings, rounds=rounds)
    return replace(settings, servers=kept.get("servers") is True)


def write_tool_settings(store: Store, settings: ToolSettings) -> None:
    store.set_setting(_SETTING, asdict(settings))


def allowed(store: Store, chat: int) -> list[str]:
    """Tools whose every call was allowed in this chat."""
    kept = store.setting(f"tools allowed in {chat}", [])
    return [str(name) for name in kept] if isinstance(kept, list) else []


def allow(store: Store, chat: int, tools: list[str]) -> None:
    store.set_setting(f"tools allowed in {chat}", tools[-_MOST_TOOLS:])


async def approve(
    app: App[Any],
    store: Store,
    chat: int,
    tool: str,
    arguments: Mapping[str, Any],
    *,
    source: str = "built in",
    description: str = "",
) -> bool:
    """Whether this call may be made; the person is asked unless it was allowed in this chat."""
    from localllm.tui.widgets.approval import ApprovalScreen

    if tool in allowed(store, chat):
        return True
    answered: asyncio.Future[Approval | None] = asyncio.get_running_loop().create_future()

    def told(answer: Approval | None) -> None:
        if not answered.done():
            answered.set_result(answer)

    await app.push_screen(
        ApprovalScreen(tool, arguments, source=source, description=description), told
    )
    answer = await answered
    if answer == "always":
        allow(store, chat, [*allowed(store, chat), tool])
    return answer in ("once", "always")
