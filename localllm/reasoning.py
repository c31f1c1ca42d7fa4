"""Better answers from several tries: chain-of-thought prompts and self-consistency.

Sources: Wei et al. 2022, "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models";
Kojima et al. 2022, "Large Language Models are Zero-Shot Reasoners"; Wang et al. 2022,
"Self-Consistency Improves Chain of Thought Reasoning in Language Models".
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

from localllm.errors import InvalidRequest
from localllm.llm import LLM, Message, Prompt
from localllm.results import GenerationResult
from localllm.sampling import SamplingParams

STEP_BY_STEP = "Let's think step by step."
_DEFAULT_TEMPERATURE = 0.7  # as Wang et al. sample from models of several sizes
_CUE = re.compile(r"####|\\boxed\{|\banswer[*_]*\s*(?:is\b[*_]*\s*:?|:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s)")
_AROUND = " \t\r.,:;!?\"'*`_()[]{}$"  # is no part of an answer that is a line
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?!\w)")


@dataclass(frozen=True)
class Vote:
    """answer: what most texts say, None if no text has an answer. index: the first that says so.

    counts: answer -> texts that give it, most frequent first, ties in order of appearance.
    """

    answer: str | None
    index: int | None
    counts: Mapping[str, int]


@dataclass(frozen=True)
class SelfConsistency:
    """text: of the first result that gives the winning answer; the first result if none has one."""

    text: str
    vote: Vote
    results: tuple[GenerationResult, ...]

    @property
    def answer(self) -> str | None:
        return self.vote.answer

    @property
    def counts(self) -> Mapping[str, int]:
        return self.vote.counts


def final_answer(text: str) -> str | None:
    """The answer a text comes to: its last number, or its last line; None if there is nothing.

    Where the text says "answer is", "Answer:", "####" or "\\boxed{", the rest of the sentence after
    the last of them decides: its first number, or all of it. Numbers lose thousands separators, a
    plus sign and zeros behind the point (1,200.0 is 1200); lines lose case and punctuation around.
    """
    cues = list(_CUE.finditer(text))
    said = _lines(_SENTENCE_END.sub("\n", text[cues[-1].end() :]))[:1] if cues else []
    numbers = _NUMBER.findall(said[0])[:1] if said else _NUMBER.findall(text)
    if numbers:
        return _plain_number(numbers[-1])
    lines = said or _lines(text)
    return lines[-1].casefold() if lines else None


def vote(texts: Sequence[str], key: Callable[[str], str | None] | None = None) -> Vote:
    """The majority's answer (Wang et al. 2022, section 2: an unweighted sum); ties to the earliest.

    key: extracts a text's answer, None for a text that has none, which then does not vote; the
    default is `final_answer`.
    """
    answers = [(key or final_answer)(text) for text in texts]
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(None, None, {})
    ordered = dict(counts.most_common())  # equal counts stay in order of first appearance
    winner = next(iter(ordered))
    return Vote(winner, answers.index(winner), ordered)


def chain_of_thought(
    question: str, *, examples: Sequence[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """Messages that ask for the steps before the answer.

    examples: (question, worked answer) pairs, shown as earlier turns: few-shot (Wei et al. 2022).
    Without any, the question is followed by "Let's think step by step." (Kojima et al. 2022).
    """
    messages = []
    for asked, worked in examples:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": worked})
    content = question if examples else f"{question}\n{STEP_BY_STEP}"
    return [*messages, {"role": "user", "content": content}]


def self_consistency(
    llm: LLM,
    prompt: Prompt | Sequence[Message],
    n: int = 8,
    params: SamplingParams | None = None,
    *,
    vote: Callable[[Sequence[str]], Vote] = vote,
) -> SelfConsistency:
    """Samples n answers and takes what most of them come to (Wang et al. 2022).

    prompt: text, token ids, or the messages of a chat. It is computed once, and the answers are
    forks of it that run in one batch.
    params: None takes the model's own. With a seed, answer i is sampled with seed + i, so that the
        same call gives the same vote. Greedy parameters are refused: all answers would be one.
    Raises what `LLM.generate` and `LLM.chat_prompt` raise.
    """
    if n < 1:
        raise InvalidRequest(f"n must be at least 1, not {n}")
    if params is None:
        params = llm.default_params
        if params.greedy:
            params = replace(params, temperature=_DEFAULT_TEMPERATURE)
    if params.greedy and n > 1:
        raise InvalidRequest(
            "at temperature 0 every answer is the same, and there is nothing to vote on",
            hint=f"use a temperature such as {_DEFAULT_TEMPERATURE}",
        )
    first = secrets.randbits(63) if params.seed is None else params.seed
    one: Prompt = llm.chat_prompt(prompt) if _is_chat(prompt) else cast("Prompt", prompt)
    best = llm.generate(one, replace(params, n=n, best_of=None, seed=first))
    results = [best, *best.alternatives]
    decided = vote([result.text for result in results])
    return SelfConsistency(results[decided.index or 0].text, decided, tuple(results))


def _is_chat(prompt: Prompt | Sequence[Message]) -> TypeGuard[Sequence[Message]]:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def _lines(text: str) -> list[str]:
    stripped = (line.strip(_AROUND) for line in text.splitlines())
    return [line for line in stripped if line]


def _plain_number(number: str) -> str:
    plain = number.replace(",", "").replace("\u2212", "-").removeprefix("+")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    whole, point, part = digits.partition(".")
    plain = (whole.lstrip("0") or "0") + point + part
    return plain if plain == "0" else sign + plain
