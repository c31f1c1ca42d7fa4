"""What a line of the input asks for, and how its answer is written: our own form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.llm import LLM
from localllm.results import GenerationResult
from localllm.sampling import SamplingParams

Fields = dict[str, Any]
_PARAMS = tuple(field.name for field in fields(SamplingParams))


@dataclass(frozen=True)
class Work:
    """One request, ready to be submitted."""

    prompt: str | Sequence[int]
    params: SamplingParams


class Form(Protocol):
    """A line's way of asking and of being answered."""

    def work(self, llm: LLM, defaults: SamplingParams) -> Work:
        """What the line asks for; `defaults` fill in what it leaves out. Raises what is wrong."""

    def answer(self, llm: LLM, result: GenerationResult) -> Fields: ...

    def failure(self, error: Exception) -> Fields: ...


class PlainForm:
    """{"id"?, "prompt" or "messages", "params"?, "tools"?, "template_vars"?}"""

    def __init__(self, index: int, given: Fields) -> None:
        self._index = index
        self._given = given
        given_id = given.get("id")
        self._id = given_id if isinstance(given_id, str) else None

    def work(self, llm: LLM, defaults: SamplingParams) -> Work:
        given = self._given
        refuse_unknown(given, ("id", "prompt", "messages", "params", "tools", "template_vars"))
        if not isinstance(given.get("id"), str | None):
            raise InvalidRequest(f"'id' must be text, not {given['id']!r:.80}")
        if ("prompt" in given) == ("messages" in given):
            raise InvalidRequest(
                "a line has either 'prompt' or 'messages'", hint='{"prompt": "Water boils at"}'
            )
        params = changed(defaults, an_object(given, "params"))
        if "prompt" in given:
            for name in ("tools", "template_vars"):
                if given.get(name):
                    raise InvalidRequest(f"{name!r} goes with 'messages', not with 'prompt'")
            return Work(a_prompt(given["prompt"]), params)
        variables = an_object(given, "template_vars")
        messages = a_chat(given["messages"])
        return Work(llm.chat_prompt(messages, given.get("tools"), variables), params)

    def answer(self, llm: LLM, result: GenerationResult) -> Fields:
        told = result.to_dict()
        del told["prompt_token_ids"]
        if told["logprobs"] is None:
            del told["logprobs"]
        return {"id": self._id, "index": self._index, **told}

    def failure(self, error: Exception) -> Fields:
        message, hint = explained(error)
        return {"id": self._id, "index": self._index, "error": {"message": message, "hint": hint}}


def read_object(line: bytes) -> Fields:
    """The JSON object of a line. Raises `InvalidRequest`."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the line is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the line is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"a line must be a JSON object, not {type(value).__name__}")
    return value


def changed(defaults: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """`defaults` with what a line gives. Raises `InvalidRequest` for unknown names."""
    refuse_unknown(given, _PARAMS, "sampling parameter")
    changes = dict(given)
    if isinstance(changes.get("logit_bias"), dict):
        changes["logit_bias"] = _bias(changes["logit_bias"])
    for name in ("stop", "stop_token_ids"):
        if not isinstance(changes.get(name), str | list | None):
            raise InvalidRequest(f"{name!r} must be a list, not {changes[name]!r:.80}")
    return replace(defaults, **changes)


def a_prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(i) is int for i in value):
        return value
    raise InvalidRequest(f"'prompt' must be text or a list of token ids, not {value!r:.80}")


def a_chat(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise InvalidRequest(
        f"'messages' must be a list of messages, not {value!r:.80}",
        hint='[{"role": "user", "content": "Hello"}]',
    )


def an_object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name)
    if not isinstance(value, dict | None):
        raise InvalidRequest(f"{name!r} must be an object, not {value!r:.80}")
    return value or {}


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], kind: str = "field") -> None:
    if unknown := [name for name in given if name not in known]:
        names = ", ".join(map(repr, unknown))
        raise InvalidRequest(f"unknown {kind} {names}", hint=f"known are {', '.join(known)}")


def explained(error: Exception) -> tuple[str, str | None]:
    """Message and hint; an error that is none of ours is named."""
    if isinstance(error, LocalLLMError):
        return str(error), error.hint
    return f"{type(error).__name__}: {error}", None


def _bias(given: Mapping[str, Any]) -> dict[int, Any]:
    """JSON's keys are text; ours are token ids."""
    try:
        return {int(token_id): value for token_id, value in given.items()}
    except ValueError:
        raise InvalidRequest(f"logit_bias must map token ids to numbers: {given!r:.80}") from None
