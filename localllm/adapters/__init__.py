"""Low-rank adapters (LoRA): read from PEFT and MLX-LM folders, named as our weights are."""

from localllm.adapters.dora import weights_in
from localllm.adapters.loading import load_adapter
from localllm.adapters.lora import LoraAdapter, LowRank

__all__ = ["LoraAdapter", "LowRank", "load_adapter", "weights_in"]
