import gc
import resource
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from localllm.backend.protocol import Batch, Chunk
from localllm.backend.reference import ReferenceBackend
from localllm.backend.reference_attention import attention
from localllm.backend.reference_decoder import Decoder
from localllm.backend.reference_linear import AffineMatrix, DenseMatrix, to_matrix, to_vector
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.tensor import Dense
from localllm.errors import CheckpointError, InvalidRequest, OutOfMemoryPlan
from localllm.models import load_spec, load_weights
from localllm.spec.memory import kv_block_bytes
from localllm.spec.weights import weight_shapes
from tests.backend import oracle
from tests.backend.conformance import BackendConformance, Sequence, assert_close, run
from tests.backend.expert_conformance import ExpertConformance
from tests.backend.hybrid_conformance import HybridConformance
from tests.backend.random_models import (
    PACKINGS,
    Packing,
    dense,
    llama,
    random_weights,
    unpacked,
)


class TestReference(BackendConformance, HybridConformance, ExpertConformance):
    def open(self, spec, weights, **sizes):
        return ReferenceBackend(spec, weights, **sizes)


def small(spec=None, **changes) -> ReferenceBackend:
    spec = spec or llama()
    weights = {**dense(random_weights(spec)), **changes}
    return ReferenceBackend(spec, iter(weights.items()), num_blocks=8, block_size=4)


def chunk(tokens, **changes) -> Chunk:
    tokens = np.asarray(tokens, np.int32)
    fields = {
        "token_ids": tokens,
        "start": 0,
        "block_table": np.arange(8, dtype=np.int32),
        "logit_rows": (len(tokens) - 1,),
        "prompt_length": len(tokens),
    }
    return Chunk(**{**fields, **changes})


class TestLoading:
    def test_a_missing_weight_is_named(self):
        weights = dense(random_weights(llama()))
        del weights["layers.1.attn.q.weight"]
        with pytest.raises(CheckpointError, match=r"missing: layers\.1\.attn\.q\.weight"):
            ReferenceBackend(llama(), iter(weights.items()), num_blocks=1)

    def test_a_weight_that_the_spec_has_no_place_for_is_named(self):
        with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.q\.bias.*no such weight"):
            small(**{"layers.0.attn.q.bias": Dense(np.zeros(64, np.float32), "float32")})

    def test_a_misshapen_weight_is_named_with_both_shapes(self):
        with pytest.raises(CheckpointError, match=r"final_norm.*\[3\].*\[64\]"):
            small(**{"final_norm.weight": Dense(np.zeros(3, np.float32), "float32")})

    def test_a_repeated_weight_is_an_error(self):
        weights = list(dense(random_weights(llama())).items())
        with pytest.raises(CheckpointError, match=r"embed\.weight: given twice"):
            ReferenceBackend(llama(), iter([*weights, weights[0]]), num_blocks=1)

    def test_one_tensor_is_held_at_a_time(self):
        given: list[weakref.ref] = []
        most = 0

        def stream():
            nonlocal most
            for name, value in random_weights(llama()).items():
                tensor = Dense(value.copy(), "float32")
                given.append(weakref.ref(tensor.data))
                yield name, tensor
                del tensor
                gc.collect()
                most = max(most, sum(array() is not None for array in given))

        ReferenceBackend(llama(), stream(), num_blocks=1)
        assert len(given) == len(weight_shapes(llama()))
        assert most == 0  # none is left when the next is asked for

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_mapped_file_does_not_count_twice(self, tmp_path: Path):
        spec = llama(hidden=256, layers=4)
        weights = random_weights(spec)
        np.concatenate([value.ravel() for value in weights.values()]).tofile(tmp_path / "weights")
        resident: list[int] = []

        def stream():
            mapped = np.memmap(tmp_path / "weights", np.float32, "r")
            at = 0
            for name, value in weights.items():
                tensor = Dense(mapped[at : at + value.size].reshape(value.shape), "float32")
                assert np.array_equal(tensor.data, value)  # as a reader looks for NaN
                at += value.size
                yield name, tensor
                resident.append(_file_pages(tmp_path / "weights"))

        ReferenceBackend(spec, stream(), num_blocks=1)
        assert len(resident) == len(weights)
        assert max(resident) == 0

    @pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
    def test_a_packed_matrix_takes_the_bytes_it_has_in_the_file(self, packing: Packing):
        tensor = packing.random(np.random.default_rng(0), (8, 256))
        matrix = to_matrix(tensor)
        assert isinstance(matrix, AffineMatrix)
        arrays = [leaf for _, leaf in tree_flatten(matrix.parameters())]
        assert sum(array.nbytes for array in arrays) == tensor.nbytes

    @pytest.mark.parametrize("packing", [Packing("odd", 4, 8, biases=True), Packing("1", 1, 32)])
    def test_a_packing_unknown_to_mlx_becomes_dense_without_loss(self, packing: Packing):
        tensor = packing.random(np.random.default_rng(0), (8, 64))
        matrix = to_matrix(tensor)
        assert isinstance(matrix, DenseMatrix)
        rows = np.array(matrix.rows(mx.arange(8)))
        assert_close(rows, unpacked(tensor), 1e-6)


