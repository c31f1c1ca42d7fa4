"""RoPE settings of a Hugging Face config: `rope_scaling` and `rope_parameters` alike."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from localllm.errors import CheckpointError
from localllm.models.config import MAX_CONTEXT, Config
from localllm.spec import RopeSpec
from localllm.spec.decoder import RopeKind

_KINDS = get_args(RopeKind)
_PLAIN_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def rope(
    config: Config,
    head_dim: int,
    *,
    theta: float = 10000.0,
    aliases: dict[str, RopeKind] | None = None,
    share: float = 1.0,
) -> RopeSpec:
    """The one RoPE of a model.

    theta: the base where the config names none. aliases: other names of a kind. share: of each
    head that is rotated, where the config says nothing.
    Raises UnsupportedModel for an unknown kind, CheckpointError for values that make no sense.
    """
    parameters = parameters_of(config)
    for key, value in parameters.values.items():
        if isinstance(value, dict):  # one set per layer type
            raise parameters.unsupported(key, value)
    return rope_from(config, parameters, head_dim, theta, aliases, share)


def parameters_of(config: Config) -> Config:
    """`rope_scaling` (older) or `rope_parameters` (transformers 5), empty if neither is there."""
    for key in ("rope_scaling", "rope_parameters"):
        if config.has(key) and config.section(key).values:
            return config.section(key)
    return Config({}, config.source, at="rope_parameters.")


def rope_from(
    config: Config,
    parameters: Config,
    head_dim: int,
    theta: float,
    aliases: dict[str, RopeKind] | None = None,
    share: float = 1.0,
) -> RopeSpec:
    """A `RopeSpec` from a set of parameters; what they leave out stands in the config itself."""
    kind = _kind(parameters, aliases or {})
    dim = _rotated(config, parameters, head_dim, share)
    base = parameters.number("rope_theta", config.number("rope_theta", theta, above=1), above=1)
    if kind == "default":
        return RopeSpec(dim=dim, theta=base)

    if kind == "proportional":
        factor = parameters.number("factor", 1.0)
        return RopeSpec(dim=head_dim, theta=base, kind=kind, factor=factor, rotated=dim)

    if kind == "linear":
        return RopeSpec(dim=dim, theta=base, kind=kind, factor=parameters.number("factor"))

    context = original = config.integer("max_position_embeddings", high=MAX_CONTEXT)
    if kind != "dynamic":
        inner = parameters.integer("original_max_position_embeddings", context, high=MAX_CONTEXT)
        original = config.integer("original_max_position_embeddings", inner, high=MAX_CONTEXT)
    factor = _factor(parameters, kind, context / original)
    spec = RopeSpec(dim=dim, theta=base, kind=kind, factor=factor, original_context=original)
    return _with_kind_fields(spec, parameters)


def _with_kind_fields(spec: RopeSpec, parameters: Config) -> RopeSpec:
    given = parameters.number("attention_factor", 0.0, above=-1e-9)
    attention_factor = given if parameters.has("attention_factor") else None
    if spec.kind == "llama3":
        low = parameters.number("low_freq_factor")
        high = parameters.number("high_freq_factor")
        if high <= low:
            raise parameters.bad("high_freq_factor", f"is {high:g}, not above low_freq_factor")
        return replace(spec, low_freq_factor=low, high_freq_factor=high)
    if spec.kind == "yarn":
        return replace(
            spec,
            attention_factor=attention_factor,
            beta_fast=parameters.number("beta_fast", 32.0, above=-1e-9) or 32.0,
            beta_slow=parameters.number("beta_slow", 1.0, above=-1e-9) or 1.0,
            mscale=parameters.number("mscale", 0.0, above=-1e30),
            mscale_all_dim=parameters.number("mscale_all_dim", 0.0, above=-1e30),
            truncate=parameters.flag("truncate", True),
        )
    if spec.kind == "longrope":
        if spec.original_context < 2:
            raise parameters.bad("original_max_position_embeddings", "must be above 1")
        return replace(
            spec,
            attention_factor=attention_factor,
            short_factor=parameters.numbers("short_factor", spec.dim // 2),
            long_factor=parameters.numbers("long_factor", spec.dim // 2),
        )
    return spec


def _kind(parameters: Config, aliases: dict[str, RopeKind]) -> RopeKind:
    key = "rope_type" if parameters.has("rope_type") or not parameters.has("type") else "type"
    if not parameters.has(key) and not parameters.values.keys() <= _PLAIN_KEYS:
        raise CheckpointError(f"{parameters.source}: {parameters.name(key)} is missing")
    name = parameters.text(key, "default")
    name = aliases.get(name, name)
    for kind in _KINDS:
        if name == kind:
            return kind  # type: ignore[no-any-return]
    raise parameters.unsupported(key, name, known=_KINDS)


def _rotated(config: Config, parameters: Config, head_dim: int, default: float) -> int:
    """How many entries of each head are rotated."""
    key = "partial_rotary_factor"
    share = parameters.number(key, config.number(key, default, high=1.0), high=1.0)
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        where = f"{key} {share:g} of head_dim {head_dim}"
        raise CheckpointError(
            f"{config.source}: {where} rotates {dim} entries; RoPE needs a positive even number"
        )
    return dim


def _factor(parameters: Config, kind: RopeKind, stretch: float) -> float:
    """The scaling factor; yarn and longrope may leave it to the ratio of the two contexts."""
    if kind in ("yarn", "longrope"):
        return parameters.number("factor", stretch)
    return parameters.number("factor")
