"""Where the programs that we compare with are found. All of them are optional."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODE_LLAMA_CPP = "node-llama-cpp@3.22.1"


def node_llama_cpp_folder() -> tuple[Path | None, str]:
    """The folder whose node_modules holds node-llama-cpp, or None, and how to get it.

    Its prebuilt libraries of llama.cpp are called without node.
    """
    folder = Path(os.environ.get("LOCALLLM_PEERS", ROOT / ".venv" / "peers"))
    advice = f"npm install --ignore-scripts --prefix {folder} {NODE_LLAMA_CPP}"
    return (folder if (folder / "node_modules" / "node-llama-cpp").is_dir() else None), advice


def node_llama_cpp() -> tuple[Path | None, str]:
    """The same, where node itself is needed too."""
    folder, advice = node_llama_cpp_folder()
    return (folder if shutil.which("node") else None), advice
