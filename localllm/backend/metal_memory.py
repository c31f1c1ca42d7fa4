"""What the metal backend takes: matrices, the KV pool, a step. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from localllm.backend.memory import ExpertSizes, StepSize, adapter_linears
from localllm.checkpoint.form import AffineForm, Form
from localllm.spec import DecoderSpec
from localllm.spec.memory import KvGroup, step_bytes
from localllm.spec.weights import weight_shapes

_VALUE = 2  # bytes of float16 and bfloat16
_ON_ITS_WAY = 16  # arrays as large as a state that MLX's own ops hold for a few rows
_GROUPS, _BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)  # that stay quantized; groups of 16 do, too


class MetalMemory:
    """See `BackendMemory`."""

    def weights(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> int:
        return sum(
            4 * shape[0]
            if len(shape) == 1
            else prod(shape[:-1]) * _row_bytes(forms[name], shape[-1])
            for name, shape in weight_shapes(spec).items()
        )

    def experts(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> ExpertSizes | None:
        return None

    def kv_pool(
        self, spec: DecoderSpec, group: KvGroup, blocks: int, block_size: int, bits: int
    ) -> int:
        total = 0
        for index in group.layers:
            attn = spec.layers[index].attention
            entry = attn.head_dim * _VALUE
            if bits < 16:
                groups = attn.head_dim // (32 if attn.head_dim % 32 == 0 else 16)
                entry = attn.head_dim * bits // 8 + 2 * _VALUE * groups
            total += 2 * blocks * block_size * attn.kv_heads * entry
        return total

    def step(self, spec: DecoderSpec, forms: Mapping[str, Form], size: StepSize) -> int:
        """Activations; where no kernel serves, K and V of one layer gathered, and the state of one
        as it is on its way through rows; and the state that sequences begin with."""
        gathered = max(
            2 * _VALUE * attn.kv_heads * attn.head_dim * size.context for _, attn in spec.attentions
        )
        states = [4 * mixer.state_values for _, mixer in spec.recurrences]
        carried = _ON_ITS_WAY * max(states, default=0) + sum(states)
        return step_bytes(spec, size.rows, size.logits) + gathered + carried

    def adapter(self, spec: DecoderSpec, rank: int) -> int:
        return _VALUE * sum(rank * (out + inner) for out, inner in adapter_linears(spec))


def _row_bytes(form: Form, width: int) -> int:
    kept = (
        isinstance(form, AffineForm)
        and form.bits in _BITS
        and (form.group in _GROUPS or (form.group == 16 and width % 32 == 0))
        and width % form.group == 0
    )
    if not kept:
        return _VALUE * width
    assert isinstance(form, AffineForm)
    return width * form.bits // 8 + 2 * _VALUE * (width // form.group)
