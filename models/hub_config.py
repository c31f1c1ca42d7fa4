"""A config.json as transformers reads it, of a checkpoint of any format."""

from __future__ import annotations

from typing import Any

from localllm.checkpoint.base import Checkpoint
from localllm.errors import UnsupportedModel
from localllm.models.gguf_config import GGUFConfig
from localllm.spec import DecoderSpec, FeedForwardSpec

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "seed_oss": "SeedOssForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
}
# Of models whose vision part is left out.
_TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_PARTLY_ROTATED = ("glm4", "qwen3_5", "qwen3_next")  # where a config does not say
_NUM_EXPERTS = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "lfm2_moe")
_QUANTIZED = ("quantization", "quantization_config")
_DTYPES = ("dtype", "torch_dtype")


def hub_config(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, Any]:
    """Of a folder its own, without quantization; of a GGUF file what its metadata says.

    Raises UnsupportedModel for a GGUF architecture that has no such config.
    """
    if checkpoint.format == "gguf":
        found = _of_gguf(checkpoint, spec)
    else:
        found = dict(checkpoint.config)
        if isinstance(found.get("text_config"), dict):
            text, kind = found["text_config"], found["model_type"]
            found = {**text, "model_type": text.get("model_type", _TEXT_TYPES.get(kind, kind))}
            found["architectures"] = [_CLASSES[found["model_type"]]]
    for key in (*_QUANTIZED, *_DTYPES):
        found.pop(key, None)
    found["tie_word_embeddings"] = spec.tied_head
    return found


def _of_gguf(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, Any]:
    metadata = GGUFConfig(checkpoint)
    kind = _TEXT_TYPES.get(metadata.model_type, metadata.model_type)
    if kind not in _CLASSES:
        raise UnsupportedModel(f"{checkpoint.path}: {kind} models have no config.json to write yet")
    attns = [attn for _, attn in spec.attentions]
    sizes = {(attn.heads, attn.kv_heads) for attn in attns}
    sizes_ffn = {
        layer.ffn.hidden for layer in spec.layers if isinstance(layer.ffn, FeedForwardSpec)
    }
    if kind != "gemma4_text" and (len(sizes) > 1 or len(sizes_ffn) > 1):
        raise UnsupportedModel(
            f"{checkpoint.path}: layers of different sizes have no place in a config.json"
        )
    attn = attns[0]
    values = {k: v for k, v in metadata.config().values.items() if v is not None}
    if values.get("partial_rotary_factor") == 1.0 and not kind.startswith(_PARTLY_ROTATED):
        del values["partial_rotary_factor"]
    if kind != "gpt2" and not values.get("sliding_window"):
        values["sliding_window"] = None  # where one would be assumed
    ffn = spec.layers[0].ffn
    bias = isinstance(ffn, FeedForwardSpec) and ffn.bias
    if kind == "starcoder2":
        values["use_bias"] = bias
    elif kind in ("llama", "mistral", "olmo2", "granite", "qwen3", "qwen3_moe", "smollm3"):
        values |= {"attention_bias": attn.qkv_bias, "mlp_bias": bias}
    elif kind.startswith(("gemma", "olmo3", "glm4", "qwen3_5", "qwen3_next")):
        values["attention_bias"] = attn.qkv_bias
    elif kind == "seed_oss":
        values |= {
            "attention_bias": attn.qkv_bias,
            "attention_out_bias": attn.out_bias,
            "mlp_bias": bias,
        }
    if kind in _NUM_EXPERTS:
        values["num_experts"] = values["num_local_experts"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = checkpoint.config.get(f"tokenizer.ggml.{key}_token_id")
        there = isinstance(token, int) and 0 <= token < spec.vocab_size
        values[f"{name}_token_id"] = token if there else None  # else some would be assumed
    return {"model_type": kind, "architectures": [_CLASSES[kind]], **values}
