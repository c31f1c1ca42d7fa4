"""A model of ours as lm-evaluation-harness takes it (extra `lm-eval`), for local use:

    from localllm.eval.lm_eval import Harness
    lm_eval.simple_evaluate(model=Harness(llm), tasks=["arc_easy"])

Source of the interface: lm_eval/api/model.py of https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from localllm.errors import InvalidRequest
from localllm.llm import LLM
from localllm.results import GenerationResult
from localllm.sampling import SamplingParams

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise InvalidRequest(
        "lm-evaluation-harness is not installed", hint="pip install 'localllm[lm-eval]'"
    ) from error

_SCORE = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
_QUEUE = 64


class Harness(LM):  # type: ignore[misc]
    """llm: stays the caller's to close. adapter: a loaded adapter's name."""

    def __init__(self, llm: LLM, *, adapter: str | None = None, max_tokens: int = 256) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise InvalidRequest("a model without a tokenizer cannot be evaluated on text")
        self._llm, self._tokenizer = llm, llm.tokenizer
        self._adapter, self._max_tokens = adapter, max_tokens

    @property
    def tokenizer_name(self) -> str:
        return self._llm.info.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        ids = self._llm.chat_prompt(chat_history)
        return self._tokenizer.decode(ids, skip_special=False)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the sum, and whether greedy decoding would give it."""
        asks = []
        for request in requests:
            context, continuation = request.args
            whole = self._tokenizer.encode(context + continuation, parse_special=True)
            before = len(self._tokenizer.encode(context, parse_special=True)) if context else 0
            asks.append((whole, _SCORE, max(1, min(before, len(whole) - 1))))
        return [self._score(result, start) for result, start in self._run(asks)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each whole text, cut where the context ends."""
        window = self._llm.info.context - 1
        asks, counts = [], []
        for request in requests:
            ids = self._tokenizer.encode(request.args[0])
            pieces = [ids[at : at + window] for at in range(0, len(ids), window)]
            pieces = [piece for piece in pieces if len(piece) > 1]
            asks += [(piece, _SCORE, 1) for piece in pieces]
            counts.append(len(pieces))
        scores = iter([self._score(result, start)[0] for result, start in self._run(asks)])
        return [sum(next(scores) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        asks = []
        for request in requests:
            context, wanted = request.args
            ids = self._tokenizer.encode(context, parse_special=True)
            asks.append((ids, self._params(dict(wanted)), 0))
        return [result.text for result, _ in self._run(asks)]

    def _params(self, wanted: dict[str, Any]) -> SamplingParams:
        until = wanted.pop("until", None) or ()
        sampled = wanted.pop("do_sample", False)
        temperature = float(wanted.pop("temperature", 1.0 if sampled else 0.0))
        params = SamplingParams(
            max_tokens=int(wanted.pop("max_gen_toks", self._max_tokens)),
            temperature=temperature if sampled else 0.0,
            top_p=float(wanted.pop("top_p", 1.0)),
            stop=(until,) if isinstance(until, str) else tuple(until),
        )
        if wanted:
            raise InvalidRequest(f"generation arguments not known here: {', '.join(wanted)}")
        return params

    def _run(
        self, asks: Sequence[tuple[list[int], SamplingParams, int]]
    ) -> Iterator[tuple[GenerationResult, int]]:
        """Results in the order asked."""
        results: dict[int, GenerationResult] = {}
        with self._llm.in_flight(adapter=self._adapter) as flight:
            waiting = iter(asks)
            while True:
                while len(flight) < _QUEUE and (ask := next(waiting, None)) is not None:
                    flight.submit(ask[0], ask[1])
                if not len(flight):
                    break
                for number, outcome in flight.finished():
                    if isinstance(outcome, Exception):
                        raise outcome
                    results[number] = outcome
        for number, ask in enumerate(asks):
            yield results[number], ask[2]

    def _score(self, result: GenerationResult, start: int) -> tuple[float, bool]:
        assert result.prompt_logprobs is not None
        found = [entry for entry in result.prompt_logprobs[start:] if entry is not None]
        greedy = all(entry.top[0][0] == entry.token_id for entry in found)
        return sum(entry.logprob for entry in found), greedy
