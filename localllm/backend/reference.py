"""The `reference` backend: plain MLX ops in float32 on the CPU; the oracle of all the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import accumulate
from threading import Event

import mlx.core as mx
import numpy as np

from localllm.adapters.lora import LoraAdapter
from localllm.backend.adapters import MAX_ADAPTERS, AdapterTable, check_adapter
from localllm.backend.protocol import (
    Activations,
    Batch,
    Chunk,
    Projection,
    StepCancelled,
    blocks_of_groups,
    check_slots,
    checked_slots,
)
from localllm.backend.reference_adapters import Loaded, RowAdapters, loaded_bytes, to_loaded
from localllm.backend.reference_attention import attention
from localllm.backend.reference_decoder import Decoder, KeysValues
from localllm.backend.reference_kv import KVPool
from localllm.backend.reference_linear import to_matrices, to_matrix, to_vector
from localllm.backend.reference_parts import Weight
from localllm.backend.reference_state import StatePool
from localllm.backend.weights import checked_weights
from localllm.checkpoint.tensor import Tensor
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_groups

_QUERY_ROWS = 256  # attention takes so many rows at a time, which bounds its scores


class ReferenceBackend:
    """Runs any `DecoderSpec`.

    weights: every name of `weight_shapes(spec)` once, in any order; taken one at a time.
    num_blocks, block_size: the KV pool; one number of blocks, or one for each of `kv_groups(spec)`.
        A group's block costs `kv_group_block_bytes(spec, group, block_size)`.
    max_adapters: how many adapters may be loaded at a time.
    state_slots: states of recurrent layers, for a model that has them.

    Weights keep the size they have in the file and become float32 when used; only group sizes
    and code widths unknown to MLX are held as float32. Raises CheckpointError for a missing,
    unknown, repeated or misshapen weight, OutOfMemoryPlan if the pool cannot be had.
    """

    name = "reference"
    step_rows = 128
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
        max_adapters: int = MAX_ADAPTERS,
        state_slots: int = 0,
    ) -> None:
        self.group_blocks = blocks_of_groups(spec, num_blocks)
        self.num_blocks = min(self.group_blocks)
        assert min(self.num_blocks, block_size) > 0, f"a pool of {num_blocks} x {block_size}"
        self.spec = spec
        self.block_size = block_size
        self._pool: KVPool | None = KVPool(spec, self.group_blocks, block_size)
        self.state_slots = checked_slots(spec, state_slots)
        self._states = StatePool(spec, self.state_slots)
        self._cancelled = Event()
        self._adapters: AdapterTable[Loaded] = AdapterTable(self.name, max_adapters)
        with mx.stream(mx.cpu):
            self._decoder: Decoder | None = Decoder(spec, _load(spec, weights))

    def forward(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        """See `Backend.forward`."""
        assert self._pool is not None, "the backend is closed"
        assert self._decoder is not None
        for chunk in batch.chunks:
            self._check(chunk)
        chunks = batch.chunks
        adapters = RowAdapters(
            [len(c.token_ids) for c in chunks],
            [None if c.adapter is None else self._adapters[c.adapter] for c in chunks],
        )
        if not chunks:
            return np.zeros((0, self.spec.vocab_size), np.float32)
        self._cancelled.clear()
        self._states.begin()
        step = _Step(self.spec, self._pool, self._states, chunks, self._cancelled, self._decoder)
        with mx.stream(mx.cpu):
            rows = self._decoder(
                step.tokens,
                step.positions,
                step.lengths,
                step.attend,
                adapters,
                step.recur,
                batch.embeddings(),
            )
            normed: mx.array | None = None
            if hidden is not None:
                normed = self._decoder.final_norm(rows)
                hidden[:] = np.array(normed)
            if not len(step.logit_rows):
                mx.eval(rows)
                return np.zeros((0, self.spec.vocab_size), np.float32)
            wanted = mx.array(step.logit_rows)
            if normed is None:
                return np.array(self._decoder.logits(rows[wanted]))
            return np.array(self._decoder.project(normed[wanted]))

    @property
    def kv_form(self) -> str:
        """See `Backend.kv_form`."""
        return f"reference {version('mlx')} {self.block_size}"

    def project(self, hidden: np.ndarray) -> np.ndarray:
        """See `Backend.project`."""
        assert self._decoder is not None, "the backend is closed"
        with mx.stream(mx.cpu):
            return np.array(self._decoder.project(mx.array(hidden.astype(np.float32))))

    def part_of_head(self, rows: Tensor) -> Projection:
        """See `Backend.part_of_head`."""
        matrix = to_matrix(rows)

        def project(hidden: np.ndarray) -> np.ndarray:
            assert self._decoder is not None, "the backend is closed"
            with mx.stream(mx.cpu):
                logits = matrix.matmul(mx.array(hidden.astype(np.float32)))
                return np.array(self._decoder.finish(logits))

        return project

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Backend.embed`."""
        assert self._decoder is not None, "the backend is closed"
        with mx.stream(mx.cpu):
            rows = self._decoder.embed.rows(mx.array(np.array(token_ids, np.int32)))
            return np.array(rows * self.spec.embed_scale)

    def add_adapter(self, adapter: LoraAdapter) -> int:
        """See `Backend.add_adapter`."""
        check_adapter(self.spec, adapter)
        self._adapters.require_room()
        with mx.stream(mx.cpu):
            return self._adapters.put(to_loaded(adapter))

    def remove_adapter(self, index: int) -> None:
        """See `Backend.remove_adapter`."""
        self._adapters.remove(index)

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """See `Backend.adapter_bytes`."""
        return loaded_bytes(adapter)

    def copy_block(self, group: int, source: int, target: int) -> None:
        """See `Backend.copy_block`."""
        blocks = self._blocks(group)
        blocks[target] = blocks[source]

    def read_block(self, group: int, block: int) -> np.ndarray:
        """See `Backend.read_block`."""
        content: np.ndarray = self._blocks(group)[block].view(np.uint8).copy()
        return content

    def write_block(self, group: int, block: int, content: np.ndarray) -> None:
        """See `Backend.write_block`."""
        self._blocks(group)[block] = content.view(np.float32)

    def replay(self, chunk: int, first: int, rows: int, source: int, target: int) -> None:
        """See `Backend.replay`."""
        assert self._decoder is not None, "the backend is closed"
        mixers = {
            index: layer.recurrent
            for index, layer in enumerate(self._decoder.layers)
            if layer.recurrent is not None
        }
        with mx.stream(mx.cpu):
            self._states.replay(mixers, chunk, slice(first, first + rows), source, target)

    def read_state(self, slot: int) -> np.ndarray:
        """See `Backend.read_state`."""
        content: np.ndarray = self._states.rows[slot].view(np.uint8).copy()
        return content

    def write_state(self, slot: int, content: np.ndarray) -> None:
        """See `Backend.write_state`."""
        self._states.rows[slot] = content.view(np.float32)

    def _blocks(self, group: int) -> np.ndarray:
        assert self._pool is not None, "the backend is closed"
        return self._pool.blocks[group]

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        self._cancelled.set()

    def close(self) -> None:
        """Frees weights and pool; the backend answers no more."""
        self._pool = None
        self._decoder = None
        self._states = StatePool(self.spec, 0)
        self._adapters.clear()

    def _check(self, chunk: Chunk) -> None:
        """The engine's promises. Block ids count from the first position that a layer can see."""
        count, stop = len(chunk.token_ids), chunk.start + len(chunk.token_ids)
        assert count > 0, "a chunk without tokens"
        assert chunk.start >= 0, f"a chunk at position {chunk.start}"
        low, high = int(chunk.token_ids.min()), int(chunk.token_ids.max())
        assert 0 <= low <= high < self.spec.vocab_size, (
            f"token ids {low} … {high} in a vocabulary of {self.spec.vocab_size}"
        )
        limit = min(self.spec.context, self.spec.learned_positions or self.spec.context)
        assert stop <= limit, f"positions up to {stop - 1} in a context of {limit}"
        needed = -(-stop // self.block_size)
        size = chunk.block_table.shape[-1]
        assert size >= needed, f"a block table of {size} for {stop} positions: {needed} are needed"
        for number, group in enumerate(kv_groups(self.spec)):
            first = _first_seen(group.window, chunk.start) // self.block_size
            used = _table(chunk, number)[first:needed]
            assert 0 <= used.min() <= used.max() < self.group_blocks[number], (
                f"blocks {used.min()} … {used.max()} in a pool of {self.group_blocks[number]}"
            )
        check_slots(self.spec, chunk, self.state_slots)
        assert all(0 <= row < count for row in chunk.logit_rows), (
            f"logits asked of rows {chunk.logit_rows} in a chunk of {count}"
        )


class _Step:
    """One forward: the rows of all chunks laid end to end, and how they attend."""

    def __init__(
        self,
        spec: DecoderSpec,
        pool: KVPool,
        states: StatePool,
        chunks: tuple[Chunk, ...],
        cancelled: Event,
        decoder: Decoder,
    ) -> None:
        self._spec = spec
        self._layers = decoder.layers
        self._states = states
        self._cancelled = cancelled
        self._pool = pool
        self._chunks = chunks
        positions = [c.start + np.arange(len(c.token_ids)) for c in chunks]
        self._offsets = list(accumulate((len(p) for p in positions[:-1]), initial=0))
        self.tokens = np.concatenate([c.token_ids for c in chunks]).astype(np.int32)
        self.positions = np.concatenate(positions).astype(np.int32)
        self.lengths = np.concatenate(
            [np.maximum(c.prompt_length, p + 1) for c, p in zip(chunks, positions, strict=True)]
        )
        rows = zip(self._offsets, (c.logit_rows for c in chunks), strict=True)
        self.logit_rows = np.array([at + row for at, asked in rows for row in asked], np.int32)
        places = self.positions % pool.block_size
        self._slots = []  # of each KV group
        for group in range(len(pool.blocks)):
            blocks = [
                _table(c, group)[p // pool.block_size]
                for c, p in zip(chunks, positions, strict=True)
            ]
            self._slots.append((np.concatenate(blocks), places))

    def attend(self, layer: int, q: mx.array, kv: KeysValues) -> mx.array:
        """Writes K and V of all rows first, so chunks of one sequence may share a batch."""
        self._go_on()
        mx.eval(q)
        if kv is not None:
            mx.eval(*kv)
            slots = self._slots[self._pool.group_of[layer]]
            self._pool.write(layer, slots, *(np.array(x, copy=False) for x in kv))
        parts = []
        for chunk, offset in zip(self._chunks, self._offsets, strict=True):
            for at in range(0, len(chunk.token_ids), _QUERY_ROWS):
                rows = min(_QUERY_ROWS, len(chunk.token_ids) - at)
                parts.append(self._attend(layer, chunk, chunk.start + at, q[offset + at :][:rows]))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def recur(self, layer: int, rows: mx.array) -> mx.array:
        """The chunks in their order, so that one may begin where another ends."""
        self._go_on()
        mixer = self._layers[layer].recurrent
        assert mixer is not None
        parts = []
        for number, (chunk, offset) in enumerate(zip(self._chunks, self._offsets, strict=True)):
            assert chunk.state is not None
            own = rows[offset : offset + len(chunk.token_ids)]
            parts.append(self._states.run(layer, mixer, number, chunk.state, own))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise StepCancelled("the step was cancelled")

    def _attend(self, layer: int, chunk: Chunk, start: int, q: mx.array) -> mx.array:
        """Rows of one chunk at positions start … over all that they can see."""
        spec = self._spec.layers[layer].attention
        first, stop = _first_seen(spec.window, start), start + q.shape[0]
        table = _table(chunk, self._pool.group_of[layer])
        k, v = (mx.array(x) for x in self._pool.read(layer, table, first, stop))
        attn = self._layers[layer].attn
        assert attn is not None
        return attention(spec, q, k, v, np.arange(start, stop), np.arange(first, stop), attn.sinks)


def _table(chunk: Chunk, group: int) -> np.ndarray:
    table = chunk.block_table
    return table if table.ndim == 1 else table[group % len(table)]


def _first_seen(window: int | None, position: int) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _load(spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Weight]:
    """The weights on MLX, each converted before the next is read."""
    parts: dict[str, Weight] = {}
    for name, tensor in checked_weights(spec, weights):
        convert = (to_vector, to_matrix, to_matrices)[len(tensor.shape) - 1]
        parts[name] = convert(tensor)
        del tensor  # else it would live on while the next one is read
    return parts
