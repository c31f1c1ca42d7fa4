"""`DecoderSpec`: a decoder-only transformer as data."""

from localllm.spec.decoder import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    GatedDeltaNetSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    PerLayerSpec,
    RecurrentSpec,
    RopeSpec,
    ShortConvSpec,
)

__all__ = [
    "AttentionSpec",
    "DecoderSpec",
    "FeedForwardSpec",
    "GatedDeltaNetSpec",
    "LayerSpec",
    "MoESpec",
    "NormSpec",
    "PerLayerSpec",
    "RecurrentSpec",
    "RopeSpec",
    "ShortConvSpec",
]
