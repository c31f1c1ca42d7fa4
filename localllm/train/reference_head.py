"""Head and cross-entropy in chunks of rows: logits never exist for all rows at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from localllm.backend.reference_decoder import Decoder, Norm, Weights, softcap
from localllm.spec import DecoderSpec
from localllm.train.reference_matrices import trained

_LOGITS = 1 << 23  # of one chunk: 32 MB
_LEAST_ROWS = 16  # a large vocabulary's head would be unpacked too often


class Head:
    """log p(target) of rows, and the way back. trained: names whose gradients are wanted."""

    def __init__(self, decoder: Decoder, names: Sequence[str]) -> None:
        self._decoder = decoder
        self.spec = decoder.spec
        own = "embed.weight" if self.spec.tied_head else "head.weight"
        wanted = {"final_norm.weight", "final_norm.bias", own, "head.bias"}
        self.names = [name for name in names if name in wanted]

    def log_probs(
        self, x: mx.array, targets: np.ndarray, arrays: Mapping[str, mx.array]
    ) -> np.ndarray:
        """float32 [n] for x float32 [n, hidden] after the last layer, targets int [n]."""
        result = np.empty(len(targets), np.float32)
        own = [arrays[name] for name in self.names if arrays]
        for at in chunks(self.spec, len(targets)):
            result[at] = np.array(self._of(x[at], mx.array(targets[at]), own))
        return result

    def gradients(
        self,
        x: mx.array,
        targets: np.ndarray,
        weights: np.ndarray,
        arrays: Mapping[str, mx.array],
    ) -> tuple[float, mx.array, dict[str, np.ndarray]]:
        """-sum(weight * log p), summed in float64; its gradients by x and by the head's arrays."""
        loss, parts = 0.0, []
        sums: dict[str, np.ndarray] = {}
        own = [arrays[name] for name in self.names]
        for at in chunks(self.spec, len(targets)):
            asked = mx.array(targets[at])

            def forward(x: mx.array, *own: mx.array, asked: mx.array = asked) -> mx.array:
                return self._of(x, asked, own)

            (values,), gradients = mx.vjp(forward, [x[at], *own], [mx.array(-weights[at])])
            mx.eval(values, *gradients)
            found = np.array(values).astype(np.float64)
            loss -= float(np.add.reduce(weights[at].astype(np.float64) * found))
            parts.append(gradients[0])
            for name, gradient in zip(self.names, gradients[1:], strict=True):
                if name in sums:
                    sums[name] += np.array(gradient)
                else:
                    sums[name] = np.array(gradient)
        return loss, mx.concatenate(parts), sums

    def _of(self, x: mx.array, targets: mx.array, own: Sequence[mx.array]) -> mx.array:
        logits = self._logits(x, own)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - mx.logsumexp(logits, axis=-1)

    def _logits(self, x: mx.array, own: Sequence[mx.array]) -> mx.array:
        if not own:
            return self._decoder.logits(x)
        parts = trained(dict(zip(self.names, own, strict=True)))
        tree = Weights(parts)
        x = Norm(self.spec.final_norm, tree.under("final_norm"))(x)
        name = "embed.weight" if self.spec.tied_head else "head.weight"
        logits = tree.matrix(name).matmul(x)
        if self.spec.head_bias:
            logits = logits + tree.vector("head.bias")
        logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else softcap(logits, cap)


def chunk_rows(spec: DecoderSpec) -> int:
    return max(_LEAST_ROWS, _LOGITS // spec.vocab_size)


def chunks(spec: DecoderSpec, rows: int) -> Iterator[slice]:
    step = chunk_rows(spec)
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))
