"""What every backend promises. Subclass `BackendConformance` in a test module and say how to open.

class TestReference(BackendConformance):
    def open(self, spec, weights, *, num_blocks, block_size): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from localllm.adapters.lora import make_adapter
from localllm.backend.adapters import MAX_ADAPTERS
from localllm.backend.protocol import Backend, Batch, Chunk, StepCancelled
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import CheckpointError, InvalidRequest, OutOfMemoryPlan
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_groups
from tests.backend import oracle
from tests.backend.random_models import (
    PACKINGS,
    Packing,
    dense,
    linears_of,
    llama,
    merged,
    random_adapter,
    random_dense,
    random_weights,
    specs,
    unpacked,
)
from tests.examples import examples

BLOCK = 4
BLOCKS = 48

property_test = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.differing_executors,
        HealthCheck.filter_too_much,
        HealthCheck.too_slow,
    ],
)


class Sequence:
    """One sequence's tokens and blocks, handing out the chunks of its next tokens."""

    def __init__(self, tokens: np.ndarray, blocks: np.ndarray, prompt_length: int | None = None):
        self.tokens = tokens.astype(np.int32)
        self.blocks = blocks.astype(np.int32)
        self.prompt_length = len(tokens) if prompt_length is None else prompt_length
        self.done = 0

    def next(
        self, count: int, rows: tuple[int, ...] | None = None, adapter: int | None = None
    ) -> Chunk:
        start, self.done = self.done, self.done + count
        return Chunk(
            token_ids=self.tokens[start : self.done],
            start=start,
            block_table=self.blocks,
            logit_rows=tuple(range(count)) if rows is None else rows,
            prompt_length=self.prompt_length,
            adapter=adapter,
        )


