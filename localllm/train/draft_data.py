"""What a draft head learns from: the target model's own answers, and its states along them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from localllm.engine.sequence import Sequence as Sequence_
from localllm.errors import CheckpointError, InvalidRequest, StoreError
from localllm.files import replace_file
from localllm.llm import LLM
from localllm.sampling import SamplingParams

_QUEUE = 64
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Answer:
    """Token ids. number: its place in the plan, which decides prompt, seed and temperature.
    at: the first of its rows in the file of states, None where they are not there yet."""

    number: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    at: int | None = None

    @property
    def rows(self) -> int:
        """States along it: at every token but the last."""
        return len(self.prompt) + len(self.tokens) - 1


@dataclass(frozen=True)
class States:
    """Along prompts with their answers.

    states: [N, hidden], float16 or float32; text i has lengths[i] rows from starts[i] on.
    following: int32 [N], the token after each. prompts: int64 [texts], lengths in tokens.
    """

    states: np.ndarray
    following: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray

    def rows(self, text: int) -> slice:
        return slice(self.starts[text], self.starts[text] + self.lengths[text])

    @property
    def drawn(self) -> np.ndarray:
        """int32: the tokens of all answers."""
        own = [
            self.following[self.rows(text)][prompt - 1 :]
            for text, prompt in enumerate(self.prompts)
        ]
        return np.concatenate(own)


class StateFile:
    """Rows of states that only grow: float16, which rounds by 0.05 %, until a value does not fit;
    float32 from then on."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width = folder, width
        self._dtype = np.dtype(np.float32 if self._path(np.float32).exists() else np.float16)

    def _path(self, dtype: type | np.dtype) -> Path:
        return self._folder / f"states.{np.dtype(dtype).name}"

    @property
    def path(self) -> Path:
        return self._path(self._dtype)

    @property
    def rows(self) -> int:
        """A row that was torn by a kill does not count."""
        size = self.path.stat().st_size if self.path.exists() else 0
        return size // (self._width * self._dtype.itemsize)

    def append(self, parts: Sequence[np.ndarray]) -> int:
        """float32 [n, width] each; the first one's first row. They are on the disk then."""
        if self._dtype == np.float16 and any(np.abs(part).max() > _LARGEST for part in parts):
            self._widen()
        rows = self.rows
        with writing(self.path), self.path.open("ab") as file:
            file.truncate(rows * self._width * self._dtype.itemsize)
            for part in parts:
                file.write(np.ascontiguousarray(part, self._dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        return rows

    def array(self) -> np.ndarray:
        """[rows, width], mapped, not held."""
        shape = (self.rows, self._width)
        return np.memmap(self.path, self._dtype, "r", shape=shape)

    def _widen(self) -> None:
        old, kept = self.path, self.array() if self.rows else None
        self._dtype = np.dtype(np.float32)
        blocks = [] if kept is None else np.array_split(kept, 1 + len(kept) // 4096)
        with writing(self.path):
            replace_file(self.path, (block.astype(np.float32).tobytes() for block in blocks))
        old.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from error


class _Recorder:
    """States of running requests, by their seeds, as steps compute them."""

    def __init__(self) -> None:
        self._parts: dict[int | None, list[np.ndarray]] = {}
        self._known: dict[int | None, int] = {}

    def __call__(self, sequence: Sequence_, start: int, states: np.ndarray) -> None:
        seed = sequence.request.params.seed
        if start != self._known.get(seed, 0):  # it gave way, and begins anew
            self._parts[seed] = [np.concatenate(self._parts[seed])[:start]] if start else []
        self._parts.setdefault(seed, []).append(states)
        self._known[seed] = start + len(states)

    def take(self, seed: int | None, rows: int) -> np.ndarray:
        """float32 [rows, hidden] of a request that has ended."""
        del self._known[seed]
        taken: np.ndarray = np.concatenate(self._parts.pop(seed))[:rows]
        assert len(taken) == rows, "states of every token were computed"
        return taken


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
                answer = Answer(
                    value["n"], tuple(value["prompt"]), tuple(value["answer"]), value.get("at")
                )
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
        with writing(self.path):
            replace_file(self.path, [_lines(answers)])

    def append(self, answers: Sequence[Answer]) -> None:
        """Of one number the latest counts."""
        with writing(self.path), self.path.open("ab") as file:
            file.write(_lines(answers))
            file.flush()
            os.fsync(file.fileno())


def _lines(answers: Sequence[Answer]) -> bytes:
    lines = [{"n": a.number, "prompt": a.prompt, "answer": a.tokens, "at": a.at} for a in answers]
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
    file: StateFile,
    *,
    tokens: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Answer]:
    """Answers of `tokens` tokens in all, in the order of their numbers, and their states.

    The first round over the prompts is greedy, later ones are drawn at `temperature`. Which answers
    count does not depend on how often the run was interrupted. progress: told tokens of tokens.
    """
    found = journal.read()
    journal.rewrite([found[number] for number in sorted(found)])
    fresh: list[tuple[Answer, np.ndarray]] = []
    recorder = _Recorder()

    def keep() -> None:
        # States before their answers: a kill between the two leaves rows that nobody names.
        kept = recorded([answer for answer, _ in fresh], [states for _, states in fresh], file)
        journal.append(kept)
        found.update((answer.number, answer) for answer in kept)
        fresh.clear()

    # A prompt that is taken from the cache has no states.
    with _watched(llm, recorder), llm.in_flight(reuse=False) as flight:
        running: dict[int, tuple[int, tuple[int, ...], int | None]] = {}
        plan = _plan(llm, prompts, found, max_tokens, temperature, seed)
        while True:
            # Enough, when those before the first that is still missing suffice.
            done = _sufficing(found, tokens)
            progress(min(tokens, sum(len(a.tokens) for a in found.values())), tokens)
            if done is not None:
                break
            while len(flight) < _QUEUE:
                number, ids, params = next(plan)
                running[flight.submit(ids, params)] = number, ids, params.seed
            for ticket, outcome in flight.finished():
                if isinstance(outcome, Exception):
                    raise outcome
                number, ids, own = running.pop(ticket)
                answer = Answer(number, ids, tuple(outcome.token_ids))
                found[number] = answer
                fresh.append((answer, recorder.take(own, max(0, answer.rows))))
            if len(fresh) >= _QUEUE:
                keep()
    if fresh:
        keep()
    return [found[answer.number] for answer in done]


@contextmanager
def _watched(llm: LLM, recorder: _Recorder) -> Iterator[None]:
    llm.pump.alone(lambda engine: engine.watch_states(recorder))
    try:
        yield
    finally:
        llm.pump.alone(lambda engine: engine.watch_states(None))


def recorded(
    answers: Sequence[Answer], states: Sequence[np.ndarray], file: StateFile
) -> list[Answer]:
    """The answers, told where their states now stand."""
    at = file.append(states)
    kept = []
    for answer, own in zip(answers, states, strict=True):
        kept.append(replace(answer, at=at))
        at += len(own)
    return kept


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


def states_of(
    llm: LLM,
    answers: Sequence[Answer],
    journal: Answers,
    file: StateFile,
    progress: Callable[[int, int], None],
) -> States:
    """Along these answers; what was not recorded, or got lost, is computed, to the same bits."""
    usable = [a for a in answers if len(a.tokens) > 2]
    missing = [a for a in usable if a.at is None or a.at + a.rows > file.rows]
    done, total = 0, sum(a.rows for a in missing)
    progress(done, total)
    again: dict[int, Answer] = {}
    for first in range(0, len(missing), _QUEUE):
        some = missing[first : first + _QUEUE]
        states = []
        for answer in some:
            states.append(_states(llm, [*answer.prompt, *answer.tokens[:-1]]))
            done += answer.rows
            progress(done, total)
        kept = recorded(some, states, file)
        journal.append(kept)
        again |= {answer.number: answer for answer in kept}
    usable = [again.get(a.number, a) for a in usable]
    following = np.zeros(file.rows, np.int32)
    starts = np.array([a.at for a in usable], np.int64)
    for answer, start in zip(usable, starts, strict=True):
        following[start : start + answer.rows] = [*answer.prompt, *answer.tokens][1:]
    return States(
        file.array(),
        following,
        starts,
        np.array([a.rows for a in usable], np.int64),
        np.array([len(a.prompt) for a in usable], np.int64),
    )


def _states(llm: LLM, ids: list[int]) -> np.ndarray:
    return llm.pump.alone(lambda engine: engine.states(ids))
