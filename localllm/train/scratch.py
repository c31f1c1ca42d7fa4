"""A model that nobody has trained yet: its shape from a config.json, its weights from a seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint.form import DenseForm
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import InvalidRequest
from localllm.models import spec_of_config
from localllm.spec import DecoderSpec, NormSpec
from localllm.spec.weights import Shape, weight_shapes
from localllm.train.base import BaseWeights

_SPREAD = 0.02
_MAX_BYTES = 1 << 20
# What adds to the residual stream; narrower the more layers there are (GPT-2).
_RESIDUAL = ("attn.o.weight", "ffn.down.weight", "moe.down.weight")


def scratch_weights(
    config: str | Path | Mapping[str, Any], *, seed: int = 0, vocab_size: int | None = None
) -> BaseWeights:
    """A new model, to be trained in full (`FullConfig`).

    config: a config.json as the hub has it (or its folder), or its content. vocab_size: instead of
    the config's, for a tokenizer of one's own. Matrices are normal with the config's
    `initializer_range` (0.02), those that add to the residual stream divided by sqrt(2 * layers);
    gains begin at 1, biases at 0. The same seed gives the same weights.
    Raises InvalidRequest for a file that is no config, UnsupportedModel and CheckpointError for
    what it says.
    """
    values, path = _read(config)
    spec = spec_of_config(values, path)
    if vocab_size is not None:
        spec = replace(spec, vocab_size=vocab_size)
    spread = values.get("initializer_range", _SPREAD)
    if not (isinstance(spread, int | float) and math.isfinite(spread) and spread > 0):
        raise InvalidRequest(f"{path}: initializer_range must be above 0, not {spread!r}")
    shapes = weight_shapes(spec)

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, Dense(_start(spec, name, shape, seed, float(spread)), "float32")

    return BaseWeights(str(path), spec, dict.fromkeys(shapes, DenseForm(4)), read)


def _start(spec: DecoderSpec, name: str, shape: Shape, seed: int, spread: float) -> np.ndarray:
    if len(shape) > 1:
        if name.endswith(_RESIDUAL):
            spread /= math.sqrt(2 * len(spec.layers))
        return (normal(seed, name, math.prod(shape)) * np.float32(spread)).reshape(shape)
    if "norm" in name and name.endswith(".weight"):
        norm = spec.final_norm
        if name.startswith("layers."):
            layer = spec.layers[int(name.split(".")[1])]
            own = layer.attention.qk_norm if ".attn." in name else layer.norm
            own = NormSpec() if ".delta." in name else own
            assert own is not None
            norm = own
        return np.full(shape, 1 - norm.offset, np.float32)
    factor = name.endswith((".scalar.weight", ".expert_scale.weight"))
    return np.full(shape, 1 if factor else 0, np.float32)


def normal(seed: int, name: str, count: int) -> np.ndarray:
    """float32 [count], standard normal, from raw bits: what numpy draws may change with time."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    half = -(-count // 2)
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(half)
    result = np.empty((2, half), np.float32)
    for start in range(0, half, 1 << 16):  # Box-Muller, in float64
        part = bits[start : start + (1 << 16)]
        high = ((part >> np.uint64(32)).astype(np.float64) + 0.5) / 2**32
        angle = (part & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2 * math.pi / 2**32)
        length = np.sqrt(-2 * np.log(high))
        result[0, start : start + len(part)] = length * np.cos(angle)
        result[1, start : start + len(part)] = length * np.sin(angle)
    return result.reshape(-1)[:count]


def _read(config: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    if isinstance(config, Mapping):
        return config, Path("config")
    path = Path(config)
    if path.is_dir():
        path = path / "config.json"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidRequest(f"{path} is larger than any config.json")
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"{path} is no config.json: it holds no object")
    return values, path
