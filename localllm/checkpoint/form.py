"""How a tensor is stored, without its numbers: what sizes can be told from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from localllm.checkpoint.tensor import Affine, GroupValues, Tensor


@dataclass(frozen=True)
class GroupForm:
    """value_bytes: of one float. per: groups under one value. multiplier: a byte for each group."""

    value_bytes: int
    per: int = 1
    multiplier: bool = False

    def row_bytes(self, groups: int) -> int:
        """Bytes of the values of so many groups."""
        return groups // self.per * self.value_bytes + groups * self.multiplier

    def with_groups_moved(self) -> GroupForm:
        """As after `GroupValues.groups`."""
        return replace(self, per=1)


@dataclass(frozen=True)
class AffineForm:
    bits: int
    group: int
    scales: GroupForm
    biases: GroupForm | None = None

    def row_bytes(self, width: int) -> int:
        groups = width // self.group
        sides = (side.row_bytes(groups) for side in (self.scales, self.biases) if side is not None)
        return width * self.bits // 8 + sum(sides)

    def scaled(self) -> AffineForm:
        """As after `Affine.scaled`."""
        return replace(self, scales=GroupForm(4))

    def with_columns_moved(self) -> AffineForm:
        """As after `Affine.columns`."""
        biases = None if self.biases is None else self.biases.with_groups_moved()
        return replace(self, scales=self.scales.with_groups_moved(), biases=biases)


@dataclass(frozen=True)
class DenseForm:
    value_bytes: int

    def row_bytes(self, width: int) -> int:
        return width * self.value_bytes

    def with_columns_moved(self) -> DenseForm:
        return self


Form = DenseForm | AffineForm


def form_of(tensor: Tensor) -> Form:
    if not isinstance(tensor, Affine):
        return DenseForm(tensor.data.dtype.itemsize)
    biases = None if tensor.biases is None else _group_form(tensor.biases)
    return AffineForm(tensor.bits, tensor.group, _group_form(tensor.scales), biases)


def _group_form(groups: GroupValues) -> GroupForm:
    width = groups.values.dtype.itemsize
    if groups.multiplier is None:
        return GroupForm(width)
    return GroupForm(width, groups.multiplier.shape[-1] // groups.values.shape[-1], True)
