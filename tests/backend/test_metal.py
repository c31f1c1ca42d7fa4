import mlx.core as mx
import pytest

from localllm.backend.metal import MetalBackend
from localllm.errors import UnsupportedModel
from localllm.kernels_metal.dispatch import Always
from localllm.kernels_metal.emulator import Emulator
from tests.backend.conformance import BackendConformance
from tests.backend.random_models import dense, hybrid, random_weights


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


def test_recurrent_layers_are_refused_with_the_way_out():
    spec = hybrid()
    with pytest.raises(UnsupportedModel, match="layer 0 is a GatedDeltaNetSpec") as caught:
        MetalBackend(spec, dense(random_weights(spec)).items(), num_blocks=4)
    assert "--backend cpu" in str(caught.value.hint)
