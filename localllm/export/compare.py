"""How far a fused model has moved from the unfused one: rounding made visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localllm.backend.protocol import Activations
from localllm.backend.select import candidates
from localllm.errors import InvalidRequest
from localllm.eval.divergence import divergence
from localllm.llm import LLM

_WINDOW = 256  # tokens whose logits of both models are held at once
# Written for this purpose: several kinds of text, some 250 tokens.
SAMPLE = """\
The ferry leaves the old harbour at half past six. By then the bakers have been at work for three
hours, and the smell of bread hangs over the quay. A fisherman mends his nets and talks to nobody in
particular about the price of diesel.

To find the mean of a list of numbers, add them all and divide the sum by how many there are. For
4, 8 and 15 that is 27 divided by 3, which is 9. The median, the number in the middle, is 8.

def longest(words):
    best = ""
    for word in words:
        if len(word) > len(best):
            best = word
    return best

Dear Ms. Okafor, thank you for your order of 12 March. Two of the five chairs are out of stock; we
expect them within ten days. Shall we send the other three now, or would you rather wait for all of
them? Kind regards, the workshop.

"Why is the sea salty?" asked the girl. "Rain dissolves a little salt from the rocks," said her
grandmother, "and rivers carry it down. The sun takes the water back, but it leaves the salt."
"""


@dataclass(frozen=True)
class Moved:
    """tokens: positions compared. kl, largest_kl: KL(unfused || fused) in nats, mean and maximum.

    largest_difference: between two logits. same_top: share of positions with the same likeliest
    token. backend: that both ran on.
    """

    tokens: int
    kl: float
    largest_kl: float
    largest_difference: float
    same_top: float
    backend: str


def how_far(
    model: str,
    fused: Path,
    text: str | None = None,
    *,
    adapter: Path | None = None,
    backend: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Moved:
    """Compares `model` with its adapter loaded beside it and the model in `fused`, on a text.

    text: None for one that is built in. Both models are in memory at once.
    """
    # Rounded activations would be seen as well, and hide what the weights do.
    exact: Activations | None = "float32"
    if "float32" not in candidates(backend)[0].activations:
        exact = None

    def opened(of: str) -> LLM:
        return LLM(
            of,
            backend=backend,
            threads=threads,
            context=2 * _WINDOW,
            max_batch=1,
            activations=exact,
        )

    with opened(model) as unfused:
        name = None if adapter is None else unfused.load_adapter(adapter)
        pieces = _pieces(unfused, SAMPLE if text is None else text)
        with opened(str(fused)) as other:
            return _compare(
                lambda ids: unfused.logits(ids, name), other.logits, pieces,
                unfused.info.backend, progress,
            )  # fmt: skip


def _compare(
    unfused: Callable[[Sequence[int]], np.ndarray],
    fused: Callable[[Sequence[int]], np.ndarray],
    pieces: list[list[int]],
    backend: str,
    progress: Callable[[int, int], None],
) -> Moved:
    largest, done, total = 0.0, 0, sum(map(len, pieces))
    last: list[np.ndarray] = []

    def kept(ids: Sequence[int]) -> np.ndarray:
        last[:] = [unfused(ids)]
        return last[0]

    def compared(ids: Sequence[int]) -> np.ndarray:
        nonlocal largest, done
        logits = fused(ids)
        largest = max(largest, float(np.abs(logits - last[0]).max()))
        done += len(ids)
        progress(done, total)
        return logits

    found = divergence(kept, compared, pieces)
    return Moved(found.tokens, found.mean, found.largest, largest, found.same_top, backend)


def _pieces(llm: LLM, text: str) -> list[list[int]]:
    if llm.tokenizer is None:
        raise InvalidRequest("a model without a tokenizer cannot be compared on a text")
    ids = llm.tokenizer.encode(text)
    if not ids:
        raise InvalidRequest("the text to compare on is empty")
    return [ids[at : at + _WINDOW] for at in range(0, len(ids), _WINDOW)]
