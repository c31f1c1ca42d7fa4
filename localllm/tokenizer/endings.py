"""Which tokens end a turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Control tokens by which known chat formats and base models end a turn or a text.
_MARKERS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_utterance>",
    "<|return|>",
    "<|call|>",
    "<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<|END_OF_TURN_TOKEN|>",
)


def is_marker(text: str) -> bool:
    """Whether a token's text is a turn's end in some known format, and hardly anything else."""
    return text in _MARKERS and text.startswith(("<|", "<｜"))  # noqa: RUF001


def end_ids(special: Mapping[str, int], declared: Iterable[int]) -> frozenset[int]:
    """The ids the model's files declare, and known markers among its control tokens.

    A marker that merely looks known but is plain text in this vocabulary does not count.
    """
    ends = {special[marker] for marker in _MARKERS if marker in special}
    if "<|return|>" in special and "<|end|>" in special:
        ends.discard(special["<|end|>"])  # in this format it ends a message, not the turn
    return frozenset(ends | set(declared))
