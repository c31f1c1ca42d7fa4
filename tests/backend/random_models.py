"""Random small decoders for property tests: every field of a spec is drawn."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from localllm.adapters import LoraAdapter, LowRank
from localllm.adapters.lora import EXPERTS, LINEARS, Gains, make_adapter
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    GatedDeltaNetSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    PerLayerSpec,
    RopeSpec,
    ShortConvSpec,
)
from localllm.spec.decoder import Mixer
from localllm.spec.weights import weight_shapes

CONTEXT = 64
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]
GATED_ACTIVATIONS = [*ACTIVATIONS, "clamped_swiglu"]
ROPE_KINDS = ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]

norms = st.builds(
    NormSpec,
    kind=st.sampled_from(["rms", "layer"]),
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
    offset=st.sampled_from([0.0, 1.0]),
    bias=st.booleans(),
)


@st.composite
def ropes(draw: st.DrawFn, head_dim: int) -> RopeSpec:
    """Contexts of a few tokens, so that short sequences already outgrow them."""
    dim = draw(st.integers(1, head_dim // 2)) * 2
    kind = draw(st.sampled_from(ROPE_KINDS))
    seed = draw(st.integers(0, 1000))
    factors = np.random.default_rng(seed).uniform(1, 4, (2, dim // 2)).tolist()
    return RopeSpec(
        dim=dim,
        theta=draw(st.sampled_from([100.0, 10000.0])),
        kind=kind,
        interleaved=draw(st.booleans()),
        factor=draw(st.sampled_from([2.0, 8.0])),
        original_context=draw(st.integers(3, 8)),
        attention_factor=draw(st.sampled_from([None, None, 0.8])),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        beta_fast=4.0,
        beta_slow=1.0,
        mscale=draw(st.sampled_from([0.0, 1.0])),
        mscale_all_dim=draw(st.sampled_from([0.0, 0.7])),
        truncate=draw(st.booleans()),
        short_factor=tuple(factors[0]),
        long_factor=tuple(factors[1]),
        rotated=draw(st.integers(1, dim // 2)) * 2,
    )


@st.composite
def attentions(draw: st.DrawFn) -> AttentionSpec:
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (3, 1), (1, 1)]))
    head_dim = draw(st.sampled_from([4, 6, 8, 16]))
    rope = draw(st.none() | ropes(head_dim))
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=draw(st.sampled_from([head_dim**-0.5, 0.5])),
        rope=rope,
        window=draw(st.none() | st.integers(1, 9)),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        qk_norm=draw(st.none() | norms),
        qk_norm_over=draw(st.sampled_from(["head", "all"])),
        softcap=draw(st.sampled_from([None, 2.0])),
        sinks=draw(st.booleans()),
        # No model rotates neighbouring entries of keys that are values too; cpu refuses it.
        v_from_k=not (rope and rope.interleaved) and draw(st.booleans()),
        v_norm=draw(st.sampled_from([None, None, 1e-2])),
        query_growth=draw(st.sampled_from([0.0, 0.0, 0.3])),
        query_context=draw(st.integers(1, 6)),
    )


@st.composite
def delta_nets(draw: st.DrawFn) -> GatedDeltaNetSpec:
    key_heads, value_heads = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (2, 4)]))
    return GatedDeltaNetSpec(
        key_heads,
        value_heads,
        key_dim=draw(st.sampled_from([4, 8, 17])),
        value_dim=draw(st.sampled_from([6, 16, 35])),
        kernel=draw(st.integers(2, 5)),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
    )


@st.composite
def hybrids(draw: st.DrawFn) -> DecoderSpec:
    """With one layer that attends and some that recur, in any order."""
    spec = draw(specs())
    convs = st.builds(
        ShortConvSpec, st.just(spec.hidden), kernel=st.integers(2, 5), bias=st.booleans()
    )
    mixers: list[Mixer] = draw(st.lists(delta_nets() | convs, min_size=1, max_size=3))
    attends = replace(draw(attentions()), gate=draw(st.booleans()))
    mixers.insert(draw(st.integers(0, len(mixers))), attends)
    mixed = tuple(replace(draw(layers()), mixer=m) for m in mixers)
    return replace(spec, layers=mixed, per_layer=None)


@st.composite
def mixtures(draw: st.DrawFn) -> MoESpec:
    groups, top_groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 2), (2, 2)]))
    each = draw(st.integers(1, 5) if groups == 1 else st.integers(2, 3))
    shared = draw(st.sampled_from([0, 0, 12, 40]))
    return MoESpec(
        experts=groups * each,
        top_k=draw(st.integers(1, min(5, each * top_groups))),
        hidden=draw(st.sampled_from([8, 20])),
        activation=draw(st.sampled_from(GATED_ACTIVATIONS)),
        renormalize=draw(st.booleans()),
        bias=draw(st.booleans()),
        scores=draw(st.sampled_from(["softmax", "sigmoid"])),
        selection_bias=draw(st.booleans()),
        groups=groups,
        top_groups=top_groups,
        renormalize_eps=draw(st.sampled_from([0.0, 1e-2])),
        weight_scale=draw(st.sampled_from([1.0, 2.5])),
        shared=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
        own_norms=draw(st.booleans()),
        router_scale=draw(st.sampled_from([1.0, 0.5])),
        expert_scale=draw(st.booleans()),
    )


feed_forwards = st.builds(
    FeedForwardSpec,
    hidden=st.sampled_from([8, 20, 33]),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.booleans(),
    bias=st.booleans(),
)


@st.composite
def layers(draw: st.DrawFn) -> LayerSpec:
    pre_norm, post_norm = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    ffn, norm = draw(feed_forwards | mixtures()), draw(norms)
    if isinstance(ffn, MoESpec) and ffn.own_norms:
        norm = damped(norm)
    return LayerSpec(
        mixer=draw(attentions()),
        ffn=ffn,
        norm=norm,
        pre_norm=pre_norm,
        post_norm=post_norm,
        residual_scale=draw(st.sampled_from([1.0, 0.3])),
        scalar=draw(st.booleans()),
    )


def damped(norm: NormSpec) -> NormSpec:
    """For what may come near 0, such as the output of few experts: else the norm magnifies
    rounding by up to 1 / sqrt(eps)."""
    return replace(norm, eps=1e-2)


per_layers = st.builds(
    PerLayerSpec,
    size=st.sampled_from([4, 10]),
    vocab_size=st.just(101),
    activation=st.sampled_from(ACTIVATIONS),
)


@st.composite
def sharing(draw: st.DrawFn) -> tuple[LayerSpec, ...]:
    """Layers of which later ones may attend to the keys of an earlier one."""
    found: list[LayerSpec] = draw(st.lists(layers(), min_size=1, max_size=3))
    for index in range(1, len(found)):
        owners = [n for n in range(index) if found[n].mixer.shared_kv is None]
        if draw(st.sampled_from([True, False, False])):
            owner = draw(st.sampled_from(owners))
            mixer = replace(found[owner].mixer, shared_kv=owner)
            found[index] = replace(found[index], mixer=mixer)
    return tuple(found)


@st.composite
def specs(draw: st.DrawFn) -> DecoderSpec:
    own, layers, final_norm = draw(st.none() | per_layers), draw(sharing()), draw(norms)
    if own is not None:
        layers = tuple(replace(layer, norm=damped(layer.norm)) for layer in layers)
        final_norm = damped(final_norm)
    return DecoderSpec(
        architecture="random",
        vocab_size=draw(st.sampled_from([7, 64, 101])),
        hidden=draw(st.sampled_from([8, 20, 32])),
        layers=layers,
        final_norm=final_norm,
        context=CONTEXT,
        tied_head=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        embed_scale=draw(st.sampled_from([1.0, 3.5])),
        learned_positions=draw(st.sampled_from([None, CONTEXT, 40])),
        logit_scale=draw(st.sampled_from([1.0, 0.125])),
        logit_softcap=draw(st.sampled_from([None, 1.5])),
        per_layer=own,
    )


def llama(hidden: int = 64, layers: int = 2, window: int | None = None) -> DecoderSpec:
    """A fixed small Llama, for tests about something else than the architecture."""
    attn = AttentionSpec(4, 2, hidden // 4, 0.25, RopeSpec(hidden // 4), window=window)
    layer = LayerSpec(attn, FeedForwardSpec(2 * hidden), NormSpec())
    return DecoderSpec("llama", 96, hidden, (layer,) * layers, NormSpec(), CONTEXT, True)


def hybrid(hidden: int = 64) -> DecoderSpec:
    """A fixed small model of every kind of mixer, for tests about something else."""
    attn = AttentionSpec(
        4, 2, hidden // 4, 0.25, RopeSpec(hidden // 8), qk_norm=NormSpec(), gate=True
    )
    delta = GatedDeltaNetSpec(key_heads=2, value_heads=4, key_dim=8, value_dim=12, kernel=4)
    conv = ShortConvSpec(channels=hidden, kernel=3)
    layers = tuple(
        LayerSpec(mixer, FeedForwardSpec(2 * hidden), NormSpec())
        for mixer in (delta, attn, conv, replace(attn, window=6, gate=False))
    )
    return DecoderSpec("hybrid", 96, hidden, layers, NormSpec(), CONTEXT, True)


def random_weights(spec: DecoderSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """float32; scaled so that activations stay around 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(spec).items():
        if name.endswith(("norm.weight", "scalar.weight", "scale.weight")):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1 or "embed." in name:
            value = rng.normal(size=shape) * 0.5
        else:
            value = rng.normal(size=shape) / np.sqrt(shape[-1])
        weights[name] = value.astype(np.float32)
    return weights


