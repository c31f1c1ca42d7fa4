"""The `metal` backend: the MLX graph of a spec over a paged KV pool, with our Metal kernels.

Where there is no Apple GPU it computes the same on the CPU, kernels in the emulator if one is set
up: that proves graph, shapes and block tables, and is far too slow for use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import accumulate
from threading import Event, Lock

import mlx.core as mx
import numpy as np

from localllm.adapters.lora import LoraAdapter
from localllm.backend.adapters import MAX_ADAPTERS, AdapterTable, check_adapter, require_no_experts
from localllm.backend.metal_adapters import (
    Loaded,
    RowAdapters,
    Stacks,
    loaded_bytes,
    to_loaded,
)
from localllm.backend.metal_attention import ChunkRows
from localllm.backend.metal_decoder import Decoder, KeysValues
from localllm.backend.metal_kernels import KernelOps
from localllm.backend.metal_kv import KvPool, kv_group_size
from localllm.backend.metal_limits import bound_memory
from localllm.backend.metal_ops import Ops
from localllm.backend.metal_recurrent import Advance, Inputs
from localllm.backend.metal_state import StatePool, StateStep
from localllm.backend.metal_weights import checkpoint_dtype, load
from localllm.backend.protocol import (
    Activations,
    Batch,
    Chunk,
    Projection,
    StateSlots,
    StepCancelled,
    blocks_of_groups,
    check_slots,
    checked_slots,
)
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import InvalidRequest
from localllm.kernels_metal.dispatch import Chooser
from localllm.kernels_metal.kernel import Executor, executed_by
from localllm.kernels_metal.runs import Run
from localllm.spec import DecoderSpec
from localllm.spec.memory import state_bytes

# Steps of more rows are evaluated layer by layer, so that a long prefill can be cancelled.
_LAZY_ROWS = 32


class MetalBackend:
    """Runs a `DecoderSpec` on MLX.

    weights: every name of `weight_shapes(spec)` once, in any order; taken one at a time.
    num_blocks, block_size: the KV pool; one number of blocks, or one for each of `kv_groups(spec)`.
    kv_bits: 16 (in `dtype`), 8 or 4. dtype: of activations, scales and an unquantized KV cache;
        None: float16 or bfloat16 by `checkpoint_dtype`.
    max_adapters: how many adapters may be loaded at a time. state_slots: states of recurrent
        layers, for a model that has them.
    choose: which kernels are used; None: MLX's own ops alone. executor: runs them where there is
        no GPU.

    Rounding depends on the number of rows in a step, since MLX picks its kernels by it; up to 8
    rows (what verifies drafts) our kernels round alike, where they are used and no row has an
    adapter on gate or up. Raises CheckpointError for weights that do not fit the spec,
    InvalidRequest for KV bits that the head sizes do not allow, OutOfMemoryPlan if the pool cannot
    be had.
    """

    name = "metal"
    step_rows = 512
    activations: Activations = "float32"
    from_cache = False
    load_note: str | None = None

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Iterable[tuple[str, Tensor]],
        *,
        num_blocks: int | Sequence[int],
        block_size: int = 32,
        kv_bits: int = 16,
        dtype: mx.Dtype | None = None,
        max_adapters: int = MAX_ADAPTERS,
        state_slots: int = 0,
        choose: Chooser | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.group_blocks = blocks_of_groups(spec, num_blocks)
        self.num_blocks = min(self.group_blocks)
        assert min(self.num_blocks, block_size) > 0, f"a pool of {num_blocks} x {block_size}"
        _check_kv_bits(spec, kv_bits)
        self.spec = spec
        self.state_slots = checked_slots(spec, state_slots)
        self.block_size = block_size
        self._kv_bits = kv_bits
        self._executor = executor
        self._device = mx.gpu if mx.metal.is_available() else mx.cpu
        self._adapters: AdapterTable[Loaded] = AdapterTable(self.name, max_adapters)
        self._cancelled = Event()
        self._stacks = Stacks()
        # Blocks are read and written in place, which must not meet a step or another such access.
        self._lock = Lock()
        with mx.stream(self._device):
            if dtype is None:
                weights, dtype = _with_dtype(spec, weights)
            self.dtype = dtype
            self._ops = Ops(dtype, kv_bits)
            if choose is not None:
                self._ops = KernelOps(dtype, kv_bits, choose)
            parts = load(spec, weights, dtype)
            self._decoder: Decoder | None = Decoder(spec, parts, self._ops)
            self._pool: KvPool | None = KvPool(spec, self.group_blocks, block_size, dtype, kv_bits)
            self._states = StatePool(self._decoder.recurrences, self.state_slots)
        bound_memory(mx.get_active_memory() + self.state_slots * state_bytes(spec))

    @property
    def kv_form(self) -> str:
        """See `Backend.kv_form`."""
        return f"metal {version('mlx')} {self.dtype} {self._kv_bits} {self.block_size}"

    def forward(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        """See `Backend.forward`. Raises StepCancelled when `cancel` was called meanwhile."""
        if not batch.chunks:
            return np.zeros((0, self.spec.vocab_size), np.float32)
        with self._working():
            assert self._pool is not None, "the backend is closed"
            assert self._decoder is not None
            chunks = batch.chunks
            indices = [c.adapter for c in chunks]
            adapters = RowAdapters(
                [len(c.token_ids) for c in chunks],
                indices,
                {index: self._adapters[index] for index in indices if index is not None},
                self._stacks,
                self._ops.lora,
            )
            for chunk in chunks:
                check_slots(self.spec, chunk, self.state_slots)
            self._cancelled.clear()
            states = self._states.begin(_runs(chunks))
            step = _Step(
                self.spec,
                self._ops,
                self._pool,
                states,
                chunks,
                self._cancelled,
                self._decoder.sinks,
            )
            rows = self._decoder(
                step.tokens,
                step.positions,
                step.lengths,
                step.attend,
                step.recur,
                adapters or None,
                batch.embeddings(),
            )
            normed: mx.array | None = None
            if hidden is not None:
                normed = self._decoder.final_norm(rows)
                hidden[:] = np.array(normed.astype(mx.float32))
            if not len(step.logit_rows):
                mx.eval(rows, self._pool.arrays, states.arrays)
                self._states.settle(states)
                return np.zeros((0, self.spec.vocab_size), np.float32)
            wanted = mx.array(step.logit_rows)
            last = self._decoder.final_norm(rows[wanted]) if normed is None else normed[wanted]
            logits = self._decoder.project(last)
            mx.eval(logits, self._pool.arrays, states.arrays)
            self._states.settle(states)
            return np.array(logits)

    def project(self, hidden: np.ndarray) -> np.ndarray:
        """See `Backend.project`."""
        assert self._decoder is not None, "the backend is closed"
        if not len(hidden):
            return np.zeros((0, self.spec.vocab_size), np.float32)
        with self._working():
            return np.array(self._decoder.project(mx.array(hidden).astype(self.dtype)))

    def part_of_head(self, rows: Tensor) -> Projection:
        """See `Backend.part_of_head`."""
        with self._working():
            matrix = mx.array(rows.to_float32()).astype(self.dtype).T
            mx.eval(matrix)

        def project(hidden: np.ndarray) -> np.ndarray:
            assert self._decoder is not None, "the backend is closed"
            with self._working():
                logits = (mx.array(hidden).astype(self.dtype) @ matrix).astype(mx.float32)
                return np.array(self._decoder.finish(logits))

        return project

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Backend.embed`."""
        assert self._decoder is not None, "the backend is closed"
        with self._working():
            rows = self._decoder.embed(mx.array(np.array(token_ids, np.int32)))
            return np.array(rows.astype(mx.float32))

    def add_adapter(self, adapter: LoraAdapter) -> int:
        """See `Backend.add_adapter`."""
        require_no_experts(self.name, adapter)
        check_adapter(self.spec, adapter)
        self._adapters.require_room()
        with self._working():
            loaded = to_loaded(adapter, self.dtype)
            index = self._adapters.put(loaded)
            self._stacks.add(index, loaded)
            return index

    def remove_adapter(self, index: int) -> None:
        """See `Backend.remove_adapter`."""
        self._adapters.remove(index)
        with self._working():
            self._stacks.remove(index)

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """See `Backend.adapter_bytes`."""
        require_no_experts(self.name, adapter)
        return loaded_bytes(adapter, self.dtype)

    def copy_block(self, group: int, source: int, target: int) -> None:
        """See `Backend.copy_block`."""
        with self._working():
            pool = self._open_pool
            for old, new in zip(pool.block(group, source), pool.block(group, target), strict=True):
                new[...] = old

    def read_block(self, group: int, block: int) -> np.ndarray:
        """See `Backend.read_block`."""
        with self._working():
            return np.concatenate(
                [part.reshape(-1) for part in self._open_pool.block(group, block)]
            )

    def write_block(self, group: int, block: int, content: np.ndarray) -> None:
        """See `Backend.write_block`."""
        with self._working():
            at = 0
            for part in self._open_pool.block(group, block):
                part[...] = content[at : at + part.size].reshape(part.shape)
                at += part.size

    def replay(self, chunk: int, first: int, rows: int, source: int, target: int) -> None:
        """See `Backend.replay`."""
        with self._working():
            self._states.replay(chunk, first, rows, source, target)

    def read_state(self, slot: int) -> np.ndarray:
        """See `Backend.read_state`."""
        with self._working():
            return self._states.read(slot)

    def write_state(self, slot: int, content: np.ndarray) -> None:
        """See `Backend.write_state`."""
        with self._working():
            self._states.write(slot, content)

    def cancel(self) -> None:
        """See `Backend.cancel`. A step of few rows that the GPU has begun ends first."""
        self._cancelled.set()

    def close(self) -> None:
        """Frees weights and pool; the backend answers no more."""
        self._pool = None
        self._decoder = None
        self._states = StatePool({}, 0)
        self._adapters.clear()
        self._stacks.clear()
        mx.clear_cache()

    @contextmanager
    def _working(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(mx.stream(self._device))
            if self._executor is not None:
                stack.enter_context(executed_by(self._executor))
            yield

    @property
    def _open_pool(self) -> KvPool:
        assert self._pool is not None, "the backend is closed"
        return self._pool


class _Step:
    """One forward: the rows of all chunks laid end to end, and how they attend."""

    def __init__(
        self,
        spec: DecoderSpec,
        ops: Ops,
        pool: KvPool,
        states: StateStep,
        chunks: tuple[Chunk, ...],
        cancelled: Event,
        sinks: Sequence[mx.array | None],
    ) -> None:
        self._spec = spec
        self._sinks = sinks
        self._ops = ops
        self._pool = pool
        self._states = states
        self._chunks = chunks
        self._cancelled = cancelled
        positions = [c.start + np.arange(len(c.token_ids)) for c in chunks]
        self._offsets = list(accumulate((len(p) for p in positions[:-1]), initial=0))
        self.tokens = np.concatenate([c.token_ids for c in chunks]).astype(np.int32)
        self.positions = np.concatenate(positions).astype(np.int32)
        self.lengths = np.concatenate(
            [np.maximum(c.prompt_length, p + 1) for c, p in zip(chunks, positions, strict=True)]
        )
        rows = zip(self._offsets, (c.logit_rows for c in chunks), strict=True)
        self.logit_rows = np.array([at + row for at, asked in rows for row in asked], np.int32)
        self._places = self.positions % pool.block_size
        self._blocks = [
            np.concatenate(
                [
                    _table(c, group)[p // pool.block_size]
                    for c, p in zip(chunks, positions, strict=True)
                ]
            )
            for group in range(max(pool.group_of) + 1)
        ]
        self._slots: dict[tuple[int, int], mx.array] = {}

    def attend(self, layer: int, q: mx.array, kv: KeysValues) -> mx.array:
        """Writes K and V of all rows first, so chunks of one sequence may share a batch."""
        self._go_on()
        pool, mixer = self._pool, self._spec.layers[layer].attention
        group = pool.group_of[layer]
        if kv is not None:
            key = (group, mixer.kv_heads)
            if key not in self._slots:
                slots = pool.slots_of(layer, self._blocks[group], self._places)
                self._slots[key] = mx.array(slots)
            pool.write(layer, self._slots[key], *kv)
        chunks = [
            ChunkRows(_table(c, group), c.start, at, len(c.token_ids))
            for c, at in zip(self._chunks, self._offsets, strict=True)
        ]
        out = self._ops.attention(mixer, pool, layer, chunks, q, self._sinks[layer])
        if len(self.tokens) > _LAZY_ROWS:
            mx.eval(out)
        return out.reshape(out.shape[0], -1)

    def recur(self, layer: int, advance: Advance, inputs: Inputs) -> mx.array:
        self._go_on()
        out = self._states.recur(layer, advance, inputs)
        if len(self.tokens) > _LAZY_ROWS:
            mx.eval(out, self._states.arrays)
        return out

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise StepCancelled("the step was cancelled")


def _table(chunk: Chunk, group: int) -> np.ndarray:
    table = chunk.block_table
    return table if table.ndim == 1 else table[group % len(table)]


def _runs(chunks: Sequence[Chunk]) -> list[tuple[StateSlots, Run]]:
    """The states and rows of chunks, where the model has recurrent layers."""
    runs, first = [], 0
    for chunk in chunks:
        count = len(chunk.token_ids)
        if chunk.state is not None:
            runs.append((chunk.state, Run(first, count, count - chunk.state.guesses)))
        first += count
    return runs


def _check_kv_bits(spec: DecoderSpec, bits: int) -> None:
    if bits not in (32, 16, 8, 4):
        raise InvalidRequest(f"kv_bits must be 16, 8 or 4, not {bits}")
    for _, attn in spec.attentions:
        size = attn.head_dim
        if bits < 16 and (size % kv_group_size(size) or size * bits % 32):
            raise InvalidRequest(
                f"the metal backend cannot keep heads of {size} entries in {bits} bits",
                hint="leave `kv_bits` out",
            )


def _with_dtype(
    spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]]
) -> tuple[Iterable[tuple[str, Tensor]], mx.Dtype]:
    """The first dense matrix or vector tells what the checkpoint was trained in."""
    read: list[tuple[str, Tensor]] = []
    rest = iter(weights)
    for name, tensor in rest:
        read.append((name, tensor))
        if isinstance(tensor, Dense):
            break
    found = [tensor.dtype for _, tensor in read if isinstance(tensor, Dense)]
    dtype = checkpoint_dtype(spec, found)

    def again() -> Iterable[tuple[str, Tensor]]:
        while read:
            yield read.pop(0)
        yield from rest

    return again(), dtype
