"""The whole training step in one native call: forward, head with cross-entropy, gradient.

With low-rank adapters the base stays in its own quantized form and is unpacked panel by panel. Of
full fine-tuning every weight is a parameter, read where the step's parameters lie. See
docs/training-native.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from localllm.backend.cpu_config import layer_configs, model_config, ropes_of
from localllm.backend.cpu_rope import RopeTable
from localllm.checkpoint.tensor import Tensor
from localllm.errors import BackendUnavailable, InvalidRequest
from localllm.kernels_cpu import _native
from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec
from localllm.spec.weights import weight_shapes
from localllm.train.native_weights import fill_store, trained_store
from localllm.train.native_weights import store_bytes as store_bytes
from localllm.train.program import Layout, Noise, Rows

_LINEARS = {
    "attn.q": "q",
    "attn.k": "k",
    "attn.v": "v",
    "attn.o": "o",
    "ffn.gate": "gate",
    "ffn.up": "up",
    "ffn.down": "down",
}
KEEP_BYTES = 128 << 20  # of a group's values kept for its gradient; beyond, they are computed anew
_KEEP_SHARE = 2  # bytes a parameter where all weights are trained, as these and AdamW take 16
_NO_NOISE = Noise()


class Weights(Protocol):
    """A model's weights, as `localllm.train.base.BaseWeights` gives them."""

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Every name of `weight_shapes(spec)` once, in any order."""
        ...


def why_not(
    spec: DecoderSpec, weights: Weights, layout: Layout, config: object = None
) -> str | None:
    """What of this model or training the native program lacks, None if nothing.

    The layout tells what is trained; any form of weights is taken, so neither they nor the config
    decide.
    """
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, AttentionSpec):
            return f"layer {index} mixes tokens by {type(layer.mixer).__name__}"
        if not isinstance(layer.ffn, FeedForwardSpec):
            return f"layer {index} has a mixture of experts"
        attn = layer.mixer
        if attn.shared_kv is not None or attn.v_from_k or attn.v_norm is not None:
            return f"layer {index} shares keys, or makes its values of them, or normalizes values"
        if attn.query_growth:
            return f"layer {index} scales queries by their position"
        if layer.scalar or spec.per_layer is not None:
            return f"layer {index} has a scalar or embeddings of its own"
        if layer.mixer.gate:
            return f"layer {index} has gated attention"
        if layer.mixer.sinks:
            return f"layer {index} has attention sinks"
        if layer.ffn.activation == "clamped_swiglu":
            return f"layer {index} activates by {layer.ffn.activation}"
    if not layout.scales:
        if dict(layout.shapes) != weight_shapes(spec):
            return "some of the weights as parameters, not all of them"
        return None
    targets = set(layout.scales)
    for name in layout.shapes:
        target, _, part = name.rpartition(".")
        if target not in targets or part not in ("a", "b", "magnitude"):
            return f"{name} as a parameter"
    known = set(_targets(spec))
    for target in layout.scales:
        if target not in known:
            return f"an adapter of {target}"
        if f"{target}.a" not in layout.shapes or f"{target}.b" not in layout.shapes:
            return f"an adapter of {target} that lacks a factor"
    return None


class NativeProgram:
    """Log-probabilities and gradients of adapters on a frozen base, or of all weights.

    See `Program`.

    weights: taken one tensor at a time. config: as `why_not` has it.
    threads: compute threads, the caller's among them; None for one per usable core.
    kernels: one of `train_kernels()`; None for the best, or what LOCALLLM_TRAIN_CPU names.
    keep_bytes: memory for values kept from forward to backward; None for 128 MiB, and with all
        weights trained half of what these take where that is more. It decides which sequences go
        at once, and so the order of sums.
    with_base: with all weights trained, hold the base as well, as it is in its file, for
        log-probabilities without parameters.

    Results do not depend on the number of threads, bit for bit; between instruction sets they
    differ by rounding (those with bfloat16 in their name multiply in it).
    Raises InvalidRequest for what `why_not` names, BackendUnavailable for kernels that cannot run
    here, CheckpointError for weights that do not fit the spec.
    """

    name = "native"
    survives_full_memory = True

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        layout: Layout,
        config: object = None,
        *,
        threads: int | None = None,
        kernels: str | None = None,
        keep_bytes: int | None = None,
        with_base: bool = True,
    ) -> None:
        reason = why_not(spec, weights, layout, config)
        if reason is not None:
            raise InvalidRequest(
                f"native training lacks {reason}", hint="use the reference program"
            )
        if threads is not None and threads < 1:
            raise InvalidRequest(f"threads must be at least 1, not {threads}")
        self.spec, self.layout = spec, layout
        self._ropes = [RopeTable(rope) for rope in ropes_of(spec)]
        if keep_bytes is None:
            keep_bytes = max(KEEP_BYTES, 0 if layout.scales else _KEEP_SHARE * layout.size)
        options = {
            "config": model_config(spec, float_activations=True),
            "layers": layer_configs(spec),
            "interleaved": [_interleaved(layer.attention) for layer in spec.layers],
            "adapters": _places(layout),
            "threads": threads or _native.default_threads(),
            "kernels": choose_kernels(kernels),
            "keep_bytes": keep_bytes,
        }
        scaled = [t for t in layout.targets if f"{t}.magnitude" in layout.shapes]
        self._base: Any = None
        if layout.scales or with_base:
            store = fill_store(spec, weights.tensors(), scaled)
            size = layout.size if layout.scales else 0
            self._base = _native.Trainer(store=store, parameters=size, **options)
        self._trainer: Any = self._base
        if not layout.scales:
            store = trained_store(spec, layout)
            self._trainer = _native.Trainer(store=store, parameters=layout.size, **options)

    @property
    def kernels(self) -> str:
        return str(self._open().kernels)

    def log_probs(
        self, rows: Rows, parameters: np.ndarray | None, noise: Noise | None = None
    ) -> np.ndarray:
        trainer = self._open()
        if parameters is None:
            trainer = self._base
            assert trainer is not None, "opened without a base"
        out = np.zeros(len(rows.tokens), np.float32)
        if len(out):
            trainer.log_probs(**self._batch(rows, noise), parameters=_floats(parameters), out=out)
        return out

    def gradients(
        self,
        rows: Rows,
        weights: np.ndarray,
        parameters: np.ndarray,
        gradient: np.ndarray,
        noise: Noise | None = None,
    ) -> float:
        assert gradient.dtype == np.float32, f"a gradient of {gradient.dtype}"
        assert gradient.flags.c_contiguous, "a gradient with gaps"
        if len(rows.tokens) == 0:
            return 0.0
        loss: float = self._open().gradients(
            **self._batch(rows, noise),
            weights=_floats(weights),
            parameters=_floats(parameters),
            gradient=gradient,
        )
        return loss

    def working_bytes(self, rows: Sequence[int]) -> int:
        lengths = [int(length) for length in rows]
        taken = int(self._open().working_bytes(lengths, gradients=True))
        if self._base is not None and self._base is not self._trainer:
            taken += int(self._base.working_bytes(lengths, gradients=False))
        return taken

    def close(self) -> None:
        """Frees weights, memory and threads. May be called twice."""
        self._trainer = self._base = None

    def _open(self) -> Any:
        assert self._trainer is not None, "the program is closed"
        return self._trainer

    def _batch(self, rows: Rows, noise: Noise | None) -> dict[str, object]:
        noise = noise or _NO_NOISE
        offsets = np.ascontiguousarray(rows.offsets, np.int32)
        lengths = np.diff(offsets)
        starts = np.repeat(offsets[:-1], lengths)
        positions = (np.arange(len(rows.tokens)) - starts).astype(np.int32)
        of_row = np.repeat(lengths, lengths).astype(np.int32)
        tables = []
        for rope in self._ropes:
            table, index = rope.rows(positions, of_row)
            tables.append(
                (np.ascontiguousarray(table, np.float32), np.ascontiguousarray(index, np.int32))
            )
        return {
            "tokens": np.ascontiguousarray(rows.tokens, np.int32),
            "targets": np.ascontiguousarray(rows.targets, np.int32),
            "offsets": offsets,
            "first_row": rows.first_row & 0xFFFFFFFF,
            "ropes": tables,
            "seed": noise.seed & 0xFFFFFFFFFFFFFFFF,
            "dropout": noise.dropout,
            "neftune": noise.neftune,
        }


def train_kernels() -> tuple[str, ...]:
    """Instruction sets that training runs on here, slowest first."""
    return tuple(_native.train_kernels())


def choose_kernels(name: str | None) -> str:
    """Raises BackendUnavailable, naming those there are."""
    usable = train_kernels()
    name = name or os.environ.get("LOCALLLM_TRAIN_CPU") or usable[-1]
    if name not in usable:
        raise BackendUnavailable(
            f"training kernels {name} cannot run here", hint=f"there are: {', '.join(usable)}"
        )
    return name


def fused_adamw(
    parameters: np.ndarray,
    gradient: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW in place on float32 vectors, with the bits of its NumPy formula.

    step: counted from 1. All scalars are rounded to float32 once; nothing is fused.
    """
    one = np.float32(1)
    b1, b2 = np.float32(beta1), np.float32(beta2)
    c1, c2 = (np.float32(1 / (1 - beta**step)) for beta in (beta1, beta2))
    rate, decay = np.float32(lr), np.float32(weight_decay)
    _native.fused_adamw(
        parameters,
        np.ascontiguousarray(gradient, np.float32),
        m,
        v,
        beta1=b1,
        rest1=one - b1,
        beta2=b2,
        rest2=one - b2,
        keep=one - rate * decay,
        rate=rate * c1,
        correction2=c2,
        eps=np.float32(eps),
    )


def _floats(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.ascontiguousarray(array, np.float32)


def _interleaved(attn: AttentionSpec) -> bool:
    return attn.rope is not None and attn.rope.interleaved


def _targets(spec: DecoderSpec) -> Iterable[str]:
    for index, layer in enumerate(spec.layers):
        for name in _LINEARS:
            gated = isinstance(layer.ffn, FeedForwardSpec) and layer.ffn.gated
            if name != "ffn.gate" or gated:
                yield f"layers.{index}.{name}"


def _places(layout: Layout) -> list[_native.AdapterPlace]:
    starts = layout.places
    places = []
    for target in layout.targets:
        _, layer, linear = target.split(".", 2)
        rank = layout.shapes[f"{target}.a"][0]
        places.append(
            _native.AdapterPlace(
                layer=int(layer),
                linear=_LINEARS[linear],
                rank=rank,
                scale=layout.scales[target],
                a=starts[f"{target}.a"],
                b=starts[f"{target}.b"],
                magnitude=starts.get(f"{target}.magnitude", -1),
            )
        )
    return places
