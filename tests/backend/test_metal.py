import mlx.core as mx
import pytest

from localllm.backend.metal import MetalBackend
from localllm.errors import UnsupportedModel
from localllm.kernels_metal.dispatch import Always
from localllm.kernels_metal.emulator import Emulator
from tests.backend.conformance import BackendConformance
from tests.backend.hybrid_conformance import HybridConformance
from tests.backend.random_models import dense, random_adapter, random_weights
from tests.backend.test_experts import mixture


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


def test_an_adapter_on_experts_is_refused_with_the_way_out():
    spec = mixture(experts=3, hidden=32)
    backend = MetalBackend(spec, iter(dense(random_weights(spec)).items()), num_blocks=4)
    adapter = random_adapter(spec, experts=True)
    for step in (backend.adapter_bytes, backend.add_adapter):
        with pytest.raises(UnsupportedModel, match=r"changes experts \(layers\.1\.moe") as caught:
            step(adapter)
        assert "localllm fuse" in str(caught.value.hint)
