"""Sizes told from headers are those that the native engine takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("localllm.kernels_cpu._native")

from localllm.backend.cpu import CpuBackend
from localllm.backend.cpu_adapters import packed_bytes as adapter_bytes
from localllm.backend.cpu_memory import CpuMemory, kv_block_bytes, packed_bytes
from localllm.backend.cpu_weights import add_matrix, pack
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.form import form_of
from localllm.checkpoint.gguf_blocks import FORMATS, to_affine
from localllm.checkpoint.gguf_types import TYPES
from localllm.kernels_cpu import _native
from localllm.models import load_forms, load_spec, load_weights
from localllm.spec.memory import kv_groups
from tests.backend.random_models import (
    PACKINGS,
    dense,
    linears_of,
    llama,
    random_adapter,
    random_dense,
    random_weights,
    specs,
)
from tests.examples import some


@given(specs(), st.sampled_from([32, 16, 8, 4]), st.sampled_from([8, 16, 32, 64]))
def test_a_kv_block_has_the_bytes_that_the_decoder_says(spec, bits, block_size):
    backend = CpuBackend(
        spec,
        dense(random_weights(spec)).items(),
        num_blocks=1,
        block_size=block_size,
        kv_bits=bits,
        threads=1,
    )
    for number, group in enumerate(kv_groups(spec)):
        told = backend.native.block_bytes(number)
        assert kv_block_bytes(spec, group, block_size, bits) == told
    backend.close()


@pytest.mark.parametrize("head_dim", [1, 31, 33, 48, 63, 64, 80, 96, 100, 128, 256])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_kv_block_of_any_head_size_has_them(head_dim, bits):
    spec = llama()
    mixer = replace(spec.layers[0].mixer, head_dim=head_dim, rope=None)
    spec = replace(spec, layers=(replace(spec.layers[0], mixer=mixer),))
    backend = CpuBackend(
        spec, dense(random_weights(spec)).items(), num_blocks=1, kv_bits=bits, threads=1
    )
    (group,) = kv_groups(spec)
    assert kv_block_bytes(spec, group, 32, bits) == backend.native.block_bytes(0)
    backend.close()


def packed(tensor) -> int:
    store = _native.WeightStore()
    add_matrix(store, "w", tensor)
    return store.nbytes


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 12))
def test_a_quantized_matrix_packs_to_the_bytes_told(packing, rows, blocks):
    unit = max(32, packing.group * (packing.per or 1))
    tensor = packing.random(np.random.default_rng(0), (rows, unit * blocks))
    assert packed_bytes(tensor.shape, form_of(tensor)) == packed(tensor)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_gguf_format_packs_to_the_bytes_told(kind):
    (stored,) = (found for found in TYPES.values() if found.name == kind)
    for columns in (1, 2, 3, 8):
        tensor = to_affine(stored, (33, stored.block * columns), lambda at, size: bytes(size))
        assert packed_bytes(tensor.shape, form_of(tensor)) == packed(tensor)


@given(st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(1, 40), st.integers(1, 70))
def test_a_dense_matrix_packs_to_the_bytes_told(dtype, rows, columns):
    tensor = random_dense(np.random.default_rng(0), (rows, columns), dtype)
    assert packed_bytes(tensor.shape, form_of(tensor)) == packed(tensor)


@pytest.mark.parametrize("name", some(["smollm2", "gemma3"], 2))
def test_a_models_headers_tell_what_its_weights_pack_to(name, request):
    checkpoint = open_checkpoint(request.getfixturevalue(name))
    try:
        spec = load_spec(checkpoint)
        forms = load_forms(checkpoint, spec)
        store = pack(spec, load_weights(checkpoint, spec))
        assert CpuMemory().weights(spec, forms) == store.nbytes
    finally:
        checkpoint.close()


@given(st.integers(1, 20))
def test_an_adapter_takes_the_bytes_told(rank):
    spec = llama()
    adapter = random_adapter(spec, rank=rank, dtype="float16")
    assert len(adapter.targets) == len(linears_of(spec))
    told = CpuMemory().adapter(spec, rank)
    assert adapter_bytes(adapter) <= told < adapter_bytes(adapter) + 4096