class TestMatrices:
    @pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
    @pytest.mark.parametrize("n", [1, 40])
    def test_products_and_rows_agree_with_the_definition(self, packing: Packing, n: int):
        rng = np.random.default_rng(1)
        tensor = packing.random(rng, (33, 256))
        wanted = unpacked(tensor)
        x = rng.normal(size=(n, 256)).astype(np.float32)
        matrix = to_matrix(tensor)
        got = np.array(matrix.matmul(mx.array(x)))
        assert_close(got, x @ wanted.T, 1e-5)
        rows = np.array(matrix.rows(mx.array([32, 0, 0, 5])))
        assert_close(rows, wanted[[32, 0, 0, 5]], 1e-6)

    @pytest.mark.parametrize("kind", ["float16", "packed", "packed and huge"])
    @pytest.mark.parametrize("n", [1, 24])
    def test_slabs_meet_without_a_seam(self, kind: str, n: int, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("localllm.backend.reference_linear.SLAB", 256 * 10)
        if kind == "packed and huge":
            monkeypatch.setattr("localllm.backend.reference_linear._HUGE", 1)
        rng = np.random.default_rng(2)
        tensor = PACKINGS[8].random(rng, (33, 256))
        if kind == "float16":
            tensor = Dense(rng.normal(size=(33, 256)).astype(np.float16), "float16")
        x = rng.normal(size=(n, 256)).astype(np.float32)
        matrix = to_matrix(tensor)
        wanted = unpacked(tensor)
        assert_close(np.array(matrix.matmul(mx.array(x))), x @ wanted.T, 1e-5)
        assert_close(np.array(matrix.rows(mx.array([32, 0, 9]))), wanted[[32, 0, 9]], 1e-6)

    def test_a_huge_packed_matrix_is_not_copied_while_loading(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ):
        tensor = PACKINGS[3].random(np.random.default_rng(0), (64, 256))
        tensor.codes.tofile(tmp_path / "codes")
        mapped = np.memmap(tmp_path / "codes", np.uint32, "r", shape=tensor.codes.shape)
        monkeypatch.setattr("localllm.backend.reference_linear._HUGE", tensor.codes.nbytes)
        assert to_matrix(tensor).codes is tensor.codes
        # A view into a file is copied: the file may change or go away.
        assert isinstance(to_matrix(replace(tensor, codes=mapped)).codes, mx.array)


class TestPool:
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_memory_becomes_resident_only_where_blocks_are_used(self):
        spec = llama()
        blocks = (8 << 30) // kv_block_bytes(spec, 32)
        weights = dense(random_weights(spec))
        before = _resident()
        backend = ReferenceBackend(spec, iter(weights.items()), num_blocks=blocks)
        last = np.array([blocks - 1], np.int32)
        backend.forward(Batch((chunk([1, 2, 3], block_table=last),)))
        assert _resident() - before < 1 << 28

    def test_a_pool_that_cannot_be_had_names_the_knob(self):
        weights = dense(random_weights(llama()))
        with pytest.raises(OutOfMemoryPlan, match="KV pool") as error:
            ReferenceBackend(llama(), iter(weights.items()), num_blocks=1 << 50)
        assert "fewer KV blocks" in error.value.hint

    def test_blocks_that_left_every_window_may_be_given_away(self):
        spec = llama(window=5)
        weights = random_weights(spec)
        tokens = np.arange(16)
        wanted = oracle.logits(spec, weights, tokens, 16)[15]
        backend = small(spec)
        run(backend, chunk(tokens[:15]))
        table = np.arange(8, dtype=np.int32)
        table[:2] = -1  # positions 0 … 7; the row at 15 sees 11 … 15
        got = run(backend, chunk(tokens[15:], start=15, block_table=table))
        assert_close(got[0], wanted, 1e-5)

    def test_long_chunks_attend_in_parts_without_a_seam(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("localllm.backend.reference._QUERY_ROWS", 3)
        for window in (None, 4):
            spec = llama(window=window)
            wanted = oracle.logits(spec, random_weights(spec), np.arange(20), 20)
            got = run(small(spec), chunk(np.arange(20), logit_rows=tuple(range(20))))
            assert_close(got, wanted, 1e-5)


class TestBrokenPromises:
    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            (chunk([1, 96]), "token ids 1 … 96 in a vocabulary of 96"),
            (chunk([-1, 2]), "token ids -1 … 2"),
            (chunk([]), "without tokens"),
            (chunk([1], start=-1), "position -1"),
            (chunk([1, 2], start=63), "positions up to 64 in a context of 64"),
            (chunk(range(9), block_table=np.arange(2)), "table of 2 for 9 positions: 3 are needed"),
            (chunk([1], block_table=np.array([8])), "blocks 8 … 8 in a pool of 8"),
            (chunk([1], block_table=np.array([-1])), "blocks -1"),
            (chunk([1, 2], logit_rows=(2,)), r"rows \(2,\) in a chunk of 2"),
            (chunk([1, 2], logit_rows=(-1,)), "chunk of 2"),
        ],
    )
    def test_a_malformed_chunk_is_stopped_with_its_reason(self, broken: Chunk, message: str):
        with pytest.raises(AssertionError, match=message):
            run(small(), broken)

    def test_positions_end_with_the_learned_ones(self):
        spec = replace(llama(), learned_positions=6)
        backend = small(spec)
        run(backend, chunk(range(6)))
        with pytest.raises(AssertionError, match="positions up to 6 in a context of 6"):
            run(backend, chunk(range(7)))

    def test_an_adapter_is_refused_since_none_is_loaded(self):
        with pytest.raises(InvalidRequest, match="adapter 0 is not loaded"):
            run(small(), chunk([1], adapter=0))

    def test_a_closed_backend_answers_no_more(self):
        backend = small()
        backend.close()
        backend.close()
        with pytest.raises(AssertionError, match="closed"):
            run(backend, chunk([1]))


