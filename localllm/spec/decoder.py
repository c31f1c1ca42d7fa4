"""The parts of a decoder-only transformer, as frozen data.

An architecture file (`models/llama.py` …) builds a `DecoderSpec` from a checkpoint's config;
backends build their programs from it. Nothing here knows a file format or an array library.

Weight names that go with a spec (all matrices are [out, in], as in a linear layer):

    embed.weight [V, D]            pos_embed.weight [P, D]
    layers.N.attn_norm.*           layers.N.attn_post_norm.*
    layers.N.attn.{q,k,v,o}.{weight,bias}
    layers.N.attn.gate.{weight,bias}, shaped like q
    layers.N.attn.{q_norm,k_norm}.weight
    layers.N.attn.sinks.weight [heads]
    layers.N.delta.qkv.weight [q, then k, then v of all heads, D]
    layers.N.delta.z.weight    layers.N.delta.{beta,decay}.weight [value_heads, D]
    layers.N.delta.o.weight    layers.N.delta.norm.weight [value_dim]
    layers.N.delta.conv.weight [channels * kernel], a channel's taps side by side, the oldest first
    layers.N.delta.{rate,step}.weight [value_heads]
    layers.N.conv.in.{weight,bias} [3 * D, D]: before, after, x    layers.N.conv.out.{weight,bias}
    layers.N.conv.taps.weight [D * kernel], as delta.conv    layers.N.conv.taps.bias [D]
    layers.N.ffn_norm.*            layers.N.ffn_post_norm.*
    layers.N.ffn.{gate,up,down}.{weight,bias}          (no `gate` when not gated)
    layers.N.moe.router.weight [E, D]
    layers.N.moe.{gate,up,down}.weight [E, out, in]
    layers.N.moe.router.bias [E]
    layers.N.moe.{gate,up,down}.bias [E * out], one expert's after another's
    layers.N.moe.selection_bias.weight [E]
    layers.N.moe.shared.{gate,up,down}.weight          layers.N.moe.shared_gate.weight [1, D]
    layers.N.moe.expert_scale.weight [E]
    layers.N.moe.{router,expert,expert_post,shared_post}_norm.*
    layers.N.per_layer.{gate [P, D], up [D, P]}.weight layers.N.per_layer_norm.*
    layers.N.scalar.weight [1]
    per_layer_inputs.embed.weight [V', layers * P]     per_layer_inputs.norm.*
    per_layer_inputs.up.weight [layers * P, D]
    final_norm.*                   head.{weight,bias}  (no `head` when tied)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# "clamped_swiglu" is gpt-oss's and takes the gate and up together:
#     g = min(gate, 7), u = clip(up, -7, 7): g * sigmoid(1.702 g) * (u + 1)
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm (`rms`) or LayerNorm (`layer`). The gain is `offset + weight` (Gemma: offset 1)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` entries of each head.

    `interleaved` pairs entries (0,1), (2,3) …; otherwise (0, dim/2), (1, dim/2+1) ….
    The scaling fields are those of the Hugging Face `rope_scaling` kinds of the same name.
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_context: int = 0  # positions the model was first trained for; 0 where unused
    attention_factor: float | None = None  # multiplies cos and sin; None: the kind's own rule
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole entries
    short_factor: tuple[float, ...] = ()  # longrope, one per frequency
    long_factor: tuple[float, ...] = ()
    rotated: int = 0  # proportional: so many entries turn, at the frequencies of all `dim`


@dataclass(frozen=True)
class AttentionSpec:
    """Causal self-attention. MHA when `kv_heads == heads`, MQA when 1, GQA between.

    A layer with `shared_kv` has no keys and values of its own: it attends to those of that earlier
    layer, whose heads and window are alike.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # multiplies q·k
    rope: RopeSpec | None = None  # None: no positions in this layer (NoPE, or learned ones)
    window: int | None = None  # a row at position p sees positions > p - window
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    qk_norm_over: Literal["head", "all"] = "head"  # "all": over the whole projection (OLMo 2)
    softcap: float | None = None  # scores -> softcap * tanh(scores / softcap)
    sinks: bool = False  # each head has one more logit, that only takes from the others' share
    gate: bool = False  # what a head gives is multiplied by sigmoid(gate(x)), entry by entry
    v_from_k: bool = False  # values are what k projects, before its norm and RoPE; no `v`
    v_norm: float | None = None  # eps of an RMSNorm without gain over each head of the values
    shared_kv: int | None = None
    # A query at position p is multiplied by 1 + query_growth * log(1 + floor(p / query_context)).
    query_growth: float = 0.0
    query_context: int = 1


