"""Small random models, adapters and rows, and their gradients by MLX's autodiff in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.backend.reference_attention import attention
from localllm.backend.reference_decoder import Decoder
from localllm.backend.reference_linear import to_matrix, to_vector
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor, pack_codes
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)
from localllm.spec.weights import weight_shapes
from localllm.train.program import Layout, Noise, Rows

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")


def small_spec(
    *,
    hidden: int = 32,
    vocab: int = 70,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    ffn: int = 40,
    norm: NormSpec | None = None,
    rope: RopeSpec | None = None,
    window: int | None = None,
    softcap: float | None = None,
    qk_norm: NormSpec | None = None,
    qk_norm_over: str = "head",
    bias: bool = False,
    activation: str = "silu",
    gated: bool = True,
    pre_norm: bool = True,
    post_norm: bool = False,
    residual_scale: float = 1.0,
    **decoder: object,
) -> DecoderSpec:
    norm = norm or NormSpec(eps=1e-5)
    learned = decoder.get("learned_positions")
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=None if learned else rope or RopeSpec(dim=head_dim, theta=100.0),
        window=window,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=qk_norm,
        qk_norm_over=qk_norm_over,
        softcap=softcap,
    )
    layer = LayerSpec(
        mixer=mixer,
        ffn=FeedForwardSpec(hidden=ffn, activation=activation, gated=gated, bias=bias),
        norm=norm,
        pre_norm=pre_norm,
        post_norm=post_norm,
        residual_scale=residual_scale,
    )
    settings = {"tied_head": True, "context": 4096, **decoder}
    return DecoderSpec("llama", vocab, hidden, (layer,) * layers, norm, **settings)


def affine(values: np.ndarray, bits: int, group: int) -> Affine:
    """values [out, in] rounded to codes by groups."""
    out, inner = values.shape
    groups = values.reshape(out, -1, group)
    low, high = groups.min(-1), groups.max(-1)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16)
    codes = np.clip(
        np.round((groups - low[..., None]) / scale.astype(np.float32)[..., None]), 0, 2**bits - 1
    )
    return Affine(
        pack_codes(codes.astype(np.uint8).reshape(out, inner), bits),
        bits,
        group,
        GroupValues(scale),
        GroupValues(low.astype(np.float16)),
    )


def random_weights(
    spec: DecoderSpec, seed: int = 0, bits: int = 0, group: int = 32
) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in weight_shapes(spec).items():
        if len(shape) == 1:
            mean = 0.0 if name.endswith("bias") else 1.0
            values = random.normal(mean, 0.2, shape).astype(np.float32)
        else:
            values = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        if bits and len(shape) == 2 and shape[-1] % group == 0:
            weights[name] = affine(values, bits, group)
        else:
            weights[name] = Dense(values, "float32")
    return weights


@dataclass(frozen=True)
class Held:
    """Weights in memory, as a program takes them."""

    held: dict[str, Tensor]

    def tensors(self):
        return self.held.items()


def make_layout(
    spec: DecoderSpec,
    rank: int = 4,
    linears: tuple[str, ...] = LINEARS,
    layers: tuple[int, ...] | None = None,
    scale: float = 0.7,
    dora: bool = False,
) -> Layout:
    """Ranks and scales differ from target to target."""
    known = weight_shapes(spec)
    shapes, scales = {}, {}
    for layer in range(len(spec.layers)) if layers is None else layers:
        for place, linear in enumerate(linears):
            target = f"layers.{layer}.{linear}"
            if f"{target}.weight" not in known:
                continue
            out, inner = known[f"{target}.weight"]
            here = rank + place % 3
            shapes[f"{target}.a"] = (here, inner)
            shapes[f"{target}.b"] = (out, here)
            if dora:
                shapes[f"{target}.magnitude"] = (out,)
            scales[target] = scale + 0.1 * place
    return Layout(shapes, scales)


def random_parameters(layout: Layout, seed: int = 1) -> np.ndarray:
    """With DoRA's magnitudes around 1, of both signs."""
    random = np.random.default_rng(seed)
    flat = random.normal(0, 0.15, layout.size).astype(np.float32)
    for name, view in layout.views(flat).items():
        if name.endswith(".magnitude"):
            view += random.choice([-1, 1, 1], view.shape).astype(np.float32)
    return flat


