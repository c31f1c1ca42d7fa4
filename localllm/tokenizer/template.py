"""Chat templates: jinja2 as Hugging Face checkpoints use it, in a bounded sandbox."""

from __future__ import annotations

import json
import re
import secrets
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from localllm.errors import TemplateError
from localllm.tokenizer import sandbox
from localllm.tokenizer.guard import PRIVATE

MAX_SOURCE = 1 << 20  # characters of a template
_INPUT_SHARE = 200  # units of the budget for each character of the conversation

# Around generation blocks while rendering; no text can hold them, for none can know the secret.
_SECRET = secrets.token_hex(8)
_OPEN, _CLOSE = f"\ue000{_SECRET}(", f"\ue000{_SECRET})"


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation; `generated` holds (start, end) of the text that the template
    marks as the model's own ({% generation %} blocks), in characters of `text`."""

    text: str
    generated: tuple[tuple[int, int], ...] = ()


class ChatTemplate:
    """One template, compiled when first rendered."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, variables: Mapping[str, Any]) -> Rendered:
        """Raises `TemplateError` with the template's own message, or what is wrong and where."""
        units = sandbox.UNITS + _INPUT_SHARE * sandbox.weigh(variables)
        chunks = []
        with sandbox.budget(units):
            try:
                for chunk in self._compiled.generate(variables):
                    sandbox.charge(len(chunk))
                    chunks.append(chunk)
            except TemplateError:
                raise
            except Exception as error:
                raise _explain(error, variables) from error
        return _spans("".join(chunks))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        if len(self.source) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template has {len(self.source)} characters; {MAX_SOURCE} is the most"
            )
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template does not parse: {error.message} (line {error.lineno})"
            ) from error
        except RecursionError as error:
            raise TemplateError("the chat template nests too deeply") from error
        except Exception as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error


def variables_read(source: str) -> frozenset[str]:
    """The names that a template looks up in what it is given. Raises `TemplateError`."""
    try:
        tree = _environment().parse(source)
        return frozenset(meta.find_undeclared_variables(tree))
    except (jinja2.TemplateError, RecursionError) as error:
        raise TemplateError(f"the chat template does not parse: {error}") from error


class _RefusalError(Exception):
    """A template's own raise_exception()."""


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %}: text that the model is to write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _environment() -> sandbox.BoundedEnvironment:
    environment = sandbox.BoundedEnvironment(
        filters={"tojson": _tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _GenerationBlock],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: Any) -> None:
    raise _RefusalError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: no HTML escapes, no ASCII escapes unless asked for."""
    between = None if separators is None else (separators[0], separators[1])
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=between, sort_keys=sort_keys
    )
    return _NOT_ASCII.sub(_escape, text) if ensure_ascii else text


# Disguised characters stay as they are: they become ASCII again.
_NOT_ASCII = re.compile(f"[^\\x00-\\x7f{chr(PRIVATE.start)}-{chr(PRIVATE.stop - 1)}]")


def _escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]


def _spans(text: str) -> Rendered:
    """Takes the marks of generation blocks out of the text and notes where they were."""
    if _OPEN not in text:
        return Rendered(text)
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    length = 0
    for part in re.split(f"({re.escape(_OPEN)}|{re.escape(_CLOSE)})", text):
        if part == _OPEN:
            starts.append(length)
        elif part == _CLOSE:
            if starts:
                spans.append((starts.pop(), length))
        else:
            parts.append(part)
            length += len(part)
    return Rendered("".join(parts), tuple(sorted(spans)))


def _explain(error: Exception, variables: Mapping[str, Any]) -> TemplateError:
    where = _line(error)
    if isinstance(error, _RefusalError):
        roles = ", ".join(str(message.get("role")) for message in variables.get("messages", ()))
        hint = f"the roles given: {roles}"
        if "alternat" in str(error).lower():
            hint = f"this model's roles must take turns; {hint}"
        return TemplateError(f"the chat template refuses these messages: {error}{where}", hint=hint)
    if isinstance(error, sandbox.BudgetError | OverflowError | MemoryError | RecursionError):
        reason = "it nests too deeply" if isinstance(error, RecursionError) else error
        return TemplateError(f"the chat template was stopped: {reason}{where}")
    if isinstance(error, SecurityError):
        return TemplateError(f"the chat template was stopped: {error}{where}")
    if isinstance(error, jinja2.UndefinedError):
        return TemplateError(
            f"the chat template needs something that was not given: {error}{where}",
            hint="give it as a template variable, or add the missing field to the message",
        )
    return TemplateError(f"the chat template failed: {type(error).__name__}: {error}{where}")


def _line(error: Exception) -> str:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == "<template>"
    ]
    return f" (line {lines[-1]} of the template)" if lines else ""
