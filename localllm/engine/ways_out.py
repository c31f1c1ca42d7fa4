"""What to change when a plan does not fit: every way named here was planned again, and fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from localllm.backend.memory import quantized_to
from localllm.backend.select import BackendStatus
from localllm.engine.planner import BLOCK_SIZE, Machine, Model, Plan, Wish, largest, make_plan
from localllm.errors import OutOfMemoryPlan


@dataclass(frozen=True)
class WayOut:
    """change: what to ask for instead, as options of the command. plan: with it; it fits."""

    change: str
    plan: Plan


def ways_out(model: Model, wish: Wish, machine: Machine, backend: BackendStatus) -> list[WayOut]:
    """Each of the settings that, changed alone, makes a plan fit; if there is none, two together.

    None where no setting helps.
    """

    def planned(model: Model, wish: Wish) -> Plan:
        return make_plan(model, wish, machine, backend)

    ways: list[WayOut] = []

    def offer(change: str, model: Model, wish: Wish) -> bool:
        plan = planned(model, wish)
        if plan.fits:
            ways.append(WayOut(change, plan))
        return plan.fits

    for change, other in _positions(model, wish, planned):
        offer(change, model, other)
    fewer_bits = [bits for bits in backend.kv_bits if bits < backend.checked_kv_bits(wish.kv_bits)]
    for bits in fewer_bits:
        if offer(f"--kv-bits {bits}", model, replace(wish, kv_bits=bits)):
            break
    batch = wish.max_batch // 2
    while batch and not offer(f"--batch {batch}", model, replace(wish, max_batch=batch)):
        batch //= 2
    if wish.adapters:
        count = largest(
            0, wish.adapters - 1, lambda n: planned(model, replace(wish, adapters=n)).fits
        )
        offer(f"--adapters {count}", model, replace(wish, adapters=count))
    if wish.draft is not None:
        offer("no --draft-model", model, replace(wish, draft=None))
    for bits in (8, 4):
        smaller = Model(model.spec, quantized_to(bits, model.forms, model.spec))
        same = smaller.forms == dict(model.forms)
        if not same and offer(f"the model quantized to {bits} bits", smaller, wish):
            break
    if not ways:
        for bits in fewer_bits:
            fewer = replace(wish, kv_bits=bits, max_batch=1)
            for change, other in [("", fewer), *_positions(model, fewer, planned)]:
                if offer(f"--kv-bits {bits} --batch 1 {change}".strip(), model, other):
                    return ways
    return ways


def require_fit(plan: Plan, model: Model, machine: Machine, backend: BackendStatus) -> None:
    """Raises `OutOfMemoryPlan` with the ways out if the plan needs more than there is."""
    if plan.fits:
        return
    parts = ", ".join(f"{item.name} {_mib(item.nbytes)}" for item in plan.items)
    found = ways_out(model, plan.wish, machine, backend)
    if found:
        hint = "what fits instead: " + "; or ".join(way.change for way in found)
    else:
        hint = "no setting makes it fit: choose a smaller model or a smaller quantization"
    raise OutOfMemoryPlan(
        f"the model needs {_mib(plan.peak)} ({parts}) and {_mib(plan.available)} may be used",
        hint=hint,
    )


def _positions(
    model: Model, wish: Wish, planned: Callable[[Model, Wish], Plan]
) -> Iterator[tuple[str, Wish]]:
    """Fewer positions: the longest context that fits, or the largest KV cache, where one was
    asked for."""
    context = planned(model, wish).context
    if wish.kv_tokens is not None:
        tokens = _longest(
            context, wish.kv_tokens, lambda n: planned(model, replace(wish, kv_tokens=n)).fits
        )
        if tokens:
            yield f"--kv-tokens {shown(tokens)}", replace(wish, kv_tokens=tokens)
            return

    def shorter(n: int) -> Wish:
        tokens = None if wish.kv_tokens is None else n
        return replace(wish, context=n, kv_tokens=tokens)

    length = _longest(1, context, lambda n: planned(model, shorter(n)).fits)
    if length:
        also = "" if wish.kv_tokens is None else f" --kv-tokens {shown(length)}"
        yield f"--context {shown(length)}{also}", shorter(length)


def _longest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest round number that fits: whole thousands (1,024), or at least whole blocks."""
    for unit in (1024, BLOCK_SIZE):
        found = largest(-(-low // unit), high // unit, lambda n, unit=unit: fits(n * unit))  # type: ignore[misc]
        if found:
            return found * unit
    return 0


def shown(count: int) -> str:
    """As a size is given to the command: 12k for 12,288."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
