"""One plan for memory: what a model, a context and a machine add up to, before anything loads."""

from __future__ import annotations

from dataclasses import dataclass

from localllm.errors import InvalidRequest, OutOfMemoryPlan
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_block_bytes, step_bytes

DEFAULT_CONTEXT = 8192
DEFAULT_KV_TOKENS = 16384
BLOCK_SIZE = 32
OVERHEAD = 256 << 20  # Python and its libraries


@dataclass(frozen=True)
class Plan:
    """Bytes and positions. `available` is what the machine could give when the plan was made."""

    context: int
    num_blocks: int
    block_size: int
    weight_bytes: int
    kv_bytes: int
    step_bytes: int  # activations and logits of the largest step
    available: int

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def total(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.step_bytes + OVERHEAD


def make_plan(
    spec: DecoderSpec,
    *,
    weight_bytes: int,
    kv_value_bytes: float,
    available: int,
    step_rows: int = 128,
    max_batch: int = 32,
    context: int | None = None,
    kv_tokens: int | None = None,
) -> Plan:
    """Fits weights, KV pool and the largest step into `available` bytes.

    context: None takes what the model supports, `DEFAULT_CONTEXT` at most. kv_tokens: None takes
    `DEFAULT_KV_TOKENS`, or as many as memory allows, but a full context at least.
    Raises `InvalidRequest` for a context the model does not have, `OutOfMemoryPlan` if it does
    not fit, naming what to lower.
    """
    if context is not None and not 0 < context <= spec.context:
        raise InvalidRequest(
            f"a context of {context} positions was asked for; this model supports 1 to "
            f"{spec.context}"
        )
    chosen = context or min(spec.context, DEFAULT_CONTEXT)
    if kv_tokens is not None and kv_tokens < chosen:
        raise InvalidRequest(
            f"a KV cache of {kv_tokens} positions is less than one context of {chosen}",
            hint="raise kv_tokens or lower the context",
        )
    block_bytes = kv_block_bytes(spec, BLOCK_SIZE, kv_value_bytes)
    rows = max(step_rows, max_batch)
    step = step_bytes(spec, rows, max_batch)
    for_kv = available - weight_bytes - step - OVERHEAD
    wanted = _blocks(kv_tokens or max(chosen, DEFAULT_KV_TOKENS))
    fitting = max(0, for_kv // block_bytes)
    num_blocks = wanted if kv_tokens is not None else max(_blocks(chosen), min(wanted, fitting))
    kv_bytes = num_blocks * block_bytes
    plan = Plan(chosen, num_blocks, BLOCK_SIZE, weight_bytes, kv_bytes, step, available)
    if plan.total > available:
        raise OutOfMemoryPlan(
            f"the model needs {_mib(plan.total)} (weights {_mib(weight_bytes)}, KV cache "
            f"{_mib(plan.kv_bytes)} for {plan.kv_tokens} positions) and {_mib(available)} are free",
            hint=_way_out(fitting * BLOCK_SIZE, kv_tokens is not None),
        )
    return plan


def _way_out(positions: int, asked: bool) -> str:
    if positions < BLOCK_SIZE:
        return "the weights alone do not fit: choose a smaller model or a smaller quantization"
    knob = "kv_tokens" if asked else "the context (--context)"
    return f"lower {knob} to {positions} positions or fewer"


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK_SIZE)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
