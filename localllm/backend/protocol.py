"""The one call every backend answers, and the batch it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from localllm.adapters.lora import LoraAdapter
from localllm.checkpoint.tensor import Tensor
from localllm.errors import LocalLLMError
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_groups

Activations = Literal["int8", "float32"]
# Hidden states as they enter the head, float32 [n, hidden] -> logits, float32 [n, m].
Projection = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class StateSlots:
    """Where a chunk finds and leaves the state of recurrent layers.

    source: the slot of the state before the chunk's first row; None: the sequence begins with it.
    target: another slot, which then holds the state after all rows but the guesses. So a step that
        was cancelled or failed can be done again: what it read is still there.
    guesses: of the last rows, those that may be wrong. `Backend.replay` adds the right ones.
    """

    source: int | None
    target: int
    guesses: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one sequence: a prefill chunk, one decode row, or rows to verify.

    token_ids: int32 [n]; they stand at positions start … start + n - 1.
    block_table: int32 [m], the KV blocks of positions 0 …, at least enough for start + n positions;
        or [groups, m], a row for each of `kv_groups(spec)`. One row serves every group. Blocks that
        lie wholly before a group's window are not looked at.
    logit_rows: which rows (0 … n-1) need logits.
    prompt_length: RoPE kinds whose frequencies depend on the length (dynamic, longrope) use
        max(prompt_length, position + 1) for each row, as transformers does when it generates;
        a row's result then does not depend on how the prompt was chunked.
    adapter: index of a loaded adapter (see `Backend.add_adapter`), or None for the base model.
    state: needed by models with recurrent layers, and by no others. A chunk may begin with what an
        earlier one of the batch leaves.
    embeddings: float32 [n, hidden], what the first layer takes instead of the tokens' own
        embeddings. All chunks of a batch have some, or none.
    """

    token_ids: np.ndarray
    start: int
    block_table: np.ndarray
    logit_rows: tuple[int, ...]
    prompt_length: int
    adapter: int | None = None
    state: StateSlots | None = None
    embeddings: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """Chunks of different sequences, computed in one step."""

    chunks: tuple[Chunk, ...]

    def embeddings(self) -> np.ndarray | None:
        """float32 [rows, hidden], of all chunks."""
        given = [c.embeddings for c in self.chunks if c.embeddings is not None]
        assert len(given) in (0, len(self.chunks)), "embeddings of some chunks only"
        return np.ascontiguousarray(np.concatenate(given), np.float32) if given else None


class StepCancelled(LocalLLMError):
    """A step was stopped by `cancel`; the cache holds its rows only in part.

    They may be computed again.
    """


def blocks_of_groups(spec: DecoderSpec, num_blocks: int | Sequence[int]) -> tuple[int, ...]:
    """How many blocks each of `kv_groups(spec)` has, when one number stands for all."""
    groups = len(kv_groups(spec))
    blocks = (num_blocks,) * groups if isinstance(num_blocks, int) else tuple(num_blocks)
    assert len(blocks) == groups, f"{len(blocks)} pools for {groups} KV groups"
    return blocks


def checked_slots(spec: DecoderSpec, slots: int) -> int:
    """How many states a backend keeps of this model: none where it has no recurrent layers."""
    recurrent = any(True for _ in spec.recurrences)
    assert slots > 1 or not recurrent, f"{slots} states: a step reads one and writes another"
    return slots if recurrent else 0


def check_slots(spec: DecoderSpec, chunk: Chunk, slots: int) -> None:
    """Asserts what `StateSlots` promises."""
    if not slots:
        assert chunk.state is None, "a state for a model without recurrent layers"
        return
    state = chunk.state
    assert state is not None, f"a {spec.architecture} chunk without a state"
    assert (state.source is None) == (chunk.start == 0), "only a sequence's start has no state"
    assert state.source is None or 0 <= state.source < slots, f"state {state.source} of {slots}"
    assert 0 <= state.target < slots, f"state {state.target} of {slots}"
    assert state.target != state.source, "a state would be written over what it comes from"
    assert 0 <= state.guesses < len(chunk.token_ids), f"{state.guesses} guesses"


class Backend(Protocol):
    """`forward` writes the K and V of every row into the pool and returns the logits asked for.

    Recurrent layers keep one state of fixed size for each sequence, of all layers together, in a
    pool of `state_slots` slots: 0 where the model has none.
    """

    name: str
    spec: DecoderSpec
    block_size: int  # positions in a KV block
    num_blocks: int  # KV blocks of every group at least
    group_blocks: tuple[int, ...]  # KV blocks of each of `kv_groups(spec)`
    state_slots: int  # states of recurrent layers
    step_rows: int  # rows in a step beyond which more gain nothing
    activations: Activations  # as what they meet quantized weights

    @property
    def from_cache(self) -> bool:
        """Whether the weights were read as an earlier start had prepared them."""
        ...

    @property
    def load_note(self) -> str | None:
        """Why loading took longer than it could, or will next time; None if neither."""
        ...

    @property
    def kv_form(self) -> str:
        """Names how K and V are computed and laid out: equal names, equal bits."""
        ...

    def forward(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        """float32 [sum of len(logit_rows), vocab_size], in the order of chunks and rows.

        hidden: float32 [rows of all chunks, spec.hidden], to be filled with what enters the head,
            or would.
        """
        ...

    def project(self, hidden: np.ndarray) -> np.ndarray:
        """The head alone: logits float32 [n, vocab_size] of float32 [n, spec.hidden]."""
        ...

    def part_of_head(self, rows: Tensor) -> Projection:
        """`project` with some rows [m, hidden] of the head alone: logits float32 [n, m].

        What the head's bias would add is left out.
        """
        ...

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [n, spec.hidden]: the tokens' embeddings as the first layer takes them."""
        ...

    def add_adapter(self, adapter: LoraAdapter) -> int:
        """Loads it and returns its index, for chunks to name until it is removed.

        Raises CheckpointError for one that does not fit the model, UnsupportedModel for one on
        experts where the backend cannot compute these, OutOfMemoryPlan when all of the
        `max_adapters` slots are taken or there is no memory for it.
        """
        ...

    def remove_adapter(self, index: int) -> None:
        """Frees the index. K and V that were computed with the adapter stay in their blocks."""
        ...

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """What loading it takes. Raises UnsupportedModel as `add_adapter` does."""
        ...

    def copy_block(self, group: int, source: int, target: int) -> None: ...

    def read_block(self, group: int, block: int) -> np.ndarray:
        """uint8 [n]: a copy of a KV block, n the same for every block of the group.

        Safe from any thread while no step writes to the block.
        """
        ...

    def write_block(self, group: int, block: int, content: np.ndarray) -> None:
        """Puts back what `read_block` gave."""
        ...

    def replay(self, chunk: int, first: int, rows: int, source: int, target: int) -> None:
        """Carries a state on over guesses of the last step that were right.

        chunk: its number in the last batch. first, rows: which of its guesses, from 0 on. source:
        the slot of the state before them; target: the slot for the state after them, maybe the
        same.
        """
        ...

    def read_state(self, slot: int) -> np.ndarray:
        """uint8 [n]: a copy of a slot, n the same for every slot.

        Safe from any thread while no step writes to the slot.
        """
        ...

    def write_state(self, slot: int, content: np.ndarray) -> None:
        """Puts back what `read_state` gave."""
        ...

    def cancel(self) -> None:
        """From any thread or a signal handler: the step under way, if there is one, raises
        StepCancelled within a layer."""
        ...

    def close(self) -> None: ...