def test_a_backend_may_be_used_from_another_thread_than_it_was_opened_in():
    backend = small()
    wanted = run(backend, chunk([1, 2, 3]))
    got = []
    thread = threading.Thread(target=lambda: got.append(run(backend, chunk([1, 2, 3]))))
    thread.start()
    thread.join()
    assert np.array_equal(got[0], wanted)


def test_the_decoder_trains_with_attention_over_the_batch_itself():
    """The seam for training: gradients reach every parameter without a KV pool."""
    spec = llama(layers=1)
    parts = {
        name: (to_vector if len(tensor.shape) == 1 else to_matrix)(tensor)
        for name, tensor in dense(random_weights(spec)).items()
    }
    decoder = Decoder(spec, parts)
    tokens, positions = np.arange(6), np.arange(6)

    def attend(layer, q, kv):
        return attention(spec.layers[layer].mixer, q, *kv, positions, positions)

    def loss(parameters):
        decoder.update(parameters)
        hidden = decoder(tokens, positions, np.full(6, 6), attend)
        return mx.mean(mx.square(decoder.logits(hidden)))

    start = decoder.parameters()
    gradients = dict(tree_flatten(mx.grad(loss)(start)))
    assert set(gradients) == {name for name, _ in tree_flatten(start)}
    assert all(float(mx.abs(g).max()) > 0 for g in gradients.values())


def test_a_whole_conversation_of_sequences_fits_any_blocks():
    """Blocks handed from one finished sequence to the next leave nothing behind."""
    backend = small()
    rng = np.random.default_rng(5)
    weights = random_weights(llama())
    for _ in range(4):
        tokens = rng.integers(0, 96, 20)
        got = run(backend, Sequence(tokens, rng.permutation(8)).next(20))
        wanted = oracle.logits(llama(), weights, tokens, 20)
        assert_close(got, wanted, 1e-5)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _file_pages(path: Path) -> int:
    """Bytes of the file that this process has mapped in."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024
        for line in lines
        if line.endswith(str(path))
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_real_weights_compute_what_the_oracle_does(model: str, request: pytest.FixtureRequest):
    path = request.getfixturevalue(model)
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, 24)
    weights = {name: tensor.to_float32() for name, tensor in load_weights(checkpoint, spec)}
    wanted = oracle.logits(spec, weights, tokens, 24)
    backend = ReferenceBackend(spec, load_weights(checkpoint, spec), num_blocks=8)
    sequence = Sequence(tokens, np.arange(8))
    whole = run(backend, sequence.next(24))
    assert_close(whole, wanted, 1e-5)
    sequence.done = 0
    assert_close(np.concatenate([run(backend, sequence.next(1)) for _ in tokens]), whole, 1e-5)
