"""Lines of JSON between the app and its engine; bounded, and nothing in them is ever executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from localllm import errors
from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tui.engine.client import EngineGone

MAX_LINE = 32 << 20  # bytes


def line(message: Mapping[str, Any]) -> bytes:
    """Raises InvalidRequest for a message that is too long."""
    data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    if len(data) >= MAX_LINE:
        raise InvalidRequest(
            f"a message of {len(data):,} bytes is more than the engine takes ({MAX_LINE:,})",
            hint="leave some of the text or the attachments out",
        )
    return data + b"\n"


def message_of(data: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object."""
    try:
        found = json.loads(data.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def error_fields(error: BaseException) -> dict[str, Any]:
    if isinstance(error, LocalLLMError):
        return {"kind": type(error).__name__, "message": str(error), "hint": error.hint}
    if isinstance(error, MemoryError):
        return {
            "kind": "OutOfMemoryPlan",
            "message": "there is not enough memory for this",
            "hint": "choose a smaller model or a shorter context",
        }
    first_line = str(error).partition("\n")[0]
    return {
        "kind": "EngineGone",
        "message": f"the engine failed: {type(error).__name__}: {first_line}",
        "hint": None,
    }


def error_from(fields: Mapping[str, Any]) -> LocalLLMError:
    kind = getattr(errors, str(fields.get("kind")), EngineGone)
    if not (isinstance(kind, type) and issubclass(kind, LocalLLMError)):
        kind = EngineGone
    hint = fields.get("hint")
    return kind(str(fields.get("message")), hint=None if hint is None else str(hint))
