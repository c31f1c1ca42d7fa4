"""Parameters are read from Metal text, and buffers made from what a user describes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localllm.kernels_metal.emulator.buffers import BadBuffer, as_bfloat, make_buffers, readable
from localllm.kernels_metal.emulator.signature import (
    NoSuchKernelHere,
    read_signature,
)

SOURCE = """
// kernel void commented(device int* no) {}
constant bool causal [[function_constant(3)]];
template <typename T, int N = 4>
[[kernel]] void scale(const device T* x, device T* y [[buffer(2)]],
                      constant float& by [[buffer(1)]],
                      uint2 at [[thread_position_in_grid]]) {}
kernel void plain(device const packed_float3 *points, device atomic_uint& count) {}
"""


def test_parameters_have_their_place_and_kind() -> None:
    signature = read_signature(SOURCE, "scale")
    assert [
        (p.name, p.kind, p.space, p.writable, p.pointer, p.index) for p in signature.parameters
    ] == [
        ("x", "T", "device", False, True, 0),
        ("y", "T", "device", True, True, 2),
        ("by", "float", "constant", False, False, 1),
    ]
    assert signature.template == {"T": None, "N": "4"}
    assert signature.constants == ("causal",)


def test_a_kernel_must_be_named_where_there_are_several() -> None:
    with pytest.raises(NoSuchKernelHere, match="2 kernels: scale, plain"):
        read_signature(SOURCE)
    with pytest.raises(NoSuchKernelHere, match="no kernel is called commented"):
        read_signature(SOURCE, "commented")
    with pytest.raises(NoSuchKernelHere, match="no kernel found"):
        read_signature("void f() {}")


def buffers(*specs: str, **template: str) -> list[np.ndarray]:
    return make_buffers(read_signature(SOURCE, "scale"), specs, template)


def test_buffers_are_made_as_described() -> None:
    x, by, y = buffers("x=2x3:arange", "y=6", "by=0.5", T="half")
    assert x.dtype == np.float16
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert by.tolist() == [0.5]
    assert np.isnan(y).all()  # an output is unset, so that what is never written shows


def test_bfloat_is_given_and_read_as_its_bits() -> None:
    x, _, _ = buffers("x=3:arange", "y=3", "by=1", T="bfloat16_t")
    assert x.dtype == np.uint16
    assert readable(x, "bfloat16_t").tolist() == [0, 1, 2]
    assert readable(as_bfloat(np.array([1 + 2**-8, 1 + 3 * 2**-8])), "bfloat").tolist() == [
        1.0,
        1 + 2**-6,
    ]  # ties go to even


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.array([1, 2], np.float16))
    x, _, _ = buffers(f"x={file}", "y=2", "by=1", T="half")
    assert x.tolist() == [1, 2]
    with pytest.raises(BadBuffer, match="holds float16, but x is of float"):
        buffers(f"x={file}", "y=2", "by=1", T="float")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x=4x", "not a shape"),
        ("x=4:nonsense", "no filling is called"),
        ("by=half", "not a value of float"),
        ("z=4", "no buffer 'z'"),
        ("x", "not NAME=SOMETHING"),
        ("x=/nowhere.npy", "nowhere"),
    ],
)
def test_a_bad_description_is_named(spec: str, message: str) -> None:
    specs = {"x": "x=4", "y": "y=4", "by": "by=1"} | {spec.split("=")[0]: spec}
    with pytest.raises(BadBuffer, match=message):
        buffers(*specs.values(), T="half")


def test_a_missing_buffer_is_named() -> None:
    with pytest.raises(BadBuffer, match="needs a --buffer for: y, by"):
        buffers("x=4", T="half")


def test_a_structure_is_given_by_its_bytes() -> None:
    signature = read_signature("kernel void f(constant Params& p, device float4* out) {}")
    with pytest.raises(BadBuffer, match="Params, which is not a plain type"):
        make_buffers(signature, ["p=1", "out=2"], {})
    assert make_buffers(signature, ["p=uchar:8", "out=2:zeros"], {})[1].shape == (2, 4)
