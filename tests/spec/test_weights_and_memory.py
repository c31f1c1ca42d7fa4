from dataclasses import replace

from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
)
from localllm.spec.memory import (
    active_parameters,
    kv_block_bytes,
    kv_bytes,
    kv_bytes_per_token,
    parameters,
)
from localllm.spec.weights import weight_shapes


def llama(**attention) -> DecoderSpec:
    """SmolLM2-135M."""
    attn = AttentionSpec(9, 3, 64, 0.125, RopeSpec(64, 1e5))
    layer = LayerSpec(replace(attn, **attention), FeedForwardSpec(1536), NormSpec())
    return DecoderSpec("llama", 49152, 576, (layer,) * 30, NormSpec(), 8192, tied_head=True)


def mixtral() -> DecoderSpec:
    """Mixtral 8x7B."""
    attn = AttentionSpec(32, 8, 128, 128**-0.5, RopeSpec(128, 1e6))
    layer = LayerSpec(attn, MoESpec(8, 2, 14336), NormSpec())
    return DecoderSpec("mixtral", 32000, 4096, (layer,) * 32, NormSpec(), 32768)


def gpt2() -> DecoderSpec:
    norm = NormSpec("layer", bias=True)
    attn = AttentionSpec(12, 12, 64, 0.125, qkv_bias=True, out_bias=True)
    layer = LayerSpec(attn, FeedForwardSpec(3072, "gelu_tanh", gated=False, bias=True), norm)
    return DecoderSpec(
        "gpt2", 50257, 768, (layer,) * 12, norm, 1024, tied_head=True, learned_positions=1024
    )


def test_parameters_are_those_the_models_are_known_to_have():
    assert parameters(llama()) == 134_515_008
    assert parameters(gpt2()) == 124_439_808
    assert parameters(mixtral()) == 46_702_792_704


def test_of_a_mixture_only_the_chosen_experts_are_active():
    assert active_parameters(mixtral()) == 12_879_925_248
    assert active_parameters(llama()) == parameters(llama())


def test_kv_bytes_count_keys_and_values_of_every_layer():
    assert kv_bytes_per_token(llama()) == 30 * 2 * 3 * 64 * 4
    assert kv_bytes_per_token(llama(), bytes_per_value=2) == 30 * 2 * 3 * 64 * 2
    assert kv_block_bytes(llama(), 32) == 32 * kv_bytes_per_token(llama())
    assert kv_bytes(llama(), 1000) == 1000 * kv_bytes_per_token(llama())


def test_a_sliding_window_bounds_what_a_layer_keeps():
    full, windowed = llama().layers[0], llama(window=100).layers[0]
    mixed = replace(llama(), layers=(full, windowed, windowed))
    per_layer = 2 * 3 * 64 * 4
    assert kv_bytes(mixed, 50) == 3 * 50 * per_layer
    assert kv_bytes(mixed, 1000) == (1000 + 2 * 100) * per_layer


def test_an_untied_head_and_its_bias_are_weights_of_their_own():
    tied, untied = weight_shapes(llama()), weight_shapes(replace(llama(), tied_head=False))
    assert "head.weight" not in tied
    assert untied["head.weight"] == (49152, 576)
    assert weight_shapes(replace(llama(), head_bias=True))["head.bias"] == (49152,)


def test_names_and_shapes_of_a_layer_with_everything():
    norm = NormSpec("layer", bias=True)
    attn = AttentionSpec(
        4, 2, 16, 0.25, qkv_bias=True, out_bias=True, qk_norm=NormSpec(), qk_norm_over="all"
    )
    layer = LayerSpec(attn, FeedForwardSpec(128, bias=True), norm, post_norm=True)
    shapes = weight_shapes(DecoderSpec("all", 100, 48, (layer,), NormSpec(), 64))
    assert list(shapes.items()) == [
        ("embed.weight", (100, 48)),
        *((f"layers.0.{norm}.{kind}", (48,)) for norm in ("attn_norm", "attn_post_norm",
          "ffn_norm", "ffn_post_norm") for kind in ("weight", "bias")),
        ("layers.0.attn.q.weight", (64, 48)),
        ("layers.0.attn.q.bias", (64,)),
        ("layers.0.attn.k.weight", (32, 48)),
        ("layers.0.attn.k.bias", (32,)),
        ("layers.0.attn.v.weight", (32, 48)),
        ("layers.0.attn.v.bias", (32,)),
        ("layers.0.attn.o.weight", (48, 64)),
        ("layers.0.attn.o.bias", (48,)),
        ("layers.0.attn.q_norm.weight", (64,)),
        ("layers.0.attn.k_norm.weight", (32,)),
        ("layers.0.ffn.gate.weight", (128, 48)),
        ("layers.0.ffn.gate.bias", (128,)),
        ("layers.0.ffn.up.weight", (128, 48)),
        ("layers.0.ffn.up.bias", (128,)),
        ("layers.0.ffn.down.weight", (48, 128)),
        ("layers.0.ffn.down.bias", (48,)),
        ("final_norm.weight", (48,)),
        ("head.weight", (100, 48)),
    ]  # fmt: skip


def test_qk_norms_over_heads_and_ungated_feed_forwards_and_mixtures_have_their_shapes():
    attn = AttentionSpec(4, 2, 16, 0.25, qk_norm=NormSpec())
    layers = (
        LayerSpec(attn, FeedForwardSpec(128, gated=False), NormSpec(), pre_norm=False),
        LayerSpec(attn, MoESpec(3, 2, 24), NormSpec()),
    )
    spec = DecoderSpec("some", 100, 48, layers, NormSpec(), 64, learned_positions=64)
    shapes = weight_shapes(spec)
    assert shapes["pos_embed.weight"] == (64, 48)
    assert shapes["layers.0.attn.k_norm.weight"] == (16,)
    assert not [name for name in shapes if name.startswith("layers.0.") and "ffn_norm" in name]
    assert "layers.0.ffn.gate.weight" not in shapes
    assert {name: s for name, s in shapes.items() if ".moe." in name} == {
        "layers.1.moe.router.weight": (3, 48),
        "layers.1.moe.gate.weight": (3, 24, 48),
        "layers.1.moe.up.weight": (3, 24, 48),
        "layers.1.moe.down.weight": (3, 48, 24),
    }
