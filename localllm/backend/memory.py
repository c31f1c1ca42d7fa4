"""What each backend takes, before it takes it. Pure arithmetic, for the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from localllm.adapters.lora import LINEARS
from localllm.checkpoint.form import AffineForm, Form, GroupForm
from localllm.spec import DecoderSpec
from localllm.spec.memory import KvGroup, kv_group_block_bytes, step_bytes
from localllm.spec.weights import weight_shapes


@dataclass(frozen=True)
class StepSize:
    """The largest step. rows: computed together; logits: of them, those that yield logits.

    context: positions of the longest sequence. adapter_rank: of the widest adapter, 0 for none.
    """

    rows: int
    logits: int
    context: int
    threads: int = 1
    float_activations: bool = False
    adapter_rank: int = 0


@dataclass(frozen=True)
class ExpertSizes:
    """Of a model's mixtures. count: experts of all layers. slot: bytes that any of them fits into.

    total: bytes of all as packed. chosen: of those that one token goes through. least: how many it
    needs at once, in one layer.
    """

    count: int
    slot: int
    total: int
    chosen: int
    least: int


class BackendMemory(Protocol):
    """Bytes that a backend takes."""

    def experts(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> ExpertSizes | None:
        """Of experts that need not all be in memory; None where the backend needs all weights."""
        ...

    def weights(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> int:
        """Of all weights, as they stay in memory."""
        ...

    def kv_pool(
        self, spec: DecoderSpec, group: KvGroup, blocks: int, block_size: int, bits: int
    ) -> int:
        """Of a KV group's pool with every block filled."""
        ...

    def step(self, spec: DecoderSpec, forms: Mapping[str, Form], size: StepSize) -> int:
        """Of everything that a step needs beside weights and KV cache, its logits included."""
        ...

    def adapter(self, spec: DecoderSpec, rank: int) -> int:
        """Of an adapter in 16 bits on every linear that can have one."""
        ...


class ReferenceMemory:
    """Weights stay as they are in the file; everything else is float32."""

    def experts(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> ExpertSizes | None:
        return None

    def weights(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> int:
        total = 0
        for name, shape in weight_shapes(spec).items():
            width = 4 * shape[-1] if len(shape) == 1 else forms[name].row_bytes(shape[-1])
            total += prod(shape[:-1]) * width
        return total

    def kv_pool(
        self, spec: DecoderSpec, group: KvGroup, blocks: int, block_size: int, bits: int
    ) -> int:
        assert bits == 32
        return blocks * kv_group_block_bytes(spec, group, block_size)

    def step(self, spec: DecoderSpec, forms: Mapping[str, Form], size: StepSize) -> int:
        return step_bytes(spec, size.rows, size.logits)

    def adapter(self, spec: DecoderSpec, rank: int) -> int:
        return 4 * sum(rank * (out + inner) for out, inner in adapter_linears(spec))


def loading_bytes(spec: DecoderSpec, forms: Mapping[str, Form]) -> int:
    """What loading takes for a while beside the weights: the largest tensor as it is read, twice,
    since reordering its rows copies it. File pages are not counted: the system takes them back."""
    sizes = [
        prod(shape[:-1]) * forms[name].row_bytes(shape[-1])
        for name, shape in weight_shapes(spec).items()
    ]
    return 2 * max(sizes)


def adapter_linears(spec: DecoderSpec) -> list[tuple[int, int]]:
    """[out, in] of every linear that an adapter may touch."""
    return [
        (shape[0], shape[1])
        for name, shape in weight_shapes(spec).items()
        if len(shape) == 2 and name.endswith(tuple(f".{linear}.weight" for linear in LINEARS))
    ]


def quantized_to(bits: int, forms: Mapping[str, Form], spec: DecoderSpec) -> dict[str, Form]:
    """The forms of the same model with no matrix wider than so many bits, in groups of 32."""
    small = AffineForm(bits, 32, GroupForm(2))
    shapes = weight_shapes(spec)

    def narrowed(name: str, form: Form) -> Form:
        shape = shapes[name]
        if len(shape) == 1 or shape[-1] % 32 or form.row_bytes(256) <= small.row_bytes(256):
            return form
        return small

    return {name: narrowed(name, form) for name, form in forms.items()}
