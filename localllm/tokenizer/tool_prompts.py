"""Functions offered to a model: as its template does it, or in words where it knows none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from localllm.errors import InvalidRequest

Json = Mapping[str, Any]
Style = Literal["tags", "parameters", "arguments"]

_WORDS = """\
You can call functions. These are there, each with a JSON schema of its arguments:

{functions}

To call one, answer with nothing but this JSON: {{"name": "NAME", "arguments": {{...}}}}
Its result comes in the next message. Call one only when it helps, else answer in words."""


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows functions to its model."""
    return template is not None and re.search(r"\btools\b", template) is not None


def style_of(template: str | None) -> Style:
    """How a call is written by the template's model: in <tool_call> tags, or as bare JSON whose
    arguments are called "parameters" or "arguments"."""
    if template is None or not knows_tools(template):
        return "arguments"
    if "<tool_call>" in template and "<function=" not in template:
        return "tags"
    llama = "python_tag" in template or "ipython" in template
    return "parameters" if llama else "arguments"


def in_words(messages: Sequence[Json], tools: Sequence[Json]) -> list[dict[str, Any]]:
    """The messages for a template that knows no functions: they are described in the system
    message, and calls and results told as text."""
    told = [_told(message) for message in messages]
    if not tools:
        return told
    words = _WORDS.format(functions="\n".join(json.dumps(function_of(tool)) for tool in tools))
    if told and told[0].get("role") == "system":
        told[0] = {**told[0], "content": f"{told[0].get('content') or ''}\n\n{words}".lstrip()}
        return told
    return [{"role": "system", "content": words}, *told]


def call_constraint(tools: Sequence[Json], choice: str, style: Style) -> dict[str, str]:
    """What makes the answer one call, as fields of SamplingParams.

    choice: "required" for any of the tools, else the name of the one to call. Raises InvalidRequest
    where there is none such.
    """
    functions = [function_of(tool) for tool in tools]
    if choice != "required":
        functions = [one for one in functions if one["name"] == choice]
        if not functions:
            known = ", ".join(str(function_of(tool)["name"]) for tool in tools) or "none"
            raise InvalidRequest(f"there is no tool {choice!r} to call", hint=f"there are: {known}")
    if not functions:
        raise InvalidRequest("a call is required, and there are no tools")
    key = "parameters" if style == "parameters" else "arguments"
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": one["name"]},
                key: one.get("parameters") or {"type": "object"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for one in functions
    ]
    schema = json.dumps(forms[0] if len(forms) == 1 else {"anyOf": forms})
    if style != "tags":
        return {"json_schema": schema}
    return {"grammar": f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}'}


def function_of(tool: Json) -> Json:
    """The function of a tool, whether it is wrapped as {"function": …} or not.

    Raises InvalidRequest for one without a name.
    """
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(
            "a tool must have a name",
            hint='{"type": "function", "function": {"name": …, "parameters": {…}}}',
        )
    return function


def _told(message: Json) -> dict[str, Any]:
    if message.get("role") == "tool":
        name = message.get("name") or "the function"
        return {"role": "user", "content": f"Result of {name}:\n{message.get('content') or ''}"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    lines = [str(message["content"])] if message.get("content") else []
    for call in calls:
        function = function_of(call)
        given = function.get("arguments")
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                given = {}
        lines.append(json.dumps({"name": function["name"], "arguments": given or {}}))
    return {"role": message["role"], "content": "\n".join(lines)}
