"""Parity of the tokenizers: our ids against recorded ids of llama.cpp and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localllm import hub
from localllm.tokenizer import load_tokenizer

TITLE = "Tokenizers"
NOTE = (
    "Texts whose ids are the same, control tokens read as text or as control tokens: emoji, "
    "combining marks, CJK, right-to-left, runs of spaces and digits, code, control characters and "
    "random text (`tests/tokenizer/texts.py`). The Gemma texts that differ are peers' own "
    "departures from SentencePiece: a written `▁`, `</s>`, and runs of more than 31 spaces."
)
HEADER = ("Vocabulary", "Held against", "Control tokens", "Same ids")
GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "tokenizer" / "golden"
MODELS = {"smollm2": "smollm2:135m", "gemma3": "gemma3:270m"}
# Recorded column: who gave it, and whether control tokens were parsed.
PEERS = {
    "plain": ("llama.cpp", False),
    "special": ("llama.cpp", True),
    "transformers": ("transformers", True),
}


def rows() -> list[tuple[str, ...]]:
    found = []
    for name, model in MODELS.items():
        texts: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))
        tokenizer = load_tokenizer(hub.resolve(model).path)
        assert tokenizer is not None
        for column, (peer, parse) in PEERS.items():
            recorded = [row for row in texts if column in row]
            if not recorded:
                continue
            same = sum(
                tokenizer.encode(row["text"], add_special=False, parse_special=parse) == row[column]
                for row in recorded
            )
            how = "parsed" if parse else "as text"
            found.append((model, peer, how, f"{same} of {len(recorded)}"))
    return found
