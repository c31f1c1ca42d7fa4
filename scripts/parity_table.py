"""Prints docs/parity.md: every parity table, measured now.

Run from the root: python -m scripts.parity_table
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from localllm.machine import cpu_model
from scripts.parity import gguf_types, llamacpp_greedy, models, tokenizers

PACKAGES = ("mlx", "transformers", "torch", "gguf", "tokenizers", "sentencepiece")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    print("# Parity\n")
    print("Held against independent implementations; `make test-all` prints this page anew.\n")
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()} ({cpu_model()}), {versions}.")
    for table in (models, gguf_types, tokenizers, llamacpp_greedy):
        print(f"\n## {table.TITLE}\n\n{table.NOTE}\n", flush=True)
        print(markdown(table.HEADER, table.rows()), flush=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "not installed"


if __name__ == "__main__":
    main()
