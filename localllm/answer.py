"""One answer in the making: drawn tokens become text, up to a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from localllm.engine import Finished
from localllm.results import GenerationDelta, GenerationResult, TokenLogprob
from localllm.sampling import Draw
from localllm.tokenizer.answers import AnswerParser, Said


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class StopFinder:
    """Lets text through up to the first stop string, however it is cut into pieces.

    Text that may be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        self._held += text
        matches = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if matches:
            at, self.found = min(matches)
            passed, self._held = self._held[:at], ""
            return passed
        keep = self._undecided()
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return passed

    def finish(self) -> str:
        """What was held back, now that no more comes."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Answer:
    """Collects a request's events. Deltas wait here until the caller takes them."""

    def __init__(
        self,
        index: int,
        prompt: tuple[int, ...],
        detokenizer: Detokenizer | None,
        stops: tuple[str, ...],
        *,
        keep_logprobs: bool,
        sample: int = 0,
        n: int = 1,
        parser: AnswerParser | None = None,
    ) -> None:
        self.index = index
        self.n = n  # answers that are wanted of all its prompt's samples
        self.sample = sample
        self.logprob = 0.0  # of the tokens together, where it was asked for
        self.deltas: deque[GenerationDelta] = deque()
        self.result: GenerationResult | None = None
        self.error: Exception | None = None
        self.cancel_requested = False  # may be set from any thread or a signal handler
        self.deadline: float | None = None  # by time.monotonic()
        self.on_news: Callable[[], None] | None = None  # called by the thread that runs the engine
        self._prompt = prompt
        self._detokenizer = detokenizer
        self._stops = StopFinder(stops)
        self._parser = parser
        self._said: list[Said] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = [] if keep_logprobs else None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(1, len(self._token_ids))

    @property
    def news(self) -> bool:
        return bool(self.deltas) or self.done

    def push(self, draw: Draw, guess: int | None = None) -> bool:
        """Takes a token; True if a stop string is now complete. What comes after it is ignored.

        guess: what speculation had guessed for its place.
        """
        if self._stops.found is not None:
            return False
        said = Said()
        if self._detokenizer is not None:
            said = self._read(self._stops.push(self._detokenizer.push(draw.token_id)))
        self._said.append(said)
        self._token_ids.append(draw.token_id)
        logprobs = None
        if draw.logprob is not None:
            self.logprob += draw.logprob
        if self._logprobs is not None:
            assert draw.logprob is not None
            self._logprobs.append(TokenLogprob(draw.token_id, draw.logprob, draw.top))
            logprobs = (self._logprobs[-1],)
        self.deltas.append(
            GenerationDelta(
                self.index,
                said.text,
                (draw.token_id,),
                logprobs,
                sample=self.sample,
                guesses=(guess,),
                reasoning=said.reasoning,
            )
        )
        self._tell()
        return self._stops.found is not None

    def finish(self, event: Finished) -> None:
        if event.error is not None:
            self.fail(event.error)
            return
        last = Said()
        if self._detokenizer is not None:
            last = self._read(self._stops.push(self._detokenizer.finish()) + self._stops.finish())
            last += Said() if self._parser is None else self._parser.finish()
        self._said.append(last)
        reason, receipt = event.reason, event.receipt
        if self._stops.found is not None:
            # The engine may have been ahead: by drafts, or at the last token that was allowed.
            reason = "stop"
            count = len(self._token_ids)
            receipt = replace(receipt, stopped_by="stop string", generated_tokens=count)
        result = GenerationResult(
            text="".join(said.text for said in self._said),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            receipt=receipt,
            prompt_token_ids=self._prompt,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            prompt_logprobs=_of_prompt(event),
            reasoning="".join(said.reasoning for said in self._said),
            tool_calls=() if self._parser is None else self._parser.calls,
            notes=() if self._parser is None else self._parser.notes,
        )
        # The delta first: whoever sees `done` without deltas left may go.
        self.deltas.append(
            GenerationDelta(
                self.index, last.text, (), None, result, self.sample, reasoning=last.reasoning
            )
        )
        self.result = result
        self._tell()

    def _read(self, text: str) -> Said:
        return Said(text) if self._parser is None else self._parser.feed(text)

    def fail(self, error: Exception) -> None:
        self.error = error
        self._tell()

    def take(self) -> GenerationDelta | None:
        """All deltas that wait, as one; None if there are none."""
        parts = []
        while self.deltas:
            parts.append(self.deltas.popleft())
        if len(parts) < 2:
            return parts[0] if parts else None
        logprobs = None
        if self._logprobs is not None:
            logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
        return GenerationDelta(
            self.index,
            "".join(part.text for part in parts),
            tuple(token_id for part in parts for token_id in part.token_ids),
            logprobs,
            parts[-1].result,
            self.sample,
            tuple(guess for part in parts for guess in part.guesses),
            "".join(part.reasoning for part in parts),
        )

    def _tell(self) -> None:
        if self.on_news is not None:
            self.on_news()


def best(answers: list[Answer]) -> GenerationResult:
    """The result of a prompt's answers: the first or likeliest of them, with the others."""
    if len(answers) > answers[0].n:
        answers = sorted(answers, key=lambda answer: -answer.mean_logprob)[: answers[0].n]
    results = [answer.result for answer in answers if answer.result is not None]
    return replace(results[0], alternatives=tuple(results[1:])) if results[1:] else results[0]


def _of_prompt(event: Finished) -> tuple[TokenLogprob | None, ...] | None:
    if event.prompt_logprobs is None:
        return None
    given = [(draw.token_id, draw.logprob, draw.top) for draw in event.prompt_logprobs]
    return None, *(TokenLogprob(token, value or 0.0, top) for token, value, top in given)
