"""The cpu backend keeps every backend's promises, and its own: the same bits whatever the way."""

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localllm.backend.cpu import CpuBackend
from localllm.backend.cpu_adapters import pack_adapter
from localllm.backend.cpu_cache import PackedCache
from localllm.backend.protocol import StateSlots, StepCancelled
from localllm.errors import BackendUnavailable, CheckpointError, InvalidRequest, OutOfMemoryPlan
from localllm.kernels_cpu import _native
from tests.backend.conformance import BackendConformance, Sequence, assert_close, run
from tests.backend.expert_conformance import ExpertConformance
from tests.backend.hybrid_conformance import HybridConformance
from tests.backend.random_models import (
    PACKINGS,
    dense,
    hybrid,
    llama,
    random_adapter,
    random_weights,
)
from tests.backend.test_experts import mixture

KERNELS = _native.usable_kernels()


class TestAccurate(BackendConformance, HybridConformance, ExpertConformance):
    """float32 activations and cache: as near to the definition as the reference."""

    invariance_tolerance = 0

    def open(self, spec, weights, **sizes):
        return CpuBackend(spec, weights, **sizes, threads=2, kv_bits=32, float_activations=True)


class TestDefault(BackendConformance, HybridConformance, ExpertConformance):
    """int8 activations and a float16 cache: bit-identical to itself, near to the definition."""

    # Each matmul rounds its input to 8 bits by groups of 32: half a percent of it, rms.
    oracle_tolerance = 3e-2
    routing_margin = 3e-2
    invariance_tolerance = 0

    # These random weights have large means, which make scores that magnify any rounding.
    # tests/kernels_cpu holds every packing to 1e-6 given the rounded input.
    test_packed_weights_mean_what_their_definition_says = None

    def open(self, spec, weights, **sizes):
        return CpuBackend(spec, weights, **sizes, threads=2)


def small(spec=None, **options) -> CpuBackend:
    spec = spec or llama()
    options = {"num_blocks": 8, "block_size": 4, **options}
    return CpuBackend(spec, iter(dense(random_weights(spec)).items()), **options)


def logits(backend: CpuBackend, count: int = 12) -> np.ndarray:
    return run(backend, Sequence(np.arange(count), np.arange(8)).next(count))


