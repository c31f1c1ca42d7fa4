"""Tiny Metal kernels written inside a test."""

from __future__ import annotations

from localllm.kernels_metal.kernel import MetalKernel


def kernel_of(body: str, inputs: list[str], outputs: list[str], header: str = "") -> MetalKernel:
    """A kernel whose body is text, not a file of the package."""
    made = MetalKernel("small", inputs, outputs)
    made.__dict__["_parts"] = ("using namespace metal;\n" + header, body)
    return made
