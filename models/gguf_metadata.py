"""A spec as GGUF metadata, for models from folders: the way back from `gguf_config.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from localllm.errors import UnsupportedModel
from localllm.models.gguf import names_of
from localllm.models.layout import Names, Part, Source
from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, MoESpec, RopeSpec
from localllm.spec.rope import frequencies

# What `DecoderSpec.architecture` is called in a file.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "granite": "granite",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
    "seed_oss": "seed_oss",
}
_PERIOD = {"gemma2": 2, "gemma3": 6}  # of the windows that llama.cpp assumes

# Where llama.cpp reads biases of q, k, v, of the output and of the feed-forward; of Qwen 2,
# OLMo 2 … it reads fewer, and does not load a file with more.
_BIASES = ("llama", "mistral", "mixtral", "granite", "starcoder2", "gpt2")
_QKV_BIASES = ("qwen2", "seed_oss")
_OWN_HEAD = ("olmo2",)  # where llama.cpp asks for a head of its own, even one that is a copy
_WINDOWED = ("gemma2", "gemma3")  # the others' windows are in the file, and llama.cpp ignores them

Metadata = dict[str, Any]


def gguf_architecture(spec: DecoderSpec) -> str:
    """Raises UnsupportedModel for one that is not written."""
    if spec.architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{spec.architecture} models cannot be written as GGUF yet",
            hint=f"these can: {', '.join(_ARCHITECTURES)}",
        )
    return _ARCHITECTURES[spec.architecture]


def gguf_names(spec: DecoderSpec) -> Names:
    """How its tensors are called there."""
    names = names_of(gguf_architecture(spec))
    if spec.architecture != "gpt2":
        return names
    parts: tuple[Part, ...] = ("q", "k", "v")
    return {**names, **{f"attn.{p}": Source("blk.{n}.attn_qkv", part=p) for p in parts}}


def needs_head(spec: DecoderSpec) -> bool:
    """Whether a file must hold the head though it is the embedding."""
    return spec.tied_head and spec.architecture in _OWN_HEAD


def gguf_notes(spec: DecoderSpec) -> tuple[str, ...]:
    """What a file holds and llama.cpp does not heed."""
    windows = {layer.attention.window for layer in spec.layers} - {None}
    if not windows or spec.architecture in _WINDOWED:
        return ()
    return (
        f"llama.cpp ignores the window of {max(w for w in windows if w)} positions that "
        f"{spec.architecture} models have here; longer texts come out differently there",
    )


def gguf_metadata(spec: DecoderSpec) -> tuple[Metadata, dict[str, np.ndarray]]:
    """What a file says of the model's shape, and the tensors of RoPE factors that go with it.

    int, float and bool stand for uint32, float32 and bool, lists for arrays. Raises
    UnsupportedModel for what the format has no place for.
    """
    name = gguf_architecture(spec)
    layers = spec.layers
    mixers = [layer.attention for layer in layers]
    first = mixers[0]
    _refuse_biases(spec)
    own: Metadata = {
        "block_count": len(layers),
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "attention.head_count": _same(spec, [mixer.heads for mixer in mixers], "heads"),
        "vocab_size": spec.vocab_size,
    }
    own |= _feed_forward(spec)
    norm = layers[0].norm
    own[f"attention.layer_norm_{'rms_' if norm.kind == 'rms' else ''}epsilon"] = norm.eps
    tensors: dict[str, np.ndarray] = {}
    if name != "gpt2":
        own["attention.head_count_kv"] = _same(spec, [m.kv_heads for m in mixers], "KV heads")
        own |= {"attention.key_length": first.head_dim, "attention.value_length": first.head_dim}
        rope, tensors = _ropes(spec)
        own |= rope
        own |= _windows(spec)
    own |= _scales(spec, first)
    return {"general.architecture": name, **{f"{name}.{k}": v for k, v in own.items()}}, tensors


def _refuse_biases(spec: DecoderSpec) -> None:
    if spec.architecture in _BIASES:
        return
    for layer in spec.layers:
        qkv = layer.attention.qkv_bias and spec.architecture not in _QKV_BIASES
        ffn = isinstance(layer.ffn, FeedForwardSpec) and layer.ffn.bias
        if qkv or layer.attention.out_bias or ffn:
            raise UnsupportedModel(
                f"{spec.architecture} models with biases there have no place in llama.cpp"
            )


def _same(spec: DecoderSpec, values: list[int], what: str) -> int:
    if len(set(values)) > 1:
        raise UnsupportedModel(f"{spec.architecture} layers with different numbers of {what}")
    return values[0]


def _feed_forward(spec: DecoderSpec) -> Metadata:
    dense = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, FeedForwardSpec)]
    mixed = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)]
    if not mixed:
        return {"feed_forward_length": _same(spec, [f.hidden for f in dense], "hidden units")}
    if dense:
        raise UnsupportedModel("mixtures with some dense layers cannot be written as GGUF")
    moe = mixed[0]
    found: Metadata = {
        "expert_count": moe.experts,
        "expert_used_count": moe.top_k,
        "feed_forward_length": moe.hidden,
    }
    if spec.architecture == "qwen3_moe":
        found |= {"expert_feed_forward_length": moe.hidden, "expert_weights_norm": moe.renormalize}
    return found


def _windows(spec: DecoderSpec) -> Metadata:
    windows = [layer.attention.window for layer in spec.layers]
    widths = {width for width in windows if width is not None}
    if not widths:
        return {}
    if len(widths) > 1:
        raise UnsupportedModel("windows of several widths have no place in GGUF")
    found: Metadata = {"attention.sliding_window": widths.pop()}
    slides = [width is not None for width in windows]
    if spec.architecture in _PERIOD:
        period = _PERIOD[spec.architecture]
        if slides != [n % period < period - 1 for n in range(len(slides))]:
            found["attention.sliding_window_pattern"] = slides
    return found


def _scales(spec: DecoderSpec, first: AttentionSpec) -> Metadata:
    found: Metadata = {}
    if first.softcap is not None:
        found["attn_logit_softcapping"] = first.softcap
    if spec.logit_softcap is not None:
        found["final_logit_softcapping"] = spec.logit_softcap
    if spec.architecture == "granite":
        found |= {
            "attention.scale": first.scale,
            "embedding_scale": spec.embed_scale,
            "residual_scale": spec.layers[0].residual_scale,
            "logit_scale": 1 / spec.logit_scale,
        }
    return found


def _ropes(spec: DecoderSpec) -> tuple[Metadata, dict[str, np.ndarray]]:
    ropes = [layer.attention.rope for layer in spec.layers]
    found: Metadata = {}
    if spec.architecture == "gemma3":
        local = {r for r, layer in zip(ropes, spec.layers, strict=True) if layer.attention.window}
        ropes = [
            r for r, layer in zip(ropes, spec.layers, strict=True) if not layer.attention.window
        ]
        for rope in local - {None}:
            assert rope is not None
            found["rope.freq_base_swa"] = rope.theta
        ropes = ropes or [*local]
    kinds = {rope for rope in ropes if rope is not None}
    if len(kinds) != 1 or (None in ropes and spec.architecture != "smollm3"):
        raise UnsupportedModel(f"{spec.architecture} layers with different RoPE")
    rope = kinds.pop()
    more, tensors = _scaling(rope)
    found |= {"rope.freq_base": rope.theta, "rope.dimension_count": rope.dim, **more}
    return found, tensors


def _scaling(rope: RopeSpec) -> tuple[Metadata, dict[str, np.ndarray]]:
    if rope.kind == "default":
        return {}, {}
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}, {}
    if rope.kind == "llama3":
        return {}, {"rope_freqs.weight": _llama3_factors(rope)}
    if rope.kind == "yarn" and rope.truncate:
        found: Metadata = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_context,
        }
        own = 0.1 * math.log(rope.factor) + 1  # which llama.cpp multiplies with
        strength = frequencies(rope, rope.original_context + 1)[1]
        if not math.isclose(strength, own):
            found["rope.scaling.attn_factor"] = strength / own
        if (rope.beta_fast, rope.beta_slow) != (32.0, 1.0):
            found["rope.scaling.yarn_beta_fast"] = rope.beta_fast
            found["rope.scaling.yarn_beta_slow"] = rope.beta_slow
        return found, {}
    if rope.kind == "longrope":
        strength = frequencies(rope, rope.original_context + 1)[1]
        return {
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.attn_factor": strength,
        }, {
            "rope_factors_long.weight": np.array(rope.long_factor, np.float32),
            "rope_factors_short.weight": np.array(rope.short_factor, np.float32),
        }
    raise UnsupportedModel(f"RoPE scaled as {rope.kind!r} has no place in GGUF")


def _llama3_factors(rope: RopeSpec) -> np.ndarray:
    """What frequencies are divided by: 1 where fast, `factor` where slow, between in between."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_context * rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)
    turns /= 2 * math.pi
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: np.ndarray = 1 / ((1 - smooth) / rope.factor + smooth)
    return factors.astype(np.float32)
