"""Published models, tensor by tensor against the `gguf` package: bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from localllm.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> gguf.GGUFReader:
    """By the `gguf` package; it takes seconds, so once for all tests."""
    return gguf.GGUFReader(smollm2_file)


def assert_same_tensors(path: Path, reader: gguf.GGUFReader) -> None:
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.names()) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        name = tensor.name
        assert checkpoint.shape(name) == tuple(int(n) for n in tensor.shape[::-1])
        assert checkpoint.kind(name) == tensor.tensor_type.name
        assert checkpoint.nbytes(name) == tensor.n_bytes
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        got = checkpoint.tensor(name).to_float32()
        assert got.shape == expected.shape
        assert np.array_equal(got.view(np.uint32), expected.view(np.uint32)), name


def test_smollm2_is_read_exactly(smollm2_file: Path, smollm2: gguf.GGUFReader) -> None:
    assert_same_tensors(smollm2_file, smollm2)


@pytest.mark.slow
def test_gemma3_is_read_exactly(gemma3_file: Path) -> None:
    assert_same_tensors(gemma3_file, gguf.GGUFReader(gemma3_file))


def test_metadata_is_that_of_the_gguf_package(smollm2_file: Path, smollm2: gguf.GGUFReader) -> None:
    config = open_checkpoint(smollm2_file).config
    theirs = {k: f.contents() for k, f in smollm2.fields.items() if not k.startswith("GGUF.")}
    assert dict(config) == theirs
    assert len(config["tokenizer.ggml.tokens"]) == 49_152
