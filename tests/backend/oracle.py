"""An independent decoder: numpy, float64, one sequence, everything recomputed, loops spelt out.

Written from the documentation of `DecoderSpec` alone; shares nothing with any backend but the
RoPE tables, which tests/spec holds to their own account.
"""

import math
from collections.abc import Sequence

import numpy as np

from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    GatedDeltaNetSpec,
    MoESpec,
    NormSpec,
    RecurrentSpec,
    RopeSpec,
)
from localllm.spec.rope import tables

Weights = dict[str, np.ndarray]


def rounding(spec: DecoderSpec, weights: Weights, tokens: np.ndarray) -> float:
    """How far logits move when each weight moves by half a unit in its last place in float32, in
    a random direction: the most of four draws, relative to the largest logit."""
    exact = logits(spec, weights, tokens, len(tokens))
    random = np.random.default_rng(0)
    moved = 0.0
    for _ in range(4):
        near = {
            name: value * (1 + 2.0**-24 * random.choice((-1, 1), value.shape))
            for name, value in weights.items()
        }
        moved = max(moved, np.abs(logits(spec, near, tokens, len(tokens)) - exact).max())
    return moved / np.abs(exact).max()


def logits(
    spec: DecoderSpec,
    weights: Weights,
    tokens: np.ndarray,
    prompt_length: int,
    margins: list[float] | None = None,
):
    """float64 [T, V] for a sequence whose first `prompt_length` tokens are its prompt.

    margins: takes by how much each choice among experts was won.
    """
    margins = [] if margins is None else margins
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    count = len(tokens)
    x = w["embed.weight"][tokens] * spec.embed_scale
    if spec.learned_positions is not None:
        x = x + w["pos_embed.weight"][:count]
    own = None if spec.per_layer is None else per_layer_inputs(spec, w, tokens, x)
    shared: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for index, layer in enumerate(spec.layers):
        at = f"layers.{index}."
        for part in ("attn", "ffn"):
            y = norm(layer.norm, w, f"{at}{part}_norm", x) if layer.pre_norm else x
            if part == "attn":
                if isinstance(layer.mixer, AttentionSpec):
                    source = layer.mixer.shared_kv
                    if source is None:
                        source = index
                        shared[index] = keys_values(layer.mixer, w, f"{at}attn.", y, prompt_length)
                    kv = shared[source]
                    y = attention(layer.mixer, w, f"{at}attn.", y, kv, prompt_length)
                else:
                    y = recurrent(layer.mixer, w, at, y)
            elif isinstance(layer.ffn, MoESpec):
                y = experts(layer.ffn, layer.norm, w, f"{at}moe.", x, y, margins)
            else:
                y = feed_forward(layer.ffn, w, f"{at}ffn.", y)
            if layer.post_norm:
                y = norm(layer.norm, w, f"{at}{part}_post_norm", y)
            x = x + layer.residual_scale * y
        if own is not None:
            gate = activate(spec.per_layer.activation, x @ w[f"{at}per_layer.gate.weight"].T)
            y = (gate * own[:, index]) @ w[f"{at}per_layer.up.weight"].T
            x = x + norm(layer.norm, w, f"{at}per_layer_norm", y)
        if layer.scalar:
            x = x * w[f"{at}scalar.weight"][0]
    x = norm(spec.final_norm, w, "final_norm", x)
    out = x @ w["embed.weight" if spec.tied_head else "head.weight"].T
    if spec.head_bias:
        out = out + w["head.bias"]
    out = out * spec.logit_scale
    if spec.logit_softcap is not None:
        out = spec.logit_softcap * np.tanh(out / spec.logit_softcap)
    return out


def per_layer_inputs(spec: DecoderSpec, w: Weights, tokens: np.ndarray, x: np.ndarray):
    """float64 [T, layers, size]."""
    shape, size = (len(tokens), len(spec.layers), spec.per_layer.size), spec.per_layer.size
    of_x = (x @ w["per_layer_inputs.up.weight"].T / math.sqrt(spec.hidden)).reshape(shape)
    of_token = w["per_layer_inputs.embed.weight"][tokens].reshape(shape) * math.sqrt(size)
    return (norm(spec.final_norm, w, "per_layer_inputs.norm", of_x) + of_token) / math.sqrt(2)


def recurrent(mixer: RecurrentSpec, w: Weights, at: str, x: np.ndarray) -> np.ndarray:
    if isinstance(mixer, GatedDeltaNetSpec):
        return delta_net(mixer, w, f"{at}delta.", x)
    before, after, inner = np.split(linear(w, f"{at}conv.in", x, mixer.bias), 3, axis=-1)
    y = after * convolved(w[f"{at}conv.taps.weight"], mixer.kernel, before * inner)
    if mixer.bias:
        y = y + after * w[f"{at}conv.taps.bias"]
    return linear(w, f"{at}conv.out", y, mixer.bias)


