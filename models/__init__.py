"""One file per architecture, named by its model type, and `catalog.toml`.

`load_spec` turns a checkpoint's config into a `DecoderSpec`, `load_weights` its tensors into ours.
"""

from localllm.models.registry import (
    known_architectures,
    load_forms,
    load_kinds,
    load_mtp,
    load_spec,
    load_weights,
    spec_of_config,
)

__all__ = [
    "known_architectures",
    "load_forms",
    "load_kinds",
    "load_mtp",
    "load_spec",
    "load_weights",
    "spec_of_config",
]
