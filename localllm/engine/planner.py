"""One plan for memory: what a model, a context and a machine add up to, before anything loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from localllm.backend.memory import StepSize, loading_bytes
from localllm.backend.select import BackendStatus
from localllm.checkpoint.form import Form
from localllm.errors import InvalidRequest
from localllm.spec import DecoderSpec, MoESpec
from localllm.spec.memory import KvGroup, kv_groups, state_bytes

DEFAULT_CONTEXT = 8192
DEFAULT_KV_TOKENS = 16384
DEFAULT_BATCH = 32
BLOCK_SIZE = 32
DRAFT_ROWS = 64  # rows of guesses in a step at most
# Logits a step yields at most where every row of a prompt wants them: 32 MiB.
STEP_LOGITS = 1 << 23
# What a process grows by when it works: threads, buffers of the allocator, late imports.
WORKING = 6 << 20
LEAST_STATES = 4  # one sequence reads one and writes one, and its beginnings are found again
_KEPT_STATES = 64  # more than sequences need, kept for those to come
_STATE_SHARE = 8  # one in so many bytes of memory is for states
_FOR_READING = 16  # a part of memory that stays free where experts are read through file pages
_BLOCK_NOTES = 400  # bytes in which the engine keeps account of a KV block


@dataclass(frozen=True)
class Model:
    """forms: how every weight of `weight_shapes(spec)` is stored."""

    spec: DecoderSpec
    forms: Mapping[str, Form]

    @property
    def has_experts(self) -> bool:
        return any(isinstance(layer.ffn, MoESpec) for layer in self.spec.layers)


@dataclass(frozen=True)
class Wish:
    """What is asked for; None leaves it to the plan.

    kv_tokens: positions of all sequences together that the KV cache holds. adapters: how many
    there may be, of what rank. draft: a model that guesses for this one. expert_bytes: memory for a
    mixture's experts, the others being read from disk as they are chosen; None: for all of them if
    that fits, else as much as fits.
    """

    context: int | None = None
    kv_tokens: int | None = None
    max_batch: int = DEFAULT_BATCH
    kv_bits: int | None = None
    threads: int = 1
    float_activations: bool = False
    adapters: int = 0
    adapter_rank: int = 16
    draft: Model | None = None
    expert_bytes: int | None = None


@dataclass(frozen=True)
class Machine:
    """Bytes. available: that this process may use, `resident` of it already in use."""

    available: int
    resident: int


@dataclass(frozen=True)
class Item:
    """A part of the plan: its name, its bytes, and what they are for."""

    name: str
    nbytes: int
    detail: str = ""


@dataclass(frozen=True)
class Plan:
    """group_blocks: KV blocks of each of `kv_groups(spec)`. state_slots: states of recurrent
    layers, all sequences' together; 0 where there are none. items: everything that takes memory.

    loading: bytes that are needed beside the weights while these are read, and then given back.
    """

    wish: Wish
    context: int
    kv_tokens: int
    kv_bits: int
    block_size: int
    group_blocks: tuple[int, ...]
    state_slots: int
    items: tuple[Item, ...]
    loading: int
    available: int
    resident: int  # what the process held when the plan was made

    @property
    def total(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def peak(self) -> int:
        """The most that is needed at any time, loading included."""
        return max(self.total, self.bytes_of("weights", "Python") + self.loading)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    def bytes_of(self, *names: str) -> int:
        return sum(item.nbytes for item in self.items if item.name in names)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_of("weights")

    @property
    def kv_bytes(self) -> int:
        return self.bytes_of(*(item.name for item in self.items if item.name.startswith("KV")))

    @property
    def step_bytes(self) -> int:
        return self.bytes_of("step")


def make_plan(model: Model, wish: Wish, machine: Machine, backend: BackendStatus) -> Plan:
    """The plan for a wish. It may need more than there is: see `Plan.fits`.

    context: None takes what the model supports, `DEFAULT_CONTEXT` at most. kv_tokens: None takes
    `DEFAULT_KV_TOKENS`, or as many as memory allows, but a full context at least.
    Experts are left on disk where they would not fit beside the rest.
    Raises `InvalidRequest` for a context that the model does not have, or bits the backend lacks.
    """
    whole = _make(model, wish, machine, backend)
    sizes = backend.memory.experts(model.spec, model.forms)
    if whole.fits or sizes is None or wish.expert_bytes is not None:
        return whole

    def with_experts(count: int) -> Plan:
        return _make(model, replace(wish, expert_bytes=count * sizes.slot), machine, backend)

    def roomy(plan: Plan) -> bool:
        return plan.peak + plan.available // _FOR_READING <= plan.available

    count = largest(sizes.least, sizes.count - 1, lambda n: roomy(with_experts(n)))
    return with_experts(count) if count else whole


def _make(model: Model, wish: Wish, machine: Machine, backend: BackendStatus) -> Plan:
    spec = model.spec
    _check(spec, wish)
    kv_bits = backend.checked_kv_bits(wish.kv_bits)
    context = wish.context or min(spec.context, DEFAULT_CONTEXT)
    if wish.kv_tokens is not None and wish.kv_tokens < context:
        raise InvalidRequest(
            f"a KV cache of {wish.kv_tokens} positions is less than one context of {context}",
            hint="raise kv_tokens or lower the context",
        )
    base = _base_items(model, wish, backend, context)
    python = Item("Python", machine.resident + WORKING, "the process itself, imports, tokenizer")

    def plan(blocks: int, slots: int) -> Plan:
        """With so many blocks for layers that see everything, and so many states."""
        group_blocks = pool_blocks(spec, blocks, wish.max_batch, backend.step_rows)
        items = [
            *base,
            *_kv_items("KV cache", spec, group_blocks, kv_bits, backend),
            *_state_items(spec, slots),
            *_draft_items(wish, blocks, kv_bits, backend, context),
            replace(python, nbytes=python.nbytes + _BLOCK_NOTES * sum(group_blocks)),
        ]
        return Plan(
            wish,
            context,
            blocks * BLOCK_SIZE,
            kv_bits,
            BLOCK_SIZE,
            group_blocks,
            slots,
            tuple(items),
            loading_bytes(spec, model.forms),
            machine.available,
            machine.resident,
        )

    least = _blocks(wish.kv_tokens or context)
    most = _blocks(wish.kv_tokens or max(context, DEFAULT_KV_TOKENS))
    few, many = _state_slots(spec, wish.max_batch, machine)
    # Where even the least does not fit, the plan says so.
    slots = max(few, largest(few, many, lambda slots: plan(least, slots).fits))
    return plan(max(least, largest(least, most, lambda blocks: plan(blocks, slots).fits)), slots)


def pool_blocks(spec: DecoderSpec, blocks: int, max_batch: int, step_rows: int) -> tuple[int, ...]:
    """KV blocks of each group, when layers that see everything have so many.

    A layer with a window keeps, of each sequence, the window and the rows of a step, a block for
    what these begin or end within, one to copy when sequences part, and one to spare for each.
    """
    rows = max(step_rows, max_batch)

    def of(group: KvGroup) -> int:
        if group.window is None:
            return blocks
        return min(blocks, max_batch * (_blocks(group.window + rows + BLOCK_SIZE) + 2))

    return tuple(map(of, kv_groups(spec)))


def logit_rows(spec: DecoderSpec, max_batch: int) -> int:
    """Rows of logits that are in memory at once: a step's, and of each sequence one more."""
    return max(STEP_LOGITS // spec.vocab_size, max_batch + DRAFT_ROWS) + max_batch


def largest(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The largest number from low to high that is good, where all below a good one are; else 0."""
    if low > high or not good(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def _check(spec: DecoderSpec, wish: Wish) -> None:
    if wish.context is not None and not 0 < wish.context <= spec.context:
        raise InvalidRequest(
            f"a context of {wish.context} positions was asked for; this model supports 1 to "
            f"{spec.context}"
        )
    if wish.max_batch < 1:
        raise InvalidRequest(f"max_batch must be at least 1, not {wish.max_batch}")


def _base_items(model: Model, wish: Wish, backend: BackendStatus, context: int) -> list[Item]:
    spec, memory = model.spec, backend.memory
    size = _step_size(spec, wish, backend, context)
    items = [
        *_weight_items(model, wish, backend),
        Item(
            "step",
            memory.step(spec, model.forms, size),
            f"{size.rows} rows at once, {size.logits} of logits",
        ),
    ]
    if wish.adapters:
        nbytes = wish.adapters * memory.adapter(spec, wish.adapter_rank)
        detail = f"{wish.adapters} of rank {wish.adapter_rank}, on every linear"
        items.append(Item("adapters", nbytes, detail))
    return items


def _weight_items(model: Model, wish: Wish, backend: BackendStatus) -> list[Item]:
    nbytes = backend.memory.weights(model.spec, model.forms)
    whole = Item("weights", nbytes, f"as {backend.name} keeps them")
    if wish.expert_bytes is None:
        return [whole]
    sizes = backend.memory.experts(model.spec, model.forms)
    if sizes is None:
        what = f"the {backend.name} backend" if model.has_experts else "a model without experts"
        raise InvalidRequest(
            f"{what} keeps all weights in memory", hint="leave the memory for experts out"
        )
    slots = min(sizes.count, wish.expert_bytes // sizes.slot)
    if slots < sizes.least:
        raise InvalidRequest(
            f"{wish.expert_bytes >> 20} MiB hold {slots} experts, and one token needs "
            f"{sizes.least} at once",
            hint=f"give at least {-(-sizes.least * sizes.slot >> 20)} MiB",
        )
    return [
        replace(whole, nbytes=nbytes - sizes.total),
        Item("experts", slots * sizes.slot, f"{slots:,} of {sizes.count:,}, the others on disk"),
    ]


def _step_size(spec: DecoderSpec, wish: Wish, backend: BackendStatus, context: int) -> StepSize:
    return StepSize(
        rows=max(backend.step_rows, wish.max_batch),
        logits=logit_rows(spec, wish.max_batch),
        context=context,
        threads=wish.threads,
        float_activations=wish.float_activations,
        adapter_rank=wish.adapter_rank if wish.adapters else 0,
    )


def _kv_items(
    name: str, spec: DecoderSpec, group_blocks: tuple[int, ...], bits: int, backend: BackendStatus
) -> list[Item]:
    items = []
    groups = kv_groups(spec)
    for group, blocks in zip(groups, group_blocks, strict=True):
        nbytes = backend.memory.kv_pool(spec, group, blocks, BLOCK_SIZE, bits)
        layers = "" if len(groups) == 1 else f" in {len(group.layers)} layers"
        sees = "" if group.window is None else f" that see {group.window}"
        detail = f"{blocks * BLOCK_SIZE:,} positions of {bits} bits{layers}{sees}"
        items.append(Item(name, nbytes, detail))
    return items


def _state_slots(spec: DecoderSpec, max_batch: int, machine: Machine) -> tuple[int, int]:
    """The fewest states of recurrent layers that will do, and the most that are of use."""
    if not state_bytes(spec):
        return 0, 0
    share = machine.available // _STATE_SHARE // state_bytes(spec)
    return LEAST_STATES, max(LEAST_STATES, min(2 * max_batch + _KEPT_STATES, share))


def _state_items(spec: DecoderSpec, slots: int) -> list[Item]:
    if not slots:
        return []
    layers = len(list(spec.recurrences))
    detail = f"{slots} in {layers} layers: two for each running sequence, the others kept"
    return [Item("recurrent states", slots * state_bytes(spec), detail)]


def _draft_items(
    wish: Wish, blocks: int, bits: int, backend: BackendStatus, context: int
) -> list[Item]:
    """The draft model's weights, its own KV cache of as many positions, and its step."""
    if wish.draft is None:
        return []
    spec, forms = wish.draft.spec, wish.draft.forms
    alone = replace(wish, adapters=0)
    size = _step_size(spec, alone, backend, min(context, spec.context))
    pools = pool_blocks(spec, blocks, wish.max_batch, backend.step_rows)
    return [
        Item("draft model", backend.memory.weights(spec, forms), "its weights"),
        *_kv_items("KV cache of the draft", spec, pools, bits, backend),
        Item("step of the draft", backend.memory.step(spec, forms, size)),
    ]


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK_SIZE)
