"""What the native engine takes: its layouts (kernels_cpu/core: pack, kv, decoder), as arithmetic.

Tests hold every function equal to what the engine says, or to what a process is seen to take.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from localllm.backend.memory import ExpertSizes, StepSize, adapter_linears
from localllm.checkpoint.form import AffineForm, DenseForm, Form, GroupForm
from localllm.spec import AttentionSpec, DecoderSpec, GatedDeltaNetSpec, MoESpec
from localllm.spec.memory import KvGroup
from localllm.spec.weights import weight_shapes

_PAGE, _HUGE_PAGE = 4096, 2 << 20
_LANES, _GROUP, _STEP = 16, 32, 32
_PART, _TILE_QUERIES = 512, 16
_TILE_SCRATCH = 32 << 10
_GUESSES = 64  # of guesses in a step, at most
_FIRST_POSITIONS = 1024  # of a RoPE table, which then doubles


class CpuMemory:
    """See `BackendMemory`."""

    def weights(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> int:
        return sum(packed_bytes(shape, forms[n]) for n, shape in weight_shapes(spec).items())

    def experts(self, spec: DecoderSpec, forms: Mapping[str, Form]) -> ExpertSizes | None:
        shapes = weight_shapes(spec)
        count = slot = total = chosen = least = 0
        for index, layer in enumerate(spec.layers):
            if not isinstance(layer.ffn, MoESpec):
                continue
            names = [f"layers.{index}.moe.{part}.weight" for part in ("gate", "up", "down")]
            one = sum(packed_bytes(shapes[name][1:], forms[name]) for name in names)
            count += layer.ffn.experts
            slot = max(slot, one)
            total += one * layer.ffn.experts
            chosen += one * layer.ffn.top_k
            least = max(least, layer.ffn.top_k)
        return ExpertSizes(count, slot, total, chosen, least) if count else None

    def kv_pool(
        self, spec: DecoderSpec, group: KvGroup, blocks: int, block_size: int, bits: int
    ) -> int:
        return _up(blocks * kv_block_bytes(spec, group, block_size, bits), _PAGE)

    def step(self, spec: DecoderSpec, forms: Mapping[str, Form], size: StepSize) -> int:
        tables = {attn.rope for _, attn in spec.attentions if attn.rope is not None}
        positions = _FIRST_POSITIONS
        while positions < size.context:
            positions *= 2
        total = size.logits * spec.vocab_size * 4
        total += sum(4 * positions * rope.dim for rope in tables)
        total += _activations(spec, size)
        total += _attention_states(spec, size)
        scratch = max(
            max(_matmul_scratch(shape[-1], forms[name]) for name, shape in _matrices(spec)),
            max(_attention_scratch(attn) for _, attn in spec.attentions),
            max((4 * d.key_dim * d.value_dim for d in _delta_nets(spec)), default=0),
        )
        return total + size.threads * _region(scratch)

    def adapter(self, spec: DecoderSpec, rank: int) -> int:
        down = [_up(rank, 4) * _up(inner, _LANES) * 2 for _, inner in adapter_linears(spec)]
        up = [_up(_up(out, _LANES) * rank * 2, 64) for out, _ in adapter_linears(spec)]
        return _up(sum(down) + sum(up), _PAGE)


def packed_bytes(shape: tuple[int, ...], form: Form) -> int:
    """Of one weight: a vector in float32, a matrix in panels of 16 rows, or a stack of those."""
    if len(shape) == 1:
        return _up(4 * shape[0], 64)
    rows, width = shape[-2:]
    return prod(shape[:-2]) * _up(-(-rows // _LANES) * _panel_bytes(width, form), 64)


def kv_block_bytes(spec: DecoderSpec, group: KvGroup, block_size: int, bits: int) -> int:
    """Of one block: for every layer and kv head, records of 32 entries of K, then those of V."""
    tile = _STEP if block_size % _STEP == 0 else block_size
    total = 0
    for index in group.layers:
        attn = spec.layers[index].attention
        scales = 2 * tile if bits < 16 else 0
        record = scales + _GROUP * tile * bits // 8
        whole, rest = divmod(attn.head_dim, _GROUP)
        keys = whole * record + (scales + _up(rest, 2) * tile * bits // 8 if rest else 0)
        piece = _up(_up(keys, 64) + -(-attn.head_dim // _GROUP) * record, 64)
        total += attn.kv_heads * piece * (block_size // tile)
    return total


# ---- weights


def _panel_bytes(width: int, form: Form) -> int:
    """16 rows of `width` inputs."""
    if isinstance(form, DenseForm):
        return _up(width * _LANES * form.value_bytes, 64)
    if form.group != 16 and form.group % _GROUP:
        return _up(width * _LANES * 4, 64)  # held as float32
    blocks = -(-width // _GROUP)
    in_record = _record_blocks(form)
    records = -(-blocks // in_record)
    tail = blocks - (records - 1) * in_record
    tables, codes = _up(_table_bytes(form, in_record), 64), _code_bytes(form)
    return (records - 1) * (tables + codes * in_record) + tables + codes * tail


def _code_bytes(form: AffineForm) -> int:
    """Of a block of 32 inputs x 16 rows."""
    return 64 * (form.bits if form.bits in (5, 6, 8) else 4)


def _table_bytes(form: AffineForm, blocks: int) -> int:
    groups = blocks * _GROUP // form.group
    sides = [side for side in (form.scales, form.biases) if side is not None]
    return sum(_LANES * side.row_bytes(groups) for side in sides)


def _record_blocks(form: AffineForm) -> int:
    """The fewest blocks that hold whole groups and values, doubled while padding costs over 2 %."""
    none = GroupForm(0)

    def whole(blocks: int) -> bool:
        groups = blocks * _GROUP // form.group
        return (
            blocks * _GROUP % form.group == 0
            and groups % form.scales.per == 0
            and groups % (form.biases or none).per == 0
        )

    blocks = 1
    while not whole(blocks):
        blocks += 1
    while blocks < 8:
        used = _table_bytes(form, blocks)
        if 50 * (_up(used, 64) - used) <= _up(used, 64) + _code_bytes(form) * blocks:
            break
        blocks *= 2
    return blocks


# ---- a step


def _activations(spec: DecoderSpec, size: StepSize) -> int:
    """As `Decoder::reserve` takes them."""
    rows = size.rows
    attention = [attn for _, attn in spec.attentions]
    q = max(attn.heads * attn.head_dim for attn in attention)
    kv = max(attn.kv_heads * attn.head_dim for attn in attention)
    for _, mixer in spec.recurrences:
        if isinstance(mixer, GatedDeltaNetSpec):
            q = max(q, mixer.value_heads * mixer.value_dim)
        else:
            q = max(q, mixer.channels)
    mixtures = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)]
    inner = max((x.ffn.hidden for x in spec.layers if not isinstance(x.ffn, MoESpec)), default=1)
    own = 0 if spec.per_layer is None else spec.per_layer.size
    inner = max(inner, *(ffn.shared for ffn in mixtures), own, 1)
    top_k = max((ffn.top_k for ffn in mixtures), default=0)
    expert = max((ffn.hidden for ffn in mixtures), default=1)
    routed = rows * top_k
    total = sum(_floats(rows, width) for width in (spec.hidden, spec.hidden, q, kv, kv))
    total += _floats(max(rows, routed), max(inner, expert))
    total += 2 * _floats(rows, own * len(spec.layers)) if own else 0
    entering = [(rows, spec.hidden), (rows, q), (rows, inner)]
    if mixtures:
        total += _floats(rows, max(ffn.experts for ffn in mixtures)) + _floats(routed, spec.hidden)
        total += _floats(rows, 1)
        entering += [(routed, spec.hidden), (routed, expert)]
    total += sum(_entering(count, width, size.float_activations) for count, width in entering)
    total += _recurrent(spec, rows)
    if any(attn.gate for attn in attention):
        total += _floats(rows, q)
    if size.adapter_rank:
        widest = max(spec.hidden, q, inner, expert)
        total += 2 * _floats(rows, widest) + _floats(rows, kv)
    return total


def _recurrent(spec: DecoderSpec, rows: int) -> int:
    """What enters and leaves convolutions, and of delta nets z, their heads' gates and outputs, and
    the inputs of guesses, of which there are few."""
    mixers = [mixer for _, mixer in spec.recurrences]
    if not mixers:
        return 0
    convolved = [x.channels * (1 if isinstance(x, GatedDeltaNetSpec) else 3) for x in mixers]
    total = _floats(rows, max(x.channels for x in mixers)) + _floats(rows, max(convolved))
    for mixer in mixers:
        heads = mixer.value_heads if isinstance(mixer, GatedDeltaNetSpec) else 0
        total += _floats(_GUESSES, mixer.channels + 2 * heads)
    deltas = _delta_nets(spec)
    if deltas:
        total += 2 * _floats(rows, max(d.value_heads * d.value_dim for d in deltas))
        total += _floats(rows, 2 * max(d.value_heads for d in deltas))
    return total


def _delta_nets(spec: DecoderSpec) -> list[GatedDeltaNetSpec]:
    return [mixer for _, mixer in spec.recurrences if isinstance(mixer, GatedDeltaNetSpec)]


def _floats(rows: int, width: int) -> int:
    return _region(rows * _up(width, 32) * 4)


def _entering(rows: int, width: int, float_activations: bool) -> int:
    """Rows that enter a matmul: in float32 and, unless that is how they meet it, in 8 bits."""
    groups = -(-width // _GROUP)
    groups += 2 if groups % 32 == 0 else 0
    quantized = 0 if float_activations else 2 * _region(rows * groups * _GROUP)
    return _floats(rows, width) + quantized


def _attention_states(spec: DecoderSpec, size: StepSize) -> int:
    """Attention's sums by parts of the context, kept when few rows leave threads idle."""
    if size.threads == 1:
        return 0
    most, parts = 0, -(-size.context // _PART)
    for _, attn in spec.attentions:
        for tile in range(1, _TILE_QUERIES + 1):
            items = -(-attn.kv_heads // max(1, _TILE_QUERIES // tile))
            rows = min(size.rows, tile * ((4 * size.threads - 1) // items))
            state = 4 * (32 + _up(attn.head_dim, _GROUP))
            most = max(most, rows * attn.heads * parts * state)
    return _region(most)


def _attention_scratch(attn: AttentionSpec) -> int:
    rows, dim = _TILE_QUERIES * (attn.heads // attn.kv_heads), _up(attn.head_dim, _GROUP)
    return 4 * (2 * rows * (32 + dim) + 2 * dim * (_STEP + 1) + 16) + 24 * rows + 256


def _matmul_scratch(width: int, form: Form) -> int:
    blocks = -(-width // _GROUP)
    record = _record_blocks(form) if isinstance(form, AffineForm) and _stays(form) else 0
    tables = 4 * 2 * (blocks + record) * _LANES * 4
    return tables + blocks * _GROUP * _LANES * 4 + _TILE_SCRATCH + 512


def _stays(form: AffineForm) -> bool:
    return form.group == 16 or form.group % _GROUP == 0


def _matrices(spec: DecoderSpec) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in weight_shapes(spec).items() if len(shape) > 1]


def _region(used: int) -> int:
    """Resident bytes of a scratch array of which so many bytes are used: it is a quarter larger,
    and in huge pages as far as those lie wholly within it."""
    huge = _up(used, _HUGE_PAGE)
    return huge if huge <= _up(used * 5 // 4, _PAGE) else _up(used, _PAGE)


def _up(n: int, to: int) -> int:
    return -(-n // to) * to
