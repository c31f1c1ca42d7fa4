"""Prints the parity tables of docs/parity.md, in Markdown.

python scripts/parity_table.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.parity import models


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    print("### Architectures\n")
    print("Largest difference from transformers' float32 logits, as a share of the largest one.\n")
    print(markdown(models.HEADER, models.rows()))


if __name__ == "__main__":
    main()
