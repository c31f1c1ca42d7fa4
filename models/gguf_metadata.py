"""A spec as GGUF metadata, for models from folders: the way back from `gguf_config.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from localllm.errors import UnsupportedModel
from localllm.models.gguf import names_of
from localllm.models.gguf_family_metadata import family_metadata
from localllm.models.layout import Names, Part, Source
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    MoESpec,
    RopeSpec,
    ShortConvSpec,
)
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
    "ministral3": "mistral3",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "olmo3": "olmo2",
    "exaone4": "exaone4",
    "gpt_oss": "gpt-oss",
    "gemma4": "gemma4",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
}
# Of the windows that llama.cpp assumes.
_PERIOD = {"gemma2": 2, "gemma3": 6, "gpt_oss": 2, "olmo3": 4, "exaone4": 4}

# Where llama.cpp reads biases of q, k, v, of the output and of the feed-forward; of Qwen 2,
# OLMo 2 … it reads fewer, and does not load a file with more.
_BIASES = ("llama", "mistral", "mixtral", "granite", "starcoder2", "gpt2", "gpt_oss")
_QKV_BIASES = ("qwen2", "seed_oss", "glm4", "glm4_moe")
# Where llama.cpp asks for a head of its own, even one that is a copy.
_OWN_HEAD = ("olmo2", "olmo3", "gpt_oss")
# The others' windows are in the file, and llama.cpp ignores them.
_WINDOWED = ("gemma2", "gemma3", "gemma4", "gpt_oss", "olmo3", "exaone4")
_TWO_ROPES = ("gemma3", "gemma4", "olmo3")  # one for windows, the other for what sees everything
_NO_ROPE = ("smollm3", "exaone4")  # in some layers
_DENSE_FIRST = ("glm4_moe", "lfm2_moe")  # dense layers may come before the mixtures
_EXAONE4_WINDOWED = 64  # layers of the one EXAONE 4 to whose windows llama.cpp holds

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
    windows = {attn.window for _, attn in spec.attentions} - {None}
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
    attns = [attn for _, attn in spec.attentions]
    _refuse_biases(spec)
    own: Metadata = {
        "block_count": len(layers),
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "attention.head_count": _same(spec, [attn.heads for attn in attns], "heads"),
        "vocab_size": spec.vocab_size,
    }
    own |= _feed_forward(spec)
    norm = layers[0].norm
    own[f"attention.layer_norm_{'rms_' if norm.kind == 'rms' else ''}epsilon"] = norm.eps
    tensors: dict[str, np.ndarray] = {}
    if name != "gpt2":
        own["attention.head_count_kv"] = _kv_heads(spec)
        head_dim = next((attn.head_dim for attn in attns if attn.window is None), attns[0].head_dim)
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        rope, tensors = _ropes(spec)
        own |= rope
        own |= _windows(spec)
    own |= _scales(spec, attns[0])
    own |= family_metadata(spec)
    return {"general.architecture": name, **{f"{name}.{k}": v for k, v in own.items()}}, tensors


def _refuse_biases(spec: DecoderSpec) -> None:
    if spec.architecture in _BIASES:
        return
    for layer in spec.layers:
        attn = layer.mixer if isinstance(layer.mixer, AttentionSpec) else None
        qkv = attn is not None and attn.qkv_bias and spec.architecture not in _QKV_BIASES
        out = attn is not None and attn.out_bias
        ffn = isinstance(layer.ffn, FeedForwardSpec) and layer.ffn.bias
        conv = isinstance(layer.mixer, ShortConvSpec) and layer.mixer.bias
        if qkv or out or ffn or conv:
            raise UnsupportedModel(
                f"{spec.architecture} models with biases there have no place in llama.cpp"
            )


def _same(spec: DecoderSpec, values: list[int], what: str) -> int:
    if len(set(values)) > 1:
        raise UnsupportedModel(f"{spec.architecture} layers with different numbers of {what}")
    return values[0]


def _kv_heads(spec: DecoderSpec) -> int | list[int]:
    """One number, or one for each layer where they differ; 0 where a convolution stands."""
    if any(isinstance(layer.mixer, ShortConvSpec) for layer in spec.layers):
        mixers = [layer.mixer for layer in spec.layers]
        return [mixer.kv_heads if isinstance(mixer, AttentionSpec) else 0 for mixer in mixers]
    heads = [attn.kv_heads for _, attn in spec.attentions]
    if spec.architecture == "gemma4" and len(set(heads)) > 1:
        return heads
    return _same(spec, heads, "KV heads")


def _feed_forward(spec: DecoderSpec) -> Metadata:
    dense = [layer.ffn.hidden for layer in spec.layers if isinstance(layer.ffn, FeedForwardSpec)]
    mixed = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)]
    if not mixed:
        if spec.architecture == "gemma4" and len(set(dense)) > 1:
            return {"feed_forward_length": dense}
        return {"feed_forward_length": _same(spec, dense, "hidden units")}
    moe = mixed[0]
    found: Metadata = {"expert_count": moe.experts, "expert_used_count": moe.top_k}
    if dense and spec.architecture not in _DENSE_FIRST:
        raise UnsupportedModel("mixtures with some dense layers cannot be written as GGUF")
    if dense:
        return {**found, "feed_forward_length": _same(spec, dense, "hidden units")}
    return {**found, "feed_forward_length": moe.shared if moe.own_norms else moe.hidden}


def _windows(spec: DecoderSpec) -> Metadata:
    windows = [attn.window for _, attn in spec.attentions]
    widths = {width for width in windows if width is not None}
    if not widths:
        return {}
    if len(widths) > 1:
        raise UnsupportedModel("windows of several widths have no place in GGUF")
    if spec.architecture == "exaone4" and len(windows) != _EXAONE4_WINDOWED:
        raise UnsupportedModel(
            f"llama.cpp runs EXAONE 4 without windows, save that of {_EXAONE4_WINDOWED} layers",
            hint="a safetensors folder has a place for them",
        )
    found: Metadata = {"attention.sliding_window": widths.pop()}
    slides = [width is not None for width in windows]
    if spec.architecture in _WINDOWED:
        period = _PERIOD.get(spec.architecture)
        if period is None or slides != [n % period < period - 1 for n in range(len(slides))]:
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
    attns = [attn for _, attn in spec.attentions]
    ropes = [attn.rope for attn in attns]
    found: Metadata = {}
    if spec.architecture in _TWO_ROPES:
        local = {attn.rope for attn in attns if attn.window} - {None}
        ropes = [attn.rope for attn in attns if not attn.window] or [*local]
        for rope in local:
            assert rope is not None
            found["rope.freq_base_swa"] = rope.theta
    kinds = {rope for rope in ropes if rope is not None}
    if len(kinds) != 1 or (None in ropes and spec.architecture not in _NO_ROPE):
        raise UnsupportedModel(f"{spec.architecture} layers with different RoPE")
    rope = kinds.pop()
    if spec.architecture == "olmo3" and found.get("rope.freq_base_swa", rope.theta) != rope.theta:
        raise UnsupportedModel(
            "llama.cpp turns OLMo 3's windows at the base of its other layers",
            hint="a safetensors folder has a place for both",
        )
    more, tensors = _scaling(rope, broken_borders=spec.architecture == "gpt_oss")
    found |= {"rope.freq_base": rope.theta, "rope.dimension_count": rope.dim, **more}
    return found, tensors


def _scaling(rope: RopeSpec, *, broken_borders: bool) -> tuple[Metadata, dict[str, np.ndarray]]:
    """broken_borders: what YaRN's correction range has in this architecture, by convention."""
    if rope.kind == "default":
        return {}, {}
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}, {}
    if rope.kind == "llama3":
        return {}, {"rope_freqs.weight": _llama3_factors(rope)}
    if rope.kind == "proportional" and rope.factor == 1.0:
        still = np.arange(rope.dim // 2) >= rope.rotated // 2
        return {}, {"rope_freqs.weight": np.where(still, 1e30, 1.0).astype(np.float32)}
    if rope.kind == "yarn" and rope.truncate is not broken_borders:
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
