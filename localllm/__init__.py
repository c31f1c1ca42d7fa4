"""A local-first runtime for language models.

The public names are loaded on first use, so that `import localllm` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localllm.async_engine import AsyncEngine
    from localllm.llm import LLM
    from localllm.results import GenerationDelta, GenerationResult
    from localllm.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "GenerationDelta", "GenerationResult", "SamplingParams"]

_HOMES = {
    "LLM": "localllm.llm",
    "AsyncEngine": "localllm.async_engine",
    "SamplingParams": "localllm.sampling",
    "GenerationResult": "localllm.results",
    "GenerationDelta": "localllm.results",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'localllm' has no attribute {name!r}")
