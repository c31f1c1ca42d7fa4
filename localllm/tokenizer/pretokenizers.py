"""The pre-tokenizer kinds that GGUF files name in `tokenizer.ggml.pre`.

A kind is a list of patterns. Each cuts the pieces left by the one before into its matches and
what lies between them. Sources: llama.cpp's src/llama-vocab.cpp, and where that notes the
model's own pattern, the model's own; Unicode normalization as in the models' own tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from localllm.errors import UnsupportedModel


@dataclass(frozen=True)
class Kind:
    """patterns: Oniguruma regular expressions, applied in order.

    nfc: text is first brought to Unicode NFC.
    ignore_merges: a piece that is itself a token is taken whole, whatever the merges say.
    add_bos: the default of `tokenizer.ggml.add_bos_token`.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in self.patterns]
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, as_bytes])

    def normalizer(self) -> Normalizer | None:
        return normalizers.NFC() if self.nfc else None


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_APOSTROPHE}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_APOSTROPHE}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    rf"{_APOSTROPHE}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_CAMEL = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+<tail>|{_HEAD}{_UPPER}+{_LOWER}*<tail>|<digits>"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = _CAMEL.replace("<tail>", f"{_APOSTROPHE}?").replace("<digits>", r"\p{N}{1,3}")
_TEKKEN = _CAMEL.replace("<tail>", "").replace("<digits>", r"\p{N}")


def _char_class(ranges: str) -> str:
    """A character class of code points in hexadecimal: "41-5A B5" -> [A-Zµ]."""
    spans = [span.split("-") for span in ranges.split()]
    return "[" + "".join("-".join(f"\\x{{{point}}}" for point in span) for span in spans) + "]"


# Letters of scripts with two cases, as DeepSeek LLM lists them.
_CASED = _char_class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F "
    "386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
    "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 "
    "1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 "
    "2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 "
    "2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 "
    "A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 "
)
_MARKS = _char_class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_EAST_ASIAN = _char_class("4E00-9FA5 800-4E00 AC00-D7FF")
_HAN_AND_KANA = _char_class("4E00-9FA5 3040-309F 30A0-30FF")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    f"{_HAN_AND_KANA}+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_APOSTROPHE}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    rf"{_APOSTROPHE}|{_HEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)

_PLAIN = Kind((GPT2_PATTERN,))
_BY_DIGIT = Kind((r"\p{N}", GPT2_PATTERN))
_LLAMA = Kind((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN = Kind((_QWEN2,), nfc=True)
_WORDS_OF_THREE_DIGITS = Kind((_LLAMA3,))

KINDS: dict[str, Kind] = {
    "default": Kind((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "jais", "trillion", "exaone4"),
        _PLAIN,
    ),
    "granite-docling": _PLAIN,
    **dict.fromkeys(("mpt", "olmo"), Kind((GPT2_PATTERN,), nfc=True)),  # vocabularies of GPT-NeoX
    **dict.fromkeys(
        ("starcoder", "refact", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _BY_DIGIT,
    ),
    "command-r": Kind(_BY_DIGIT.patterns, nfc=True),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA,
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _WORDS_OF_THREE_DIGITS),
    "qwen2": _QWEN,
    "qwen35": Kind((_QWEN35,), nfc=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "kormo", "megrez", "hunyuan", "solar-open", "stablelm2", "grok-2"),
        Kind((_QWEN2,)),
    ),
    "tekken": Kind((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Kind((_GPT4O,))),
    "deepseek-llm": Kind(
        (r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_MARKS}+", r"\s+$", f"{_EAST_ASIAN}+", r"\p{N}+")
    ),
    "deepseek-coder": Kind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{_EAST_ASIAN}+", r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Kind(_DEEPSEEK3)),
    "falcon": Kind((r"[\p{P}\$\+<=>\^~\|`]+", GPT2_PATTERN, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), Kind((_BLOOM,))),
    "viking": Kind((_BLOOM, r"\p{N}")),
    "superbpe": Kind((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), Kind((_BAILING,))),
    "seed-coder": Kind((_SEED,)),
    "exaone-moe": Kind((_EXAONE_MOE,)),
    "minicpm5": Kind((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignore_merges=True),
}


def kind_named(name: str | None) -> Kind:
    """Raises `UnsupportedModel` for a kind that is unknown or not stated: never a guess."""
    kind = KINDS.get(name) if name is not None else None
    if kind is not None:
        return kind
    if name is None:
        raise UnsupportedModel(
            "the vocabulary does not say how text is cut before merging "
            "(tokenizer.ggml.pre is missing)",
            hint="convert the model again with a current converter; old files lack this key",
        )
    raise UnsupportedModel(
        f"the pre-tokenizer kind {name!r} is not one we know",
        hint="a guess would give wrong tokens; known kinds: " + ", ".join(sorted(KINDS)),
    )
