"""Writes tests/golden/llamacpp_greedy.json: llama.cpp's greedy answers on the real models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.parity.llamacpp_greedy import GOLDEN, make_golden  # noqa: E402

GOLDEN.parent.mkdir(exist_ok=True)
GOLDEN.write_text(json.dumps(make_golden(), separators=(",", ":")) + "\n", "utf-8")
print(f"wrote {GOLDEN}")
