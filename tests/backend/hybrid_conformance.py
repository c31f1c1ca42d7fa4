"""What backends promise of models with recurrent layers. Mix into a `BackendConformance`."""

from contextlib import contextmanager

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.backend.protocol import Batch, Chunk, StateSlots, StepCancelled
from tests.backend import oracle
from tests.backend.conformance import BLOCK, BLOCKS, cancelling, property_test
from tests.backend.random_models import (
    dense,
    hybrid,
    hybrids,
    merged,
    random_adapter,
    random_weights,
)
from tests.examples import examples

SLOTS = 6


class Recurring:
    """One sequence in a backend, its state in slots that are free."""

    def __init__(self, backend, tokens, blocks):
        self.backend, self.tokens, self.blocks = backend, tokens.astype(np.int32), blocks
        self.slot: int | None = None
        self.done = 0
        self.free = list(range(SLOTS))

    def chunk(self, count: int, guesses=(), adapter=None) -> Chunk:
        """The next tokens, and guesses after them. The state moves to another slot."""
        start, self.done = self.done, self.done + count
        source, self.slot = self.slot, self.free.pop(0)
        self.free += [] if source is None else [source]
        ids = np.concatenate((self.tokens[start : self.done], np.array(guesses, np.int32)))
        state = StateSlots(source, self.slot, len(guesses))
        table = self.blocks.astype(np.int32)
        wanted = tuple(range(len(ids)))
        return Chunk(ids.astype(np.int32), start, table, wanted, len(self.tokens), adapter, state)

    def guess(self, right: int, wrong: int, data: st.DataObject) -> np.ndarray:
        """One token and then guesses, of which the first `right` are right: those rows' logits."""
        after = self.tokens[self.done + 1 : self.done + 1 + right]
        chunk = self.chunk(1, guesses=[*after, *[3] * wrong])
        logits = self.backend.forward(Batch((chunk,)))[: 1 + right]
        assert self.slot is not None
        done = 0
        while done < right:
            count = data.draw(st.integers(1, right - done))
            to = data.draw(st.sampled_from([self.slot, self.free[0]]))
            self.backend.replay(0, done, count, self.slot, to)
            if to != self.slot:
                self.free[0], self.slot = self.slot, to
            done += count
        self.done += right
        return logits


class HybridConformance:
    @contextmanager
    def hybrid(self, spec, weights):
        backend = self.open(
            spec, iter(weights.items()), num_blocks=BLOCKS, block_size=BLOCK, state_slots=SLOTS
        )
        try:
            yield backend
        finally:
            backend.close()

    @settings(property_test, max_examples=examples(20))
    @given(spec=hybrids(), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 20))
    def test_any_hybrid_computes_what_its_fields_say(self, spec, seed, count):
        rng = np.random.default_rng(seed)
        weights = random_weights(spec, seed)
        tokens = rng.integers(0, spec.vocab_size, count)
        with self.hybrid(spec, dense(weights)) as backend:
            sequence = Recurring(backend, tokens, rng.permutation(BLOCKS))
            got = backend.forward(Batch((sequence.chunk(count),)))
        self.assert_right(got, oracle.logits(spec, weights, tokens, count))

    @settings(property_test, max_examples=examples(20))
    @given(spec=hybrids(), seed=st.integers(0, 2**32 - 1), data=st.data())
    def test_a_state_does_not_show_how_it_came_about(self, spec, seed, data):
        """By chunks, two of them in a batch, guesses right and wrong, and copies of states."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, spec.vocab_size, data.draw(st.integers(2, 24)))
        with self.hybrid(spec, dense(random_weights(spec, seed))) as backend:
            sequence = Recurring(backend, tokens, rng.permutation(BLOCKS))
            wanted = backend.forward(Batch((sequence.chunk(len(tokens)),)))
            sequence = Recurring(backend, tokens, rng.permutation(BLOCKS))
            got = []
            while (left := len(tokens) - sequence.done) > 0:
                way = data.draw(st.sampled_from(["one", "two", "guesses", "move"]))
                if way == "move" and sequence.slot is not None:
                    content = backend.read_state(sequence.slot)
                    backend.write_state(sequence.slot, np.zeros_like(content))
                    sequence.free.append(sequence.slot)
                    sequence.slot = sequence.free.pop(0)
                    backend.write_state(sequence.slot, content)
                elif way == "guesses":
                    right = data.draw(st.integers(0, min(left - 1, 6)))
                    got.append(sequence.guess(right, data.draw(st.integers(0, 3)), data))
                else:
                    chunks = [sequence.chunk(data.draw(st.integers(1, left)))]
                    left = len(tokens) - sequence.done
                    if way == "two" and left:
                        chunks.append(sequence.chunk(data.draw(st.integers(1, left))))
                    got.append(backend.forward(Batch(tuple(chunks))))
        self.assert_same(np.concatenate(got), wanted)

    @settings(property_test, max_examples=examples(8))
    @given(spec=hybrids(), seed=st.integers(0, 2**32 - 1), dora=st.booleans())
    def test_an_adapter_of_a_hybrid_computes_what_merged_weights_do(self, spec, seed, dora):
        weights = random_weights(spec, seed)
        adapter = random_adapter(spec, seed, dora=weights if dora else None)
        tokens = np.random.default_rng(seed).integers(0, spec.vocab_size, 9)
        with self.hybrid(spec, dense(weights)) as backend:
            index = backend.add_adapter(adapter)
            sequence = Recurring(backend, tokens, np.arange(BLOCKS))
            got = backend.forward(Batch((sequence.chunk(9, adapter=index),)))
        self.assert_right(got, oracle.logits(spec, merged(weights, adapter), tokens, 9))

    def test_a_cancelled_step_of_a_hybrid_can_be_run_again(self):
        spec, tokens = hybrid(), np.arange(60) % 96
        with self.hybrid(spec, dense(random_weights(spec))) as backend:
            sequence = Recurring(backend, tokens, np.arange(BLOCKS))
            backend.forward(Batch((sequence.chunk(10),)))
            batch = Batch((sequence.chunk(40),))
            wanted = backend.forward(batch)
            cancelled = 0
            with cancelling(backend):
                for _ in range(1000):
                    try:
                        assert np.array_equal(backend.forward(batch), wanted)
                    except StepCancelled:
                        cancelled += 1
                    if cancelled == 5:
                        break
            assert cancelled == 5
            assert np.array_equal(backend.forward(batch), wanted)
            after = backend.forward(Batch((sequence.chunk(1),)))
            sequence = Recurring(backend, tokens, np.arange(BLOCKS)[::-1])
            self.assert_same(after, backend.forward(Batch((sequence.chunk(51),)))[50:])
