"""Sampling: temperature, top_k, top_p and min_p over a whole vocabulary in one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel
from localllm.kernels_metal.reference import sample_tokens as reference

# A row is the work of one threadgroup. 512 threads, as the kernel needs too many registers for it
# to be safe to ask for 1024. `THREADS` in sample_cut.metal is the same.
THREADS = 512

LARGEST_VOCABULARY = 2**19  # so that masses of 2^-44 add up in 63 bits

_SAMPLE = MetalKernel(
    "sample_tokens",
    ["logits", "temperature", "top_k", "top_p", "min_p", "uniforms"],
    ["token", "logprob", "kept"],
)


@dataclass(frozen=True)
class Settings:
    """Of each row, [n]: temperature float32 (0: the likeliest token), top_k int32 (0: all), top_p
    float32 (1: all), min_p float32 (0: all; at most 1)."""

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array


def sample_tokens(
    logits: mx.array, settings: Settings, uniforms: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(token int32 [n], its log-probability float32 [n], tokens kept int32 [n]).

    logits: [n, V], half, bfloat16 or float32, V <= 2^19. uniforms: float32 [n] in [0, 1), drawn
    by the caller; such numbers lie 2^-24 apart, so a rarer token may never come up. top_k, then
    top_p of what it leaves, then min_p, as in `localllm.sampling.processors`, ties at a border
    broken by the lower token. The token is the first, by rising id, at which the probability of
    the kept ones so far exceeds the uniform number; the log-probability is that under the kept
    ones.

    Probabilities come from float32 exponentials and are summed exactly, in units of 2^-44 of the
    likeliest: a row's bits depend on that row alone, and on no order. A row with NaN or +inf, or
    with -inf alone, gives token -1, NaN and 0. A temperature below 1.2e-38 counts as 0.

    Raises ValueError for other shapes and dtypes.
    """
    _check(logits, settings, uniforms)
    n = logits.shape[0]
    if logits.size < 8:  # Metal gets so few values as `constant`, which the kernel does not take
        bans = mx.full((n, 8), -np.inf, dtype=logits.dtype)
        logits = mx.concatenate([logits, bans], axis=1)
    token, logprob, kept = _SAMPLE(
        Launch(
            inputs=[
                logits, settings.temperature, settings.top_k, settings.top_p, settings.min_p,
                uniforms,
            ],
            grid=(THREADS, n, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(n,)] * 3,
            output_dtypes=[mx.int32, mx.float32, mx.int32],
            template=[("T", logits.dtype)],
        )
    )  # fmt: skip
    return token, logprob, kept


def _check(logits: mx.array, settings: Settings, uniforms: mx.array) -> None:
    if logits.ndim != 2 or logits.size == 0 or logits.shape[1] > LARGEST_VOCABULARY:
        raise ValueError(f"logits [n, V] with V <= 2^19 are needed, not {logits.shape}")
    if logits.dtype not in (mx.float16, mx.bfloat16, mx.float32):
        raise ValueError(f"half, bfloat16 or float32 is needed, not {logits.dtype}")
    for name, array, dtype in (
        ("temperature", settings.temperature, mx.float32),
        ("top_k", settings.top_k, mx.int32),
        ("top_p", settings.top_p, mx.float32),
        ("min_p", settings.min_p, mx.float32),
        ("uniforms", uniforms, mx.float32),
    ):
        if array.shape != (logits.shape[0],) or array.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} [{logits.shape[0]}], not {array.dtype} {array.shape}"
            )


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """A vocabulary as of Qwen3, one row and eight, with the usual settings."""
    for rows in (1, 8):
        for name, top_k, top_p, min_p in (
            ("top_k 20, top_p 0.95", 20, 0.95, 0.0),
            ("top_p 0.95", 0, 0.95, 0.0),
            ("min_p 0.05", 0, 1.0, 0.05),
        ):
            work = _Work.of(rows, 151936, top_k, top_p, min_p, dtype)
            yield Contest(
                kernel="sample_tokens",
                work=f"{rows} x 151936, {name}, {str(dtype).removeprefix('mlx.core.')}",
                ours=work.ours,
                mlx=work.mlx,
                truth=work.truth,
                # A wrong token is off by far more; a log-probability of some -10 is within 1e-4.
                tolerance=1e-5,
                least_bytes=work.logits.nbytes + rows * 32,
            )


@dataclass(frozen=True)
class _Work:
    logits: mx.array
    settings: Settings
    uniforms: mx.array
    top_k: int  # of every row

    @staticmethod
    def of(
        n: int, vocabulary: int, top_k: int, top_p: float, min_p: float, dtype: mx.Dtype
    ) -> _Work:
        random = np.random.default_rng(n)
        # Heavy at the top, as what models say is: some tens of tokens hold most of it.
        values = random.standard_normal((n, vocabulary)) * 2
        places = random.permuted(np.tile(np.arange(vocabulary), (n, 1)), axis=1)[:, :200]
        values[np.arange(n)[:, None], places] += 12 - 1.2 * np.log(1 + np.arange(200))
        settings = Settings(
            mx.full((n,), 0.7),
            mx.full((n,), top_k, dtype=mx.int32),
            mx.full((n,), top_p),
            mx.full((n,), min_p),
        )
        uniforms = mx.array(random.random(n).astype(np.float32))
        logits = mx.array(values.astype(np.float32)).astype(dtype)
        return _Work(logits, settings, uniforms, top_k)

    def ours(self) -> list[mx.array]:
        return list(sample_tokens(self.logits, self.settings, self.uniforms)[:2])

    def mlx(self) -> list[mx.array]:
        """With MLX's own ops: the top_k alone sorted, or else the whole row."""
        if self.top_k:
            some = mx.argpartition(-self.logits, self.top_k, axis=-1)[:, : self.top_k]
            order = mx.argsort(-mx.take_along_axis(self.logits, some, -1), axis=-1)
            tokens = mx.take_along_axis(some, order, -1)
        else:
            tokens = mx.argsort(-self.logits, axis=-1)
        sorted_logits = mx.take_along_axis(self.logits, tokens, -1).astype(mx.float32)
        scaled = (sorted_logits - sorted_logits[:, :1]) / self.settings.temperature[:, None]
        probabilities = mx.softmax(scaled, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        keep = (before < self.settings.top_p[:, None]) | (before == 0)
        keep = keep & (scaled >= mx.log(self.settings.min_p)[:, None])
        # The draw goes by rising token.
        by_token = mx.argsort(tokens, axis=-1)
        mass = mx.take_along_axis(mx.where(keep, mx.exp(scaled), 0.0), by_token, -1)
        sums = mx.cumsum(mass, axis=-1)
        place = mx.argmax(sums > self.uniforms[:, None] * sums[:, -1:], axis=-1, keepdims=True)
        token = mx.take_along_axis(mx.take_along_axis(tokens, by_token, -1), place, -1)
        drawn = mx.log(mx.take_along_axis(mass, place, -1) / sums[:, -1:])
        return [token[:, 0].astype(mx.int32), drawn[:, 0]]

    def truth(self) -> list[np.ndarray]:
        settings = self.settings
        columns = (settings.temperature, settings.top_k, settings.top_p, settings.min_p)
        rows = zip(
            np.array(self.logits.astype(mx.float32)).astype(np.float64),
            *(np.array(column).tolist() for column in (*columns, self.uniforms)),
            strict=True,
        )
        sampled = [reference.sample_row(*row) for row in rows]
        return [
            np.array([row.token for row in sampled], dtype=np.float64),
            np.array([row.logprob for row in sampled]),
        ]
