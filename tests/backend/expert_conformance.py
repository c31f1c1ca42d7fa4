"""What backends promise of adapters on experts. Mix into a `BackendConformance`."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.spec import DecoderSpec, MoESpec
from tests.backend.conformance import BLOCKS, Sequence, property_test, run
from tests.backend.random_models import (
    damped,
    dense,
    llama,
    merged,
    mixtures,
    random_adapter,
    random_weights,
)
from tests.examples import examples


def decoder(moe: MoESpec) -> DecoderSpec:
    """A dense layer, then two with these experts."""
    base = llama(hidden=32, layers=3)
    norm = damped(base.layers[0].norm) if moe.own_norms else base.layers[0].norm
    layer = replace(base.layers[0], ffn=moe, norm=norm)
    return replace(base, layers=(base.layers[0], layer, layer))


class ExpertConformance:
    @settings(property_test, max_examples=examples(30))
    @given(moe=mixtures(), seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.4, 1.0]))
    def test_an_adapter_on_experts_computes_what_merged_weights_do(self, moe, seed, share):
        spec = decoder(moe)
        weights = random_weights(spec, seed)
        adapter = random_adapter(spec, seed, rank=4, share=share, experts=True)
        tokens = np.random.default_rng(seed).integers(0, spec.vocab_size, 12)
        with self.backend(spec, dense(weights)) as backend:
            index = backend.add_adapter(adapter)
            got = run(backend, Sequence(tokens, np.arange(3)).next(12, adapter=index))
        self.assert_defined(got, spec, merged(weights, adapter), tokens, 12)

    @pytest.mark.parametrize("top_k", [1, 3])
    def test_rows_of_adapters_on_experts_share_a_step_as_if_alone(self, top_k):
        spec = decoder(MoESpec(experts=5, top_k=top_k, hidden=20, bias=True))
        adapters = [
            random_adapter(spec, 1, rank=5, experts=True),
            random_adapter(spec, 2, rank=2, dtype="bfloat16", share=0.5, experts=True),
        ]
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, spec.vocab_size, (5, 40))
        blocks = np.split(rng.permutation(BLOCKS)[:45], 5)
        with self.backend(spec, dense(random_weights(spec))) as backend:
            own = [None, *map(backend.add_adapter, adapters)]
            own += own[1:]
            alone = [
                run(backend, Sequence(t, b[:8]).next(30, adapter=adapter))
                for t, b, adapter in zip(tokens, blocks, own, strict=True)
            ]
            sequences = [Sequence(t, b[:8]) for t, b in zip(tokens, blocks, strict=True)]
            parts = [
                run(backend, *(s.next(n, adapter=a) for s, a in zip(sequences, own, strict=True)))
                for n in (1, 29)
            ]
        for at, wanted in enumerate(alone):
            got = [np.split(part, 5)[at] for part in parts]
            self.assert_same(np.concatenate(got), wanted)