def random_rows(spec: DecoderSpec, lengths: tuple[int, ...], seed: int = 2, first: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    n = sum(lengths)
    return Rows(
        tokens=random.integers(0, spec.vocab_size, n).astype(np.int32),
        targets=random.integers(0, spec.vocab_size, n).astype(np.int32),
        offsets=np.cumsum([0, *lengths]).astype(np.int32),
        first_row=first,
    )


def mix(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.uint32)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def noise_hash(seed: int, target: int, first: int, rows: int, columns: int) -> np.ndarray:
    """uint32 [rows, columns], as `Noise` says."""
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)
    start = mix(np.array([low ^ mix(np.array([high ^ np.uint32(target)]))[0]]))
    row = mix(start + (np.arange(rows, dtype=np.uint64) + first).astype(np.uint32))
    steps = np.arange(columns, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return mix(row[:, None] + steps[None, :])


def kept(noise: Noise, target: int, first: int, rows: int, columns: int) -> np.ndarray:
    """float32 [rows, columns]: 0 or 1 / (1 - p)."""
    keep = noise_hash(noise.seed, target, first, rows, columns) >= noise.dropout * 2**32
    return keep.astype(np.float32) / np.float32(1 - noise.dropout)


@dataclass(frozen=True)
class Autodiff:
    """The reference decoder with adapters, differentiated by MLX."""

    spec: DecoderSpec
    weights: dict[str, Tensor]
    layout: Layout

    def _log_probs(self, rows: Rows, flat: mx.array | None, noise: Noise) -> mx.array:
        decoder = Decoder(
            self.spec,
            {
                name: to_vector(x) if len(x.shape) == 1 else to_matrix(x)
                for name, x in self.weights.items()
            },
        )
        parts, at = {}, 0
        if flat is not None:
            for name, shape in self.layout.shapes.items():
                count = int(np.prod(shape))
                parts[name] = flat[at : at + count].reshape(shape)
                at += count
        results = []
        for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
            if start == end:
                continue
            positions = np.arange(end - start)
            first = rows.first_row + int(start)

            def attend(layer, q, kv, positions=positions):
                mixer = self.spec.layers[layer].mixer
                return attention(mixer, q, *kv, positions, positions)

            def adapt(target, x, y, routed=None, first=first):
                assert routed is None
                if f"{target}.a" not in parts:
                    return y
                if noise.dropout:
                    place = self.layout.targets.index(target)
                    x = x * mx.array(kept(noise, place, first, x.shape[0], x.shape[1]))
                a, b, scale = parts[f"{target}.a"], parts[f"{target}.b"], self.layout.scales[target]
                added = ((x @ a.T) @ b.T) * scale
                if f"{target}.magnitude" not in parts:
                    return y + added
                weight = mx.array(self.weights[f"{target}.weight"].to_float32())
                whole = mx.stop_gradient(weight + scale * (b @ a))
                gain = parts[f"{target}.magnitude"] / mx.linalg.norm(whole, axis=1)
                bias = self.weights.get(f"{target}.bias")
                bias = 0 if bias is None else mx.array(bias.to_float32())
                return (y - bias + added) * gain + bias

            embed = decoder.embed
            if noise.neftune:
                uniform = noise_hash(
                    noise.seed, 0xFFFFFFFF, first, end - start, self.spec.hidden
                ).astype(np.float64)
                uniform = (uniform / 2**31 - 1) * noise.neftune
                uniform /= np.sqrt((end - start) * self.spec.hidden) * self.spec.embed_scale
                decoder.embed = _Noisy(embed, mx.array(uniform.astype(np.float32)))
            hidden = decoder(
                rows.tokens[start:end], positions, np.full(end - start, end - start), attend, adapt
            )
            decoder.embed = embed
            logits = decoder.logits(hidden)
            targets = mx.array(rows.targets[start:end])
            picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            results.append(picked - mx.logsumexp(logits, axis=-1))
        return mx.concatenate(results)

    def log_probs(
        self, rows: Rows, flat: np.ndarray | None, noise: Noise | None = None
    ) -> np.ndarray:
        given = None if flat is None else mx.array(flat)
        return np.array(self._log_probs(rows, given, noise or Noise()))

    def gradients(
        self, rows: Rows, weights: np.ndarray, flat: np.ndarray, noise: Noise | None = None
    ) -> tuple[float, np.ndarray]:
        def loss(x: mx.array) -> mx.array:
            return -mx.sum(mx.array(weights) * self._log_probs(rows, x, noise or Noise()))

        value, gradient = mx.value_and_grad(loss)(mx.array(flat))
        return float(value), np.array(gradient)


class _Noisy:
    def __init__(self, matrix, noise: mx.array) -> None:
        self.matrix, self.noise = matrix, noise

    def rows(self, index: mx.array) -> mx.array:
        return self.matrix.rows(index) + self.noise


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def some_weights(n: int, seed: int = 3) -> np.ndarray:
    """Of both signs; every third row counts for nothing."""
    weights = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    weights[::3] = 0
    return weights


def gradient(program, rows, weights, parameters, noise=None) -> tuple[float, np.ndarray]:
    result = np.zeros_like(parameters)
    return program.gradients(rows, weights, parameters, result, noise), result


def check_same_bits(opened: Callable, rows: Rows, parameters: np.ndarray, noise: Noise) -> None:
    """However many threads, and whether values are kept or computed again."""
    weights, results = some_weights(len(rows.tokens)), []
    for threads, keep in [(1, 0), (2, 0), (5, 0), (1, 1 << 30), (3, 1 << 30)]:
        program = opened(threads=threads, keep_bytes=keep)
        loss, got = gradient(program, rows, weights, parameters, noise)
        results.append((loss, got.tobytes(), program.log_probs(rows, parameters).tobytes()))
        again = gradient(program, rows, weights, parameters, noise)
        assert (again[0], again[1].tobytes()) == results[-1][:2]
    assert len(set(results)) == 1


def check_micro_batches(program, spec: DecoderSpec, parameters: np.ndarray, noise: Noise) -> None:
    """Cutting a step changes the order of the sum alone."""
    rows, weights = random_rows(spec, (20, 9, 31)), some_weights(60)
    loss, whole = gradient(program, rows, weights, parameters, noise)
    summed, total = np.zeros_like(whole), 0.0
    for first, last in ((0, 20), (20, 60)):
        starts = rows.offsets[(rows.offsets >= first) & (rows.offsets <= last)]
        part = Rows(rows.tokens[first:last], rows.targets[first:last], starts - first, first)
        total += program.gradients(part, weights[first:last], parameters, summed, noise)
    assert abs(total - loss) < 1e-6 * np.abs(weights).sum() * 10
    assert relative(summed, whole) < 1e-6


def check_rows_without_weight(
    program, rows: Rows, changed: Rows, weights: np.ndarray, parameters: np.ndarray
) -> None:
    """They count for nothing: `changed` differs in such rows from `rows`."""
    loss, wanted = gradient(program, rows, weights, parameters)
    got_loss, got = gradient(program, changed, weights, parameters)
    assert loss == got_loss
    assert np.array_equal(wanted, got)
    loss, got = gradient(program, rows, np.zeros_like(weights), parameters)
    assert loss == 0
    assert not got.any()


def check_added(program, spec: DecoderSpec, parameters: np.ndarray, within: float) -> None:
    """Gradients are added to what is there."""
    rows, weights = random_rows(spec, (12,)), some_weights(12)
    _, once = gradient(program, rows, weights, parameters)
    filled = np.full_like(once, 8.0)
    program.gradients(rows, weights, parameters, filled)
    assert np.abs(filled - 8.0 - once).max() < within