def convolved(taps: np.ndarray, kernel: int, x: np.ndarray) -> np.ndarray:
    taps = taps.reshape(-1, kernel)
    y = np.zeros_like(x)
    for row in range(len(x)):
        for back in range(min(kernel, row + 1)):
            y[row] += taps[:, kernel - 1 - back] * x[row - back]
    return y


def delta_net(spec: GatedDeltaNetSpec, w: Weights, at: str, x: np.ndarray) -> np.ndarray:
    qkv = activate(
        "silu", convolved(w[f"{at}conv.weight"], spec.kernel, x @ w[f"{at}qkv.weight"].T)
    )
    keys, out = spec.key_heads * spec.key_dim, []
    z, beta, decay = (x @ w[f"{at}{name}.weight"].T for name in ("z", "beta", "decay"))
    states = np.zeros((spec.value_heads, spec.key_dim, spec.value_dim))
    for row in range(len(x)):
        heads = []
        for head, s in enumerate(states):
            key = head // (spec.value_heads // spec.key_heads) * spec.key_dim
            q = qkv[row, key : key + spec.key_dim]
            k = qkv[row, keys + key : keys + key + spec.key_dim]
            v = qkv[row, 2 * keys + head * spec.value_dim :][: spec.value_dim]
            q, k = (part / np.sqrt((part**2).sum() + 1e-6) for part in (q, k))
            slowed = np.logaddexp(0, decay[row, head] + w[f"{at}step.weight"][head])
            s *= np.exp(-np.exp(w[f"{at}rate.weight"][head]) * slowed)
            s += np.outer(k, (v - k @ s) / (1 + np.exp(-beta[row, head])))
            y = q @ s * spec.key_dim**-0.5
            y = norm(NormSpec(eps=spec.eps), w, f"{at}norm", y)
            heads.append(y * activate("silu", z[row, head * spec.value_dim :][: spec.value_dim]))
        out.append(np.concatenate(heads))
    return np.array(out) @ w[f"{at}o.weight"].T


def norm(spec: NormSpec, w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    if spec.kind == "layer":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + spec.eps)
    else:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.eps)
    x = x * (spec.offset + w[f"{name}.weight"])
    return x + w[f"{name}.bias"] if spec.bias else x


def linear(w: Weights, name: str, x: np.ndarray, bias: bool) -> np.ndarray:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if bias else y


def projected(
    spec: AttentionSpec, w: Weights, name: str, x: np.ndarray, heads: int, prompt_length: int
) -> np.ndarray:
    """Queries or keys, [T, heads, head_dim], normalized and rotated."""
    y = linear(w, name, x, spec.qkv_bias)
    if spec.qk_norm is not None and spec.qk_norm_over == "all":
        y = norm(spec.qk_norm, w, f"{name}_norm", y)
    y = y.reshape(len(x), heads, spec.head_dim)
    if spec.qk_norm is not None and spec.qk_norm_over == "head":
        y = norm(spec.qk_norm, w, f"{name}_norm", y)
    return y if spec.rope is None else rotate(spec.rope, y, prompt_length)


def keys_values(spec: AttentionSpec, w: Weights, at: str, x: np.ndarray, prompt_length: int):
    v = linear(w, at + ("k" if spec.v_from_k else "v"), x, spec.qkv_bias)
    v = v.reshape(len(x), spec.kv_heads, spec.head_dim)
    if spec.v_norm is not None:
        v = v / np.sqrt((v**2).mean(-1, keepdims=True) + spec.v_norm)
    return projected(spec, w, f"{at}k", x, spec.kv_heads, prompt_length), v


