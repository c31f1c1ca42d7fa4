"""Loading a model for a command, with progress on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localllm import LLM


def load_with_progress(name: str, **settings: Any) -> LLM:
    """Fetches the model if need be, showing how far that is, and loads it."""
    from localllm import LLM
    from localllm.cli.progress import pull_progress

    with pull_progress() as progress:
        llm = LLM(name, progress=progress, **settings)
        if llm.info.backend_note:
            progress.say(f"runs on {llm.info.backend}, {llm.info.backend_note}")
        if llm.info.load_note:
            progress.say(llm.info.load_note)
        return llm


def tell_kv_disk(llm: LLM) -> None:
    """On stderr, once the model is closed: what could not be kept for the next start, and why."""
    if llm.kv_disk_note is not None:
        print(f"computed prompts were not all kept: {llm.kv_disk_note}", file=sys.stderr)