def dense(weights: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Dense(value, "float32") for name, value in weights.items()}


def linears_of(spec: DecoderSpec) -> list[str]:
    """Those that an adapter may touch: `layers.0.attn.q` …"""
    names = [name.removesuffix(".weight") for name in weight_shapes(spec) if ".weight" in name]
    return [name for name in names if name.split(".", 2)[-1] in LINEARS]


def experts_of(spec: DecoderSpec) -> list[str]:
    """The stacks of matrices that an adapter may touch: `layers.0.moe.gate` …"""
    names = [name.removesuffix(".weight") for name in weight_shapes(spec) if ".weight" in name]
    return [name for name in names if name.split(".", 2)[-1] in EXPERTS]


def random_adapter(
    spec: DecoderSpec,
    seed: int = 0,
    *,
    rank: int = 3,
    dtype: str = "float32",
    share: float = 1.0,
    dora: dict[str, np.ndarray] | None = None,
    experts: bool = False,
) -> LoraAdapter:
    """On so large a share of the linears, one at least; it changes them by half of their size.

    dora: the base's weights, to give every other linear the gains of DoRA. experts: on these, too.
    """
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(spec)
    linears = linears_of(spec) + (experts_of(spec) if experts else [])
    chosen = [name for name in linears if rng.random() < share] or linears[:1]
    targets = {}
    for name in chosen:
        *stacked, out, inner = shapes[f"{name}.weight"]
        targets[name] = LowRank(
            random_dense(rng, (*stacked, rank, inner), dtype),
            random_dense(rng, (*stacked, out, rank), dtype),
            0.5,
        )
        if dora is not None and len(targets) % 2 and not stacked:
            gain = rng.uniform(0.5, 1.5, out).astype(np.float32)
            bias = dora.get(f"{name}.bias")
            offset = None if bias is None else (bias * (1 - gain)).astype(np.float32)
            targets[name] = replace(targets[name], gains=Gains(gain, offset))
    return make_adapter(f"random {seed}", targets)


