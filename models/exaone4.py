"""EXAONE 4: norms after the sublayers only; where some layers have a window, the others have no
positions."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import olmo2
from localllm.models.common import (
    attention,
    decoder,
    feed_forward,
    rms_norm,
    sizes,
    window,
    windows,
)
from localllm.models.config import MAX_LAYERS, Config
from localllm.models.layout import Names
from localllm.spec import DecoderSpec, LayerSpec

NAMES: Names = olmo2.NAMES


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config, default=1e-5)
    mixer = attention(config, size, qk_norm=norm, qkv_bias=False, out_bias=False)
    width, ffn = window(config, default=4096), feed_forward(config)
    layers = [
        LayerSpec(
            mixer=replace(
                mixer, window=own, rope=mixer.rope if own is not None or width is None else None
            ),
            ffn=ffn,
            norm=norm,
            pre_norm=False,
            post_norm=True,
        )
        for own in windows(config, size, _pattern(config, size.layers), width)
    ]
    return decoder("exaone4", config, size, layers, norm)


def _pattern(config: Config, count: int) -> list[bool]:
    """Which layers have a window: all but every n-th, or as "LLLG" says, over and over."""
    key = "sliding_window_pattern"
    if isinstance(config.values.get(key), str):
        letters = config.text(key)
        if not letters or set(letters) - {"L", "G"}:
            raise config.bad(key, f"is {letters!r}; it may hold L and G alone")
        return [letters[n % len(letters)] == "L" and n + 1 < count for n in range(count)]
    period = config.integer(key, 4, low=0, high=MAX_LAYERS)
    return [period > 0 and (n + 1) % period != 0 for n in range(count)]
