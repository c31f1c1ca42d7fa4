"""From a request of the app to the model's prompt, and from its tokens to pieces."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from localllm.answer import Detokenizer
from localllm.errors import InvalidRequest, LocalLLMError
from localllm.llm import LLM
from localllm.results import GenerationDelta, GenerationResult
from localllm.sampling import SamplingParams
from localllm.tokenizer import Tokenizer
from localllm.tokenizer.answers import AnswerParser, AnswerReader, Said
from localllm.tokenizer.harmony import FINAL
from localllm.tokenizer.reasoning import with_reasoning
from localllm.tokenizer.tool_prompts import (
    call_constraint,
    function_of,
    in_words,
    knows_tools,
    style_of,
)

_COUNTED = 64  # messages whose own tokens are told exactly; of older ones they are estimated

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Asking:
    """prompt: token ids. reader: of the answers to it. tools: the names of functions that may be
    called."""

    prompt: list[int]
    params: SamplingParams
    reader: AnswerReader
    tools: tuple[str, ...] = ()

    def detokenizer(self) -> Callable[[], Detokenizer]:
        return self.reader.detokenizer

    def voices(self) -> list[Voice]:
        return [
            Voice(k, self.reader.tokenizer, self.reader.parser(), with_tools=bool(self.tools))
            for k in range(self.params.n)
        ]


def asking(llm: LLM, message: Fields) -> Asking:
    """Raises InvalidRequest, TemplateError and their like for what cannot be asked."""
    wishes = dict(message.get("params") or {})
    choice = wishes.pop("tool_choice", "auto")
    given = wishes.pop("template_vars", None) or {}
    if not isinstance(given, Mapping):
        raise InvalidRequest("template_vars must be a mapping of names to values")
    variables = with_reasoning(_template(llm), wishes.pop("reasoning", None), given)
    tools = [] if choice == "none" else list(message.get("tools") or ())
    messages = list(message["messages"])
    names = tuple(str(function_of(tool)["name"]) for tool in tools)
    if choice not in ("auto", "none"):
        style = style_of(_template(llm))
        wishes.update(call_constraint(tools, str(choice), style))
    params = _params(llm.default_params, wishes, message)
    if not message.get("continue_last"):
        prompt = _prompt(llm, messages, tools, variables)
        return Asking(prompt, params, llm.reader(prompt, tools, plain=False), names)
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise InvalidRequest("only an answer of the assistant can be continued")
    start = _prompt(llm, messages[:-1], tools, variables)
    assert llm.tokenizer is not None  # it has rendered the messages
    said = llm.tokenizer.encode(str(messages[-1].get("content") or ""), add_special=False)
    if llm.reader(start).form.channels:
        start += llm.tokenizer.encode(FINAL, add_special=False, parse_special=True)
    prompt = [*start, *said]
    reader = llm.reader(prompt, tools, continued=len(said), plain=False)
    return Asking(prompt, params, reader, names)


def recommended(params: SamplingParams) -> dict[str, Any]:
    """What of a model's own parameters is not as the library has it anyway."""
    plain = SamplingParams()
    every = ((one.name, getattr(params, one.name)) for one in fields(params))
    return {name: value for name, value in every if value != getattr(plain, name)}


def counted(llm: LLM, messages: list[Any], tools: Sequence[Fields] = ()) -> dict[str, Any]:
    """A message's own tokens are those that the prompt grows by. tools: what describes them counts
    in the total alone."""
    if not messages:
        return {"total": 0, "per_message": [], "cached": 0, "context": llm.info.context}
    ids = _prompt(llm, messages, [], {})
    whole = _prompt(llm, messages, tools, {}) if tools else ids
    own = [0] * len(messages)
    before = len(messages) - 1
    longer = len(ids)
    while before > 0 and before >= len(messages) - _COUNTED:
        try:
            shorter = len(_prompt(llm, messages[:before], [], {}))
        except LocalLLMError:  # some templates refuse to end there
            break
        own[before] = max(0, longer - shorter)
        longer, before = shorter, before - 1
    rest = messages[: before + 1]
    weights = [len(str(one.get("content", ""))) + 1 for one in rest]
    for at, weight in enumerate(weights):
        own[at] = longer * weight // sum(weights)
    return {
        "total": len(whole),
        "per_message": own,
        "cached": llm.cached_tokens(whole),
        "context": llm.info.context,
    }