class TestOneArithmetic:
    def test_thread_counts_and_instruction_sets_give_the_same_bits(self):
        wanted = logits(small(threads=1, kernels="scalar"))
        for kernels in _native.usable_kernels():
            for threads in (1, 2, 5):
                assert np.array_equal(logits(small(threads=threads, kernels=kernels)), wanted)

    def test_hybrids_have_the_same_bits_too(self):
        def states(**options) -> np.ndarray:
            with_state = small(hybrid(), state_slots=2, **options)
            chunk = replace(
                Sequence(np.arange(12), np.arange(8)).next(12), state=StateSlots(None, 1)
            )
            return np.concatenate(
                [run(with_state, chunk).ravel().view(np.uint8), with_state.read_state(1)]
            )

        wanted = states(threads=1, kernels="scalar")
        for kernels in _native.usable_kernels():
            for threads in (1, 2, 5):
                assert np.array_equal(states(threads=threads, kernels=kernels), wanted)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("spec", [llama(hidden=96), mixture(experts=3)], ids=["llama", "moe"])
    def test_adapters_do_not_change_that(self, spec, dtype):
        adapters = [
            random_adapter(spec, n, rank=7, dtype=dtype, share=0.7, experts=True) for n in range(3)
        ]

        def answers(**options) -> np.ndarray:
            backend = small(spec, num_blocks=20, **options)
            for adapter in adapters:
                backend.add_adapter(adapter)
            chunks = [
                Sequence(np.arange(12), np.arange(5) + 5 * at).next(12, adapter=index)
                for at, index in enumerate((2, None, 0, 2))
            ]
            return run(backend, *chunks)

        wanted = answers(threads=1, kernels="scalar")
        assert not np.array_equal(wanted[:12], wanted[12:24])
        assert np.array_equal(wanted[:12], wanted[36:])
        for kernels in KERNELS:
            for threads in (1, 2, 5):
                assert np.array_equal(answers(threads=threads, kernels=kernels), wanted)

    def test_block_sizes_give_the_same_bits(self):
        spec = llama(window=7)
        tokens = np.arange(70) % 96
        results = []
        for block_size in (3, 16, 32, 64):
            blocks = -(-70 // block_size)
            backend = small(spec, num_blocks=blocks, block_size=block_size)
            results.append(run(backend, Sequence(tokens, np.arange(blocks)[::-1]).next(70)))
        assert all(np.array_equal(result, results[0]) for result in results)

    def test_a_sequence_with_nan_in_its_cache_leaves_its_neighbours_alone(self):
        spec = llama()
        weights = random_weights(spec)
        weights["embed.weight"][90] = np.nan
        tensors = dense(weights)
        backend = CpuBackend(spec, iter(tensors.items()), num_blocks=16, block_size=4)
        clean = Sequence(np.arange(12), np.arange(8))
        wanted = run(backend, clean.next(12))
        clean.done = 0
        spoilt = Sequence(np.array([1, 2, 90, 3]), np.arange(8, 16))
        both = run(backend, spoilt.next(4), clean.next(12))
        # The head is tied, so token 90 has no score anywhere; all else is as before.
        others = np.arange(96) != 90
        assert np.array_equal(both[4:, others], wanted[:, others])
        assert np.isfinite(both[:2, others]).all()
        assert np.isnan(both[2:4]).all()


class TestQuantizedCache:
    @pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.01), (4, 0.25)])
    def test_fewer_bits_stay_near(self, bits, tolerance):
        wanted = logits(small(kv_bits=32, float_activations=True))
        got = logits(small(kv_bits=bits, float_activations=True))
        assert_close(got, wanted, tolerance)
        assert not np.array_equal(got, wanted)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_chunks_do_not_matter(self, bits):
        wanted = logits(small(kv_bits=bits))
        backend = small(kv_bits=bits)
        sequence = Sequence(np.arange(12), np.arange(8))
        got = [run(backend, sequence.next(n)) for n in (1, 5, 2, 4)]
        assert np.array_equal(np.concatenate(got), wanted)

    def test_the_cache_shrinks_with_its_bits(self):
        spec = llama(hidden=256)  # heads of 64
        sizes = [
            small(spec, kv_bits=bits, num_blocks=2048, block_size=32).kv_bytes
            for bits in (32, 16, 8, 4)
        ]
        assert sizes[1] == sizes[0] / 2
        assert sizes[2] < 0.54 * sizes[1]
        assert sizes[3] < 0.29 * sizes[1]


class TestChoice:
    def test_the_environment_forces_an_instruction_set(self, monkeypatch):
        monkeypatch.setenv("LOCALLLM_CPU", "scalar")
        assert small().kernels == "scalar"

    @pytest.mark.parametrize("name", ["sse9", "neon" if "avx2" in KERNELS else "avx2"])
    def test_one_that_cannot_run_here_is_refused_with_those_that_can(self, monkeypatch, name):
        monkeypatch.setenv("LOCALLLM_CPU", name)
        with pytest.raises(BackendUnavailable, match=name) as error:
            small()
        assert all(possible in error.value.hint for possible in KERNELS)

    def test_threads_are_as_asked_and_at_least_one(self):
        assert small(threads=3).threads == 3
        assert small().threads == _native.default_threads()
        with pytest.raises(InvalidRequest, match="threads"):
            small(threads=0)

    def test_unknown_cache_widths_are_refused(self):
        with pytest.raises(InvalidRequest, match="kv_bits"):
            small(kv_bits=5)

    def test_default_threads_follow_affinity(self):
        if not hasattr(os, "sched_setaffinity"):
            pytest.skip("no affinity on this system")
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert _native.default_threads() == 1
        finally:
            os.sched_setaffinity(0, allowed)


