"""A draft head in one native call a guess computes what its parts do one by one."""

from __future__ import annotations

import numpy as np
import pytest

from localllm.backend.cpu import CpuBackend
from localllm.backend.cpu_head import CpuHead
from localllm.backend.head_network import HeadRows, _Composed, head_network
from localllm.backend.reference import ReferenceBackend
from localllm.checkpoint.tensor import Dense
from tests.backend.random_models import dense, llama, random_weights
from tests.engine.heads import random_head

SPEC = llama()
WEIGHTS = dense(random_weights(SPEC))
TOKENS = np.array([0, 3, 4, 17, 40, 41, 90])


def network(kind: str, tokens: np.ndarray | None, threads: int = 2):
    head = random_head(SPEC.hidden, tokens)
    embed = np.asarray(WEIGHTS["embed.weight"].to_float32())
    whole = embed if SPEC.tied_head else np.asarray(WEIGHTS["head.weight"].to_float32())
    rows = None if tokens is None else Dense(whole[tokens], "float32")
    settings = {"num_blocks": 12, "block_size": 4}
    if kind == "reference":
        model = ReferenceBackend(SPEC, iter(WEIGHTS.items()), **settings)
        layer = ReferenceBackend(head.spec, iter(head.weights.items()), **settings)
        return head_network(head, model, layer, rows)
    settings |= {"threads": threads, "float_activations": True, "kv_bits": 32}
    model = CpuBackend(SPEC, iter(WEIGHTS.items()), **settings)
    layer = CpuBackend(head.spec, iter(head.weights.items()), **settings)
    make = head_network if kind == "native" else _Composed
    return make(head, model, layer, rows)


def some_rows(count: int, start: int, first_block: int, seed: int) -> HeadRows:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(count, SPEC.hidden)).astype(np.float32)
    following = rng.integers(0, SPEC.vocab_size, count).tolist()
    blocks = np.arange(first_block, first_block + 4, dtype=np.int32)
    return HeadRows(states, following, start, blocks, 3)


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("other", ["composed", "reference"])
def test_native_steps_equal_composed_ones(tokens, other):
    native, parts = network("native", tokens), network(other, tokens)
    assert isinstance(native, CpuHead)
    assert isinstance(parts, _Composed)
    for step in (
        [some_rows(5, 0, 0, seed=1), some_rows(2, 0, 4, seed=2)],
        [some_rows(1, 5, 0, seed=3), some_rows(3, 2, 4, seed=4)],
        [some_rows(1, 5, 4, seed=5)],
    ):
        mine, theirs = native.run(step), parts.run(step)
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape
            assert np.allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_a_sequence_beside_others_has_the_bits_it_has_alone():
    together, alone = network("native", TOKENS), network("native", TOKENS, threads=1)
    a, b = some_rows(4, 0, 0, seed=1), some_rows(6, 0, 4, seed=2)
    states, logits = together.run([a, b])
    for row, of in enumerate((a, b)):
        own_states, own_logits = alone.run([of])
        assert np.array_equal(states[row : row + 1], own_states)
        assert np.array_equal(logits[row : row + 1], own_logits)


def test_what_does_not_fit_is_refused():
    native = network("native", TOKENS)
    good = some_rows(2, 0, 0, seed=1)
    for states, following, start, blocks, told in (
        (good.states[:, :-1], good.following, 0, good.block_table, "wrong shape"),
        (good.states, good.following[:1], 0, good.block_table, "wrong shape"),
        (good.states, [SPEC.vocab_size, 0], 0, good.block_table, "outside the vocabulary"),
        (good.states, good.following, 15, good.block_table, "too short"),
        (good.states, good.following, 0, good.block_table + 12, "outside the pool"),
    ):
        with pytest.raises(ValueError, match=told):
            native.run([HeadRows(states, following, start, blocks, 3)])
