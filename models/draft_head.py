"""A draft head: one decoder layer that guesses the next hidden state from the last one.

    x_t = F_hidden · norm(h_t) + F_embedding · norm(e_t+1)
    h'_t+1 = final_norm(layer(x_0 … x_t))

h_t: the model's hidden state at position t, as it enters the head; e_t+1: the embedding of the
token that follows; h'_t+1: a guess at the state of the next position, from which the model's own
head makes logits. Further guesses take h' where h is not known yet. So it is in EAGLE (Li et al.,
arXiv:2401.15077) and in the multi-token prediction layers that checkpoints bring along
(DeepSeek-AI, arXiv:2412.19437).

Guesses may be confined to some tokens, the most frequent ones: the model's head over a sixth of
its rows costs a sixth, and what is rare is seldom missed (Zhao et al., "FR-Spec", 2025).

On disk: `draft_head.json`, {"format": "localllm-draft-head", "version": 2, "hidden": D, "heads",
"kv_heads", "head_dim", "inner", "rope_theta", "eps"}, and `draft_head.safetensors`, float32 or
16-bit: `hidden_norm.weight`, `embedding_norm.weight` [D], `fuse.hidden.weight`,
`fuse.embedding.weight` [D, D], and the layer's weights and `final_norm.weight` as
`localllm.spec.decoder` names them; where guesses are confined also `tokens` uint32 [M], ascending.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint.atomic import write_json
from localllm.checkpoint.safetensors import SafetensorsFile, write_safetensors
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import CheckpointError
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)
from localllm.spec.weights import weight_shapes

_FORMAT, _VERSION = "localllm-draft-head", 2
_MAX_CONFIG = 1 << 16
_MOST = {"heads": 1 << 10, "kv_heads": 1 << 10, "head_dim": 1 << 12, "inner": 1 << 20}


@dataclass(frozen=True)
class DraftHead:
    """spec: of the layer: a decoder of one layer with a vocabulary of one, which nobody uses.

    weights: every name of `weight_shapes(spec)`. hidden_norm, embedding_norm: float32 [D], gains of
    RMSNorms with the eps of the layer's. from_hidden, from_embedding: [D, D].
    tokens: int64 [M], the only ones it guesses, ascending; None for all.
    """

    spec: DecoderSpec
    weights: Mapping[str, Tensor]
    hidden_norm: np.ndarray
    embedding_norm: np.ndarray
    from_hidden: Tensor
    from_embedding: Tensor
    tokens: np.ndarray | None = None

    def save(self, folder: Path) -> None:
        """Writes a head of the kind that `head_spec` describes."""
        folder.mkdir(parents=True, exist_ok=True)
        layer = self.spec.layers[0]
        attention, rope, ffn = layer.attention, layer.attention.rope, layer.ffn
        assert rope is not None
        assert isinstance(ffn, FeedForwardSpec)
        settings = {
            "format": _FORMAT,
            "version": _VERSION,
            "hidden": self.spec.hidden,
            "heads": attention.heads,
            "kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "inner": ffn.hidden,
            "rope_theta": rope.theta,
            "eps": layer.norm.eps,
        }
        tensors = {
            "hidden_norm.weight": self.hidden_norm,
            "embedding_norm.weight": self.embedding_norm,
            "fuse.hidden.weight": self.from_hidden.to_float32(),
            "fuse.embedding.weight": self.from_embedding.to_float32(),
            **{n: w.to_float32() for n, w in self.weights.items() if n != "embed.weight"},
        }
        if self.tokens is not None:
            tensors["tokens"] = self.tokens.astype(np.uint32)
        write_safetensors(folder / "draft_head.safetensors", tensors)
        write_json(folder / "draft_head.json", settings)

    @classmethod
    def load(cls, folder: Path, *, hidden: int, vocab_size: int) -> DraftHead:
        """hidden, vocab_size: of the model it is for.

        Raises CheckpointError naming what does not fit.
        """
        spec = _spec(folder / "draft_head.json", hidden)
        path = folder / "draft_head.safetensors"
        file = SafetensorsFile(path)

        def read(name: str, shape: tuple[int, ...]) -> Dense:
            array = np.array(file.dense(name).to_float32())
            if array.shape != shape:
                raise CheckpointError(f"{path}: {name} has the shape {array.shape}, not {shape}")
            if not np.isfinite(array).all():
                raise CheckpointError(f"{path}: {name} holds NaN or infinite values")
            return Dense(array, "float32")

        try:
            shapes = weight_shapes(spec)
            del shapes["embed.weight"]
            tokens = None
            if "tokens" in file.tensors:
                tokens = file.words("tokens").astype(np.int64)
                if tokens.ndim != 1 or not tokens.size or (np.diff(tokens) <= 0).any():
                    raise CheckpointError(f"{path}: tokens are no ascending list of ids")
                if tokens[-1] >= vocab_size:
                    raise CheckpointError(
                        f"{path}: guesses token {tokens[-1]} of a vocabulary of {vocab_size}"
                    )
            return cls(
                spec,
                {**no_vocabulary(hidden), **{n: read(n, shape) for n, shape in shapes.items()}},
                read("hidden_norm.weight", (hidden,)).data,
                read("embedding_norm.weight", (hidden,)).data,
                read("fuse.hidden.weight", (hidden, hidden)),
                read("fuse.embedding.weight", (hidden, hidden)),
                tokens,
            )
        finally:
            file.close()


def layer_alone(
    architecture: str, layer: LayerSpec, norm: NormSpec, hidden: int, context: int
) -> DecoderSpec:
    """A decoder of one layer that is given its inputs, and whose hidden states are taken."""
    return DecoderSpec(architecture, 1, hidden, (layer,), norm, context, tied_head=True)


def no_vocabulary(hidden: int) -> dict[str, Tensor]:
    """The embedding that `layer_alone` has to have."""
    return {"embed.weight": Dense(np.zeros((1, hidden), np.float32), "float32")}


def head_spec(
    hidden: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int,
    rope_theta: float,
    eps: float,
    context: int = 1 << 20,
) -> DecoderSpec:
    """Llama's kind of layer, which heads that are trained here have."""
    norm = NormSpec(eps=eps)
    rope = RopeSpec(head_dim, rope_theta)
    attention = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, rope)
    layer = LayerSpec(attention, FeedForwardSpec(inner), norm)
    return layer_alone("draft_head", layer, norm, hidden, context)


