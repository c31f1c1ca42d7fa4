"""The Apple GPU of this machine, as MLX knows it."""

from __future__ import annotations

import mlx.core as mx


def is_available() -> bool:
    return bool(mx.metal.is_available())


def info() -> dict[str, str | int]:
    """What MLX tells of the default device: name, architecture, sizes in bytes."""
    return dict(mx.device_info())
