"""Kernels written in a test instead of a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from localllm.kernels_metal.kernel import MetalKernel, SourceLine

USING = "using namespace metal;\n"


class InlineKernel(MetalKernel):
    """header and body are those of `mx.fast.metal_kernel`; in messages they are the files
    NAME.header and NAME.body."""

    def __init__(
        self,
        body: str,
        *,
        header: str = USING,
        name: str = "inline",
        inputs: Sequence[str] = ("a",),
        outputs: Sequence[str] = ("o",),
    ) -> None:
        super().__init__(name, inputs, outputs)
        self._texts = header, body

    @cached_property
    def lines(self) -> tuple[list[SourceLine], list[SourceLine]]:
        header, body = (
            [
                SourceLine(line + "\n", f"{self.name}.{part}", number)
                for number, line in enumerate(text.splitlines(), 1)
            ]
            for text, part in zip(self._texts, ("header", "body"), strict=True)
        )
        return header, body
