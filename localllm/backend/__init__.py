"""Backends: each loads a spec and weights, owns the KV pool, and answers `forward(batch)`."""
