"""Small model files: by independent writers where they are sound, by hand where they are not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

# Where a block keeps its float16 values, in bytes from its start.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "MXFP4": (), "NVFP4": (), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip


def random_blocks(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, blocks * block bytes]: any bits at all, but finite scales."""
    rng = np.random.default_rng(seed)
    if kind == "MXFP4":  # a byte of exponent, and what float16 holds of its powers
        raw = rng.integers(0, 256, (rows, blocks, 17), dtype=np.uint8)
        raw[:, :, 0] = rng.integers(104, 144, (rows, blocks))
        raw[:, ::5, 1:] = rng.choice(np.array([0x00, 0x88, 0x80], np.uint8))  # zeros of both signs
        raw[:, ::5, 0] = rng.integers(0, 255, raw[:, ::5, 0].shape)
        return raw.reshape(rows, -1)
    size = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        bits = rng.integers(0, 1 << 16, (rows, blocks), dtype=np.uint16)
        bits &= np.uint16(0xFBFF)  # never the exponent of infinity; tiny and negative ones too
        raw[:, :, at : at + 2] = bits[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, str]],
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Floating-point arrays as they are, or (uint8 blocks, type name)."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata(writer)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=Kind[tensor[1]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor_info(
    name: str = "w", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0
) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def raw_gguf(
    infos: list[bytes] = [],  # noqa: B006
    keys: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    *,
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file put together by hand, as wrong as wished."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head += b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + data


def raw_safetensors(header: bytes | str, data: bytes = b"", size: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if size is None else size) + header + data
