"""A draft head: a small network that guesses the next hidden state from the last one.

    s' = s + W_out · silu(W_in · rmsnorm([s ; e]))

s: the model's hidden state, as it enters the head, where the last token was drawn; e: that
token's embedding; s': a guess at the state one position later, from which the model's own head
makes logits. It is applied again for every further guess. The idea is EAGLE's (Li et al., 2024)
without its attention layer, so that it needs no KV cache.

Guesses may be confined to some tokens, the most frequent ones: the model's head over a sixth of
its rows costs a sixth, and what is rare is seldom missed (Zhao et al., "FR-Spec", 2025).

On disk: `draft_head.json` {"format": "localllm-draft-head", "version": 1, "hidden": D, "inner": I}
and `draft_head.safetensors` with float32 (or 16-bit) `norm` [2D], `in` [I, 2D] and `out` [D, I];
where guesses are confined also `tokens` uint32 [M], ascending.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from localllm.checkpoint.atomic import write_json
from localllm.checkpoint.safetensors import SafetensorsFile, write_safetensors
from localllm.errors import CheckpointError

_FORMAT, _VERSION = "localllm-draft-head", 1
_MAX_CONFIG = 1 << 16


class DraftHead:
    """norm: float32 [2D]. inside: float32 [I, 2D]. outside: float32 [D, I].

    tokens: int32 [M], the only ones it guesses, ascending; None for all.
    """

    def __init__(
        self,
        norm: np.ndarray,
        inside: np.ndarray,
        outside: np.ndarray,
        tokens: np.ndarray | None = None,
    ) -> None:
        inner, hidden = inside.shape[0], outside.shape[0]
        for name, array, shape in (
            ("norm", norm, (2 * hidden,)),
            ("in", inside, (inner, 2 * hidden)),
            ("out", outside, (hidden, inner)),
        ):
            if array.shape != shape:
                raise CheckpointError(
                    f"draft head: {name} has the shape {array.shape}, not {shape}"
                )
            if not np.isfinite(array).all():
                raise CheckpointError(f"draft head: {name} holds NaN or infinite values")
        if tokens is not None and (
            tokens.ndim != 1 or not len(tokens) or (np.diff(tokens) <= 0).any() or tokens[0] < 0
        ):
            raise CheckpointError("draft head: tokens are no ascending list of ids")
        self.norm, self.inside, self.outside = norm, inside, outside
        self.tokens = tokens

    @property
    def hidden(self) -> int:
        return int(self.outside.shape[0])

    def advance(self, states: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """float32 [n, D]: guesses at the next states of these, given the tokens drawn from them."""
        both = np.concatenate([states, embeddings], axis=1)
        both = both / np.sqrt(np.mean(both * both, axis=1, keepdims=True) + 1e-6) * self.norm
        inner = both @ self.inside.T
        with np.errstate(over="ignore"):
            inner = inner / (1 + np.exp(-inner))
        result: np.ndarray = states + inner @ self.outside.T
        return result.astype(np.float32)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": _FORMAT,
            "version": _VERSION,
            "hidden": self.hidden,
            "inner": int(self.inside.shape[0]),
        }
        tensors = {"norm": self.norm, "in": self.inside, "out": self.outside}
        if self.tokens is not None:
            tensors["tokens"] = self.tokens.astype(np.uint32)
        write_safetensors(folder / "draft_head.safetensors", tensors)
        write_json(folder / "draft_head.json", settings)

    @classmethod
    def load(cls, folder: Path, *, hidden: int, vocab_size: int) -> DraftHead:
        """hidden, vocab_size: of the model it is for.

        Raises CheckpointError naming what does not fit.
        """
        settings = _settings(folder / "draft_head.json")
        if settings.get("hidden") != hidden:
            raise CheckpointError(
                f"{folder}: this draft head is for hidden states of {settings.get('hidden')}, "
                f"the model's have {hidden}"
            )
        path = folder / "draft_head.safetensors"
        file = SafetensorsFile(path)
        try:
            norm, inside, outside = (
                np.array(file.dense(name).to_float32()) for name in ("norm", "in", "out")
            )
            tokens = None
            if "tokens" in file.tensors:
                tokens = file.words("tokens").astype(np.int64)
                if tokens.size and tokens.max() >= vocab_size:
                    raise CheckpointError(
                        f"{path}: guesses token {tokens.max()} of a vocabulary of {vocab_size}"
                    )
            return cls(norm, inside, outside, tokens)
        finally:
            file.close()


def _settings(path: Path) -> dict[str, object]:
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
            f"{path}: version {settings.get('version')}; this release reads {_VERSION}"
        )
    return settings
