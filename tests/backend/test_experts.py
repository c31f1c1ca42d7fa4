"""Experts that memory does not hold change when an answer comes, never what it is."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.backend import cpu_experts
from localllm.backend.cpu import CpuBackend
from localllm.backend.cpu_cache import PackedCache
from localllm.backend.cpu_experts import expected_speed, merged_uses
from localllm.backend.cpu_memory import CpuMemory
from localllm.backend.memory import ExpertSizes
from localllm.backend.select import BackendStatus
from localllm.checkpoint.form import AffineForm, DenseForm, GroupForm
from localllm.checkpoint.tensor import Tensor
from localllm.engine.planner import Machine, Model, Wish, make_plan
from localllm.errors import CheckpointError, InvalidRequest, StoreError
from localllm.planning import expected_speed as expected_before
from localllm.spec import DecoderSpec, LayerSpec, MoESpec, NormSpec
from localllm.spec.weights import weight_shapes
from tests.backend.conformance import Sequence, run
from tests.backend.random_models import PACKINGS, dense, llama, random_adapter, random_weights
from tests.examples import examples

EXPERTS, TOP_K, LAYERS = 7, 2, 3
CPU = BackendStatus("cpu", True, "", kv_bits=(16, 8, 4), step_rows=512, memory=CpuMemory())


def mixture(experts: int = EXPERTS, hidden: int = 64, bias: bool = True) -> DecoderSpec:
    base = llama(hidden=64, layers=1)
    ffn = MoESpec(experts=experts, top_k=TOP_K, hidden=hidden, bias=bias)
    layer = LayerSpec(base.layers[0].mixer, ffn, NormSpec())
    return replace(base, layers=(base.layers[0], *(layer,) * LAYERS))


SPEC = mixture()
FORMS = {
    name: AffineForm(4, 32, GroupForm(2)) if len(shape) == 3 else DenseForm(4)
    for name, shape in weight_shapes(SPEC).items()
}
SIZES = CpuMemory().experts(SPEC, FORMS)
assert SIZES is not None


def tensors() -> dict[str, Tensor]:
    """The experts in 4 bits, everything else dense."""
    rng = np.random.default_rng(3)
    weights = dense(random_weights(SPEC))
    for name, tensor in weights.items():
        if len(tensor.shape) == 3:
            weights[name] = PACKINGS[0].random(rng, tensor.shape)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    (path / "model.gguf").write_bytes(b"the weights")
    return path


def opened(folder: Path, slots: int | None, **options: object) -> CpuBackend:
    """slots: experts in memory; None: all weights."""
    cache = PackedCache(folder / "cache", [folder / "model.gguf"])
    return CpuBackend(
        SPEC,
        iter(tensors().items()),
        num_blocks=48,
        block_size=4,
        cache=None if slots is None else cache,
        expert_bytes=None if slots is None else slots * SIZES.slot,
        threads=2,
        **options,  # type: ignore[arg-type]
    )


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slots=st.integers(TOP_K, LAYERS * EXPERTS), seed=st.integers(0, 1000), data=st.data())
def test_the_same_bits_however_few_experts_are_in_memory(folder, slots, seed, data):
    rng = np.random.default_rng(seed)
    sequences = [
        Sequence(rng.integers(0, SPEC.vocab_size, 24), rng.permutation(48)[:24]) for _ in "ab"
    ]
    sequences[1].blocks = np.setdiff1d(np.arange(48), sequences[0].blocks).astype(np.int32)
    others = [Sequence(s.tokens, s.blocks) for s in sequences]
    few, all_of_them = opened(folder, slots), opened(folder, None)
    while sequences[0].done < 24:
        count = data.draw(st.integers(1, 24 - sequences[0].done))
        got = run(few, *(s.next(count) for s in sequences))
        wanted = run(all_of_them, *(s.next(count) for s in others))
        assert np.array_equal(got, wanted)
    use = few.experts
    assert use is not None
    assert (use.in_memory, use.experts) == (slots, LAYERS * EXPERTS)
    assert slots < LAYERS * EXPERTS or use.read == 0
    assert all_of_them.experts is None


def test_adapters_on_experts_are_as_good_with_few_in_memory(folder):
    adapters = [random_adapter(SPEC, seed, rank=4, experts=True) for seed in (1, 2)]
    answers = []
    for slots in (TOP_K, None):
        backend = opened(folder, slots)
        indices = [backend.add_adapter(adapter) for adapter in adapters]
        chunks = [
            Sequence(np.arange(12), np.arange(4) + 4 * at).next(12, adapter=index)
            for at, index in enumerate((indices[1], None, indices[0]))
        ]
        answers.append(run(backend, *chunks))
    assert np.array_equal(*answers)
    assert not np.array_equal(answers[0][:12], answers[0][12:24])


def test_experts_that_are_used_often_stay_in_memory(folder):
    backend = opened(folder, LAYERS * TOP_K)
    token = np.full(40, 5)
    again = Sequence(token, np.arange(48))
    for _ in range(20):
        run(backend, again.next(1))
    before = backend.experts
    for _ in range(20):
        run(backend, again.next(1))
    after = backend.experts
    assert before is not None
    assert after is not None
    assert after.chosen - before.chosen == 20 * LAYERS * TOP_K
    # One token's experts are nearly always the same; attention over more of it may change some.
    assert after.read - before.read < (after.chosen - before.chosen) / 2


def test_a_model_packed_straight_into_the_file_is_the_one_packed_in_memory(folder, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"the weights")
    in_memory = opened(tmp_path, None, kernels="scalar")
    written = opened(tmp_path, LAYERS * EXPERTS, kernels="scalar")
    cache = PackedCache(tmp_path / "cache", [tmp_path / "model.gguf"])
    read = CpuBackend(SPEC, iter(()), num_blocks=48, block_size=4, cache=cache, kernels="scalar")
    assert cache.hit
    wanted = run(in_memory, Sequence(np.arange(12), np.arange(8)).next(12))
    for backend in (written, read):
        assert np.array_equal(run(backend, Sequence(np.arange(12), np.arange(8)).next(12)), wanted)


@pytest.mark.parametrize("damage", ["cut", "zeroed"])
def test_a_file_that_is_damaged_in_use_is_named_and_answers_nothing(tmp_path, damage):
    (tmp_path / "model.gguf").write_bytes(b"the weights")
    backend = opened(tmp_path, TOP_K)
    (packed,) = (tmp_path / "cache").glob("*.packed")
    size = packed.stat().st_size
    if damage == "cut":
        os.truncate(packed, size // 3)
    else:
        with packed.open("r+b") as file:
            file.seek(1 << 14)
            file.write(bytes(size - (1 << 14)))
    with pytest.raises(CheckpointError, match=packed.name) as raised:
        run(backend, Sequence(np.arange(24), np.arange(8)).next(24))
    assert raised.value.hint


def test_a_file_that_cannot_be_kept_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"the weights")
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(StoreError, match="cannot be kept") as raised:
        opened(tmp_path, TOP_K)
    assert "LOCALLLM_HOME" in (raised.value.hint or "")


def test_the_last_gib_of_the_disk_stays_free(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"the weights")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1 << 30))
    with pytest.raises(StoreError, match="1024 are to stay so"):
        opened(tmp_path, TOP_K)
    assert not list((tmp_path / "cache").glob("*.packed"))


def test_without_a_place_for_packed_weights_it_is_refused():
    with pytest.raises(InvalidRequest, match="no packed weights"):
        CpuBackend(SPEC, iter(()), num_blocks=8, expert_bytes=TOP_K * SIZES.slot)


def test_the_next_start_begins_with_the_experts_that_were_used_most(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"the weights")
    first = opened(tmp_path, LAYERS * TOP_K)
    assert not first.experts.known
    assert "at least" in first.load_note
    run(first, Sequence(np.full(40, 5), np.arange(48)).next(40))
    first.close()
    second = opened(tmp_path, LAYERS * TOP_K)
    assert second.experts.known
    run(second, Sequence(np.full(40, 5), np.arange(48)).next(1))
    assert second.experts.read == 0  # one token's experts are those of the first start
    second.close()
    (uses,) = (tmp_path / "cache").glob("*.uses")
    uses.write_text('{"uses": [1, "many"]}')
    assert not opened(tmp_path, LAYERS * TOP_K).experts.known  # nothing sound: as if it were not


def test_the_next_start_announces_what_the_last_run_like_it_did(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"the weights")
    first = opened(tmp_path, LAYERS * TOP_K)
    sequence = Sequence(np.full(41, 5), np.arange(48))
    run(first, sequence.next(9))
    for _ in range(32):
        run(first, sequence.next(1))
    first.close()
    (uses,) = (tmp_path / "cache").glob("*.uses")
    past = json.loads(uses.read_text())
    assert past["speed"] > 0
    uses.write_text(json.dumps({**past, "speed": 12.5}))

    def announced(slots: int) -> float:
        backend = opened(tmp_path, slots)
        try:
            return backend.experts.expected_speed
        finally:
            backend.close()

    assert announced(LAYERS * TOP_K) == 12.5
    assert announced(LAYERS * TOP_K) == 12.5  # a run of no steps leaves it as it is
    assert announced(LAYERS * TOP_K + 3) != 12.5
    uses.write_text(json.dumps({**past, "speed": 12.5, "threads": 1}))
    assert announced(LAYERS * TOP_K) != 12.5


def test_what_is_remembered_of_use_is_bounded_and_fades():
    uses = merged_uses([], [10, 0])
    assert uses == [10, 0]
    for _ in range(50):
        uses = merged_uses(uses, [0, 1000])
    assert sum(uses) <= 2000
    assert uses[0] < 1 < uses[1]


class TestPlan:
    SPEC = mixture(experts=64, hidden=512)
    model = Model(SPEC, {name: DenseForm(4) for name in weight_shapes(SPEC)})
    SIZES = CpuMemory().experts(SPEC, model.forms)

    def plan(self, available: int, **wishes: object):
        wish = Wish(context=32, kv_tokens=32, max_batch=1, **wishes)  # type: ignore[arg-type]
        return make_plan(self.model, wish, Machine(available, 0), CPU)

    @property
    def whole(self) -> int:
        return self.plan(1 << 40).peak

    def test_all_experts_are_in_memory_where_they_fit(self):
        assert self.plan(self.whole).wish.expert_bytes is None

    @pytest.mark.parametrize("missing", [1, 10 << 20, 40 << 20])
    def test_else_as_many_as_fit_beside_a_sixteenth_for_file_pages(self, missing):
        plan = self.plan(self.whole - missing)
        free = plan.available - plan.peak - plan.available // 16
        assert 0 <= free < self.SIZES.slot
        left = self.SIZES.total - plan.wish.expert_bytes
        assert left > 0
        assert sum(i.nbytes for i in plan.items if i.name in ("weights", "experts")) == (
            CpuMemory().weights(self.SPEC, self.model.forms) - left
        )

    def test_what_one_token_needs_must_fit(self):
        assert not self.plan(self.whole - self.SIZES.total).fits
        with pytest.raises(InvalidRequest, match="one token needs 2"):
            self.plan(1 << 40, expert_bytes=self.SIZES.slot)

    def test_a_wish_for_less_is_kept(self):
        plan = self.plan(1 << 40, expert_bytes=3 * self.SIZES.slot)
        assert plan.wish.expert_bytes == 3 * self.SIZES.slot
        detail = f"3 of {self.SIZES.count}, the others on disk"
        assert any(item.detail == detail for item in plan.items)

    def test_it_says_before_loading_how_fast_it_will_be_at_least(self, tmp_path, monkeypatch):
        file = tmp_path / "model.gguf"
        file.write_bytes(bytes(1 << 20))
        assert expected_before(self.model, self.plan(1 << 40), CPU, file) is None
        few = self.plan(1 << 40, expert_bytes=3 * self.SIZES.slot)
        many = self.plan(1 << 40, expert_bytes=(self.SIZES.count - 1) * self.SIZES.slot)
        assert (expected_before(self.model, few, CPU, file) or 0) > 0
        monkeypatch.setattr(cpu_experts, "memory_speed", lambda threads: 1e10)
        monkeypatch.setattr(cpu_experts, "read_speed", lambda file, size: 1e9)
        slow, fast = (expected_before(self.model, plan, CPU, file) for plan in (few, many))
        assert 0 < slow < fast

    def test_other_backends_and_dense_models_say_that_they_cannot(self):
        toy = BackendStatus("toy", True, "")
        wish = Wish(context=32, expert_bytes=1 << 20)
        with pytest.raises(InvalidRequest, match="the toy backend keeps all weights"):
            make_plan(self.model, wish, Machine(1 << 40, 0), toy)
        small = llama()
        forms = {name: DenseForm(4) for name in weight_shapes(small)}
        with pytest.raises(InvalidRequest, match="a model without experts"):
            make_plan(Model(small, forms), wish, Machine(1 << 40, 0), CPU)


def test_sizes_are_those_of_the_packed_experts(folder):
    count, chosen = LAYERS * EXPERTS, LAYERS * TOP_K
    wanted = ExpertSizes(count, SIZES.slot, count * SIZES.slot, chosen * SIZES.slot, TOP_K)
    assert wanted == SIZES
    backend = opened(folder, TOP_K)
    assert backend.experts is not None
    # A byte less does not hold what a token needs; the engine's slot is the plan's.
    with pytest.raises(ValueError, match="no memory for the 2 experts"):
        CpuBackend(
            SPEC,
            iter(()),
            num_blocks=8,
            cache=PackedCache(folder / "cache", [folder / "model.gguf"]),
            expert_bytes=TOP_K * SIZES.slot - 1,
        )


def test_the_expected_speed_adds_reading_to_computing():
    assert expected_speed(100, 80, 1.0, 1000, 10) == pytest.approx(10)
    assert expected_speed(100, 80, 0.5, 1000, 10) == pytest.approx(1 / (0.1 + 4))