def attention(
    spec: AttentionSpec,
    w: Weights,
    at: str,
    x: np.ndarray,
    kv: tuple[np.ndarray, np.ndarray],
    prompt_length: int,
):
    count, size = len(x), spec.head_dim
    q, (k, v) = projected(spec, w, f"{at}q", x, spec.heads, prompt_length), kv
    for p in range(count):
        q[p] = q[p] * (1 + spec.query_growth * math.log(1 + p // spec.query_context))
    out = np.zeros((count, spec.heads, size))
    for head in range(spec.heads):
        kv = head // (spec.heads // spec.kv_heads)
        for p in range(count):
            first = 0 if spec.window is None else max(0, p - spec.window + 1)
            scores = k[first : p + 1, kv] @ q[p, head] * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            if spec.sinks:
                scores = np.append(scores, w[f"{at}sinks.weight"][head])
                out[p, head] = softmax(scores)[:-1] @ v[first : p + 1, kv]
            else:
                out[p, head] = softmax(scores) @ v[first : p + 1, kv]
    mixed = out.reshape(count, -1)
    if spec.gate:
        mixed = mixed / (1 + np.exp(-linear(w, f"{at}gate", x, spec.qkv_bias)))
    return linear(w, f"{at}o", mixed, spec.out_bias)


def rotate(rope: RopeSpec, x: np.ndarray, prompt_length: int) -> np.ndarray:
    """x: [T, heads, head_dim]; pairs turned as complex numbers."""
    positions = np.arange(len(x))
    cos, sin = tables(rope, positions, np.maximum(positions + 1, prompt_length))
    turn = (cos.astype(np.float64) + 1j * sin)[:, None, :]
    half = rope.dim // 2
    a = np.arange(0, rope.dim, 2) if rope.interleaved else np.arange(half)
    b = a + 1 if rope.interleaved else a + half
    turned = (x[..., a] + 1j * x[..., b]) * turn
    y = x.copy()
    y[..., a], y[..., b] = turned.real, turned.imag
    return y


def feed_forward(spec: FeedForwardSpec, w: Weights, at: str, x: np.ndarray) -> np.ndarray:
    up = linear(w, f"{at}up", x, spec.bias)
    if spec.gated:
        inner = gated(spec.activation, linear(w, f"{at}gate", x, spec.bias), up)
    else:
        inner = activate(spec.activation, up)
    return linear(w, f"{at}down", inner, spec.bias)


def experts(
    spec: MoESpec,
    kind: NormSpec,
    w: Weights,
    at: str,
    x: np.ndarray,
    normed: np.ndarray,
    margins: list[float],
) -> np.ndarray:
    """x: before the layer's norm; normed: after."""

    def own(part: str, x: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        return norm(kind, w, f"{at}{part}_norm", x) if spec.own_norms else otherwise

    routed, x = own("router", x, normed), own("expert", x, normed)
    y = np.zeros_like(x)
    for row in range(len(x)):
        scores = linear(w, f"{at}router", routed[row], spec.bias) * spec.router_scale
        scores = softmax(scores) if spec.scores == "softmax" else sigmoid(scores)
        preference = scores.copy()
        if spec.selection_bias:
            preference += w[f"{at}selection_bias.weight"]
        each = spec.experts // spec.groups
        runs = [list(range(g * each, (g + 1) * each)) for g in range(spec.groups)]
        if spec.groups > 1:
            sums = [sum(sorted(preference[run])[-2:]) for run in runs]
            margins.append(margin(sums, spec.top_groups))
            runs.sort(key=lambda run: -sum(sorted(preference[run])[-2:]))
        allowed = sorted(e for run in runs[: spec.top_groups] for e in run)
        margins.append(margin(preference[allowed], spec.top_k))
        best = sorted(allowed, key=lambda e: -preference[e])[: spec.top_k]
        share = scores[best]
        if spec.renormalize:
            share = share / (share.sum() + spec.renormalize_eps)
        share = share * spec.weight_scale
        if spec.expert_scale:
            share = share * w[f"{at}expert_scale.weight"][best]
        for expert, weight in zip(best, share, strict=True):
            gate, up = (of_expert(spec, w, at + name, expert, x[row]) for name in ("gate", "up"))
            inner = gated(spec.activation, gate, up)
            y[row] += weight * of_expert(spec, w, f"{at}down", expert, inner)
    y = own("expert_post", y, y)
    if spec.shared:
        dense = FeedForwardSpec(spec.shared, spec.activation)
        shared = feed_forward(dense, w, f"{at}shared.", normed)
        if spec.shared_gate:
            shared = shared * sigmoid(normed @ w[f"{at}shared_gate.weight"].T)
        y = y + own("shared_post", shared, shared)
    return y


def margin(values: Sequence[float] | np.ndarray, count: int) -> float:
    """Between the least of the `count` largest and the next."""
    falling = sorted(values, reverse=True)
    return falling[count - 1] - falling[count] if count < len(falling) else np.inf


def of_expert(spec: MoESpec, w: Weights, name: str, expert: int, x: np.ndarray) -> np.ndarray:
    matrix = w[f"{name}.weight"][expert]
    y = matrix @ x
    return y + w[f"{name}.bias"][expert * len(y) : (expert + 1) * len(y)] if spec.bias else y


def gated(kind: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if kind == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return activate(kind, gate) * up


def activate(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "relu":
        return np.where(x > 0, x, 0)
    if kind == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    assert kind == "gelu_tanh"
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
