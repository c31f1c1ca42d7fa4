"""What a generation gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from localllm.engine.receipt import Receipt
from localllm.engine.sequence import FinishReason
from localllm.tokenizer.call_bodies import ToolCall


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's natural log-probability, and the likeliest tokens beside it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


@dataclass(frozen=True)
class GenerationResult:
    """One finished answer.

    text: the answer, up to a stop string; empty for a model without a tokenizer.
    token_ids: the answer's tokens, without the end-of-sequence token.
    finish_reason: "stop" (end of sequence, stop id or stop string), "length" (max_tokens or the
        context is full; `receipt.stopped_by` says which) or "cancelled".
    logprobs: one entry a token when `SamplingParams.logprobs` was set, else None.
    prompt_logprobs: one entry a prompt token when `SamplingParams.prompt_logprobs` was set, the
        first None: nothing comes before it.
    alternatives: the other answers when `SamplingParams.n` is above 1: with `best_of` or `beams`
        the next best, else in the order of their seeds.
    reasoning, tool_calls: of an answer to a conversation, told from its text. notes: what of it
        could not be read, and is text.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    receipt: Receipt
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    alternatives: tuple[GenerationResult, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class GenerationDelta:
    """A piece of one streamed answer.

    index: which prompt of the call it belongs to; sample: which of its answers, when n is above 1.
    text: what became readable with these tokens;
    it may be empty while a character or a possible stop string is incomplete.
    result: the whole answer, in the last delta of each answer only.
    guesses: for each token what speculation had guessed for its place (the same token if it was
    right), None where there was no guess.
    reasoning: as text, of an answer to a conversation.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    result: GenerationResult | None = None
    sample: int = 0
    guesses: tuple[int | None, ...] = ()
    reasoning: str = ""

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.result is None else self.result.finish_reason
