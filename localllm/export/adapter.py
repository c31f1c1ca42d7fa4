"""An adapter as LoRA in GGUF, for llama.cpp's --lora: A and B beside the names of its tensors.

llama.cpp scales B A by alpha / rank, with one alpha for all; what differs from that goes into B.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localllm.adapters import LoraAdapter, LowRank
from localllm.checkpoint.tensor import Dense
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.export.gguf import gguf_layout
from localllm.export.source import Source
from localllm.files import sync_folder
from localllm.models.writing import Stored, stored_tensors


@dataclass(frozen=True)
class WrittenAdapter:
    """pairs: of A and B; alpha: which all share."""

    path: Path
    nbytes: int
    pairs: int
    alpha: float


def write_adapter_gguf(source: Source, path: Path) -> WrittenAdapter:
    """Float32. Raises InvalidRequest without an adapter, UnsupportedModel for one on experts or of
    DoRA, which llama.cpp does not know, CheckpointError where the file cannot be written."""
    import gguf

    adapter = source.adapter
    if adapter is None:
        raise InvalidRequest("there is no adapter to write")
    if any(pair.gains is not None for pair in adapter.targets.values()):
        raise UnsupportedModel(
            "llama.cpp has no DoRA adapters", hint="export the model with the adapter merged in"
        )
    if any(len(pair.a.shape) == 3 for pair in adapter.targets.values()):
        raise UnsupportedModel(
            "adapters on experts are not written as LoRA in GGUF",
            hint="export the model with the adapter merged in",
        )
    name, names, has = gguf_layout(source)
    pairs = [
        (stored, _joined(stored, adapter))
        for stored in stored_tensors(source.spec, names, "", has=has)
        if any(part in source.adapted for part in stored.parts)
    ]
    alpha = pairs[0][1].scale * pairs[0][1].rank
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(part, name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_string("general.name", adapter.name)
        for stored, pair in pairs:
            ratio = np.float32(pair.scale * pair.rank / alpha)
            b = pair.b.to_float32() if ratio == 1 else pair.b.to_float32() * ratio
            writer.add_tensor(f"{stored.name}.lora_a", np.ascontiguousarray(pair.a.to_float32()))
            writer.add_tensor(f"{stored.name}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return WrittenAdapter(path, path.stat().st_size, len(pairs), alpha)


def _joined(stored: Stored, adapter: LoraAdapter) -> LowRank:
    """One pair for all linears in a tensor, their ranks side by side, in the file's order."""
    parts = [adapter.targets.get(part.removesuffix(".weight")) for part in stored.parts]
    there = [pair for pair in parts if pair is not None]
    first = there[0]
    scale = first.scale
    if len(stored.parts) == 1:
        a, b = first.a.to_float32(), first.b.to_float32()
        if stored.columns is not None:
            a = a[:, stored.columns]
        order = stored.orders[0]
        return LowRank(
            Dense(a, "float32"), Dense(b if order is None else b[order], "float32"), scale
        )
    a = np.concatenate([pair.a.to_float32() for pair in there])
    b = np.zeros((sum(stored.rows), len(a)), np.float32)
    row = column = 0
    for pair, count, order in zip(parts, stored.rows, stored.orders, strict=True):
        if pair is not None:
            own = pair.b.to_float32() * np.float32(pair.scale / scale)
            b[row : row + count, column : column + pair.rank] = own if order is None else own[order]
            column += pair.rank
        row += count
    if stored.mixed is not None:
        b = b[stored.mixed]
    return LowRank(Dense(a, "float32"), Dense(b, "float32"), scale)
