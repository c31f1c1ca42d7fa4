"""Texts that tokenizers get wrong."""

# Confusable letters and long lines are the point here.
# ruff: noqa: RUF001, E501

from __future__ import annotations

import random

HARD: dict[str, str] = {
    "empty": "",
    "plain": "The quick brown fox jumps over the lazy dog.",
    "contractions": "I'm sure you're right; they've said we'll see, I'd say, it's DON'T CAN'T 'tis",
    "emoji": "😀😃 👍🏽 🇫🇷🇯🇵 ❤️ ☕️ 1️⃣",
    "zwj": "👩‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 a\u200db",
    "combining": "e\u0301 n\u0303 Z\u0351\u036b\u0343a\u0328l\u0321g\u0322o\u0489 \u0301 q\u0307\u0323",
    "precomposed": "é ñ ü Å ệ ǖ",
    "cjk": "今天天气不错。日本語のテキスト、カタカナ。한국어 텍스트. 𠮷野家 、。「」",
    "rtl": "שלום עולם! مرحبا بالعالم، كيف حالك؟ \u202eabc\u202c \u200fx",
    "scripts": "Привет мир. Γειά σου Κόσμε. नमस्ते दुनिया. สวัสดีชาวโลก ᠮᠣᠩᠭᠣᠯ Ⴀⴀ ꙮ ⵣ",
    "spaces": "a b  c   d    e     f                                        g ",
    "leading spaces": "   three before",
    "trailing spaces": "three after   ",
    "only spaces": "     ",
    "one space": " ",
    "other spaces": "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u200bg\ufeffh\u0085i",
    "tabs": "\ta\t\tb\t\t\tc \t d\t \te",
    "newlines": "a\nb\n\nc\n\n\n\n\nd\r\ne\r\n\r\nf\rg\n\r h \n i\n  j\n",
    "many newlines": "\n" * 40 + "x" + "\n\n",
    "digits": "0 1 12 123 1234 12345 1234567890123456789 3.14159 1,000,000 2024-01-31 0x1F",
    "other digits": "٣٤٥ ४५६ ²³ ½ Ⅻ ① 𝟘𝟙",
    "python": "def f(x: int) -> int:\n    return x ** 2  # square\n\n\nif __name__ == '__main__':\n\tprint(f(3))\n",
    "c": '#include <stdio.h>\nint main(void) { for (int i=0;i<10;++i) printf("%d\\n", i); }',
    "html": '<div class="a"><b>x</b><br/>&amp;<table><tr><td>1</td></tr></table></div><s>no</s>',
    "json": '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "markdown": "# Title\n\n* one\n* two\n\n---\n\n```sh\n$ ls -la | grep x\n```\n**bold**_it_",
    "symbols": "!!! ??? ... --- === *** ((( ))) [[[ ]]] {{{ }}} <<< >>> ~~~ ``` $$$ %%% ^^^ &&& @@@",
    "control": "".join(chr(c) for c in range(1, 32)) + "\x7f\x80\x9f",
    "nul": "a\x00b\x00\x00",
    "private": "\ue000 \uf8ff \U000f0000 \U00100000 \U0010fffd",
    "noncharacters": "\ufffe\uffff \U0001fffe",
    "replacement": "\ufffd\ufffd",
    "surrogate pairs": "𝒜𝓃 𐍈 🜁 \U0002f800",
    "ligatures": "ﬁ ﬂ Å Ω K ſ ß ẞ İ ı",
    "escaped space": "a▁b ▁▁ c▁",
    "byte token text": "<0x0A> <0xFF> Ġ Ċ",
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "gemma chat": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "end marks": "</s><s><unk><pad><eos><|endoftext|>",
    "nearly special": "<|im_end|> <|im_end| <im_end> <|IM_END|> <|im_ end|><|im_start|<|im_end|>>",
    "special in words": "a<|im_end|>b <end_of_turn>.<bos>x<eos>",
    "unused": "<unused0><unused99>[multimodal]<mask><start_of_image><repo_name><file_sep>",
    "long word": "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "repeated": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "url": "https://user:pw@example.com:8080/a/b%20c?d=e&f=g#h",
    "mixed case": "camelCaseWord HTTPServer iPhone XMLHttpRequest SCREAMING_CASE kebab-case",
}

_ALPHABET = (
    "abcdefghij ABC  0123456789 \n\n\t\r.,;:!?'\"<>|_-/\\()[]{}@#$%^&*~`"
    "éñüçßøåЖшλ中文字日本語한국אבعر\u0301\u200d👍😀🏽ﬁ①½ \u00a0\u3000▁Ġ\x00\x07"
)
_WORDS = [
    "the ",
    " and",
    "ing",
    "'s",
    "<|im_end|>",
    "<b>",
    "</b>",
    "    ",
    "\n\n\n",
    "\r\n",
    "1234",
]


def random_texts(count: int, seed: int = 20) -> list[str]:
    """Mixtures of characters and pieces, the same for the same seed."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        size = draw.randint(1, 60)
        parts = [draw.choice(_WORDS if draw.random() < 0.2 else _ALPHABET) for _ in range(size)]
        texts.append("".join(parts))
    return texts
