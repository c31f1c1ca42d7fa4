import mlx.core as mx
import pytest

from localllm.backend.metal import MetalBackend
from tests.backend.conformance import BackendConformance


class TestMetalOps(BackendConformance):
    """The graph in float32 on MLX's own ops."""

    def open(self, spec, weights, *, num_blocks, block_size):
        return MetalBackend(
            spec, weights, num_blocks=num_blocks, block_size=block_size, dtype=mx.float32
        )
