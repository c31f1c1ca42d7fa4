"""Lines in the form of OpenAI's batch files, answered in the form of its batch results.

https://platform.openai.com/docs/api-reference/batch: {"custom_id", "method", "url", "body"} in;
{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"} out. A failed
request has a status code of 400 (or 500) and the error in its body, as a served one would.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Any

from localllm.batch.form import (
    Fields,
    Work,
    a_chat,
    a_prompt,
    an_object,
    changed,
    explained,
    refuse_unknown,
)
from localllm.errors import InvalidRequest, LocalLLMError
from localllm.llm import LLM
from localllm.results import GenerationResult, TokenLogprob
from localllm.sampling import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_MAX_TOP_LOGPROBS = 20
# Ours under the same name; the last three are beyond OpenAI's, as other servers take them.
_SAMPLING = (
    "max_tokens", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "logit_bias", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip
# Fields that may be given, but only so that they change nothing.
_NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "stream": False, "echo": False, "suffix": None,
    "response_format": {"type": "text"},
}  # fmt: skip
_LOGPROBS = ("logprobs", "top_logprobs")


def is_openai(given: Fields) -> bool:
    return any(name in given for name in ("custom_id", "url", "body", "method"))


class OpenAIForm:
    def __init__(self, index: int, given: Fields) -> None:
        self._index = index
        self._given = given
        custom_id = given.get("custom_id")
        self._id = custom_id if isinstance(custom_id, str) else None
        self._chat = given.get("url") == CHAT

    @property
    def named_model(self) -> str | None:
        """The model that the line names; the one that was loaded answers."""
        body = self._given.get("body")
        name = body.get("model") if isinstance(body, dict) else None
        return name if isinstance(name, str) else None

    def work(self, llm: LLM, defaults: SamplingParams) -> Work:
        given = self._given
        refuse_unknown(given, ("custom_id", "method", "url", "body"))
        if self._id is None:
            raise InvalidRequest("'custom_id' must be given, as text")
        if given.get("method", "POST") != "POST":
            raise InvalidRequest(f"'method' must be POST, not {given['method']!r:.80}")
        if given.get("url") not in (CHAT, COMPLETIONS):
            raise InvalidRequest(
                f"'url' must be {CHAT} or {COMPLETIONS}, not {given.get('url')!r:.80}"
            )
        body = an_object(given, "body")
        source = "messages" if self._chat else "prompt"
        own = ("max_completion_tokens", "top_logprobs") if self._chat else ()
        refuse_unknown(
            body, ("model", source, *_SAMPLING, "logprobs", *own, "user", *_NEUTRAL), "body field"
        )
        for name, value in _NEUTRAL.items():
            if body.get(name) is not None and body[name] != value:
                raise InvalidRequest(f"{name!r} is supported as {value!r} only")
        if body.get(source) is None:
            raise InvalidRequest(f"the body has no {source!r}")
        params = changed(defaults, self._sampling(body))
        if self._chat:
            return Work(llm.chat_prompt(a_chat(body["messages"])), params)
        return Work(a_prompt(body["prompt"]), params)

    def answer(self, llm: LLM, result: GenerationResult) -> Fields:
        choice: Fields = {"index": 0, "finish_reason": result.finish_reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": result.text}
            choice["logprobs"] = _chat_logprobs(llm, result)
        else:
            choice["text"] = result.text
            choice["logprobs"] = _completion_logprobs(llm, result)
        prompt, new = result.receipt.prompt_tokens, result.receipt.generated_tokens
        return self._response(
            200,
            {
                "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{self._index}",
                "object": "chat.completion" if self._chat else "text_completion",
                "created": int(time.time()),
                "model": llm.info.name,
                "choices": [choice],
                "usage": {
                    "prompt_tokens": prompt,
                    "completion_tokens": new,
                    "total_tokens": prompt + new,
                },
            },
        )

    def failure(self, error: Exception) -> Fields:
        message, hint = explained(error)
        ours = isinstance(error, LocalLLMError)
        told = {
            "message": f"{message} ({hint})" if hint else message,
            "type": "invalid_request_error" if ours else "server_error",
            "param": None,
            "code": None,
        }
        return self._response(400 if ours else 500, {"error": told})

    def _response(self, status: int, body: Fields) -> Fields:
        name = f"batch_req_{self._index}"
        response = {"status_code": status, "request_id": name, "body": body}
        return {"id": name, "custom_id": self._id, "response": response, "error": None}

    def _sampling(self, body: Fields) -> Fields:
        given = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
        newer = body.get("max_completion_tokens")
        if newer is not None and given.setdefault("max_tokens", newer) != newer:
            raise InvalidRequest("'max_tokens' and 'max_completion_tokens' differ")
        count = body.get("logprobs")
        if self._chat:
            if not isinstance(count, bool | None):
                raise InvalidRequest(f"'logprobs' must be true or false, not {count!r:.80}")
            top = body.get("top_logprobs")
            if top is not None and not count:
                raise InvalidRequest("'top_logprobs' needs 'logprobs': true")
            if count and type(top) is int and top > _MAX_TOP_LOGPROBS:
                raise InvalidRequest(f"'top_logprobs' is {_MAX_TOP_LOGPROBS} at most, not {top}")
            count = (0 if top is None else top) if count else None
        given["logprobs"] = count
        return given


def _chat_logprobs(llm: LLM, result: GenerationResult) -> Fields | None:
    if result.logprobs is None:
        return None
    content = [
        {
            **_token(llm, entry.token_id, entry.logprob),
            "top_logprobs": [_token(llm, token_id, value) for token_id, value in entry.top],
        }
        for entry in result.logprobs
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(llm: LLM, result: GenerationResult) -> Fields | None:
    if result.logprobs is None:
        return None

    def top(entry: TokenLogprob) -> dict[str, float]:
        return {_text(_bytes(llm, token_id)): value for token_id, value in entry.top}

    tokens = [_text(_bytes(llm, entry.token_id)) for entry in result.logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in result.logprobs],
        "top_logprobs": [top(entry) for entry in result.logprobs],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0))[: len(tokens)],
    }


def _token(llm: LLM, token_id: int, logprob: float) -> Fields:
    data = _bytes(llm, token_id)
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _bytes(llm: LLM, token_id: int) -> bytes:
    return b"" if llm.tokenizer is None else llm.tokenizer.token_bytes(token_id)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
