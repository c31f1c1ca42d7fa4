"""Models and adapters as files that others read: fused folders, GGUF, LoRA in GGUF."""

from localllm.export.adapter import write_adapter_gguf
from localllm.export.compare import Moved, how_far
from localllm.export.folder import Kept, write_folder
from localllm.export.gguf import write_gguf
from localllm.export.source import Source, open_source

__all__ = [
    "Kept",
    "Moved",
    "Source",
    "how_far",
    "open_source",
    "write_adapter_gguf",
    "write_folder",
    "write_gguf",
]
