"""`DecoderSpec`: a decoder-only transformer as data."""

from localllm.spec.decoder import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    PerLayerSpec,
    RopeSpec,
)

__all__ = [
    "AttentionSpec",
    "DecoderSpec",
    "FeedForwardSpec",
    "LayerSpec",
    "MoESpec",
    "NormSpec",
    "PerLayerSpec",
    "RopeSpec",
]