class BackendConformance:
    # Against the oracle, relative to the largest logit: float32 through three layers of any kind.
    oracle_tolerance = 1e-4
    # Between two ways of computing the same rows, relative to the largest logit; 0: bit for bit.
    invariance_tolerance = 1e-5
    # Whether an expert is chosen must not hang on rounding where the oracle's is not shared.
    routing_margin = 0.0

    def open(
        self,
        spec: DecoderSpec,
        weights: Iterator[tuple[str, Tensor]],
        *,
        num_blocks: int,
        block_size: int,
    ) -> Backend:
        raise NotImplementedError

    @contextmanager
    def backend(self, spec: DecoderSpec, weights: dict[str, Tensor]) -> Iterator[Backend]:
        backend = self.open(spec, iter(weights.items()), num_blocks=BLOCKS, block_size=BLOCK)
        try:
            yield backend
        finally:
            backend.close()

    @contextmanager
    def llama(self) -> Iterator[Backend]:
        spec = llama()
        with self.backend(spec, dense(random_weights(spec))) as backend:
            yield backend

    def assert_same(self, got: np.ndarray, wanted: np.ndarray) -> None:
        assert_close(got, wanted, self.invariance_tolerance)

    def assert_same_in_float32(self, got, wanted, spec, weights, tokens) -> None:
        """As `assert_same`, but where the weights drawn let float32 promise less, that is enough.

        Two orders of the same sum differ as if its factors had been rounded otherwise. So what
        float32 promises is how far exact logits move when every weight moves by half a unit in its
        last place. Adapters of random weights, DoRA's above all, can bring that to 2e-5 of the
        largest logit. A backend that promises the same bits gets no such allowance.
        """
        tolerance = self.invariance_tolerance
        if tolerance and np.abs(got - wanted).max() > tolerance * np.abs(wanted).max():
            tolerance = max(tolerance, 2 * oracle.rounding(spec, weights, tokens))
        assert_close(got, wanted, tolerance)

    def assert_right(self, got: np.ndarray, wanted: np.ndarray) -> None:
        assert got.dtype == np.float32
        assert_close(got, wanted, self.oracle_tolerance)

    def assert_defined(self, got, spec, weights, tokens, prompt_length: int) -> None:
        margins: list[float] = []
        wanted = oracle.logits(spec, weights, tokens, prompt_length, margins)
        assume(min(margins, default=np.inf) >= self.routing_margin)
        self.assert_right(got, wanted)

    @settings(property_test, max_examples=examples(120))
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_any_spec_computes_what_its_fields_say(self, spec, seed, data):
        rng = np.random.default_rng(seed)
        weights = random_weights(spec, seed)
        tokens = rng.integers(0, spec.vocab_size, data.draw(st.integers(1, 20)))
        prompt_length = data.draw(st.integers(1, len(tokens)))
        sequence = Sequence(tokens, rng.permutation(BLOCKS), prompt_length)
        with self.backend(spec, dense(weights)) as backend:
            got = run(backend, sequence.next(len(tokens)))
        self.assert_defined(got, spec, weights, tokens, prompt_length)

    @settings(property_test, max_examples=examples(60))
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_a_row_depends_on_neither_its_chunk_nor_its_batch(self, spec, seed, data):
        rng = np.random.default_rng(seed)
        lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
        blocks = np.split(rng.permutation(BLOCKS)[: 5 * len(lengths)], len(lengths))
        sequences = []
        for length, own in zip(lengths, blocks, strict=True):
            tokens = rng.integers(0, spec.vocab_size, length)
            sequences.append(Sequence(tokens, own, data.draw(st.integers(1, length))))
        with self.backend(spec, dense(random_weights(spec, seed))) as backend:
            whole = [run(backend, s.next(len(s.tokens))) for s in sequences]
            stepwise = []
            for s in sequences:
                s.done = 0
                stepwise.append(np.concatenate([run(backend, s.next(1)) for _ in s.tokens]))
                s.done = 0
            mixed: list[list[np.ndarray]] = [[] for _ in sequences]
            while any(s.done < len(s.tokens) for s in sequences):
                chosen = [i for i, s in enumerate(sequences) if s.done < len(s.tokens)]
                if len(chosen) > 1:
                    chosen = data.draw(st.lists(st.sampled_from(chosen), min_size=1, unique=True))
                chunks = []
                for index in chosen:
                    s = sequences[index]
                    chunks.append(s.next(data.draw(st.integers(1, len(s.tokens) - s.done))))
                logits = run(backend, *chunks)
                ends = np.cumsum([len(c.token_ids) for c in chunks])[:-1]
                for index, part in zip(chosen, np.split(logits, ends), strict=True):
                    mixed[index].append(part)
        for index, wanted in enumerate(whole):
            self.assert_same(stepwise[index], wanted)
            self.assert_same(np.concatenate(mixed[index]), wanted)

    @pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
    def test_packed_weights_mean_what_their_definition_says(self, packing: Packing):
        rng = np.random.default_rng(7)
        spec = llama(hidden=256, layers=1)
        tensors = dense(random_weights(spec))
        for name, tensor in tensors.items():
            if len(tensor.shape) == 2:
                tensors[name] = packing.random(rng, tensor.shape)
        weights = {name: unpacked(tensor) for name, tensor in tensors.items()}
        tokens = rng.integers(0, spec.vocab_size, 40)
        wanted = oracle.logits(spec, weights, tokens, len(tokens))
        sequence = Sequence(tokens, np.arange(BLOCKS))
        with self.backend(spec, tensors) as backend:
            # Many rows, then few: a backend may take other ways for either.
            self.assert_right(run(backend, sequence.next(36)), wanted[:36])
            self.assert_right(run(backend, sequence.next(3)), wanted[36:39])
            self.assert_right(run(backend, sequence.next(1)), wanted[39:])

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_dense_weights_of_every_dtype_are_taken_as_they_are(self, dtype: str):
        rng = np.random.default_rng(8)
        spec = llama()
        tensors: dict[str, Tensor] = {
            name: random_dense(rng, tensor.shape, dtype)
            for name, tensor in dense(random_weights(spec)).items()
        }
        weights = {name: unpacked(tensor) for name, tensor in tensors.items()}
        tokens = rng.integers(0, spec.vocab_size, 12)
        with self.backend(spec, tensors) as backend:
            got = run(backend, Sequence(tokens, np.arange(BLOCKS)).next(12))
        self.assert_right(got, oracle.logits(spec, weights, tokens, len(tokens)))

    def test_only_the_rows_asked_for_come_back_in_the_order_asked(self):
        tokens = np.arange(12)
        with self.llama() as backend:
            whole = run(backend, Sequence(tokens, np.arange(8)).next(12))
            some = run(
                backend,
                Sequence(tokens, np.arange(8)).next(12, rows=(11, 0, 5)),
                Sequence(tokens, np.arange(8, 16)).next(12, rows=()),
                Sequence(tokens, np.arange(16, 24)).next(12, rows=(3,)),
            )
        self.assert_same(some, whole[[11, 0, 5, 3]])

    def test_a_step_without_logit_rows_still_fills_the_cache(self):
        tokens = np.arange(12)
        with self.llama() as backend:
            wanted = run(backend, Sequence(tokens, np.arange(8)).next(12))[11:]
            sequence = Sequence(tokens, np.arange(8, 16))
            assert run(backend, sequence.next(11, rows=())).shape == (0, backend.spec.vocab_size)
            self.assert_same(run(backend, sequence.next(1)), wanted)

    @settings(property_test, max_examples=examples(40))
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1))
    def test_each_kv_group_has_blocks_of_its_own(self, spec, seed):
        rng = np.random.default_rng(seed)
        groups = kv_groups(spec)
        tokens = rng.integers(0, spec.vocab_size, 20)
        with self.backend(spec, dense(random_weights(spec, seed))) as backend:
            wanted = run(backend, Sequence(tokens, np.arange(5)).next(20))
            tables = np.stack([rng.permutation(BLOCKS)[:5] for _ in groups])
            sequence = Sequence(tokens, tables)
            got = [run(backend, sequence.next(13))]
            for number, group in enumerate(groups):
                for block in range(3):
                    # Blocks before the window may be gone; the others may move.
                    if group.window is not None and 4 * (block + 1) <= 13 + 1 - group.window:
                        sequence.blocks[number, block] = -1
                        continue
                    old = int(sequence.blocks[number, block])
                    new = next(
                        b for b in rng.permutation(BLOCKS) if b not in sequence.blocks[number]
                    )
                    if block == 1:
                        backend.copy_block(number, old, int(new))
                    else:
                        content = backend.read_block(number, old)
                        backend.write_block(number, old, np.zeros_like(content))
                        backend.write_block(number, int(new), content)
                    sequence.blocks[number, block] = new
            got.append(run(backend, sequence.next(7)))
        self.assert_same(np.concatenate(got), wanted)

    def test_what_enters_the_head_can_be_had_and_projected_again(self):
        tokens = np.arange(12)
        with self.llama() as backend:
            chunk = Sequence(tokens, np.arange(8)).next(12, rows=(11, 3))
            hidden = np.zeros((12, backend.spec.hidden), np.float32)
            logits = backend.forward(Batch((chunk,)), hidden)
            self.assert_same(backend.project(hidden[[11, 3]]), logits)
            self.assert_same(backend.project(hidden[3:4]), logits[1:])
            assert backend.project(hidden[:0]).shape == (0, backend.spec.vocab_size)
            again = np.zeros_like(hidden)
            chunk = Sequence(tokens, np.arange(8)).next(12, rows=())
            assert backend.forward(Batch((chunk,)), again).shape == (0, backend.spec.vocab_size)
            self.assert_same(again, hidden)

    def test_embeddings_can_be_given_instead_of_tokens(self):
        spec = replace(llama(), embed_scale=3.0)
        tokens = np.arange(12)
        with self.backend(spec, dense(random_weights(spec))) as backend:
            chunk = Sequence(tokens, np.arange(8)).next(12, rows=(11, 3))
            wanted = backend.forward(Batch((chunk,)))
            given = replace(
                chunk,
                token_ids=np.zeros(12, np.int32),
                embeddings=backend.embed(tokens.tolist()),
            )
            self.assert_same(backend.forward(Batch((given,))), wanted)

    def test_some_rows_of_the_head_give_their_logits_alone(self):
        spec = replace(llama(), logit_scale=0.5, logit_softcap=3.0)
        weights = random_weights(spec)
        rows = np.array([2, 3, 17, 40])
        head = Dense(weights["embed.weight" if spec.tied_head else "head.weight"], "float32")
        hidden = np.random.default_rng(1).normal(size=(3, spec.hidden)).astype(np.float32)
        with self.backend(spec, dense(weights)) as backend:
            part = backend.part_of_head(head.rows(rows))
            whole = backend.project(hidden)
            self.assert_right(part(hidden), whole[:, rows].astype(np.float64))
            assert part(hidden[:0]).shape == (0, 4)

    def test_embeddings_are_those_of_the_weights(self):
        spec = replace(llama(), embed_scale=3.0)
        weights = random_weights(spec)
        with self.backend(spec, dense(weights)) as backend:
            got = backend.embed([5, 0, 5])
        self.assert_right(got, 3 * weights["embed.weight"][[5, 0, 5]])

    def test_an_empty_batch_has_no_logits(self):
        with self.llama() as backend:
            assert run(backend).shape == (0, backend.spec.vocab_size)

    def test_two_chunks_of_one_sequence_may_share_a_batch(self):
        tokens = np.arange(12)
        with self.llama() as backend:
            wanted = run(backend, Sequence(tokens, np.arange(8)).next(12))
            sequence = Sequence(tokens, np.arange(8, 16))
            self.assert_same(run(backend, sequence.next(5), sequence.next(7)), wanted)

    def test_sequences_may_share_the_blocks_of_a_common_prefix(self):
        ends = [np.array([5, 6, 7]), np.array([8, 9])]
        prefix = np.arange(20, 28)  # two full blocks
        with self.llama() as backend:
            run(backend, Sequence(prefix, np.array([30, 31])).next(8, rows=()))
            chunks, wanted = [], []
            for index, end in enumerate(ends):
                tokens = np.concatenate((prefix, end))
                wanted.append(run(backend, Sequence(tokens, np.arange(3)).next(len(tokens)))[8:])
                sequence = Sequence(tokens, np.array([30, 31, 10 + index]))
                sequence.done = 8
                chunks.append(sequence.next(len(end)))
            self.assert_same(run(backend, *chunks), np.concatenate(wanted))

    def test_positions_may_be_written_again_after_rejected_draft_tokens(self):
        tokens = np.arange(12)
        with self.llama() as backend:
            wanted = run(backend, Sequence(tokens, np.arange(8)).next(12))[6:]
            sequence = Sequence(tokens, np.arange(8, 16))
            run(backend, sequence.next(6))
            draft = Sequence(np.concatenate((tokens[:6], [90, 91, 92, 93])), sequence.blocks)
            draft.done = 6
            run(backend, draft.next(4))
            self.assert_same(run(backend, sequence.next(6)), wanted)

    @settings(property_test, max_examples=examples(60))
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_an_adapter_computes_what_weights_with_it_merged_in_do(self, spec, seed, data):
        weights = random_weights(spec, seed)
        adapter = random_adapter(
            spec,
            seed,
            rank=data.draw(st.sampled_from([1, 2, 4, 7, 16])),
            dtype=data.draw(st.sampled_from(["float32", "float16", "bfloat16"])),
            share=data.draw(st.sampled_from([0.3, 1.0])),
            dora=data.draw(st.sampled_from([None, weights])),
        )
        tokens = np.random.default_rng(seed).integers(0, spec.vocab_size, 12)
        with self.backend(spec, dense(weights)) as backend:
            index = backend.add_adapter(adapter)
            got = run(backend, Sequence(tokens, np.arange(3)).next(12, adapter=index))
        self.assert_defined(got, spec, merged(weights, adapter), tokens, 12)

    @settings(property_test, max_examples=examples(40))
    @given(spec=specs(), seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_rows_of_any_adapters_and_of_none_share_a_step_as_if_alone(self, spec, seed, data):
        rng = np.random.default_rng(seed)
        base = random_weights(spec, seed)
        adapters = [
            random_adapter(spec, seed, rank=5),
            random_adapter(spec, seed + 2, rank=4, share=0.7, dora=base),
            random_adapter(spec, seed + 1, rank=2, dtype="bfloat16", share=0.4),
        ]
        count = data.draw(st.integers(2, 5))
        blocks = np.split(rng.permutation(BLOCKS)[: 3 * count], count)
        lengths = [data.draw(st.integers(1, 12)) for _ in range(count)]
        tokens = [rng.integers(0, spec.vocab_size, length) for length in lengths]
        weights = dense(base)
        with self.backend(spec, weights) as backend:
            alone = [run(backend, Sequence(t, blocks[0]).next(len(t))) for t in tokens]
        with self.backend(spec, weights) as backend:
            changed = {backend.add_adapter(a): merged(base, a) for a in adapters}
            indices = [None, *changed]
            own = [data.draw(st.sampled_from(indices)) for _ in range(count)]
            for at, (t, adapter) in enumerate(zip(tokens, own, strict=True)):
                sequence = Sequence(t, blocks[0])
                single = run(backend, sequence.next(len(t), adapter=adapter))
                if adapter is None:
                    self.assert_same(single, alone[at])
                alone[at] = single
            sequences = [Sequence(t, b) for t, b in zip(tokens, blocks, strict=True)]
            parts: list[list[np.ndarray]] = [[] for _ in sequences]
            while left := [i for i, s in enumerate(sequences) if s.done < len(s.tokens)]:
                chunks = [
                    sequences[i].next(
                        data.draw(st.integers(1, len(tokens[i]) - sequences[i].done)),
                        adapter=own[i],
                    )
                    for i in left
                ]
                logits = run(backend, *chunks)
                ends = np.cumsum([len(c.token_ids) for c in chunks])[:-1]
                for i, part in zip(left, np.split(logits, ends), strict=True):
                    parts[i].append(part)
        for at, wanted in enumerate(alone):
            computed_with = changed.get(own[at], base)
            got = np.concatenate(parts[at])
            self.assert_same_in_float32(got, wanted, spec, computed_with, tokens[at])

    def test_a_removed_adapter_is_refused_and_its_index_given_to_another(self):
        spec = llama()
        first, second = random_adapter(spec, 1), random_adapter(spec, 2, rank=4)
        chunk = Sequence(np.arange(5), np.arange(2)).next(5)
        with self.llama() as backend:
            base = run(backend, chunk)
            index = backend.add_adapter(first)
            wanted = run(backend, replace(chunk, adapter=index))
            assert not np.allclose(wanted, base)
            backend.remove_adapter(index)
            with pytest.raises(InvalidRequest, match=f"adapter {index} is not loaded"):
                run(backend, replace(chunk, adapter=index))
            with pytest.raises(InvalidRequest, match="not loaded"):
                backend.remove_adapter(index)
            assert backend.add_adapter(second) == index
            other = backend.add_adapter(first)
            self.assert_same(run(backend, replace(chunk, adapter=other)), wanted)
            self.assert_same(run(backend, chunk), base)

    def test_adapters_are_loaded_until_no_slot_is_left(self):
        adapter = random_adapter(llama())
        with self.llama() as backend:
            assert backend.adapter_bytes(adapter) >= adapter.nbytes
            taken = [backend.add_adapter(adapter) for _ in range(MAX_ADAPTERS)]
            with pytest.raises(OutOfMemoryPlan, match="adapter slots") as error:
                backend.add_adapter(adapter)
            assert "max_adapters" in error.value.hint
            assert len(set(taken)) == len(taken) >= 8

    def test_an_adapter_of_another_model_is_refused(self):
        spec = llama()
        wide = random_adapter(llama(hidden=128))
        deep = random_adapter(llama(layers=3))
        pair = random_adapter(spec).targets[linears_of(spec)[0]]
        norm = make_adapter("norm", {"layers.0.attn_norm": pair})
        with self.llama() as backend:
            for adapter in (wide, deep, norm):
                with pytest.raises(CheckpointError, match=r"layers\.\d\."):
                    backend.add_adapter(adapter)

    def test_a_cancelled_step_can_be_run_again(self):
        chunk = Sequence(np.arange(40) % 96, np.arange(16)).next(40)
        with self.llama() as backend:
            wanted = run(backend, chunk)
            cancelled = 0
            with cancelling(backend):
                for _ in range(1000):
                    try:
                        assert np.array_equal(run(backend, chunk), wanted)
                    except StepCancelled:
                        cancelled += 1
            assert cancelled > 0
            assert np.array_equal(run(backend, chunk), wanted)

    def test_the_same_step_twice_gives_the_same_bits(self):
        tokens = np.arange(12)
        with self.llama() as backend:
            first, second = (
                run(backend, Sequence(tokens, np.arange(8)).next(12)) for _ in range(2)
            )
        assert np.array_equal(first, second)


@contextmanager
def cancelling(backend: Backend) -> Iterator[None]:
    """Meanwhile another thread cancels whatever step is under way, again and again."""
    over = Event()

    def cancel() -> None:
        while not over.wait(0.0002):
            backend.cancel()

    canceller = Thread(target=cancel)
    canceller.start()
    try:
        yield
    finally:
        over.set()
        canceller.join()


def assert_close(got: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Equal but for `tolerance` times the largest value wanted."""
    assert got.shape == wanted.shape
    error = np.abs(got - wanted).max(initial=0)
    assert error <= tolerance * np.abs(wanted).max(initial=0)


def run(backend: Backend, *chunks: Chunk) -> np.ndarray:
    return backend.forward(Batch(chunks))
