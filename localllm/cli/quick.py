"""Commands that start quickly: what needs no checking is not checked.

Typer sends every value through a library for data models, the defaults too. Loading that library is
a third of the time until `localllm chat` shows its first frame.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from typer.core import TyperCommand, TyperGroup


class QuickCommand(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _spared(super().get_params(ctx))


class QuickGroup(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _spared(super().get_params(ctx))


def _spared(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if not isinstance(parameter.process_value, partial):
            usual = parameter.process_value
            parameter.process_value = partial(_processed, parameter, usual)
    return parameters


def _processed(parameter: Any, usual: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    """What `usual` gives for the value."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    missing = value is None and not parameter.required
    # What is typed comes as text: a number or a flag is from our own source.
    if not (missing or isinstance(value, bool | int) or (isinstance(value, str) and kind is str)):
        return usual(ctx, value)
    return value if parameter.callback is None else parameter.callback(ctx, parameter, value)
