"""The byte-level alphabet of GPT-2: every byte is written as one printable character.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), code.
"""

from __future__ import annotations


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    chars.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return chars


BYTE_OF = _alphabet()


def to_bytes(text: str) -> bytes:
    """The bytes a byte-level token stands for; text outside the alphabet is taken as it is."""
    try:
        return bytes([BYTE_OF[char] for char in text])
    except KeyError:
        return text.encode()


def byte_token(text: str) -> int | None:
    """The byte of a SentencePiece byte token ("<0x0A>" -> 10), or None."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None
