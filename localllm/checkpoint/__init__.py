"""Model files: safetensors folders, MLX-quantized folders, GGUF. Untrusted input, read lazily."""
