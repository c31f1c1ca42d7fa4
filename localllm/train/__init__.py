"""Fine-tuning: data, methods, the training loop, checkpoints."""
