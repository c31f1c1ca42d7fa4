"""What the date and time are, which no model can know."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from localllm.tui.tools.tool import Tool, ToolFailed


async def _call(arguments: Mapping[str, Any]) -> str:
    name = arguments.get("timezone") or None
    try:
        now = datetime.now().astimezone() if name is None else datetime.now(ZoneInfo(str(name)))
    except (KeyError, ValueError, OSError):
        raise ToolFailed(
            f"there is no time zone {name!r}; they are named like Europe/Paris"
        ) from None
    zone = name or now.tzname() or ""
    return f"{now:%A}, {now.isoformat(timespec='seconds')} ({zone})"


CLOCK = Tool(
    "time",
    "Tells the current date, weekday and time.",
    {
        "type": "object",
        "properties": {
            "timezone": {
                "type": "string",
                "description": "such as Europe/Paris; left out: the one of this machine",
            }
        },
        "additionalProperties": False,
    },
    _call,
    harmless=True,
)
