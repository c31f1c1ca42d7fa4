"""Fine-tuning: data, methods, the training loop, checkpoints.

The public names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localllm.train.config import TrainConfig
    from localllm.train.lora import LoRAConfig
    from localllm.train.progress import Result
    from localllm.train.trainer import Trainer

__all__ = ["LoRAConfig", "Result", "TrainConfig", "Trainer"]

_HOMES = {
    "Trainer": "localllm.train.trainer",
    "Result": "localllm.train.progress",
    "TrainConfig": "localllm.train.config",
    "LoRAConfig": "localllm.train.lora",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'localllm.train' has no attribute {name!r}")
