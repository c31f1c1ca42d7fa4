"""A cheap check that weights hold neither NaN nor infinity: an exponent of all ones is either."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from localllm.checkpoint.tensor import Affine, Dense, DType, GroupValues, Tensor
from localllm.errors import CheckpointError

_EXPONENT = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_CHUNK = 1 << 18  # values looked at together, so that temporaries stay small


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raises `CheckpointError` naming the file and the tensor."""
    if isinstance(tensor, Dense):
        what, finite = "values", is_finite(tensor.data, tensor.dtype)
    else:
        what, finite = "scales", _is_finite_affine(tensor)
    if not finite:
        raise CheckpointError(
            f"{path}: tensor '{name}' has {what} that are NaN or infinite",
            hint="The file is damaged or the model was exported broken; download it again.",
        )


def is_finite(data: np.ndarray, dtype: DType) -> bool:
    mask = _EXPONENT[dtype]
    bits = data.reshape(-1).view(f"u{data.itemsize}")
    exponent = bits.dtype.type(mask)
    return not any(
        bool(((bits[at : at + _CHUNK] & exponent) == exponent).any())
        for at in range(0, bits.size, _CHUNK)
    )


def _is_finite_affine(tensor: Affine) -> bool:
    sides = [tensor.scales, *([] if tensor.biases is None else [tensor.biases])]
    if not all(_is_finite_groups(side) for side in sides):
        return False
    # float16 values cannot reach float32's end; float32 scales times a code can.
    largest = max((float(np.abs(side.values).max(initial=0.0)) for side in sides), default=0.0)
    return largest * (1 << tensor.bits) * 2 <= float(np.finfo(np.float32).max)


def _is_finite_groups(groups: GroupValues) -> bool:
    return is_finite(groups.values, "float16" if groups.values.dtype == np.float16 else "float32")