@dataclass(frozen=True)
class GatedDeltaNetSpec:
    """Gated DeltaNet (arXiv:2412.06464), as Qwen3-Next and Qwen 3.5 have it.

    q, k and v pass a causal convolution over `kernel` tokens and SiLU; q and k are then scaled to
    length 1, q also by key_dim ** -0.5. Each value head has a state S [key_dim, value_dim], zeros
    at first, and shares q and k with value_heads / key_heads neighbours. Every token does

        S *= exp(-exp(rate) * softplus(decay(x) + step))
        S += outer(k, sigmoid(beta(x)) * (v - k S))
        y  = o(norm(q S) * silu(z(x)))

    with an RMSNorm over each head, of whose weight nothing is added to.
    """

    key_heads: int
    value_heads: int
    key_dim: int  # entries of a key head
    value_dim: int  # entries of a value head
    kernel: int
    eps: float = 1e-6  # of the norm

    @property
    def channels(self) -> int:
        """Of the convolution: q, k and v of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_values(self) -> int:
        """Numbers kept of a sequence: the convolution's last inputs and every head's S."""
        heads = self.value_heads * self.key_dim * self.value_dim
        return (self.kernel - 1) * self.channels + heads


@dataclass(frozen=True)
class ShortConvSpec:
    """LFM2's gated short convolution: out(after * conv(before * x)), with all three from `in`.

    The convolution is causal, over `kernel` tokens, each channel by itself.
    bias: of `in`, `out` and the convolution.
    """

    channels: int  # the model's hidden size
    kernel: int
    bias: bool = False

    @property
    def state_values(self) -> int:
        """Numbers kept of a sequence: the convolution's last inputs."""
        return (self.kernel - 1) * self.channels


@dataclass(frozen=True)
class FeedForwardSpec:
    """down(act(gate(x)) * up(x)) when gated (SwiGLU, GeGLU), else down(act(up(x)))."""

    hidden: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True)
class MoESpec:
    """Token-choice mixture of gated experts: of the scores of router logits, the best `top_k` win.

    A row's score for each expert is a softmax or a sigmoid of its logit. Chosen by score (with a
    `selection_bias`, by score + bias: that only chooses) and weighed by score. With `groups` the
    experts lie in so many runs of equal length, and only those of the `top_groups` runs are to be
    had whose two best are the most together. Of equals the lower index wins.
    The weights are scores, divided by their sum + `renormalize_eps` where they are renormalized,
    times `weight_scale`.
    A shared expert of `shared` hidden entries takes every row and is added with weight 1, or with
    that of sigmoid(shared_gate x).
    With `own_norms` (Gemma 4) each way has norms of its own, of the layer's kind: router, experts
    and shared expert normalize what they take in (`router_norm`, `expert_norm`, the layer's
    `ffn_norm`), and experts and shared expert what they give (`expert_post_norm`,
    `shared_post_norm`), before the two are added.
    """

    experts: int
    top_k: int
    hidden: int
    activation: Activation = "silu"
    renormalize: bool = True
    bias: bool = False  # of the router and of every expert's matrices
    scores: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    renormalize_eps: float = 0.0
    weight_scale: float = 1.0
    shared: int = 0  # 0: no shared expert
    shared_gate: bool = False
    own_norms: bool = False
    router_scale: float = 1.0  # multiplies router logits
    expert_scale: bool = False  # each expert's weight is multiplied by one number more


RecurrentSpec = GatedDeltaNetSpec | ShortConvSpec
Mixer = AttentionSpec | RecurrentSpec
FeedForward = FeedForwardSpec | MoESpec


@dataclass(frozen=True)
class LayerSpec:
    """x += residual_scale * post(mixer(pre(x))), then the same for the feed-forward.

    `pre_norm` normalizes a sublayer's input, `post_norm` its output before the residual is
    added; Llama has the first, OLMo 2 the second, Gemma both.
    """

    mixer: Mixer
    ffn: FeedForward
    norm: NormSpec
    pre_norm: bool = True
    post_norm: bool = False
    residual_scale: float = 1.0
    scalar: bool = False  # what leaves the layer is multiplied by a learned number

    @property
    def attention(self) -> AttentionSpec:
        """The mixer, where it is known to attend."""
        assert isinstance(self.mixer, AttentionSpec), f"a {type(self.mixer).__name__} layer"
        return self.mixer


@dataclass(frozen=True)
class PerLayerSpec:
    """Embeddings of `size` entries that each layer has of its own (Gemma 3n and 4).

    For x, what enters the first layer, layer n takes
        e = (norm(up x / sqrt(D)) + embed[token] * sqrt(size)) / sqrt(2), of which part n,
    and, after its feed-forward, does y += layer_norm(up_n (act(gate_n y) * e_n)).
    """

    size: int
    vocab_size: int
    activation: Activation = "gelu_tanh"


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder: embedding, layers, final norm, head."""

    architecture: str  # the model type, e.g. "llama"
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    context: int  # positions the checkpoint supports
    tied_head: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0  # multiplies token embeddings
    learned_positions: int | None = None  # rows of pos_embed (GPT-2)
    logit_scale: float = 1.0  # multiplies logits (Granite: 1 / logits_scaling)
    logit_softcap: float | None = None
    per_layer: PerLayerSpec | None = None  # its norms are of the kind of `final_norm`

    @property
    def attentions(self) -> Iterator[tuple[int, AttentionSpec]]:
        """The layers that attend, by their numbers."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer.mixer, AttentionSpec):
                yield index, layer.mixer

    @property
    def recurrences(self) -> Iterator[tuple[int, RecurrentSpec]]:
        """The layers that keep a state of fixed size instead of K and V, by their numbers."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer.mixer, AttentionSpec):
                yield index, layer.mixer