def merged(weights: dict[str, np.ndarray], adapter: LoraAdapter) -> dict[str, np.ndarray]:
    """gain * (W + scale * B A) in float64."""
    result = dict(weights)
    for target, pair in adapter.targets.items():
        product = unpacked(pair.b) @ unpacked(pair.a)
        whole = weights[f"{target}.weight"] + pair.scale * product
        if pair.gains is not None:
            whole = whole * pair.gains.values[:, None]
        result[f"{target}.weight"] = whole
    return result


def random_dense(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Dense:
    value = (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
    if dtype == "bfloat16":
        return Dense((value.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
    return Dense(value.astype(dtype), dtype)


@dataclass(frozen=True)
class Packing:
    """A kind of affine tensor; `of` names the file formats that look so."""

    of: str
    bits: int
    group: int
    zero_point: int = 0
    biases: bool = False
    per: int | None = None  # groups under one value, where there are two levels

    def random(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Affine:
        codes = rng.integers(0, 1 << self.bits, shape, dtype=np.uint8)
        size = 1 / np.sqrt(shape[-1]) / (1 << self.bits)
        centre = (1 << self.bits) / 2 if self.zero_point == 0 else 0
        groups = (*shape[:-1], shape[-1] // self.group)
        scales = self._values(rng, groups, size, signed=self.zero_point != 0)
        biases = self._values(rng, groups, -size * centre, False) if self.biases else None
        return Affine(
            pack(codes, self.bits), self.bits, self.group, scales, biases, self.zero_point
        )

    def _values(
        self, rng: np.random.Generator, groups: tuple[int, ...], size: float, signed: bool
    ) -> GroupValues:
        spread = rng.uniform(0.5, 2, groups) * size
        if self.per is None:
            return GroupValues(spread.astype(np.float16))
        values = (spread[..., :: self.per] / 8).astype(np.float16)
        low = -8 if signed else 1
        kind = np.int8 if signed else np.uint8
        return GroupValues(values, rng.integers(low, 8, groups).astype(kind))


PACKINGS = [
    Packing("GGUF Q4_0", 4, 32, zero_point=8),
    Packing("GGUF Q4_1", 4, 32, biases=True),
    Packing("GGUF Q5_0", 5, 32, zero_point=16),
    Packing("GGUF Q8_0", 8, 32, zero_point=128),
    Packing("GGUF Q2_K", 2, 16, biases=True, per=16),
    Packing("GGUF Q3_K", 3, 16, zero_point=4, per=16),
    Packing("GGUF Q4_K", 4, 32, biases=True, per=8),
    Packing("GGUF Q5_K", 5, 32, biases=True, per=8),
    Packing("GGUF Q6_K", 6, 16, zero_point=32, per=16),
    *(
        Packing(f"MLX {bits}-bit/{group}", bits, group, biases=True)
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    ),
]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n] -> uint32 [..., n * bits / 32], by writing the bits out one by one."""
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = stream.reshape(*codes.shape[:-1], -1)
    return np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)


def unpacked(tensor: Tensor) -> np.ndarray:
    """float64, bit by bit from the definition in `localllm.checkpoint.tensor`."""
    if isinstance(tensor, Dense):
        if tensor.dtype == "bfloat16":
            return (tensor.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return tensor.data.astype(np.float64)
    stream = np.unpackbits(tensor.codes.view(np.uint8), axis=-1, bitorder="little")
    stream = stream.reshape(*tensor.shape, tensor.bits)
    codes = (stream * (1 << np.arange(tensor.bits))).sum(-1).astype(np.float64)
    value = _spread(tensor.scales, tensor.shape) * (codes - tensor.zero_point)
    return value if tensor.biases is None else value + _spread(tensor.biases, tensor.shape)


def _spread(groups: GroupValues, shape: tuple[int, ...]) -> np.ndarray:
    """One value per weight."""
    values = groups.values.astype(np.float64)
    if groups.multiplier is not None:
        multiplier = groups.multiplier.astype(np.float64)
        values = np.repeat(values, multiplier.shape[-1] // values.shape[-1], axis=-1) * multiplier
    return np.repeat(values, shape[-1] // values.shape[-1], axis=-1)
