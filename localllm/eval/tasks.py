"""What a line of an evaluation file asks.

    {"text": …}                                              perplexity
    {"prompt" | "messages": …, "choices": [...], "answer": …}    multiple choice by likelihood
    {"prompt" | "messages": …, "answer": … | [...]}              the answer itself, exactly
    {"prompt" | "messages": …, "pattern": …}                     a regular expression it must match

"question" stands for "prompt" as well. An answer among choices is its place from 0, its letter
from A, or its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest

MAX_LINE = 16 << 20  # bytes
_MAX_PATTERN = 10_000

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Text:
    """Every token of it is predicted from those before."""

    text: str


@dataclass(frozen=True)
class Choice:
    """prompt: a string or messages; correct: the place of the right choice."""

    prompt: str | Messages
    choices: tuple[str, ...]
    correct: int


@dataclass(frozen=True)
class Match:
    """answers: any of them, but for white space around; or pattern: found anywhere in it."""

    prompt: str | Messages
    answers: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None

    def holds(self, answer: str) -> bool:
        if self.pattern is not None:
            return self.pattern.search(answer) is not None
        return answer.strip() in (wanted.strip() for wanted in self.answers)


Task = Text | Choice | Match


def read_tasks(path: Path, limit: int | None = None) -> list[Task]:
    """One task a line. Raises InvalidRequest naming file and line."""
    tasks: list[Task] = []
    for number, line in _lines(path):
        if limit is not None and len(tasks) == limit:
            break
        try:
            tasks.append(task_of(json.loads(line)))
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"{path}:{number}: no JSON ({error.msg})") from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}:{number}: {error}", hint=error.hint) from error
    if not tasks:
        raise InvalidRequest(f"{path}: there is no line to evaluate")
    return tasks


def task_of(row: Any) -> Task:
    """Raises InvalidRequest for a row that is none of the four kinds."""
    if not isinstance(row, dict):
        raise InvalidRequest("a JSON object is needed")
    if "text" in row and not {"choices", "answer", "pattern"} & row.keys():
        return Text(_string(row, "text"))
    prompt = _prompt(row)
    if "choices" in row:
        return _choice(prompt, row)
    if "pattern" in row:
        return Match(prompt, pattern=_pattern(row["pattern"]))
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, str | int | float) and not isinstance(answers, bool):
        answers = [str(answers)]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise InvalidRequest(
            'neither "text" nor a prompt with "choices", "answer" or "pattern"',
            hint="see `localllm evaluate --help` for what a line may hold",
        )
    return Match(prompt, answers=tuple(answers))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise InvalidRequest(f"{path}:{number}: longer than {MAX_LINE >> 20} MiB")
                if line.strip():
                    yield number, line.decode("utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}:{number}: not UTF-8 ({error.reason})") from error


def _prompt(row: Mapping[str, Any]) -> str | Messages:
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise InvalidRequest('"messages" must be a list of objects')
        return tuple(messages)
    for name in ("prompt", "question"):
        if name in row:
            return _string(row, name)
    raise InvalidRequest('"prompt", "question" or "messages" is missing')


def _string(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str) or not row[name]:
        raise InvalidRequest(f'"{name}" must be a string that is not empty')
    return str(row[name])


def _choice(prompt: str | Messages, row: Mapping[str, Any]) -> Choice:
    choices = row["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise InvalidRequest('"choices" must be two strings or more, none of them empty')
    return Choice(prompt, tuple(choices), _correct(choices, row.get("answer")))


def _correct(choices: Sequence[str], answer: Any) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        letter = answer.strip().upper()
        if len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(choices):
            return ord(letter) - ord("A")
    raise InvalidRequest(
        f'"answer" must name one of the {len(choices)} choices: its place from 0, its letter from '
        f"A, or its text, not {answer!r}"
    )


def _pattern(text: Any) -> re.Pattern[str]:
    if not isinstance(text, str) or not text or len(text) > _MAX_PATTERN:
        raise InvalidRequest('"pattern" must be a regular expression')
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise InvalidRequest(f'"pattern" is no regular expression: {error}') from error
