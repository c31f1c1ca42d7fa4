"""Adapters on their way into a backend, and the bounded row of slots they stand in."""

from __future__ import annotations

from typing import Generic, TypeVar

from localllm.adapters.lora import EXPERTS, LINEARS, LoraAdapter
from localllm.errors import CheckpointError, InvalidRequest, OutOfMemoryPlan, UnsupportedModel
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes

MAX_ADAPTERS = 16  # slots of a backend, unless told otherwise

T = TypeVar("T")


def check_adapter(spec: DecoderSpec, adapter: LoraAdapter) -> None:
    """CheckpointError, naming the linear, unless every pair fits one of the model."""
    shapes = weight_shapes(spec)
    for target, pair in adapter.targets.items():
        stem = target.split(".", 2)[-1]
        wanted = shapes.get(f"{target}.weight") if stem in (*LINEARS, *EXPERTS) else None
        if wanted is None:
            raise CheckpointError(
                f"adapter {adapter.name!r}: this {spec.architecture} model has no linear {target}"
            )
        rank = pair.rank
        if pair.a.shape != (*wanted[:-2], rank, wanted[-1]) or pair.b.shape != (*wanted[:-1], rank):
            raise CheckpointError(
                f"adapter {adapter.name!r}: {target} takes {list(pair.b.shape)} x "
                f"{list(pair.a.shape)} where {list(wanted)} is needed"
            )


def require_no_experts(backend: str, adapter: LoraAdapter) -> None:
    """UnsupportedModel for an adapter that changes experts, on a backend that cannot."""
    for target in adapter.targets:
        if target.split(".", 2)[-1] in EXPERTS:
            raise UnsupportedModel(
                f"adapter {adapter.name!r} changes experts ({target}), which the {backend} backend "
                "cannot do beside the base model",
                hint="give --backend cpu, or merge it into the model with `localllm fuse`",
            )


class AdapterTable(Generic[T]):
    """The loaded adapters of one backend by index, each in the backend's own form."""

    def __init__(self, backend: str, slots: int) -> None:
        if slots < 0:
            raise InvalidRequest(f"max_adapters must be at least 0, not {slots}")
        self._backend = backend
        self._slots: list[T | None] = [None] * slots

    def require_room(self) -> None:
        """Raises OutOfMemoryPlan when every slot is taken."""
        if None not in self._slots:
            raise OutOfMemoryPlan(
                f"all {len(self._slots)} adapter slots of the {self._backend} backend are taken",
                hint="remove an adapter, or open the backend with a larger `max_adapters`",
            )

    def put(self, adapter: T) -> int:
        """The first free index, from now on this adapter's."""
        self.require_room()
        index = self._slots.index(None)
        self._slots[index] = adapter
        return index

    def remove(self, index: int) -> None:
        self[index]
        self._slots[index] = None

    def clear(self) -> None:
        self._slots = [None] * len(self._slots)

    def __getitem__(self, index: int) -> T:
        """Raises InvalidRequest for an index where none is loaded."""
        found = self._slots[index] if 0 <= index < len(self._slots) else None
        if found is None:
            raise InvalidRequest(f"adapter {index} is not loaded in the {self._backend} backend")
        return found
