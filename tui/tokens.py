"""The tokens of answers, for the inspector and the view of speculation. The last few are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from textual.app import App

from localllm.tui.store import Message

if TYPE_CHECKING:
    from localllm.tui.engine.client import TokenInfo

KEPT = 16  # answers
MOST_TOKENS = 16384  # of an answer


@dataclass(frozen=True)
class Alternative:
    """logprob: natural logarithm of the model's own probability."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenView:
    """fate: own, accepted (a guess that was right), rejected (a wrong guess, no part of the
    answer). rank: 1 for the likeliest, None where the alternatives do not hold it."""

    id: int
    text: str
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    fate: str = "own"

    @property
    def rank(self) -> int | None:
        places = (n for n, other in enumerate(self.alternatives, 1) if other.id == self.id)
        return next(places, None)


_answers: WeakKeyDictionary[App[Any], OrderedDict[int, list[TokenView]]] = WeakKeyDictionary()


def keep_tokens(app: App[Any], message: int, tokens: Sequence[TokenView]) -> None:
    """The tokens of a message of the store; of the oldest ones none are kept."""
    answers = _answers.setdefault(app, OrderedDict())
    answers[message] = list(tokens[:MOST_TOKENS])
    answers.move_to_end(message)
    while len(answers) > KEPT:
        answers.popitem(last=False)


def kept_tokens(app: App[Any], message: Message) -> list[TokenView] | None:
    """None where they are not kept, or the message was changed since."""
    found = _answers.get(app, OrderedDict()).get(message.id)
    if found is None:
        return None
    text = "".join(token.text for token in found if token.fate != "rejected")
    return found if message.content.strip() in text else None


def token_views(tokens: Iterable[TokenInfo]) -> list[TokenView]:
    """From what the engine sends with a piece."""
    views = []
    for token in tokens:
        views.append(
            TokenView(
                token.id,
                token.text,
                token.logprob,
                tuple(Alternative(*other) for other in token.top),
                token.drafted or "own",
            )
        )
    return views