class TestLoading:
    def test_weights_that_do_not_fit_are_named(self):
        spec = llama()
        good = dense(random_weights(spec))
        missing = {k: v for k, v in good.items() if k != "layers.1.attn.q.weight"}
        with pytest.raises(CheckpointError, match=r"layers\.1\.attn\.q\.weight"):
            CpuBackend(spec, iter(missing.items()), num_blocks=1)
        with pytest.raises(CheckpointError, match="extra"):
            CpuBackend(spec, iter({**good, "extra": good["embed.weight"]}.items()), num_blocks=1)
        with pytest.raises(CheckpointError, match="given twice"):
            CpuBackend(spec, iter([*good.items(), *good.items()]), num_blocks=1)
        wrong = {**good, "layers.0.attn.k.weight": good["embed.weight"]}
        with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.k\.weight.*shape"):
            CpuBackend(spec, iter(wrong.items()), num_blocks=1)

    def test_a_pool_that_does_not_fit_memory_is_refused(self):
        with pytest.raises(OutOfMemoryPlan, match="KV blocks"):
            small(num_blocks=2**31 - 1, block_size=65536)


class TestSteps:
    def test_an_adapter_that_is_not_loaded_is_refused(self):
        chunk = Sequence(np.arange(4), np.arange(8)).next(4)
        with pytest.raises(InvalidRequest, match="adapter 3"):
            run(small(), replace(chunk, adapter=3))

    def test_adapters_of_16_bits_are_held_in_16_bits(self):
        spec = llama(hidden=256)
        backend = small(spec)
        wide, narrow = (random_adapter(spec, rank=8, dtype=d) for d in ("float32", "bfloat16"))
        assert backend.adapter_bytes(wide) == wide.nbytes == 2 * backend.adapter_bytes(narrow)

    def test_a_packed_adapter_of_another_model_never_reaches_a_step(self):
        spec = llama(hidden=128)
        packed = pack_adapter(spec, random_adapter(spec))
        backend = small()
        index = backend._adapters.put(packed)
        with pytest.raises(ValueError, match="not one of this model"):
            run(backend, replace(Sequence(np.arange(4), np.arange(8)).next(4), adapter=index))

    @pytest.mark.parametrize(
        "changes",
        [
            {"token_ids": np.array([96], np.int32)},
            {"token_ids": np.array([-1], np.int32)},
            {"block_table": np.array([8], np.int32)},
            {"block_table": np.array([-1], np.int32)},
            {"block_table": np.zeros(0, np.int32)},
            {"start": -1},
            {"start": 4, "block_table": np.array([0], np.int32)},
            {"logit_rows": (1,)},
            {"logit_rows": (-1,)},
        ],
        ids=str,
    )
    def test_nothing_outside_the_model_or_pool_is_touched(self, changes):
        chunk = replace(Sequence(np.arange(1), np.arange(1)).next(1), **changes)
        with pytest.raises(ValueError, match=r".+"):
            run(small(), chunk)

    def test_freed_blocks_before_a_window_are_not_read(self):
        spec = llama(window=5)
        wanted = run(small(spec), Sequence(np.arange(20), np.arange(8)).next(20))[16:]
        backend = small(spec)
        sequence = Sequence(np.arange(20), np.arange(8))
        run(backend, sequence.next(16))
        sequence.blocks = sequence.blocks.copy()
        sequence.blocks[:3] = -1  # positions 0 … 11; position 16 sees 12 …
        assert np.array_equal(run(backend, sequence.next(4)), wanted)

    def test_a_step_can_be_cancelled_and_the_next_one_runs(self):
        spec = llama(hidden=512, layers=24)
        backend = small(spec, num_blocks=64, block_size=32, threads=2)
        tokens = np.arange(1500) % 96
        whole = timed(lambda: run(backend, Sequence(tokens, np.arange(64)).next(1500, rows=())))
        timer = threading.Timer(whole / 8, backend.cancel)
        timer.start()
        with pytest.raises(StepCancelled):
            run(backend, Sequence(tokens, np.arange(64)).next(1500, rows=()))
        timer.join()
        assert np.isfinite(run(backend, Sequence(tokens, np.arange(64)).next(3))).all()

    def test_signal_handlers_run_during_a_step(self):
        """So that Ctrl-C need not wait for a long prompt."""
        spec = llama(hidden=512, layers=24)
        backend = small(spec, num_blocks=64, block_size=32, threads=2)
        tokens = np.arange(1500) % 96
        whole = timed(lambda: run(backend, Sequence(tokens, np.arange(64)).next(1500, rows=())))
        before = signal.signal(signal.SIGALRM, lambda *_: backend.cancel())
        try:
            signal.setitimer(signal.ITIMER_REAL, whole / 8)
            with pytest.raises(StepCancelled):
                run(backend, Sequence(tokens, np.arange(64)).next(1500, rows=()))
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, whole / 8)
            with pytest.raises(KeyboardInterrupt):
                run(backend, Sequence(tokens, np.arange(64)).next(1500, rows=()))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert np.isfinite(run(backend, Sequence(tokens, np.arange(64)).next(3))).all()

    def test_the_interpreter_runs_on_during_a_step(self):
        spec = llama(hidden=512, layers=8)
        backend = small(spec, num_blocks=64, block_size=32, threads=1)
        tokens = np.arange(1500) % 96
        count = 0
        done = threading.Event()

        def step():
            run(backend, Sequence(tokens, np.arange(64)).next(1500, rows=()))
            done.set()

        thread = threading.Thread(target=step)
        thread.start()
        while not done.wait(0.001):
            count += 1
        thread.join()
        assert count > 3


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class TestPackedCache:
    def backend(self, folder: Path, file: Path, weights, spec) -> tuple[CpuBackend, PackedCache]:
        cache = PackedCache(folder, [file])
        backend = CpuBackend(spec, iter(weights.items()), num_blocks=8, block_size=4, cache=cache)
        return backend, cache

    def setup(self, tmp_path: Path):
        spec = llama(hidden=256, layers=1)
        rng = np.random.default_rng(1)
        tensors = dense(random_weights(spec))
        for name, tensor in tensors.items():
            if len(tensor.shape) == 2:
                tensors[name] = PACKINGS[6].random(rng, tensor.shape)
        file = tmp_path / "model.gguf"
        file.write_bytes(b"the weights")
        return spec, tensors, file

    def test_the_second_start_reads_no_weights_and_gives_the_same_bits(self, tmp_path):
        spec, tensors, file = self.setup(tmp_path)
        first, cache = self.backend(tmp_path / "cache", file, tensors, spec)
        assert cache.note is None
        second, _ = self.backend(tmp_path / "cache", file, {}, spec)
        assert np.array_equal(logits(second), logits(first))

    def test_a_changed_file_is_packed_anew(self, tmp_path):
        spec, tensors, file = self.setup(tmp_path)
        self.backend(tmp_path / "cache", file, tensors, spec)
        status = file.stat()
        file.write_bytes(b"THE WEIGHTS")  # the same size
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # and time
        with pytest.raises(CheckpointError, match="missing"):
            self.backend(tmp_path / "cache", file, {}, spec)

    @pytest.mark.parametrize("damage", ["cut", "empty", "zeroed", "header"])
    def test_a_damaged_cache_is_packed_anew(self, tmp_path, damage):
        spec, tensors, file = self.setup(tmp_path)
        first, _ = self.backend(tmp_path / "cache", file, tensors, spec)
        (packed,) = (tmp_path / "cache").glob("*.packed")
        content = packed.read_bytes()
        packed.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "empty": b"",
                "zeroed": bytes(len(content)),
                "header": content[:40] + b"\xff" * 4000 + content[4040:],
            }[damage]
        )
        second, _ = self.backend(tmp_path / "cache", file, tensors, spec)
        assert np.array_equal(logits(second), logits(first))

    def test_a_folder_that_cannot_be_written_costs_only_time(self, tmp_path):
        spec, tensors, file = self.setup(tmp_path)
        (tmp_path / "cache").write_text("a file where the folder should be")
        backend, cache = self.backend(tmp_path / "cache", file, tensors, spec)
        assert "could not be kept" in cache.note
        assert np.isfinite(logits(backend)).all()

    def test_a_full_disk_costs_only_time(self, tmp_path, monkeypatch):
        spec, tensors, file = self.setup(tmp_path)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
        backend, cache = self.backend(tmp_path / "cache", file, tensors, spec)
        assert "1 MiB are free" in cache.note
        assert not list((tmp_path / "cache").glob("*.part"))
        assert np.isfinite(logits(backend)).all()

    def test_only_the_most_recent_models_are_kept(self, tmp_path):
        spec, tensors, file = self.setup(tmp_path)
        for number in range(6):
            file.write_bytes(b"weights %d" % number)
            self.backend(tmp_path / "cache", file, tensors, spec)
        assert len(list((tmp_path / "cache").glob("*.packed"))) == 4
