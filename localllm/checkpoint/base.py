"""What every checkpoint reader offers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from localllm.checkpoint.form import Form
from localllm.checkpoint.tensor import Tensor

Format = Literal["safetensors", "mlx", "gguf"]


class Checkpoint(Protocol):
    """A readable checkpoint. Tensors are read when asked for and not kept.

    `config`: for folders the parsed config.json; for GGUF the raw metadata (keys as in the
    file, arrays as lists). Names and shapes are the file's own, shapes in row-major order
    ([out, in], experts [E, out, in]) for every format.
    """

    path: Path
    format: Format
    config: Mapping[str, Any]

    def files(self) -> tuple[Path, ...]:
        """Every file whose content decides what the tensors are."""
        ...

    def names(self) -> Iterator[str]: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def kind(self, name: str) -> str:
        """How the tensor is stored, for people: "F16", "Q4_K", "affine 4-bit/64" …"""
        ...

    def nbytes(self, name: str) -> int: ...

    def form(self, name: str) -> Form:
        """How `tensor` will give it, told from headers alone; raises what `tensor` raises."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Raises `CheckpointError` naming file and tensor if missing, damaged or not finite."""
        ...

    def forget_vocabulary(self) -> None:
        """Drops what `config` holds for the tokenizer alone, once that is built."""
        ...

    def close(self) -> None: ...
