import mlx.core as mx

from localllm.backend.metal import MetalBackend
from localllm.kernels_metal.dispatch import Always
from localllm.kernels_metal.emulator import Emulator
from tests.backend.conformance import BackendConformance
from tests.backend.hybrid_conformance import HybridConformance


class TestMetalOps(BackendConformance, HybridConformance):
    """The graph in float32 on MLX's own ops."""

    def open(self, spec, weights, **sizes):
        return MetalBackend(spec, weights, dtype=mx.float32, **sizes)


class TestMetalKernels(BackendConformance, HybridConformance):
    """The same with every kernel that applies, in the emulator."""

    def open(self, spec, weights, **sizes):
        return MetalBackend(
            spec, weights, dtype=mx.float32, choose=Always(), executor=Emulator(), **sizes
        )
