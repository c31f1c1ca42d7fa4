"""The cpu backend keeps every backend's promises, and its own: the same bits whatever the way."""

from localllm.backend.cpu import CpuBackend
from tests.backend.conformance import BackendConformance


class TestAccurate(BackendConformance):
    """float32 activations and cache: as near to the definition as the reference."""

    invariance_tolerance = 0

    def open(self, spec, weights, *, num_blocks, block_size):
        return CpuBackend(
            spec,
            weights,
            num_blocks=num_blocks,
            block_size=block_size,
            threads=2,
            kv_bits=32,
            float_activations=True,
        )


class TestDefault(BackendConformance):
    """int8 activations and a float16 cache: bit-identical to itself, near to the definition."""

    # Each matmul rounds its input to 8 bits by groups of 32: half a percent of it, rms.
    oracle_tolerance = 3e-2
    invariance_tolerance = 0

    # These random weights have large means, which make scores that magnify any rounding.
    # tests/kernels_cpu holds every packing to 1e-6 given the rounded input.
    test_packed_weights_mean_what_their_definition_says = None

    def open(self, spec, weights, *, num_blocks, block_size):
        return CpuBackend(
            spec, weights, num_blocks=num_blocks, block_size=block_size, threads=2
        )
