"""Of a mixture of experts, a token touches the chosen ones alone."""

from dataclasses import replace

import numpy as np
import pytest

from localllm.backend.cpu import CpuBackend
from localllm.checkpoint.tensor import Dense
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    PerLayerSpec,
    RopeSpec,
)
from localllm.spec.memory import active_bytes, active_parameters, parameters
from localllm.spec.weights import weight_shapes
from tests.backend.conformance import Sequence, run
from tests.backend.random_models import PACKINGS, dense, random_weights

CHOSEN = (3, 11)


def mixture(**changes) -> DecoderSpec:
    """16 experts of which each token takes two, and a dense first layer."""
    attn = AttentionSpec(4, 2, 32, 32**-0.5, RopeSpec(32))
    moe = MoESpec(16, 2, 128, scores="sigmoid", selection_bias=True, shared=128)
    layers = tuple(LayerSpec(attn, ffn, NormSpec()) for ffn in (FeedForwardSpec(256), moe, moe))
    return replace(
        DecoderSpec("mixture", 256, 128, layers, NormSpec(), 64, tied_head=True), **changes
    )


def logits(spec, tensors) -> np.ndarray:
    backend = CpuBackend(spec, iter(tensors.items()), num_blocks=4, block_size=32, threads=2)
    sequence = Sequence(np.arange(9), np.arange(4))
    try:
        return np.concatenate([run(backend, sequence.next(n)) for n in (5, 1, 1, 2)])
    finally:
        backend.close()


def test_experts_that_no_token_chose_change_nothing_whatever_they_hold():
    spec = mixture()
    weights = random_weights(spec)
    for name, value in weights.items():
        if name.endswith("selection_bias.weight"):
            value[...] = 0
            value[list(CHOSEN)] = 10
    wanted = logits(spec, dense(weights))
    assert np.isfinite(wanted).all()
    for value in weights.values():
        if value.ndim == 3:
            value[[e for e in range(16) if e not in CHOSEN]] = np.nan
    assert np.array_equal(logits(spec, dense(weights)), wanted)
    weights["layers.2.moe.up.weight"][CHOSEN[1], 5] = np.nan
    assert not np.isfinite(logits(spec, dense(weights))).any()


# Fewer bits than 4 are held as 4.
HELD_AS_STORED = [packing for packing in PACKINGS if packing.bits >= 4]


@pytest.mark.parametrize("packing", HELD_AS_STORED, ids=lambda packing: packing.of)
def test_a_token_reads_no_more_than_a_tenth_beyond_its_active_parameters(packing):
    """Against the bytes that these parameters take in the file."""
    spec, rng = mixture(), np.random.default_rng(0)
    tensors = {
        name: Dense(value.astype(np.float16), "float16")
        for name, value in random_weights(spec).items()
    }
    for name, shape in weight_shapes(spec).items():
        if len(shape) > 1 and shape[-1] % packing.group == 0:
            tensors[name] = packing.random(rng, shape)
    backend = CpuBackend(spec, iter(tensors.items()), num_blocks=4, block_size=32, threads=1)
    needed = active_bytes(spec, lambda name: tensors[name].nbytes)
    assert backend.token_bytes <= 1.1 * needed
    assert backend.token_bytes < 0.4 * backend.weight_bytes
    backend.close()


def test_of_embeddings_for_each_layer_a_token_reads_a_row():
    spec = mixture(per_layer=PerLayerSpec(32, 4096), tied_head=False)
    table = 4096 * 3 * 32
    assert active_parameters(spec) < parameters(spec) - table + 3 * 32 + 1
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in weight_shapes(spec).items()}
    rows = 2 * (3 * 32 + 128)
    tables = sizes["per_layer_inputs.embed.weight"] + sizes["embed.weight"]
    experts = sum(sizes[name] for name, shape in weight_shapes(spec).items() if len(shape) == 3)
    wanted = sum(sizes.values()) - tables + rows - experts * 14 // 16
    assert active_bytes(spec, sizes.__getitem__) == wanted
