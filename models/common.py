"""What the architecture files share: sizes, the usual attention and feed-forward, windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localllm.models.config import MAX_CONTEXT, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Config
from localllm.models.rope import rope
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
)

# Options of other architectures that change what a model computes.
_FOREIGN = (
    "attention_chunk_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "clip_qkv",
    "qk_layernorm",
    "use_qk_norm",
    "alibi",
    "parallel_residual",
    "use_parallel_residual",
    "kv_lora_rank",
    "q_lora_rank",
    "n_shared_experts",
    "shared_expert_intermediate_size",
    "add_cross_attention",
    "use_bidirectional_attention",
    "sinks",
)


@dataclass(frozen=True)
class Sizes:
    """The numbers every config has."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int


def sizes(config: Config, *, handled: Sequence[str] = (), **defaults: int) -> Sizes:
    """Reads and checks them; also refuses foreign options, save those the caller handles.

    defaults: by key, where an architecture's configs may leave the key out.
    """
    config.refuse(*(key for key in _FOREIGN if key not in handled))

    def size(key: str, high: int, *default: int) -> int:
        return config.integer(
            key, *(default or ([defaults[key]] if key in defaults else [])), high=high
        )

    hidden = size("hidden_size", MAX_WIDTH)
    heads = size("num_attention_heads", MAX_WIDTH)
    kv_heads = size("num_key_value_heads", MAX_WIDTH, defaults.get("num_key_value_heads", heads))
    if heads % kv_heads:
        raise config.bad(
            "num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} heads"
        )
    if not config.has("head_dim") and "head_dim" not in defaults and hidden % heads:
        raise config.bad("num_attention_heads", f"is {heads}, which does not divide {hidden}")
    return Sizes(
        vocab=size("vocab_size", MAX_VOCAB),
        hidden=hidden,
        layers=size("num_hidden_layers", MAX_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", MAX_WIDTH, defaults.get("head_dim", max(hidden // heads, 1))),
        context=size("max_position_embeddings", MAX_CONTEXT),
    )


def attention(config: Config, size: Sizes, **changes: Any) -> AttentionSpec:
    """Llama's attention; `changes` replace fields. `attention_bias` covers all four matrices."""
    bias = config.flag("attention_bias", False)
    fields: dict[str, Any] = {
        "heads": size.heads,
        "kv_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "scale": size.head_dim**-0.5,
        "qkv_bias": bias,
        "out_bias": bias,
        **changes,
    }
    if "rope" not in fields:
        fields["rope"] = rope(config, size.head_dim)
    return AttentionSpec(**fields)


def feed_forward(config: Config, *, bias: bool = False) -> FeedForwardSpec:
    """A gated feed-forward (SwiGLU unless `hidden_act` says otherwise)."""
    return FeedForwardSpec(
        hidden=config.integer("intermediate_size", high=MAX_WIDTH),
        activation=config.activation("hidden_act", "silu"),
        bias=bias,
    )


def experts(config: Config, *, hidden_key: str, renormalize: bool) -> MoESpec:
    """A mixture of gated experts; their number goes by two names."""
    count_key = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    count = config.integer(count_key, high=MAX_WIDTH)
    return MoESpec(
        experts=count,
        top_k=config.integer("num_experts_per_tok", high=count),
        hidden=config.integer(hidden_key, high=MAX_WIDTH),
        activation=config.activation("hidden_act", "silu"),
        renormalize=renormalize,
    )


def rms_norm(config: Config, *, default: float = 1e-6, offset: float = 0.0) -> NormSpec:
    return NormSpec(kind="rms", eps=config.number("rms_norm_eps", default, high=1.0), offset=offset)


def decoder(
    name: str,
    config: Config,
    size: Sizes,
    layers: Sequence[LayerSpec],
    norm: NormSpec,
    *,
    tied: bool = False,
    **changes: Any,
) -> DecoderSpec:
    """tied: the architecture's default for `tie_word_embeddings`."""
    return DecoderSpec(
        architecture=name,
        vocab_size=size.vocab,
        hidden=size.hidden,
        layers=tuple(layers),
        final_norm=norm,
        context=_context(size, layers),
        tied_head=config.flag("tie_word_embeddings", tied),
        **changes,
    )


def _context(size: Sizes, layers: Sequence[LayerSpec]) -> int:
    """Dynamic RoPE alone takes `max_position_embeddings` for the length before scaling."""
    mixers = [layer.mixer for layer in layers]
    ropes = [m.rope for m in mixers if isinstance(m, AttentionSpec) and m.rope is not None]
    stretch = max((rope.factor for rope in ropes if rope.kind == "dynamic"), default=1.0)
    return max(size.context, int(size.context * min(stretch, MAX_CONTEXT)))


def window(config: Config, *, default: int | None = None) -> int | None:
    """`sliding_window`: null means none, a missing key the architecture's default."""
    if "sliding_window" not in config:
        return default
    if not config.has("sliding_window"):
        return None
    return config.integer("sliding_window", high=MAX_CONTEXT)


def windows(
    config: Config, size: Sizes, sliding: Sequence[bool], width: int | None
) -> list[int | None]:
    """Each layer's window: as `layer_types` say, or else as the architecture's pattern does."""
    if config.has("layer_types"):
        kinds = config.items("layer_types", length=size.layers)
        known = ("full_attention", "sliding_attention")
        for kind in kinds:
            if kind not in known:
                raise config.unsupported("layer_types", kind, known=known)
        sliding = [kind == "sliding_attention" for kind in kinds]
    return [width if slides else None for slides in sliding]


def upper_windows(config: Config, size: Sizes) -> list[int | None]:
    """Qwen's: layers from `max_window_layers` on have a window, if it is used at all."""
    width = window(config, default=4096) if config.flag("use_sliding_window", False) else None
    first = config.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
    return windows(config, size, [n >= first for n in range(size.layers)], width)
