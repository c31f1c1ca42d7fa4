"""What a draft head learns from: the target model's own answers, and its states along them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localllm.errors import CheckpointError, InvalidRequest, StoreError
from localllm.files import replace_file
from localllm.llm import LLM
from localllm.sampling import SamplingParams

_QUEUE = 64


@dataclass(frozen=True)
class Answer:
    """Token ids. number: its place in the plan, which decides prompt, seed and temperature."""

    number: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class States:
    """Of all prompts with their answers, one text after the other.

    states: [N, hidden], float16 or float32, at every token but a text's last. following: int32 [N],
    the token after each. starts: int64 [texts + 1]. prompts: int64 [texts], lengths in tokens.
    """

    states: np.ndarray
    following: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def drawn(self) -> np.ndarray:
        """int32: the tokens of all answers."""
        own = [
            self.following[start + prompt - 1 : stop]
            for start, stop, prompt in zip(self.starts, self.starts[1:], self.prompts, strict=False)
        ]
        return np.concatenate(own)


class Answers:
    """A journal of answers, one JSON a line, so that a run that was killed goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, Answer]:
        """A last line that is torn does not count. Raises CheckpointError for any other damage."""
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")
        found: dict[int, Answer] = {}
        for at, line in enumerate(lines):
            if not line:
                continue
            try:
                value = json.loads(line)
                answer = Answer(value["n"], tuple(value["prompt"]), tuple(value["answer"]))
            except (ValueError, KeyError, TypeError) as error:
                if at == len(lines) - 1:
                    break
                raise CheckpointError(
                    f"{self.path}:{at + 1}: is damaged",
                    hint="Delete the file; the answers are then generated again.",
                ) from error
            found[answer.number] = answer
        return found

    def rewrite(self, answers: Sequence[Answer]) -> None:
        """Exactly these, so that nothing is appended to a torn line."""
        with self._writing():
            replace_file(self.path, [_lines(answers)])

    def append(self, answers: Sequence[Answer]) -> None:
        with self._writing(), self.path.open("ab") as file:
            file.write(_lines(answers))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from error


def _lines(answers: Sequence[Answer]) -> bytes:
    lines = [{"n": a.number, "prompt": a.prompt, "answer": a.tokens} for a in answers]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def prompt_ids(llm: LLM, prompt: str) -> tuple[int, ...]:
    """As a chat has it, where the model has a template for one."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise InvalidRequest("a model without a tokenizer cannot read prompts")
    if tokenizer.chat_template is None:
        return tuple(tokenizer.encode(prompt))
    return tuple(llm.chat_prompt([{"role": "user", "content": prompt}]))


def generate(
    llm: LLM,
    prompts: Sequence[str],
    journal: Answers,
    *,
    tokens: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Answer]:
    """Answers of `tokens` tokens in all, in the order of their numbers.

    The first round over the prompts is greedy, later ones are drawn at `temperature`. Which answers
    count does not depend on how often the run was interrupted. progress: told tokens of tokens.
    """
    found = journal.read()
    journal.rewrite([found[number] for number in sorted(found)])
    fresh: list[Answer] = []
    with llm.in_flight() as flight:
        running: dict[int, tuple[int, tuple[int, ...]]] = {}
        plan = _plan(llm, prompts, found, max_tokens, temperature, seed)
        while True:
            # Enough, when those before the first that is still missing suffice.
            done = _sufficing(found, tokens)
            progress(min(tokens, sum(len(a.tokens) for a in found.values())), tokens)
            if done is not None:
                journal.append(fresh)
                return done
            while len(flight) < _QUEUE:
                number, ids, params = next(plan)
                running[flight.submit(ids, params)] = number, ids
            for ticket, outcome in flight.finished():
                if isinstance(outcome, Exception):
                    raise outcome
                number, ids = running.pop(ticket)
                found[number] = Answer(number, ids, tuple(outcome.token_ids))
                fresh.append(found[number])
            if len(fresh) >= _QUEUE:
                journal.append(fresh)
                fresh.clear()


def _plan(
    llm: LLM,
    prompts: Sequence[str],
    found: dict[int, Answer],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> Iterator[tuple[int, tuple[int, ...], SamplingParams]]:
    number = 0
    while True:
        if number not in found:
            greedy = number < len(prompts) or temperature == 0
            params = SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0 if greedy else temperature,
                seed=(seed * 1_000_003 + number) % (1 << 32),
                speculation="off",
            )
            yield number, prompt_ids(llm, prompts[number % len(prompts)]), params
        number += 1
        if temperature == 0 and number >= len(prompts):
            raise InvalidRequest(
                f"{len(prompts)} prompts give too few tokens",
                hint="give more prompts, ask for fewer tokens, or set a temperature",
            )


def _sufficing(found: dict[int, Answer], tokens: int) -> list[Answer] | None:
    total, answers = 0, []
    for number in range(len(found)):
        if number not in found:
            return None
        answers.append(found[number])
        total += len(answers[-1].tokens)
        if total >= tokens:
            return answers
    return None


def compute_states(
    llm: LLM, answers: Sequence[Answer], folder: Path, progress: Callable[[int, int], None]
) -> States:
    """The states along prompts and answers, in a file of `folder` that is mapped, not held.

    float16 where every value fits, which rounds by 0.05 %; else float32.
    """
    usable = [a for a in answers if len(a.tokens) > 2]
    rows = [len(a.prompt) + len(a.tokens) - 1 for a in usable]
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    path, part = folder / "states.npy", folder / "states.part"
    shape = (int(starts[-1]), llm.spec.hidden)
    if not _complete(path, shape):
        dtype: type = np.float16
        while True:
            array = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
            if _fill(llm, usable, starts, array, progress):
                break
            dtype = np.float32
        array.flush()
        del array
        os.replace(part, path)
    following = [np.array([*a.prompt, *a.tokens][1:], np.int32) for a in usable]
    return States(
        np.load(path, mmap_mode="r"),
        np.concatenate(following),
        starts,
        np.array([len(a.prompt) for a in usable], np.int64),
    )


def _fill(
    llm: LLM,
    answers: Sequence[Answer],
    starts: np.ndarray,
    array: np.ndarray,
    progress: Callable[[int, int], None],
) -> bool:
    """False where a value is too large for the array's type."""
    limit = np.finfo(array.dtype).max
    for i, answer in enumerate(answers):
        states = _states(llm, [*answer.prompt, *answer.tokens[:-1]])
        if np.abs(states).max() > limit:
            return False
        array[starts[i] : starts[i + 1]] = states
        progress(int(starts[i + 1]), int(starts[-1]))
    return True


def _states(llm: LLM, ids: list[int]) -> np.ndarray:
    return llm.pump.alone(lambda engine: engine.states(ids))


def _complete(path: Path, shape: tuple[int, ...]) -> bool:
    if not path.exists():
        return False
    try:
        return bool(np.load(path, mmap_mode="r").shape == shape)
    except (ValueError, OSError):
        return False
