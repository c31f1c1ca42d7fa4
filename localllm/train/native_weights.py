"""Weights in the store that native training reads: a checkpoint's, or parameters in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from localllm.backend.weights import checked_weights
from localllm.checkpoint.form import DenseForm, Form
from localllm.checkpoint.tensor import Affine, Dense, Tensor
from localllm.kernels_cpu import _native
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes
from localllm.train.layout import squared_norms
from localllm.train.program import Layout

_SLAB = 1 << 20  # weights unpacked at a time


def fill_store(
    spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]], scaled: Collection[str] = ()
) -> _native.TrainStore:
    """The weights of `weight_shapes(spec)`, each packed and dropped before the next is read.

    scaled: linears whose rows DoRA brings to a length; "TARGET.squares" holds what they have.
    Codes of up to 4 bits take 4, wider ones 8; groups that are no multiple of 16 become float32.
    Raises CheckpointError for a missing, unknown, repeated or misshapen weight.
    """
    offsets = _norm_offsets(spec)
    store = _native.TrainStore()
    for name, tensor in checked_weights(spec, weights):
        if len(tensor.shape) == 1:
            values = tensor.to_float32() + np.float32(offsets.get(name, 0.0))
            store.add_vector(name, np.ascontiguousarray(values))
        else:
            _add_matrix(store, name, tensor)
            if (target := name.removesuffix(".weight")) in scaled:
                store.add_vector(f"{target}.squares", squared_norms(tensor.to_float32()))
        del tensor  # else it would live on while the next one is read
    return store


def store_bytes(spec: DecoderSpec, forms: Mapping[str, Form]) -> int:
    """What `fill_store` will take of weights in these forms."""
    total = 0
    for name, shape in weight_shapes(spec).items():
        if len(shape) == 1:
            total += 4 * shape[0]
            continue
        rows, cols, form = -(-shape[0] // 16) * 16, -(-shape[1] // 16) * 16, forms[name]
        if isinstance(form, DenseForm):
            total += rows * cols * form.value_bytes
        elif form.group % 16 == 0 and form.bits <= 8:
            codes = rows * cols // (2 if form.bits <= 4 else 1)
            total += codes + rows * (shape[1] // form.group) * 8  # a scale and a bias
        else:
            total += rows * cols * 4
    return total


def trained_store(spec: DecoderSpec, layout: Layout) -> _native.TrainStore:
    """Every weight a parameter of `layout`, read where the parameters of a call hold it."""
    offsets = _norm_offsets(spec)
    store = _native.TrainStore()
    for name, at in layout.places.items():
        shape = layout.shapes[name]
        if len(shape) == 1:
            store.add_trained_vector(name, shape[0], at, offsets.get(name, 0.0))
        else:
            store.add_trained(name, *shape, at)
    return store


def _add_matrix(store: _native.TrainStore, name: str, tensor: Tensor) -> None:
    rows, cols = tensor.shape
    step = max(16, _SLAB // cols // 16 * 16)
    if isinstance(tensor, Affine) and tensor.group % 16 == 0 and tensor.bits <= 8:
        codes = _native.TrainCodes.bits4 if tensor.bits <= 4 else _native.TrainCodes.bits8
        store.add(name, rows, cols, codes, tensor.group)
        for at in range(0, rows, step):
            part = tensor.rows(slice(at, at + step))
            store.fill_codes(name, at, np.ascontiguousarray(part.unpack()), *_scales(part))
        return
    if isinstance(tensor, Affine):
        store.add(name, rows, cols, _native.TrainCodes.float32, 0)
        for at in range(0, rows, step):
            store.fill_dense(name, at, tensor.rows(slice(at, at + step)).to_float32())
        return
    store.add(name, rows, cols, _native.TrainCodes[tensor.dtype], 0)
    for at in range(0, rows, step):
        store.fill_dense(name, at, _bits(tensor, slice(at, at + step)))


def _bits(tensor: Dense, rows: slice) -> np.ndarray:
    values = np.ascontiguousarray(tensor.data[rows])
    return values if values.dtype == np.float32 else values.view(np.uint16)


def _scales(part: Affine) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, groups] each, the zero point within the biases."""
    scales = np.ascontiguousarray(part.scales.to_float32())
    biases = scales * np.float32(-part.zero_point)
    if part.biases is not None:
        biases = biases + part.biases.to_float32()
    return scales, np.ascontiguousarray(biases)


def _norm_offsets(spec: DecoderSpec) -> dict[str, float]:
    """What is added to each norm's weight to make its gain."""
    offsets = {"final_norm.weight": spec.final_norm.offset}
    for index, layer in enumerate(spec.layers):
        at = f"layers.{index}."
        for part in ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"):
            offsets[f"{at}{part}.weight"] = layer.norm.offset
        if layer.attention.qk_norm is not None:
            for part in ("q_norm", "k_norm"):
                offsets[f"{at}attn.{part}.weight"] = layer.attention.qk_norm.offset
    return offsets
