"""Chats as files: written as Markdown and JSON lines, read from those and from other programs.

a file -> reading.py finds its form -> ChatTree (trees.py) -> importing.py -> the store
"""

from localllm.tui.exchange.importing import Imported, import_file, put_in
from localllm.tui.exchange.jsonl import write_jsonl
from localllm.tui.exchange.markdown import markdown_of, write_markdown
from localllm.tui.exchange.reading import Found, read_chats
from localllm.tui.exchange.trees import ChatTree, Node, tree_of

__all__ = [
    "ChatTree",
    "Found",
    "Imported",
    "Node",
    "import_file",
    "markdown_of",
    "put_in",
    "read_chats",
    "tree_of",
    "write_jsonl",
    "write_markdown",
]
