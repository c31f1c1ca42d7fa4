"""The `cpu` backend: the whole decoder in one native call a step, over repacked weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from localllm.adapters.lora import LoraAdapter
from localllm.backend.adapters import MAX_ADAPTERS, AdapterTable, check_adapter
from localllm.backend.cpu_adapters import pack_adapter, packed_bytes
from localllm.backend.cpu_cache import PackedCache, native_build
from localllm.backend.cpu_config import layer_configs, model_config, ropes_of
from localllm.backend.cpu_experts import Decoding, ExpertUse, Past, measured_use, merged_uses
from localllm.backend.cpu_rope import RopeTable
from localllm.backend.cpu_weights import (
    add_matrix,
    bytes_per_token,
    expert_bytes_per_token,
    pack,
    pack_to_file,
)
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
from localllm.checkpoint.tensor import Tensor
from localllm.errors import BackendUnavailable, CheckpointError, InvalidRequest, OutOfMemoryPlan
from localllm.kernels_cpu import _native
from localllm.spec import DecoderSpec, MoESpec


class Span(Protocol):
    """Rows of one sequence, of a `Chunk` or of a draft head; what is told is told there."""

    @property
    def start(self) -> int: ...
    @property
    def block_table(self) -> np.ndarray: ...
    @property
    def prompt_length(self) -> int: ...


# Starts, counts, block tables, their sizes, and for each RoPE its rows.
_Places = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]


class CpuBackend:
    """Runs a `DecoderSpec` natively.

    weights: every name of `weight_shapes(spec)` once, in any order; taken one at a time.
    num_blocks, block_size: the KV pool; one number of blocks, or one for each of `kv_groups(spec)`.
        Multiples of 32 positions are fastest.
    threads: compute threads, the caller's among them; None for one per usable core.
    kv_bits: 16, or 8 or 4 (heads rotated, scaled by token and 32 entries), or 32.
    float_activations: activations enter matmuls in float32, not quantized to int8: for
        evaluation, slower.
    kernels: an instruction set of `usable_kernels()`; None for the best, or what the
        environment's LOCALLLM_CPU names.
    max_adapters: how many adapters may be loaded at a time.
    state_slots: states of recurrent layers, for a model that has some.
    cache: where packed weights are kept. If they are there, `weights` is not read.
    expert_bytes: memory for experts of mixtures, of which the others are read from the packed file
        as they are chosen; None: all weights are in memory. Changes no result.

    weight_bytes: of the packed weights. token_bytes: how many of them one token's step reads.

    A row's result does not depend on batch, chunks, threads or instruction set, bit for bit.
    Raises UnsupportedModel for what the engine lacks, CheckpointError for weights that do not
    fit the spec, BackendUnavailable for kernels that cannot run here, OutOfMemoryPlan.
    """

    name = "cpu"
    step_rows = 512  # every row of weights is unpacked once for all of them

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Iterable[tuple[str, Tensor]],
        *,
        num_blocks: int | Sequence[int],
        block_size: int = 32,
        threads: int | None = None,
        kv_bits: int = 16,
        float_activations: bool = False,
        kernels: str | None = None,
        max_adapters: int = MAX_ADAPTERS,
        cache: PackedCache | None = None,
        state_slots: int = 0,
        expert_bytes: int | None = None,
    ) -> None:
        self.group_blocks = blocks_of_groups(spec, num_blocks)
        self.num_blocks = min(self.group_blocks)
        assert min(self.num_blocks, block_size) > 0, f"a pool of {num_blocks} x {block_size}"
        if threads is not None and threads < 1:
            raise InvalidRequest(f"threads must be at least 1, not {threads}")
        if kv_bits not in (32, 16, 8, 4):
            raise InvalidRequest(f"kv_bits must be 32, 16, 8 or 4, not {kv_bits}")
        self.state_slots = checked_slots(spec, state_slots)
        chosen = choose_kernels(kernels)
        layers = layer_configs(spec)
        self.spec = spec
        self._cache = cache
        self._kv_bits = kv_bits
        self._adapters: AdapterTable[_native.Adapter] = AdapterTable(self.name, max_adapters)
        self.block_size = block_size
        self.activations: Activations = "float32" if float_activations else "int8"
        self._ropes = [RopeTable(rope) for rope in ropes_of(spec)]
        try:
            store = _store(spec, weights, cache, on_disk=expert_bytes is not None)
            past = Past([]) if cache is None else cache.past(_experts_of(spec))
            self.weight_bytes = int(store.nbytes)
            self.token_bytes = bytes_per_token(spec, store)
            self._decoder: _native.Decoder | None = _native.Decoder(
                store,
                model_config(spec, float_activations=float_activations),
                layers,
                kv_bits,
                block_size,
                list(self.group_blocks),
                threads or _native.default_threads(),
                chosen,
                self.state_slots,
                expert_bytes or 0,
                past.uses,
            )
            self._experts = self._measured_experts(store, past)
            self._decoding = Decoding()
        except MemoryError as error:
            raise OutOfMemoryPlan(
                f"no memory for the weights and {num_blocks} KV blocks of {block_size} positions",
                hint="take fewer KV blocks (a shorter context), fewer sequences at once, or a "
                "smaller model",
            ) from error

    @property
    def from_cache(self) -> bool:
        """Whether the weights came packed from the cache."""
        return self._cache is not None and self._cache.hit

    @property
    def load_note(self) -> str | None:
        """Why the cache was not used, or could not keep the weights; which experts are on disk."""
        notes = [self._cache.note if self._cache is not None else None]
        notes.append(self._experts.note() if self._experts is not None else None)
        return "; ".join(note for note in notes if note) or None

    @property
    def experts(self) -> ExpertUse | None:
        """How the memory for experts was used up to now; None where all weights are in memory."""
        cache = self.native.expert_cache
        if cache is None or self._experts is None:
            return None
        return replace(self._experts, chosen=cache.chosen, read=cache.read)

    def _measured_experts(self, store: _native.WeightStore, past: Past) -> ExpertUse | None:
        cache = self.native.expert_cache
        if cache is None:
            return None
        from_experts = expert_bytes_per_token(self.spec, store)
        return measured_use(cache, past, self.threads, self.token_bytes, from_experts)

    @property
    def kernels(self) -> str:
        """The instruction set in use."""
        return str(self.native.kernels)

    @property
    def kv_form(self) -> str:
        """See `Backend.kv_form`; the same on every instruction set."""
        return f"cpu {native_build()} {self._kv_bits} {self.activations} {self.block_size}"

    @property
    def threads(self) -> int:
        """Compute threads, the caller's among them; fewer than asked if the system refused."""
        return int(self.native.threads)

    @property
    def kv_bytes(self) -> int:
        """Bytes of address space of the KV pool; memory is taken when blocks are first used."""
        return int(self.native.kv_bytes)

    def forward(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        """See `Backend.forward`. Raises StepCancelled when `cancel` was called meanwhile, and
        OutOfMemoryPlan where there is no memory for the step's rows; the next step may be smaller.
        """
        began = time.perf_counter()
        try:
            logits = self._forward(batch, hidden)
        except RuntimeError as error:
            if self._experts is None:
                raise
            raise CheckpointError(
                f"experts could not be read: {error}", hint="load the model again"
            ) from error
        except MemoryError as error:
            rows = sum(len(c.token_ids) for c in batch.chunks)
            raise OutOfMemoryPlan(
                f"no memory for a step of {rows} rows",
                hint="take fewer rows in a step (a smaller batch or prefill chunk)",
            ) from error
        if self._experts is not None and sum(len(c.token_ids) for c in batch.chunks) == 1:
            self._decoding.record(time.perf_counter() - began)
        return logits

    def _forward(self, batch: Batch, hidden: np.ndarray | None) -> np.ndarray:
        decoder, chunks = self.native, batch.chunks
        adapters = [None if c.adapter is None else self._adapters[c.adapter] for c in chunks]
        if not chunks:
            return np.zeros((0, self.spec.vocab_size), np.float32)
        counts = [len(c.token_ids) for c in chunks]
        offsets = np.cumsum([0, *counts[:-1]])
        logit_rows = [
            offset + row
            for c, offset in zip(chunks, offsets.tolist(), strict=True)
            for row in c.logit_rows
        ]
        out = np.empty((len(logit_rows), self.spec.vocab_size), np.float32)
        done = decoder.forward(
            _join([c.token_ids for c in chunks]),
            *self.places(chunks, counts),
            np.array(logit_rows, np.int32),
            out,
            hidden,
            [] if all(adapter is None for adapter in adapters) else adapters,
            self._states(chunks),
            batch.embeddings(),
        )
        if not done:
            raise StepCancelled("the step was cancelled")
        return out

    def places(self, spans: Sequence[Span], counts: Sequence[int]) -> _Places:
        """Where rows stand, so many of each span, as the native engine is told."""
        positions = [
            np.arange(s.start, s.start + n, dtype=np.int32)
            for s, n in zip(spans, counts, strict=True)
        ]
        lengths = [
            np.maximum(s.prompt_length, p + 1) for s, p in zip(spans, positions, strict=True)
        ]
        at, length = _join(positions), _join(lengths)
        return (
            np.array([s.start for s in spans], np.int32),
            np.array(counts, np.int32),
            _join([self._tables(s).reshape(-1) for s in spans]),
            np.array([s.block_table.shape[-1] for s in spans], np.int32),
            [rope.rows(at, length) for rope in self._ropes],
        )

    def _tables(self, span: Span) -> np.ndarray:
        """[groups, m]."""
        if span.block_table.ndim == 2:
            return span.block_table
        shape = (len(self.group_blocks), span.block_table.shape[-1])
        return np.broadcast_to(span.block_table, shape)

    def _states(self, chunks: tuple[Chunk, ...]) -> np.ndarray | None:
        """int32 [chunks, 3]: source (-1 for none), target, guesses."""
        for chunk in chunks:
            check_slots(self.spec, chunk, self.state_slots)
        states = [chunk.state for chunk in chunks if chunk.state is not None]
        if not states:
            return None
        rows = [(-1 if s.source is None else s.source, s.target, s.guesses) for s in states]
        return np.array(rows, np.int32)

    def project(self, hidden: np.ndarray) -> np.ndarray:
        """See `Backend.project`."""
        out = np.empty((len(hidden), self.spec.vocab_size), np.float32)
        if len(hidden):
            self.native.project(np.ascontiguousarray(hidden, np.float32), out)
        return out

    def part_of_head(self, rows: Tensor) -> Projection:
        """See `Backend.part_of_head`."""
        store, name = _native.WeightStore(), "part"
        add_matrix(store, name, rows)
        count = rows.shape[0]

        def project(hidden: np.ndarray) -> np.ndarray:
            out = np.empty((len(hidden), count), np.float32)
            if len(hidden):
                states = np.ascontiguousarray(hidden, np.float32)
                self.native.project_with(store, name, states, out)
            return out

        return project

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Backend.embed`."""
        out = np.empty((len(token_ids), self.spec.hidden), np.float32)
        self.native.embed(np.array(token_ids, np.int32), out)
        return out

    def add_adapter(self, adapter: LoraAdapter) -> int:
        """See `Backend.add_adapter`."""
        check_adapter(self.spec, adapter)
        self._adapters.require_room()
        try:
            packed = pack_adapter(self.spec, adapter)
        except MemoryError as error:
            raise OutOfMemoryPlan(
                f"no memory for the adapter {adapter.name!r} of {packed_bytes(adapter)} bytes",
                hint="remove another adapter first",
            ) from error
        return self._adapters.put(packed)

    def remove_adapter(self, index: int) -> None:
        """See `Backend.remove_adapter`."""
        self._adapters.remove(index)

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """See `Backend.adapter_bytes`."""
        return packed_bytes(adapter)

    def copy_block(self, group: int, source: int, target: int) -> None:
        """See `Backend.copy_block`."""
        self.native.copy_block(group, source, target)

    def read_block(self, group: int, block: int) -> np.ndarray:
        """See `Backend.read_block`."""
        content = np.empty(self.native.block_bytes(group), np.uint8)
        self.native.read_block(group, block, content)
        return content

    def write_block(self, group: int, block: int, content: np.ndarray) -> None:
        """See `Backend.write_block`."""
        self.native.write_block(group, block, content)

    def replay(self, chunk: int, first: int, rows: int, source: int, target: int) -> None:
        """See `Backend.replay`."""
        self.native.replay(chunk, first, rows, source, target)

    def read_state(self, slot: int) -> np.ndarray:
        """See `Backend.read_state`."""
        content = np.empty(self.native.state_bytes, np.uint8)
        self.native.read_state(slot, content)
        return content

    def write_state(self, slot: int, content: np.ndarray) -> None:
        """See `Backend.write_state`."""
        self.native.write_state(slot, content)

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        self.native.cancel()

    def close(self) -> None:
        """Frees weights, pool and threads; the backend answers no more."""
        if self._decoder is not None and self._cache is not None and self._experts is not None:
            now = self._decoder.expert_cache.uses
            past = self._cache.past(len(now))
            past = replace(past, uses=merged_uses(past.uses, now))
            if speed := self._decoding.speed:
                in_memory = self._experts.in_memory
                past = replace(past, speed=speed, in_memory=in_memory, threads=self.threads)
            self._cache.remember(past)
        self._decoder = None
        self._adapters.clear()

    @property
    def native(self) -> _native.Decoder:
        """The engine itself, until `close`."""
        assert self._decoder is not None, "the backend is closed"
        return self._decoder


def _store(
    spec: DecoderSpec,
    weights: Iterable[tuple[str, Tensor]],
    cache: PackedCache | None,
    *,
    on_disk: bool,
) -> _native.WeightStore:
    if not on_disk:
        return cache.store(spec, lambda: pack(spec, weights)) if cache else pack(spec, weights)
    if cache is None:
        raise InvalidRequest(
            "the experts do not fit into memory, and no packed weights may be kept to read them "
            "from",
            hint="unset LOCALLLM_NO_PACKED_CACHE",
        )
    return cache.in_file(spec, lambda path: pack_to_file(path, spec, weights))


def _experts_of(spec: DecoderSpec) -> int:
    return sum(layer.ffn.experts for layer in spec.layers if isinstance(layer.ffn, MoESpec))


def choose_kernels(name: str | None) -> str:
    """The named kernels, or what LOCALLLM_CPU names, or the best that run here.

    Raises BackendUnavailable naming what is possible.
    """
    usable = _native.usable_kernels()
    asked = name or os.environ.get("LOCALLLM_CPU") or usable[-1]
    if asked not in usable:
        source = "" if name else "LOCALLLM_CPU: "
        raise BackendUnavailable(
            f"{source}no {asked!r} kernels can run on this machine",
            hint=f"possible here: {', '.join(usable)}",
        )
    return asked


def _join(parts: list[np.ndarray]) -> np.ndarray:
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.ascontiguousarray(joined, np.int32)
