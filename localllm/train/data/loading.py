"""`load_data`: from a file to examples, with an account of every row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from localllm.errors import InvalidRequest
from localllm.tokenizer import Tokenizer
from localllm.train.data.example import Example, Preference, TrainingData
from localllm.train.data.formats import KINDS, Chat, Completion, Item, Kind, Pair, Text, kind_of
from localllm.train.data.formats import item_of as read_item
from localllm.train.data.masks import Made, Masker
from localllm.train.data.reading import rows
from localllm.train.data.report import DataReport

MAX_ROWS = 20_000_000
_TRAIN_ON = ("assistant", "completion", "last", "all")
# Counts that `Made` and `DataReport` share.
_TURN_COUNTS = ("empty_turns", "unmarked", "trailing", "rejoined", "endless", "unlike")


@dataclass(frozen=True)
class _Row:
    """digest: of what it says, whatever file says it."""

    origin: str
    item: Item
    digest: bytes


def load_data(
    source: str,
    tokenizer: Tokenizer,
    *,
    kind: str = "auto",
    train_on: str = "assistant",
    max_length: int = 2048,
    on_long: str = "refuse",
    valid: str | None = None,
    valid_fraction: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    chat_template: str | None = None,
) -> TrainingData:
    """Examples of a file; `localllm.train.data.reading` says of which kinds.

    kind: of the rows, "auto" looks at the first. train_on: see `Masker`. max_length: tokens of an
    example at most; on_long: what becomes of longer ones: "refuse" (an error that counts them),
    "drop", or "cut" at the end (texts are cut into pieces, and nothing of them is lost). valid: a
    file of validation rows; valid_fraction: or about that share of `source`, chosen by content and
    seed, so that a row stays where it is when others come. limit: rows read at most.
    chat_template: instead of the model's; a template, or the name of one of its own.

    Rows that are empty, repeated or in validation too are left out and counted. Raises
    InvalidRequest naming file, line and field.
    """
    _check(kind, train_on, on_long, max_length, valid, valid_fraction, limit)
    masker = Masker(tokenizer, train_on, chat_template)
    chosen, found = _read(source, kind, limit)
    account = Counter[str](rows=len(found))
    held: list[_Row] = []
    if valid is not None:
        _, held = _read(valid, chosen, None)
        account["rows"] += len(held)
    found, again = _distinct(found)
    held, more = _distinct(held)
    account["duplicates"] = again + more
    if valid_fraction:
        held, found = _split(found, valid_fraction, seed)
    elif held:
        kept = {row.digest for row in held}
        both = [row for row in found if row.digest in kept]
        account["shared"] = len(both)
        found = [row for row in found if row.digest not in kept]

    maker = _Maker(masker, max_length, on_long, account)
    train: Any = maker.examples(found)
    validation: Any = maker.examples(held)
    maker.refuse_long()
    everything = [example for one in (*train, *validation) for example in _sequences(one)]
    longest = max(everything, key=len, default=None)
    counts: dict[str, Any] = dict(account)
    facts = DataReport(kind=chosen, trained_on=train_on, **counts)
    report = replace(
        facts,
        as_chat=chosen != "text" and masker.has_template,
        train=len(train),
        valid=len(validation),
        max_length=max_length,
        tokens=sum(len(example) for example in everything),
        trained_tokens=sum(example.targets for example in everything),
        longest=0 if longest is None else len(longest),
        longest_at="" if longest is None else longest.origin,
        dated=masker.dated and chosen != "text",
    )
    return TrainingData(tuple(train), tuple(validation), report, _fingerprint(train, validation))


class _Maker:
    """Examples of rows; what is not taken as it stands goes into the account."""

    def __init__(
        self, masker: Masker, max_length: int, on_long: str, account: Counter[str]
    ) -> None:
        self._masker = masker
        self._max = max_length
        self._on_long = on_long
        self._account = account
        self._refused: list[Example] = []

    def examples(self, found: Iterable[_Row]) -> list[Example] | list[Preference]:
        singles: list[Example] = []
        pairs: list[Preference] = []
        for row in found:
            if isinstance(row.item, Pair):
                pairs += self._pair(row.item, row.origin)
            else:
                singles += self._single(row.item, row.origin)
        return pairs or singles

    def refuse_long(self) -> None:
        """Raises InvalidRequest where examples are over the limit and nothing may become of them,
        once all are counted."""
        if not self._refused:
            return
        longest = max(self._refused, key=len)
        count = len(self._refused)
        raise InvalidRequest(
            f"{self._refused[0].origin}: the example has {len(self._refused[0]):,} tokens, and at "
            f"most {self._max:,} are taken; {count:,} {'is' if count == 1 else 'are'} longer, and "
            f"the longest has {len(longest):,} ({longest.origin})",
            hint="raise --seq-len, or choose with --on-long drop or --on-long cut",
        )

    def _single(self, item: Chat | Completion | Text, origin: str) -> list[Example]:
        made = self._made(item, origin)
        for name in ("empty", "unanswered", "expanded", *_TURN_COUNTS):
            self._account[name] += int(getattr(made, name))
        pieces = isinstance(item, Text)
        return [one for example in made.examples for one in self._fitted(example, pieces)]

    def _pair(self, pair: Pair, origin: str) -> list[Preference]:
        if pair.chosen == pair.rejected:
            self._account["same"] += 1
            return []
        sides = [self._made(side, origin) for side in (pair.chosen, pair.rejected)]
        if any(not side.examples for side in sides):
            self._account["empty"] += 1
            return []
        for name in _TURN_COUNTS:
            self._account[name] += sum(int(getattr(side, name)) for side in sides)
        # A row counts once, whichever of its answers is too long.
        chosen, rejected = (side.examples[-1] for side in sides)
        if len(chosen) <= self._max and len(rejected) <= self._max:
            return [Preference(chosen, rejected, origin)]
        self._account["long"] += 1
        if self._on_long == "refuse":
            self._refused.append(max(chosen, rejected, key=len))
            return []
        if self._on_long == "drop":
            self._account["dropped_long"] += 1
            return []
        cuts = [_part(side, 0, self._max) for side in (chosen, rejected)]
        if not all(side.targets for side in cuts):
            self._account["untrained"] += 1
            return []
        self._account["cut"] += 1
        self._account["cut_tokens"] += len(chosen) + len(rejected) - sum(map(len, cuts))
        return [Preference(cuts[0], cuts[1], origin)]

    def _made(self, item: Chat | Completion | Text, origin: str) -> Made:
        if isinstance(item, Text):
            return self._masker.text(item, origin)
        if isinstance(item, Completion):
            return self._masker.completion(item, origin)
        if not self._masker.has_template:
            raise InvalidRequest(
                f"{origin}: this model has no chat template, so a chat has no tokens",
                hint="give one with --chat-template, or data of prompts and completions",
            )
        return self._masker.chat(item, origin)

    def _fitted(self, example: Example, pieces: bool) -> list[Example]:
        if len(example) <= self._max:
            return [example]
        self._account["long"] += 1
        if self._on_long == "refuse":
            self._refused.append(example)
            return []
        if self._on_long == "drop":
            self._account["dropped_long"] += 1
            return []
        if pieces:
            self._account["split"] += 1
            return [
                _part(example, start, start + self._max)
                for start in range(0, len(example), self._max)
                if len(example) - start > 1
            ]
        cut = _part(example, 0, self._max)
        if not cut.targets:
            self._account["untrained"] += 1
            return []
        self._account["cut"] += 1
        self._account["cut_tokens"] += len(example) - self._max
        return [cut]


def _part(example: Example, start: int, end: int) -> Example:
    trained = example.trained[start:end].copy()
    trained[:1] = False
    return replace(example, tokens=example.tokens[start:end], trained=trained)


def _read(source: str, kind: str, limit: int | None) -> tuple[Kind, list[_Row]]:
    found: list[_Row] = []
    chosen: Kind | None = None if kind == "auto" else next(k for k in KINDS if k == kind)
    for origin, row in rows(source):
        if limit is not None and len(found) >= limit:
            break
        if len(found) >= MAX_ROWS:
            raise InvalidRequest(f"{source} has more than {MAX_ROWS:,} rows", hint="use --limit")
        if chosen is None:
            chosen = kind_of(origin, row)
        item = read_item(origin, row, chosen)
        found.append(_Row(origin, item, _digest(item)))
    if chosen is None or not found:
        raise InvalidRequest(f"{source} holds no rows")
    return chosen, found


def _digest(item: Item) -> bytes:
    told = json.dumps(asdict(item), sort_keys=True, default=repr, ensure_ascii=True)
    return hashlib.blake2b(told.encode(), digest_size=16).digest()


def _distinct(found: Sequence[_Row]) -> tuple[list[_Row], int]:
    kept = {row.digest: row for row in reversed(found)}  # the first of each stays
    distinct = [row for row in found if kept[row.digest] is row]
    return distinct, len(found) - len(distinct)


def _split(found: list[_Row], fraction: float, seed: int) -> tuple[list[_Row], list[_Row]]:
    """Validation first. A row's side hangs on its content alone; but neither is left empty."""
    if len(found) < 2:
        return [], found
    key = seed.to_bytes(16, "little", signed=True)
    places = [hashlib.blake2b(row.digest, key=key, digest_size=16).digest() for row in found]
    below = int(fraction * 2**53) << 75  # of the 2**128 places there are
    held = [int.from_bytes(place, "big") < below for place in places]
    if not any(held):
        held[places.index(min(places))] = True
    elif all(held):
        held[places.index(max(places))] = False
    return (
        [row for row, out in zip(found, held, strict=True) if out],
        [row for row, out in zip(found, held, strict=True) if not out],
    )


