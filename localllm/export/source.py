"""What is exported: a model's checkpoint, with or without an adapter to be merged into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localllm import hub
from localllm.adapters import LoraAdapter, load_adapter, weights_in
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.models import load_spec, load_weights
from localllm.spec import DecoderSpec


@dataclass(frozen=True)
class Source:
    """path: of the model's files. adapter: to be merged, or None."""

    name: str
    path: Path
    checkpoint: Checkpoint
    spec: DecoderSpec
    adapter: LoraAdapter | None

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the weights that the adapter changes."""
        if self.adapter is None:
            return frozenset()
        return frozenset(f"{target}.weight" for target in self.adapter.targets)

    def weights(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """As `load_weights`; what the adapter changes comes merged, in float32."""
        targets = {} if self.adapter is None else self.adapter.targets
        for name, tensor in load_weights(self.checkpoint, self.spec, only=only):
            pair = targets.get(name.removesuffix(".weight"))
            if pair is None or not name.endswith(".weight"):
                yield name, tensor
            else:
                yield name, Dense(pair.merged(tensor.to_float32()), "float32")


@contextmanager
def open_source(
    model: str, adapter: str | Path | None = None, *, offline: bool | None = None
) -> Iterator[Source]:
    """model: by any name that it loads by. adapter: a PEFT or MLX-LM folder.

    Raises what resolving, opening and `load_adapter` raise.
    """
    path = hub.resolve(model, offline=offline).path
    checkpoint = open_checkpoint(path)
    try:
        spec = load_spec(checkpoint)
        loaded = None
        if adapter is not None:
            loaded = load_adapter(adapter, spec, base=weights_in(path, spec))
        yield Source(model, path, checkpoint, spec, loaded)
    finally:
        checkpoint.close()
