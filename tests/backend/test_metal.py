import mlx.core as mx

from localllm.backend.metal import MetalBackend
from localllm.kernels_metal.dispatch import Always
from localllm.kernels_metal.emulator import Emulator
from tests.backend.conformance import BackendConformance


class TestMetalOps(BackendConformance):
    """The graph in float32 on MLX's own ops."""

    def open(self, spec, weights, *, num_blocks, block_size):
        return MetalBackend(
            spec, weights, num_blocks=num_blocks, block_size=block_size, dtype=mx.float32
        )


class TestMetalKernels(BackendConformance):
    """The same with every kernel that applies, in the emulator."""

    def open(self, spec, weights, *, num_blocks, block_size):
        return MetalBackend(
            spec,
            weights,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=mx.float32,
            choose=Always(),
            executor=Emulator(),
        )
