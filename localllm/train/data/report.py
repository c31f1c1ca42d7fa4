"""What became of every row, told before the first step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class DataReport:
    """Counts of rows unless said otherwise. Every row read is kept or in one of the dropped counts.

    kind: the format found. as_chat: whether the chat template was used. trained_on: `train_on`.
    rows: read, of training and validation together. train, valid: examples made of them.
    duplicates, shared: dropped, for another row says the same, or validation does.
    empty: dropped, for an answer (or text) is empty; empty_turns: such turns of rows that are kept.
    unmarked: turns that the template does not mark as the model's own, while it marks others.
    unanswered: dropped, for no assistant message is in them. same: preferences without a
    difference. trailing: messages after the last answer, left out.
    long: longer than max_length; dropped_long, cut: what became of them; cut_tokens: taken off;
    untrained: dropped, for the cut left nothing to learn. split: texts in several examples.
    expanded: rows made into several examples, for the template renders past turns otherwise than
    new ones. endless: turns that end without an end-of-turn token. rejoined: turns whose prompt and
    answer would have merged in one token, split as they are when the model is used. unlike: turns
    before which the model in use gets another prompt (with an opened thought, say). dated: whether
    the template writes a date.
    tokens, trained_tokens, longest: in tokens, of what is kept.
    """

    kind: str
    trained_on: str
    as_chat: bool = False
    rows: int = 0
    train: int = 0
    valid: int = 0
    duplicates: int = 0
    shared: int = 0
    empty: int = 0
    empty_turns: int = 0
    unmarked: int = 0
    unanswered: int = 0
    same: int = 0
    trailing: int = 0
    max_length: int = 0
    long: int = 0
    dropped_long: int = 0
    cut: int = 0
    cut_tokens: int = 0
    untrained: int = 0
    split: int = 0
    expanded: int = 0
    endless: int = 0
    rejoined: int = 0
    unlike: int = 0
    dated: bool = False
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    longest_at: str = ""

    @property
    def dropped(self) -> int:
        """Rows of which nothing is trained."""
        return (
            self.duplicates
            + self.shared
            + self.empty
            + self.unanswered
            + self.same
            + self.dropped_long
            + self.untrained
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field and `dropped`."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"dropped": self.dropped}

    def lines(self) -> list[str]:
        """For people: the format and totals first, then what was not taken as it stands."""
        chat = ", by the chat template" if self.as_chat else ""
        trained_on = "all" if self.kind == "text" else self.trained_on
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"{_count(self.rows, 'row')} of {self.kind}{chat}: "
            f"{self.train:,} to train, {self.valid:,} to validate",
            f"{_count(self.tokens, 'token')}, {self.trained_tokens:,} of them trained "
            f"({share:.0%}, "
            f"{_TRAINED_ON[trained_on]}); the longest example has {self.longest:,} "
            f"({self.longest_at}; the limit is {self.max_length:,})",
        ]
        return lines + [text for count, text in self._remarks() if count]

    def _remarks(self) -> list[tuple[int, str]]:
        row, turn = "row", "turn"
        return [
            (self.duplicates, f"dropped: {_count(self.duplicates, row)} that came before"),
            (self.shared, f"dropped: {_count(self.shared, row)} that validation holds too"),
            (self.empty, f"dropped: {_count(self.empty, row)} with an empty answer"),
            (self.unanswered, f"dropped: {_count(self.unanswered, row)} without an answer"),
            (self.same, f"dropped: {_count(self.same, row)} whose two answers are the same"),
            (self.dropped_long, f"dropped: {_count(self.dropped_long, row)} over the limit"),
            (
                self.untrained,
                f"dropped: {_count(self.untrained, row)} with no answer left after the cut",
            ),
            (
                self.cut,
                f"cut: {_count(self.cut, 'example')} over the limit, "
                f"by {_count(self.cut_tokens, 'token')}",
            ),
            (
                self.split,
                f"split: {_count(self.split, 'text')} over the limit, into pieces; nothing is lost",
            ),
            (
                self.empty_turns,
                f"not trained: {_count(self.empty_turns, turn)} of the assistant with no content",
            ),
            (
                self.unmarked,
                f"not trained: {_count(self.unmarked, turn)} that the template does not mark "
                "as the model's own",
            ),
            (
                self.trailing,
                f"left out: {_count(self.trailing, 'message')} after the last answer",
            ),
            (
                self.expanded,
                f"expanded: {_count(self.expanded, row)} into several examples, for the template "
                "renders past answers otherwise than new ones",
            ),
            (
                self.rejoined,
                f"split: {_count(self.rejoined, 'token')} across the end of a prompt, as when the "
                "model is used",
            ),
            (
                self.unlike,
                f"beware: before {_count(self.unlike, turn)} the template's prompt for a model "
                "in use ends otherwise (with an opened thought, say)",
            ),
            (
                self.endless,
                f"beware: {_count(self.endless, turn)} end without an end-of-turn token, so the "
                "model does not learn to stop",
            ),
            (
                int(self.dated),
                "beware: the template writes today's date; a fixed one is used in training",
            ),
        ]


_TRAINED_ON = {
    "assistant": "the assistant's answers",
    "completion": "the completions",
    "last": "the last answers",
    "all": "everything",
}


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
