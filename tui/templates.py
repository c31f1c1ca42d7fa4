"""Prompts with {{variables}}: which ones are asked for, and the text with them filled in.

{{date}}, {{time}} and {{weekday}} are filled in by themselves; {{name}} is asked for, and
{{name=text}} too, beginning with that text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from localllm.errors import InvalidRequest

MOST = 32  # variables of a prompt
_LONGEST = 200_000  # characters of a filled prompt
_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][\w -]{0,40}?)\s*(?:=([^{}\n]{0,400}))?\}\}")
_OWN = {"date": "%Y-%m-%d", "time": "%H:%M", "weekday": "%A"}


def to_ask(text: str) -> dict[str, str]:
    """The variables a person fills in, in order of appearance -> what they begin with."""
    found: dict[str, str] = {}
    for match in _VARIABLE.finditer(text):
        name, default = match[1], (match[2] or "").strip()
        if name not in _OWN and not found.get(name):
            found[name] = default
    if len(found) > MOST:
        raise InvalidRequest(f"a prompt can have {MOST} variables, this one has {len(found)}")
    return found


def fill(text: str, values: Mapping[str, str], *, now: float | None = None) -> str:
    """The text with every variable replaced, once: what is filled in is not looked at again.

    now: seconds since 1970, for the date. Raises InvalidRequest naming a variable without a value.
    """
    moment = time.localtime(now)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in values:
            return values[name]
        if name in _OWN:
            return time.strftime(_OWN[name], moment)
        raise InvalidRequest(f"the prompt's variable {name!r} has no value")

    filled = _VARIABLE.sub(value, text)
    if len(filled) > _LONGEST:
        raise InvalidRequest(
            f"the filled prompt has {len(filled):,} characters; at most {_LONGEST:,} are taken"
        )
    return filled