def _spec(path: Path, hidden: int) -> DecoderSpec:
    settings = _settings(path)
    if settings.get("hidden") != hidden:
        raise CheckpointError(
            f"{path.parent}: this draft head is for hidden states of {settings.get('hidden')}, "
            f"the model's have {hidden}"
        )
    sizes: dict[str, int] = {}
    for name, most in _MOST.items():
        value = settings.get(name)
        if type(value) is not int or not 0 < value <= most:
            raise CheckpointError(f"{path}: {name} must be 1 … {most}, not {value!r}")
        sizes[name] = value
    if sizes["heads"] % sizes["kv_heads"] or sizes["head_dim"] % 2:
        raise CheckpointError(f"{path}: {sizes} are no sizes of an attention layer")
    numbers: dict[str, float] = {}
    for name in ("rope_theta", "eps"):
        value = settings.get(name)
        if not isinstance(value, int | float) or not 0 < value < 1e12:
            raise CheckpointError(f"{path}: {name} must be a positive number, not {value!r}")
        numbers[name] = float(value)
    return head_spec(
        hidden,
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        inner=sizes["inner"],
        rope_theta=numbers["rope_theta"],
        eps=numbers["eps"],
    )


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"larger than {_MAX_CONFIG} bytes")
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}",
            hint="a draft head is a folder with draft_head.json and draft_head.safetensors",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a draft head of ours")
    if settings.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: version {settings.get('version')}; this release reads {_VERSION}",
            hint="train the head again",
        )
    return settings
