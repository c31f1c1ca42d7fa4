"""A vocabulary of one's own: byte-level BPE, as the models of today have it.

Byte-level: every text has ids, and they give back the very text. Numbers are cut at three digits
and words at their beginnings, so that merges do not cross them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from localllm.checkpoint.atomic import write_bytes, write_json
from localllm.errors import InvalidRequest
from localllm.tokenizer import Tokenizer, load_tokenizer
from localllm.tokenizer.messages import check_unicode
from localllm.tokenizer.pretokenizers import kind_named
from localllm.tokenizer.template import ChatTemplate

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CUTS = "dbrx"  # llama.cpp's name for such words and numbers, so that a model can go there
_BYTES = 256
_MAX_VOCABULARY = 1 << 20


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    folder: Path | str,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    end_of_text: str = END_OF_TEXT,
    chat_template: str | None = CHATML,
    min_frequency: int = 2,
) -> Tokenizer:
    """Learns the merges of `texts`, writes them to `folder` as Hugging Face has it, and opens it.

    texts: gone through once, and not kept. vocab_size: tokens at most, special ones and the 256
    bytes included; of a short text fewer are made. special_tokens: have the first ids; text never
    becomes one. end_of_text: the one that ends a text; what ends a turn is known by its name.
    chat_template: tried on a small conversation; None writes none. min_frequency: how often a pair
    must be there to be merged. The same texts in the same order give the same files.
    Raises InvalidRequest for sizes and tokens that make no sense and for no text at all,
    TemplateError for a template that does not render, CheckpointError where nothing can be written.
    """
    special = list(special_tokens)
    _check(vocab_size, special, end_of_text, min_frequency)
    if chat_template is not None:
        ChatTemplate(chat_template).render({"messages": [{"role": "user", "content": "Hello"}]})
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = kind_named(_CUTS).pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counted = _Counted(texts)
    inner.train_from_iterator(counted, trainer)
    if not counted.characters:
        raise InvalidRequest("there is no text to learn a vocabulary from")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_json(
        place / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end_of_text,
            "pad_token": end_of_text,
            "additional_special_tokens": [text for text in special if text != end_of_text],
            "clean_up_tokenization_spaces": False,
            **({} if chat_template is None else {"chat_template": chat_template}),
        },
    )
    write_bytes(place / "tokenizer.json", (inner.to_str(pretty=True) + "\n").encode())
    found = load_tokenizer(place, {})
    assert found is not None
    return found


class _Counted:
    """The texts as they pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for number, text in enumerate(self._texts, 1):
            if not isinstance(text, str):
                raise InvalidRequest(f"text {number} is no text but {type(text).__name__}")
            check_unicode(text, f"text {number}")
            self.characters += len(text)
            yield text


def _check(vocab_size: int, special: list[str], end_of_text: str, min_frequency: int) -> None:
    if len(set(special)) < len(special) or not all(special):
        raise InvalidRequest("special tokens must differ, and none be empty")
    if end_of_text not in special:
        raise InvalidRequest(f"{end_of_text!r} ends a text, and is not among the special tokens")
    least = _BYTES + len(special)
    if not least <= vocab_size <= _MAX_VOCABULARY:
        raise InvalidRequest(
            f"a vocabulary of {vocab_size:,} tokens cannot be made: 256 bytes and {len(special)} "
            f"special tokens take {least}, and {_MAX_VOCABULARY:,} are the most"
        )
    if min_frequency < 1:
        raise InvalidRequest(f"min_frequency must be at least 1, not {min_frequency}")
