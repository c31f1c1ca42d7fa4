"""Loading a model for a command, with progress on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localllm import LLM


def load_with_progress(name: str, **settings: Any) -> LLM:
    """Fetches the model if need be, showing how far that is, and loads it."""
    from localllm import LLM
    from localllm.cli.progress import pull_progress

    with pull_progress() as progress:
        return LLM(name, progress=progress, **settings)