def as_delta(result: GenerationResult, sample: int) -> GenerationDelta:
    """A whole answer as if it had come in one piece."""
    return GenerationDelta(0, result.text, result.token_ids, result.logprobs, result, sample)


class Voice:
    """One answer on its way: its text split from thinking and calls, its tokens described."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        parser: AnswerParser,
        *,
        with_tools: bool = False,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._parser = parser
        self._with_tools = with_tools
        self._text = self._reasoning = ""
        self._tokens: list[dict[str, Any]] = []
        self.finished: dict[str, Any] | None = None

    def take(self, delta: GenerationDelta) -> None:
        self._add(self._parser.feed(delta.text))
        logprobs = delta.logprobs or ()
        guesses = delta.guesses or (None,) * len(delta.token_ids)
        for at, (token, guess) in enumerate(zip(delta.token_ids, guesses, strict=True)):
            if guess is not None and guess != token:
                self._tokens.append(
                    {"id": guess, "text": self._spelled(guess), "drafted": "rejected"}
                )
            info: dict[str, Any] = {"id": token, "text": self._spelled(token)}
            if guess == token:
                info["drafted"] = "accepted"
            if at < len(logprobs):
                info["logprob"] = logprobs[at].logprob
                info["top"] = [(i, self._spelled(i), value) for i, value in logprobs[at].top]
            self._tokens.append(info)
        if delta.result is not None:
            self._add(self._parser.finish())
            calls = self._parser.calls if self._with_tools else ()
            receipt = delta.result.receipt.to_dict()
            self.finished = {
                "reason": delta.result.finish_reason,
                "receipt": receipt,
                "seed": receipt["seed"],
                "tool_calls": [asdict(call) for call in calls],
            }

    def piece(self) -> dict[str, Any] | None:
        """What came since the last one, None if nothing did."""
        if not (self._text or self._reasoning or self._tokens):
            return None
        piece = {
            "index": self._index,
            "text": self._text,
            "reasoning": self._reasoning,
            "tokens": self._tokens,
        }
        self._text, self._reasoning, self._tokens = "", "", []
        return piece

    def _add(self, said: Said) -> None:
        self._text += said.text
        self._reasoning += said.reasoning

    def _spelled(self, token: int) -> str:
        """Of a token that is no whole character, a mark stands for each of its bytes."""
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def _template(llm: LLM) -> str | None:
    if llm.tokenizer is None:
        return None
    named = llm.tokenizer.chat_templates
    return named.get("tool_use") or llm.tokenizer.chat_template


def _prompt(llm: LLM, messages: list[Any], tools: Sequence[Fields], variables: Fields) -> list[int]:
    if knows_tools(_template(llm)):
        return llm.chat_prompt(messages, tools or None, variables)
    return llm.chat_prompt(in_words(messages, tools), None, variables)


def _params(default: SamplingParams, wishes: dict[str, Any], message: Fields) -> SamplingParams:
    known = set(SamplingParams.__dataclass_fields__)
    for name in wishes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InvalidRequest(
                f"there is no sampling parameter named {name!r}",
                hint=f"did you mean {near[0]}?" if near else None,
            )
    if int(message.get("n", 1)) > 1:
        wishes["n"] = int(message["n"])
    if int(message.get("logprobs", 0)) > 0:
        wishes["logprobs"] = int(message["logprobs"])
    bias = wishes.get("logit_bias")
    if isinstance(bias, Mapping):  # JSON knows no numbers as keys
        wishes["logit_bias"] = {int(k) if str(k).isdecimal() else k: v for k, v in bias.items()}
    wishes = {key: tuple(v) if isinstance(v, list) else v for key, v in wishes.items()}
    return replace(default, **wishes)
