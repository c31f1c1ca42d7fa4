"""Writes tests/golden/llamacpp_greedy.json: llama.cpp's greedy answers on the real models.

Run from the root: python -m scripts.goldens.llamacpp_greedy
"""

from __future__ import annotations

import json

from scripts.parity.llamacpp_greedy import GOLDEN, make_golden

if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(make_golden(), separators=(",", ":")) + "\n", "utf-8")
    print(f"wrote {GOLDEN}")