def _sequences(one: Example | Preference) -> tuple[Example, ...]:
    return (one,) if isinstance(one, Example) else (one.chosen, one.rejected)


def _fingerprint(*parts: Sequence[Example] | Sequence[Preference]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"part")
        for one in part:
            for example in _sequences(one):
                digest.update(len(example).to_bytes(8, "little"))
                digest.update(example.tokens.tobytes() + example.trained.tobytes())
    return digest.hexdigest()


def _check(
    kind: str,
    train_on: str,
    on_long: str,
    max_length: int,
    valid: str | None,
    valid_fraction: float,
    limit: int | None,
) -> None:
    for name, value, known in (
        ("kind", kind, ("auto", *KINDS)),
        ("train_on", train_on, _TRAIN_ON),
        ("on_long", on_long, ("refuse", "drop", "cut")),
    ):
        if value not in known:
            raise InvalidRequest(f"{name} is one of {', '.join(known)}, not {value!r}")
    if max_length < 2:
        raise InvalidRequest(f"examples need at least 2 tokens, not {max_length}")
    if not 0 <= valid_fraction < 1:
        raise InvalidRequest(f"a share to validate is from 0 to below 1, not {valid_fraction}")
    if valid is not None and valid_fraction:
        raise InvalidRequest("validation is a file or a share of the data, not both")
    if limit is not None and limit < 1:
        raise InvalidRequest(f"the limit must be at least 1 row, not {limit}")
