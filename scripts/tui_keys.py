"""Writes the table of the chat app's commands and keys into docs/tui.md, from the registry.

python -m scripts.tui_keys          # writes
python -m scripts.tui_keys --check  # exit code 1 if it would change something
"""

from __future__ import annotations

import sys
from pathlib import Path

from localllm.tui.commands import Command, gather, grouped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tui.md"
BEGIN, END = "<!-- commands: begin (python -m scripts.tui_keys) -->", "<!-- commands: end -->"
PLACES = {"message": "on a chosen message", "chats": "in the list of chats"}


def table() -> str:
    lines = []
    for group, commands in grouped(gather()):
        lines += [f"**{group}**", "", "| keys | typed | what it does | in keys.toml |"]
        lines += ["| --- | --- | --- | --- |", *map(_row, commands), ""]
    return "\n".join(lines)


def _row(command: Command) -> str:
    keys = ", ".join(f"`{key}`" for key in command.keys)
    slash = f"`/{command.slash}{' ' + command.argument if command.argument else ''}`"
    where = f" ({PLACES[command.where]})" if command.where in PLACES and keys else ""
    cells = [keys + where, slash if command.slash else "", command.help, f"`{command.name}`"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        return int(written != text)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
