"""Model files: safetensors folders, MLX-quantized folders, GGUF. Untrusted input, read lazily."""

from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.opening import open_checkpoint
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor

__all__ = ["Affine", "Checkpoint", "Dense", "GroupValues", "Tensor", "open_checkpoint"]
