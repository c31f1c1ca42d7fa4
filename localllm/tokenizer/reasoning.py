"""How much a model reasons before it answers, as its chat template takes the wish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from localllm.errors import InvalidRequest
from localllm.tokenizer.template import variables_read

Reasoning = Literal["off", "on", "low", "medium", "high"]

EFFORT = "reasoning_effort"
_SWITCHES = ("enable_thinking", "thinking")  # the names that templates have for it


def reasoning_variables(template: str | None, wish: Reasoning | None) -> dict[str, Any]:
    """The template variables that say `wish`; none for None, which leaves it to the template.

    "on" and "off" are for templates that can be told whether to think, efforts for those that are
    told how much. Raises InvalidRequest for a wish that the template does not know.
    """
    if wish is None:
        return {}
    if wish not in get_args(Reasoning):
        raise InvalidRequest(
            f"reasoning must be one of {', '.join(get_args(Reasoning))}, not {wish!r:.80}"
        )
    reads = frozenset() if template is None else variables_read(template)
    switch = next((name for name in _SWITCHES if name in reads), None)
    if wish in ("on", "off"):
        if switch is not None:
            return {switch: wish == "on"}
    elif EFFORT in reads:
        return {EFFORT: wish} | ({} if switch is None else {switch: True})
    known = ["on", "off"] if switch is not None else []
    known += ["low", "medium", "high"] if EFFORT in reads else []
    raise InvalidRequest(
        f"this model's chat template cannot be told reasoning {wish!r}",
        hint=f"it knows {', '.join(known)}" if known else "it has no option for reasoning",
    )


def with_reasoning(
    template: str | None, wish: Reasoning | None, variables: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`variables` and those of the wish. Raises InvalidRequest if both say something of it."""
    given = dict(variables or {})
    told = reasoning_variables(template, wish)
    twice = sorted(told.keys() & given.keys())
    if twice:
        raise InvalidRequest(
            f"reasoning and the template variable {twice[0]} contradict each other"
        )
    return given | told
