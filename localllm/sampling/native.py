"""The native module, where it was built; without it NumPy does everything, to the same result."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


@cache
def native_module() -> Any:
    """localllm.kernels_cpu._native, or None."""
    try:
        from localllm.kernels_cpu import _native
    except ImportError:
        return None
    return _native


@cache
def kernels() -> str:
    """The instruction set to use: what LOCALLLM_CPU names if it runs here, or the best."""
    usable: list[str] = native_module().usable_kernels()
    asked = os.environ.get("LOCALLLM_CPU", "")
    return asked if asked in usable else usable[-1]
