"""An adapter in part is the adapter that was saved with a part of its scale."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest

from localllm.adapters import load_adapter
from localllm.adapters.dora import Base
from localllm.checkpoint.tensor import Dense
from localllm.errors import InvalidRequest
from tests.adapters.test_refusals import CONFIG, LLAMA, PREFIX, good
from tests.adapters.tiny import write_adapter


def write(folder: Path, alpha: float, dora: bool) -> Path:
    tensors = good()
    if dora:
        for module, rows in (("q_proj", 32), ("v_proj", 16)):
            name = f"{PREFIX}{module}.lora_magnitude_vector"
            tensors[name] = Dense(np.linspace(1, 2, rows, dtype=np.float32), "float32")
    return write_adapter(folder, {**CONFIG, "lora_alpha": alpha, "use_dora": dora}, tensors)


def read(only: Collection[str]) -> Iterator[tuple[str, Dense]]:
    for name in sorted(only):
        if name.endswith(".weight"):
            rows = 16 if ".v." in name else 32
            values = np.linspace(-1, 1, rows * 32, dtype=np.float32).reshape(rows, 32)
            yield name, Dense(values, "float32")


base = Base(read, lambda: b"a base")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("weight", [0.25, 0.5, 2.0])
def test_a_weight_is_a_scale(tmp_path, dora, weight):
    whole = write(tmp_path / "whole", 8, dora)
    part = write(tmp_path / "part", 8 * weight, dora)
    found = load_adapter(whole, LLAMA, base=base, weight=weight)
    assert found.digest == load_adapter(part, LLAMA, base=base).digest
    assert found.digest != load_adapter(whole, LLAMA, base=base).digest


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_is_a_number(tmp_path, weight):
    with pytest.raises(InvalidRequest, match="number"):
        load_adapter(write(tmp_path / "a", 8, False), LLAMA, weight=weight)
