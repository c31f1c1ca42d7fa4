"""GPT-2: learned positions, LayerNorm, multi-head attention, matrices kept [in, out]."""

from __future__ import annotations

from dataclasses import replace

from localllm.models.config import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Config,
)
from localllm.models.layout import Names, Source
from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec

NAMES: Names = {
    "embed": "wte",
    "pos_embed": "wpe",
    "attn_norm": "h.{n}.ln_1",
    "attn.q": Source("h.{n}.attn.c_attn", part="q", conv1d=True),
    "attn.k": Source("h.{n}.attn.c_attn", part="k", conv1d=True),
    "attn.v": Source("h.{n}.attn.c_attn", part="v", conv1d=True),
    "attn.o": Source("h.{n}.attn.c_proj", conv1d=True),
    "ffn_norm": "h.{n}.ln_2",
    "ffn.up": Source("h.{n}.mlp.c_fc", conv1d=True),
    "ffn.down": Source("h.{n}.mlp.c_proj", conv1d=True),
    "final_norm": "ln_f",
    "head": "lm_head",
}
BUFFERS = ("*h.*.attn.bias", "*h.*.attn.masked_bias")  # causal masks, saved as buffers


def spec(config: Config) -> DecoderSpec:
    config.refuse("add_cross_attention")
    hidden = config.integer("n_embd", high=MAX_WIDTH)
    heads = config.integer("n_head", high=MAX_WIDTH)
    if hidden % heads:
        raise config.bad("n_head", f"is {heads}, which does not divide n_embd = {hidden}")
    head_dim = hidden // heads
    norm = NormSpec("layer", eps=config.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
    )
    ffn = FeedForwardSpec(
        hidden=config.integer("n_inner", 4 * hidden, high=4 * MAX_WIDTH),
        activation=config.activation("activation_function", "gelu_new"),
        gated=False,
        bias=True,
    )
    by_depth = config.flag("scale_attn_by_inverse_layer_idx", False)
    positions = config.integer("n_positions", high=MAX_CONTEXT)
    return DecoderSpec(
        architecture="gpt2",
        vocab_size=config.integer("vocab_size", high=MAX_VOCAB),
        hidden=hidden,
        layers=tuple(
            LayerSpec(
                mixer=replace(mixer, scale=mixer.scale / (n + 1)) if by_depth else mixer,
                ffn=ffn,
                norm=norm,
            )
            for n in range(config.integer("n_layer", high=MAX_LAYERS))
        ),
        final_norm=norm,
        context=positions,
        tied_head=config.flag("tie_word_embeddings", True),
        learned_positions=positions,
    )
