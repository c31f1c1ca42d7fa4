"""GGUF metadata as a Hugging Face config.

What llama.cpp leaves out of a file (Gemma's window pattern, query scale and local RoPE base …)
follows its own defaults, in src/models/*.cpp and src/llama-model.cpp; `gguf_families.py` has those
of the mixed and hybrid ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from localllm.checkpoint.base import Checkpoint
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models.config import MAX_CONTEXT, MAX_LAYERS, MAX_WIDTH, Config
from localllm.models.gguf_families import FAMILIES, File
from localllm.models.gguf_rope import rope_scaling
from localllm.spec import AttentionSpec, FeedForwardSpec, LayerSpec

# general.architecture -> model type; Mistral comes as llama, Mixtral as llama with experts, OLMo 3
# as olmo2 with a window.
_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "granite": "granite",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
    "gpt-oss": "gpt_oss",
    "seed_oss": "seed_oss",
    "mistral3": "ministral3",
    "glm4": "glm4",
    "glm4moe": "glm4_moe",
    "exaone4": "exaone4",
    "gemma4": "gemma4",
    "lfm2": "lfm2",
    "lfm2moe": "lfm2_moe",
    "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5",
    "qwen35moe": "qwen3_5_moe",
}
_SLIDING = (
    "mistral", "mixtral", "ministral3", "gemma2", "gemma3", "gemma4", "phi3", "starcoder2",
    "gpt_oss", "olmo3", "exaone4",
)  # fmt: skip

# Hugging Face key -> GGUF key, without the architecture in front.
_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "norm_topk_prob": "expert_weights_norm",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GPT2_KEYS = {
    "n_layer": "block_count",
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")

# Options that change the result, save those that a model type is known to have.
_FOREIGN = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.shared_kv_layers",
    "attention.temperature_length",
    "attention.temperature_scale",
    "attention.key_length_mla",
    "expert_group_count",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "nextn_predict_layers",
    "rope.dimension_sections",
    "router_logit_softcapping",
    "use_parallel_residual",
)
_QWEN_NEXT = ("expert_shared_feed_forward_length",)
_QWEN35 = ("rope.dimension_sections", "nextn_predict_layers")
_KNOWN: Mapping[str, tuple[str, ...]] = {
    "ministral3": ("attention.temperature_scale",),
    "glm4_moe": ("expert_group_count", "expert_shared_count", "nextn_predict_layers"),
    "gemma4": ("attention.shared_kv_layers",),
    "qwen3_next": _QWEN_NEXT,
    "qwen3_5": _QWEN35,
    "qwen3_5_moe": (*_QWEN_NEXT, *_QWEN35),
}
_SIGMOID = ("glm4_moe", "lfm2_moe")


class GGUFConfig:
    """The metadata of one file.

    architecture: as `general.architecture` has it. guessing_layers: the numbers of those that guess
    several tokens at once. Raises UnsupportedModel for an architecture or option that we do not
    run.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        arch = Config(checkpoint.config, checkpoint.path).text("general.architecture")
        if arch not in _MODEL_TYPES:
            raise UnsupportedModel(
                f"{checkpoint.path}: the architecture {arch!r} is not supported",
                hint=f"Known in GGUF files: {', '.join(_MODEL_TYPES)}.",
            )
        self.architecture = arch
        own = {
            key.removeprefix(f"{arch}."): value
            for key, value in checkpoint.config.items()
            if key.startswith(f"{arch}.")
        }
        self._meta = Config(own, checkpoint.path, at=f"{arch}.")
        self.model_type = self._model_type(arch)
        blocks = self._meta.integer("block_count", high=MAX_LAYERS)
        guessing = 0
        if "nextn_predict_layers" in _KNOWN.get(self.model_type, ()):
            guessing = self._meta.integer("nextn_predict_layers", 0, low=0, high=blocks - 1)
        self._layers = blocks - guessing
        self.guessing_layers = range(self._layers, blocks)
        self._by_layer = {key: self._list(key) for key in _BY_LAYER if _is_list(own.get(key))}
        own |= {key: next(filter(None, sizes), 0) for key, sizes in self._by_layer.items()}
        self._refuse_foreign()

    def config(self) -> Config:
        """The metadata under the names that the architecture files ask for."""
        keys = _GPT2_KEYS if self.model_type == "gpt2" else _KEYS
        values = {ours: self._meta.values[key] for ours, key in keys.items() if key in self._meta}
        if "token_embd.weight" not in self._checkpoint:
            raise CheckpointError(f"{self._checkpoint.path}: token_embd.weight is missing")
        values["vocab_size"] = self._checkpoint.shape("token_embd.weight")[0]
        values[next(iter(keys))] = self._layers
        if self.model_type != "gpt2":
            values |= self._attention()
            values |= self._conventions(values)
        aliases = {ours: self._meta.name(key) for ours, key in keys.items()}
        return Config(values, self._checkpoint.path, aliases)

    def as_stored(self, index: int, layer: LayerSpec) -> LayerSpec:
        """The layer with biases where the file has them, and sizes listed layer by layer."""

        def has_bias(*names: str) -> bool:
            return any(f"blk.{index}.{name}.bias" in self._checkpoint for name in names)

        def size(key: str, default: int) -> int:
            return self._by_layer[key][index] if key in self._by_layer else default

        mixer = layer.mixer
        if isinstance(mixer, AttentionSpec):
            heads = size("attention.head_count", mixer.heads)
            kv_heads = size("attention.head_count_kv", mixer.kv_heads)
            if not kv_heads or heads % kv_heads:
                raise self._meta.bad("attention.head_count_kv", f"has {kv_heads} for {heads} heads")
            mixer = replace(
                mixer,
                heads=heads,
                kv_heads=kv_heads,
                qkv_bias=has_bias("attn_q", "attn_qkv"),
                out_bias=has_bias("attn_output"),
            )
        ffn = layer.ffn
        if isinstance(ffn, FeedForwardSpec):
            hidden = size("feed_forward_length", ffn.hidden)
            ffn = replace(ffn, hidden=hidden, bias=has_bias("ffn_down"))
        return replace(layer, mixer=mixer, ffn=ffn)

    def _list(self, key: str) -> list[int]:
        """A size of each layer; of keys 0 where a layer does not attend."""
        entries = self._meta.items(key, length=self.guessing_layers.stop)
        low = 0 if key == "attention.head_count_kv" else 1
        return [
            Config({key: entry}, self._meta.source, {key: self._meta.name(key)}).integer(
                key, low=low, high=MAX_WIDTH
            )
            for entry in entries[: self._layers]
        ]

    def _model_type(self, arch: str) -> str:
        if arch == "olmo2" and self._window():
            return "olmo3"
        if arch != "llama":
            return _MODEL_TYPES[arch]
        if self._meta.values.get("expert_count"):
            return "mixtral"
        return "mistral" if self._window() else "llama"

    def _window(self) -> int | None:
        """0 stands for none."""
        return self._meta.integer("attention.sliding_window", 0, low=0, high=MAX_CONTEXT) or None

    def _refuse_foreign(self) -> None:
        known = _KNOWN.get(self.model_type, ())
        self._meta.refuse(*(key for key in _FOREIGN if key not in known))
        if not self._meta.flag("attention.causal", True):
            raise self._meta.unsupported("attention.causal", False)
        if self._window() and self.model_type not in _SLIDING:
            raise self._meta.unsupported("attention.sliding_window", self._window())
        self._refuse_routing()
        if not self._meta.flag("rope.scaling.finetuned", True) and self.model_type == "granite":
            raise self._meta.unsupported("rope.scaling.finetuned", False)  # Granite without RoPE

    def _refuse_routing(self) -> None:
        scale = self._meta.values.get("expert_weights_scale", 0.0)
        if scale not in (0.0, 1.0) and self.model_type not in _SIGMOID:
            raise self._meta.unsupported("expert_weights_scale", scale)
        # 1: softmax; 2: sigmoid; 3: softmax over the chosen, which is gpt-oss's and renormalizing
        # gives too.
        gatings = {"gpt_oss": (0, 1, 3), "glm4_moe": (0, 2), "lfm2_moe": (2,)}
        gating = self._meta.values.get("expert_gating_func", 0)
        if gating not in gatings.get(self.model_type, (0, 1)):
            raise self._meta.unsupported("expert_gating_func", gating)

    def _attention(self) -> dict[str, Any]:
        """Head size, rotated share of it, RoPE and window."""
        hidden = self._meta.integer("embedding_length", high=MAX_WIDTH)
        heads = self._meta.integer("attention.head_count", high=MAX_WIDTH)
        default = max(hidden // heads, 1)
        head_dim = self._meta.integer("attention.key_length", default, high=MAX_WIDTH)
        value_dim = self._meta.integer("attention.value_length", default, high=MAX_WIDTH)
        if value_dim != head_dim:
            raise self._meta.unsupported("attention.value_length", value_dim)
        rotated = self._meta.integer("rope.dimension_count", head_dim, high=head_dim)
        scaling = rope_scaling(self._checkpoint, self._meta, rotated)
        return {
            "head_dim": head_dim,
            # Half an entry more, so that int(share * head_dim) is `rotated` whatever the rounding.
            "partial_rotary_factor": min(1.0, (rotated + 0.5) / head_dim),
            "rope_scaling": scaling,
            "sliding_window": self._window(),
        }

    def _conventions(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the architecture has by convention, not by metadata."""
        kind = self.model_type
        if kind in ("gemma2", "gemma3"):
            return self._gemma(values)
        if kind == "granite" and not values.get("attention_multiplier"):
            return {"attention_multiplier": values["head_dim"] ** -0.5}
        if kind == "gpt_oss":
            found: dict[str, Any] = {"layer_types": self._layer_types(2)}
            if values["rope_scaling"]:  # files do not say that its YaRN keeps broken borders
                found["rope_scaling"] = {**values["rope_scaling"], "truncate": False}
            if "moe_intermediate_size" in values:
                found["intermediate_size"] = values["moe_intermediate_size"]
            return found
        if kind == "qwen3_moe":
            return {"norm_topk_prob": values.get("norm_topk_prob", True)}
        if kind == "olmo3":
            return {"layer_types": self._layer_types(4), **self._two_ropes(values)}
        if kind == "exaone4":
            base = self._meta.values.get("rope.freq_base_swa")
            if base not in (None, self._meta.values.get("rope.freq_base")):
                raise self._meta.unsupported("rope.freq_base_swa", base)
            slides = values["sliding_window"] is not None
            kinds = self._layer_types(4) if slides else ["full_attention"] * self._layers
            return {"layer_types": kinds}
        if kind in FAMILIES:
            file = File(
                self._checkpoint, self._meta, self._layers, self._by_layer, self._layer_types
            )
            return FAMILIES[kind](file, values)
        return {}

    def _gemma(self, values: dict[str, Any]) -> dict[str, Any]:
        two = self.model_type == "gemma2"
        window = values["sliding_window"] or (4096 if two else None)
        kinds = self._layer_types(2 if two else 6) if window else ["full_attention"] * self._layers
        # The two 27B models scale queries by hidden / heads; files do not say so.
        heads = self._meta.integer("attention.head_count", high=MAX_WIDTH)
        is_27b = self._layers == (46 if two else 62)
        hidden = self._meta.integer("embedding_length", high=MAX_WIDTH)
        scalar = hidden // heads if is_27b else values["head_dim"]
        found = {"sliding_window": window, "layer_types": kinds, "query_pre_attn_scalar": scalar}
        if two:
            return found
        return {**found, **self._two_ropes(values, local=10000.0)}

    def _two_ropes(self, values: dict[str, Any], *, local: float | None = None) -> dict[str, Any]:
        """Scaled where a layer sees everything. local: the base of windows, where it is not that
        of the others and the file is silent."""
        base = self._meta.number("rope.freq_base", 10000.0)
        local = self._meta.number("rope.freq_base_swa", local or base)
        full = {**(values["rope_scaling"] or {"rope_type": "default"}), "rope_theta": base}
        ropes = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
        return {"rope_scaling": None, "rope_parameters": ropes}

    def _layer_types(self, period: int) -> list[str]:
        """The last layer of every `period` sees everything; a file may list the layers instead."""
        key = "attention.sliding_window_pattern"
        if _is_list(self._meta.values.get(key)):
            slides = [bool(entry) for entry in self._meta.items(key, length=self._layers)]
        else:
            period = self._meta.integer(key, period, high=MAX_LAYERS)
            slides = [n % period < period - 1 for n in range(self._layers)]
        return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
