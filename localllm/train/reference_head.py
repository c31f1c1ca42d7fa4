"""Head and cross-entropy in chunks of rows: logits never exist for all rows at once.

The way back through them is written out, since autodiff would keep a dozen arrays of their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from localllm.backend.reference_decoder import Decoder, softcap
from localllm.backend.reference_linear import Matrix
from localllm.backend.reference_parts import Norm, Weights
from localllm.spec import DecoderSpec
from localllm.train.reference_matrices import matmul, trained, turned_matmul

_LOGITS = 1 << 23  # of one chunk: 32 MB
_LEAST_ROWS = 16  # a large vocabulary's head would be unpacked too often


class Head:
    """log p(target) of rows, and the way back.

    names: the parameters; those of them that are the head's get gradients.
    """

    def __init__(self, decoder: Decoder, names: Sequence[str]) -> None:
        self._decoder = decoder
        self.spec = decoder.spec
        self._matrix_name = "embed.weight" if self.spec.tied_head else "head.weight"
        wanted = {"final_norm.weight", "final_norm.bias", self._matrix_name, "head.bias"}
        self.names = [name for name in names if name in wanted]

    def log_probs(
        self, x: mx.array, targets: np.ndarray, arrays: Mapping[str, mx.array]
    ) -> np.ndarray:
        """float32 [n] for x float32 [n, hidden] after the last layer, targets int [n]."""
        norm, matrix, bias = self._parts(arrays)
        result = np.empty(len(targets), np.float32)
        for at in chunks(self.spec, len(targets)):
            logits = self._logits(norm(x[at]), matrix, bias)
            result[at] = np.array(_chosen(logits, targets[at])[0])
        return result

    def gradients(
        self,
        x: mx.array,
        targets: np.ndarray,
        weights: np.ndarray,
        arrays: Mapping[str, mx.array],
    ) -> tuple[float, mx.array, dict[str, np.ndarray]]:
        """-sum(weight * log p), summed in float64; its gradients by x and by the head's arrays."""
        norm, matrix, bias = self._parts(arrays)
        loss, parts = 0.0, []
        sums: dict[str, np.ndarray] = {}
        of_norm = [name for name in self.names if name.startswith("final_norm.")]
        for at in chunks(self.spec, len(targets)):
            normed = norm(x[at])
            values, back = self._back(normed, matrix, bias, targets[at], weights[at])
            loss -= float(np.add.reduce(weights[at].astype(np.float64) * values))
            found: dict[str, mx.array] = {}
            if self._matrix_name in self.names:
                found[self._matrix_name] = back.T @ normed
            if "head.bias" in self.names:
                found["head.bias"] = mx.sum(back, axis=0)
            back = turned_matmul(matrix, back, stepwise=True)

            def normalized(x: mx.array, *own: mx.array) -> mx.array:
                if not own:
                    return norm(x)
                tree = Weights(trained(dict(zip(of_norm, own, strict=True))))
                return Norm(self.spec.final_norm, tree.under("final_norm"))(x)

            _, slopes = mx.vjp(normalized, [x[at], *(arrays[name] for name in of_norm)], [back])
            found |= dict(zip(of_norm, slopes[1:], strict=True))
            mx.eval(slopes[0])
            parts.append(slopes[0])
            for name, slope in found.items():
                if name in sums:
                    sums[name] += np.array(slope)
                else:
                    sums[name] = np.array(slope)
        return loss, mx.concatenate(parts), sums

    def _parts(self, arrays: Mapping[str, mx.array]) -> tuple[Norm, Matrix, mx.array | None]:
        """Norm, matrix and bias: the parameters, or else the base's."""
        if not (self.names and arrays):
            head = self._decoder.embed if self._decoder.head is None else self._decoder.head
            return self._decoder.final_norm, head, self._decoder.head_bias
        tree = Weights(trained({name: arrays[name] for name in self.names}))
        norm = Norm(self.spec.final_norm, tree.under("final_norm"))
        bias = tree.vector("head.bias") if self.spec.head_bias else None
        return norm, tree.matrix(self._matrix_name), bias

    def _logits(self, normed: mx.array, matrix: Matrix, bias: mx.array | None) -> mx.array:
        """float32 [n, vocab]; a cap comes last, so it can be undone from its outcome."""
        logits = matmul(matrix, normed, stepwise=True)
        if bias is not None:
            logits = logits + bias
        logits = logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    def _back(
        self,
        normed: mx.array,
        matrix: Matrix,
        bias: mx.array | None,
        targets: np.ndarray,
        weights: np.ndarray,
    ) -> tuple[np.ndarray, mx.array]:
        """log p of each row; d loss / d (W normed + bias), float32 [n, vocab]."""
        logits = self._logits(normed, matrix, bias)
        values, total = _chosen(logits, targets)
        mx.eval(values, total)
        rows = mx.arange(len(targets))
        back = mx.exp(logits - total[:, None]) * mx.array(weights)[:, None]
        back = back.at[rows, mx.array(targets)].add(mx.array(-weights))
        cap = self.spec.logit_softcap
        if cap is not None:
            back = back * (1 - mx.square(logits / cap))
        if self.spec.logit_scale != 1:
            back = back * self.spec.logit_scale
        del logits
        mx.eval(back)
        return np.array(values).astype(np.float64), back


def _chosen(logits: mx.array, targets: np.ndarray) -> tuple[mx.array, mx.array]:
    """log p of the targets, and the log of each row's sum: float32 [n] both."""
    total = mx.logsumexp(logits, axis=-1)
    at = mx.array(targets)[:, None]
    return mx.take_along_axis(logits, at, axis=-1)[:, 0] - total, total


def chunk_rows(spec: DecoderSpec) -> int:
    return max(_LEAST_ROWS, _LOGITS // spec.vocab_size)


def chunks(spec: DecoderSpec, rows: int) -> Iterator[slice]:
    step = chunk_rows(spec)
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))
