"""DoRA's lengths of rows, which are never computed from the sum of W and B A."""

import numpy as np
import pytest

from localllm.adapters import load_adapter
from localllm.adapters.dora import Base, _norms
from localllm.adapters.dora_lengths import LENGTHS
from localllm.adapters.lora import LowRank
from localllm.checkpoint.tensor import Dense
from tests.adapters.test_refusals import LLAMA
from tests.adapters.test_weight import read, write


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


class Counted:
    """A base whose weights are counted as they are read."""

    def __init__(self, content: bytes = b"a base") -> None:
        self.weights = 0
        self.base = Base(self._read, lambda: content)

    def _read(self, only):
        for name, tensor in read(only):
            self.weights += name.endswith(".weight")
            yield name, tensor


def gains(folder, counted, **more) -> bytes:
    adapter = load_adapter(folder, LLAMA, base=counted.base, **more)
    return b"".join(pair.gains.values.tobytes() for pair in adapter.targets.values())


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "adapter", 8, dora=True)


def test_lengths_are_computed_once_and_then_read(folder):
    first, second = Counted(), Counted()
    assert gains(folder, first) == gains(folder, second)
    assert first.weights > 0
    assert second.weights == 0


def test_those_of_another_base_or_weight_are_not_taken(folder):
    whole = gains(folder, Counted())
    other = Counted(b"another base")
    gains(folder, other)
    assert other.weights > 0
    half = Counted()
    assert gains(folder, half, weight=0.5) != whole
    assert half.weights > 0


def test_those_of_another_adapter_are_not_taken(folder, tmp_path):
    gains(folder, Counted())
    stronger = write(tmp_path / "stronger", 16, dora=True)
    (stronger / LENGTHS).write_bytes((folder / LENGTHS).read_bytes())
    counted = Counted()
    gains(stronger, counted)
    assert counted.weights > 0


@pytest.mark.parametrize("at", [0, 40, 70, -1])
def test_a_damaged_file_is_as_good_as_none(folder, at):
    wanted = gains(folder, Counted())
    path = folder / LENGTHS
    whole = path.read_bytes()
    data = bytearray(whole)
    data[at] ^= 1
    for broken in (data, whole[:-4], b""):
        path.write_bytes(broken)
        counted = Counted()
        assert gains(folder, counted) == wanted
        assert counted.weights > 0
        assert path.read_bytes() == whole


def test_where_nothing_can_be_kept_the_adapter_loads_all_the_same(folder):
    wanted = gains(folder, Counted())
    (folder / LENGTHS).unlink()
    (folder / LENGTHS).mkdir()
    assert gains(folder, Counted()) == wanted
