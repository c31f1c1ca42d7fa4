"""DoRA's lengths of rows, which are never computed from the sum of W and B A."""

import numpy as np
import pytest

from localllm.adapters.dora import _norms
from localllm.adapters.lora import LowRank
from localllm.checkpoint.tensor import Dense


@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4])
def test_lengths_are_right_even_where_an_adapter_all_but_cancels_its_weight(left):
    random = np.random.default_rng(0)
    a = random.normal(size=(6, 96)).astype(np.float32)
    b = random.normal(size=(40, 6)).astype(np.float32)
    rest = random.normal(size=(40, 96)) * left
    weight = (rest - 0.5 * b.astype(np.float64) @ a.astype(np.float64)).astype(np.float32)
    pair = LowRank(a=Dense(a, "float32"), b=Dense(b, "float32"), scale=0.5)
    wanted = np.linalg.norm(weight.astype(np.float64) + 0.5 * b.astype(np.float64) @ a, axis=1)
    assert np.allclose(_norms(Dense(weight, "float32"), pair), wanted, rtol=max(1e-5, 1e-6 / left))
