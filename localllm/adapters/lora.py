"""A low-rank adapter as every backend takes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from localllm.checkpoint.tensor import Dense

# The linears of a layer that an adapter may touch: `layers.N.` and one of these.
LINEARS = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.gate",
    "attn.o",
    "delta.qkv",
    "delta.z",
    "delta.o",
    "conv.in",
    "conv.out",
    "ffn.gate",
    "ffn.up",
    "ffn.down",
)
# Of a mixture, stacked: each expert has a pair of its own.
EXPERTS = ("moe.gate", "moe.up", "moe.down")


@dataclass(frozen=True)
class Gains:
    """What DoRA multiplies each output with, `magnitude / |row of W + scale * B A|`.

    values: float32 [out]. offset: float32 [out], what of the base's bias that takes away and must
    come back, bias * (1 - gain); None without a bias. Source: https://arxiv.org/abs/2402.09353
    """

    values: np.ndarray
    offset: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.offset is None else self.offset.nbytes)


@dataclass(frozen=True)
class LowRank:
    """y = W x + B (scale * (A x)), and with DoRA each row of that times its gain.

    a: [r, in], b: [out, r], in the dtype of the file; of experts [E, r, in] and [E, out, r]. The
    scale stays a number of its own, so that 16-bit matrices are held in 16 bits without loss.
    """

    a: Dense
    b: Dense
    scale: float
    gains: Gains | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.gains is None else self.gains.nbytes)

    def delta(self) -> np.ndarray:
        """scale * B A: float32 [out, in], of experts [E, out, in]."""
        product: np.ndarray = self.b.to_float32() @ self.a.to_float32()
        return product * np.float32(self.scale)

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """What takes W's place: float32, of W's shape."""
        whole: np.ndarray = weight + self.delta()
        return whole if self.gains is None else whole * self.gains.values[:, None]

    def scaled_b(self) -> np.ndarray:
        """B with scale and gain in it: float32, of B's shape."""
        b = self.b.to_float32() * np.float32(self.scale)
        return b if self.gains is None else b * self.gains.values[:, None]


@dataclass(frozen=True)
class LoraAdapter:
    """name: for people. digest: of what it computes, the same for the same tensors and scales.

    targets: by our weight name without `.weight`: `layers.0.attn.q` …
    """

    name: str
    digest: bytes
    targets: Mapping[str, LowRank]

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return sum(pair.nbytes for pair in self.targets.values())


def make_adapter(name: str, targets: Mapping[str, LowRank]) -> LoraAdapter:
    """With the digest of its content."""
    digest = hashlib.sha256()
    for target in sorted(targets):
        pair = targets[target]
        digest.update(f"{target} {pair.scale.hex()}".encode())
        for side in (pair.a, pair.b):
            digest.update(f" {side.dtype} {side.shape};".encode())
            digest.update(np.ascontiguousarray(side.data).view(np.uint8).data)
        if pair.gains is not None:
            digest.update(b" gains" + pair.gains.values.tobytes())
    return LoraAdapter(name, digest.digest(), dict(targets))
