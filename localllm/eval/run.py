"""Running the tasks of an evaluation through a model, as many together as it batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from localllm.errors import InvalidRequest
from localllm.eval.divergence import divergence
from localllm.eval.report import Choices, EvalReport, Matches, Perplexity
from localllm.eval.tasks import Choice, Match, Messages, Task, Text
from localllm.llm import LLM
from localllm.results import GenerationResult
from localllm.sampling import SamplingParams
from localllm.tokenizer import Tokenizer

_SCORE = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
_KL_WINDOW = 256  # tokens whose logits of both models are held at once
_QUEUE = 64  # requests in flight


@dataclass(frozen=True)
class _Ask:
    """One request. ids: the prompt; scored: from this place on its tokens are what is judged."""

    ids: tuple[int, ...]
    params: SamplingParams
    task: int
    choice: int = 0
    scored: int = 1


@dataclass
class _Scores:
    """losses: of every predicted token of texts. choices: by task, the sum of each choice."""

    losses: list[float] = field(default_factory=list)
    choices: dict[int, dict[int, float]] = field(default_factory=dict)
    matched: dict[int, bool] = field(default_factory=dict)


def evaluate(
    llm: LLM,
    tasks: Sequence[Task],
    *,
    adapter: str | None = None,
    base: LLM | None = None,
    window: int | None = None,
    max_tokens: int = 256,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> EvalReport:
    """Answers every task, greedily where something is generated.

    adapter: a loaded adapter's name. base: a model to compare predictions with, over the texts, and
    over the prompts where there are none; with an adapter and no base, the model without it.
    window: texts are cut into pieces of so many tokens, each predicted from its own beginning;
    None: 2,048, or the model's context. progress: told how many requests of how many are done.

    Raises InvalidRequest for a choice or prompt that leaves no room in the context.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise InvalidRequest("a model without a tokenizer cannot be evaluated on text")
    if window is not None and window < 2:
        raise InvalidRequest(f"a window of {window} tokens predicts nothing; 2 is the least")
    window = min(window or 2048, llm.info.context - 1)
    asks = [
        ask
        for number, task in enumerate(tasks)
        for ask in _asks(tokenizer, llm, number, task, window, max_tokens)
    ]
    scores = _Scores()
    done = 0
    with llm.in_flight(adapter=adapter) as flight:
        waiting = iter(asks)
        numbers: dict[int, _Ask] = {}
        while True:
            while len(flight) < _QUEUE and (ask := next(waiting, None)) is not None:
                numbers[flight.submit(ask.ids, ask.params)] = ask
            if not len(flight):
                break
            for number, outcome in flight.finished():
                if isinstance(outcome, Exception):
                    raise outcome
                _take(scores, tasks, numbers.pop(number), outcome)
                done += 1
                progress(done, len(asks))
    compared = None
    if base is not None or adapter is not None:
        other = llm if base is None else base
        if other.spec.vocab_size != llm.spec.vocab_size:
            raise InvalidRequest(
                f"the base has a vocabulary of {other.spec.vocab_size}, the model of "
                f"{llm.spec.vocab_size}: their predictions cannot be compared"
            )
        texts = [a for a in asks if isinstance(tasks[a.task], Text)] or asks
        pieces = [
            a.ids[at : at + _KL_WINDOW] for a in texts for at in range(0, len(a.ids), _KL_WINDOW)
        ]
        compared = divergence(other.logits, lambda ids: llm.logits(ids, adapter), pieces)
    return EvalReport(
        model=llm.info.name,
        adapter=adapter,
        perplexity=_perplexity(tasks, scores),
        choices=_choices(tasks, scores),
        matches=Matches(len(scores.matched), sum(scores.matched.values()))
        if scores.matched
        else None,
        divergence=compared,
    )


def _asks(
    tokenizer: Tokenizer, llm: LLM, number: int, task: Task, window: int, max_tokens: int
) -> Iterator[_Ask]:
    if isinstance(task, Text):
        ids = tuple(tokenizer.encode(task.text))
        for at in range(0, len(ids), window):
            piece = ids[at : at + window]
            if len(piece) > 1:
                yield _Ask(piece, _SCORE, number)
        return
    prompt = _prompt_ids(tokenizer, llm, task.prompt)
    if isinstance(task, Match):
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        yield _Ask(prompt, params, number)
        return
    for place, choice in enumerate(task.choices):
        ids = _with_choice(tokenizer, task.prompt, prompt, choice)
        yield _Ask(ids, _SCORE, number, place, len(prompt))


def _prompt_ids(tokenizer: Tokenizer, llm: LLM, prompt: str | Messages) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    return tuple(llm.chat_prompt(prompt))


def _with_choice(
    tokenizer: Tokenizer, prompt: str | Messages, ids: tuple[int, ...], choice: str
) -> tuple[int, ...]:
    """After a plain prompt, which it continues, a choice begins with a space unless the prompt ends
    with one; in a chat it stands alone."""
    if isinstance(prompt, str) and not prompt[-1].isspace() and not choice[0].isspace():
        choice = " " + choice
    return (*ids, *tokenizer.encode(choice, add_special=False))


def _take(scores: _Scores, tasks: Sequence[Task], ask: _Ask, result: GenerationResult) -> None:
    task = tasks[ask.task]
    if isinstance(task, Match):
        scores.matched[ask.task] = task.holds(result.text)
        return
    assert result.prompt_logprobs is not None
    found = [entry.logprob for entry in result.prompt_logprobs[ask.scored :] if entry is not None]
    if isinstance(task, Text):
        scores.losses += [-logprob for logprob in found]
    else:
        scores.choices.setdefault(ask.task, {})[ask.choice] = sum(found)


def _perplexity(tasks: Sequence[Task], scores: _Scores) -> Perplexity | None:
    losses = np.array(scores.losses)
    if not len(losses):
        return None
    error = losses.std() / math.sqrt(len(losses))
    texts = sum(isinstance(task, Text) for task in tasks)
    return Perplexity(texts, len(losses), float(losses.mean()), float(error))


def _choices(tasks: Sequence[Task], scores: _Scores) -> Choices | None:
    if not scores.choices:
        return None
    correct = normalized = 0
    for number, sums in scores.choices.items():
        task = tasks[number]
        assert isinstance(task, Choice)
        lengths = [len(choice.encode()) for choice in task.choices]
        raw = [sums[place] for place in range(len(lengths))]
        even = [value / length for value, length in zip(raw, lengths, strict=True)]
        correct += raw.index(max(raw)) == task.correct
        normalized += even.index(max(even)) == task.correct
    return Choices(len(scores.choices), correct, normalized)
