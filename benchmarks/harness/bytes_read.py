"""How many bytes of a file's weights one decoded token must read: the roofline's numerator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf


@dataclass(frozen=True)
class Weights:
    """Bytes as they lie in the file. layer: of one layer, all alike; head: of the output matrix."""

    layers: int
    layer: float
    head: int

    @property
    def token(self) -> float:
        return self.layers * self.layer + self.head


def bytes_read(path: Path) -> Weights:
    """Every matrix once; of an embedding that is not also the head, only one row."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    in_layers = {name: size for name, size in sizes.items() if name.startswith("blk.")}
    layers = 1 + max(int(name.split(".")[1]) for name in in_layers)
    head = sizes.get("output.weight", sizes["token_embd.weight"])
    return Weights(layers, sum(in_layers.values()) / layers, head)
