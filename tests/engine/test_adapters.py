"""Named adapters come and go within their limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from localllm.adapters import LoraAdapter, LowRank
from localllm.adapters.lora import make_adapter
from localllm.checkpoint.tensor import Dense
from localllm.engine.adapters import AdaptersBusy, AdapterSlots
from localllm.errors import CheckpointError, InvalidRequest, OutOfMemoryPlan
from tests.backend.random_models import llama


def adapter(name: str, size: int = 10, value: float = 1.0) -> LoraAdapter:
    """Of 4 * (size + 1) bytes."""
    a = Dense(np.full((1, size), value, np.float32), "float32")
    return make_adapter(name, {"layers.0.attn.q": LowRank(a, Dense(a.data[:, :1], "float32"), 1.0)})


class FakeBackend:
    spec = llama()

    def __init__(self, slots: int = 8) -> None:
        self.slots: list[LoraAdapter | None] = [None] * slots

    def add_adapter(self, adapter: LoraAdapter) -> int:
        index = self.slots.index(None)
        self.slots[index] = adapter
        return index

    def remove_adapter(self, index: int) -> None:
        assert self.slots[index] is not None
        self.slots[index] = None

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        return adapter.nbytes


def slots(count: int = 2, nbytes: int = 1000, **options) -> tuple[AdapterSlots, FakeBackend]:
    backend = FakeBackend()
    return AdapterSlots(backend, max_adapters=count, max_bytes=nbytes, **options), backend


def registered(*names: str, count: int = 2, nbytes: int = 1000) -> AdapterSlots:
    found, _ = slots(count, nbytes)
    for name in names:
        found.register(adapter(name))
    return found


def test_an_adapter_is_loaded_when_first_acquired_and_shared_after():
    found, backend = slots()
    found.register(adapter("a"))
    assert found.loaded == ()
    index = found.acquire("a")
    assert backend.slots[index].name == "a"
    assert found.acquire("a") == index
    assert found.loaded_bytes == adapter("a").nbytes


def test_the_least_recently_used_idle_one_goes_first():
    found = registered("a", "b", "c")
    for name in ("a", "b", "a"):
        found.acquire(name)
        found.release(name)
    found.acquire("c")
    assert found.loaded == ("a", "c")


def test_one_in_use_or_pinned_is_never_evicted():
    found = registered("a", "b", "c")
    found.pin("a")
    found.acquire("b")
    assert found.busy_for("c")
    with pytest.raises(AdaptersBusy, match=r"all 2 adapter slots are taken.*'a', 'b'") as error:
        found.acquire("c")
    assert "max_adapters" in error.value.hint
    found.release("b")
    assert not found.busy_for("c")
    found.acquire("c")
    assert found.loaded == ("a", "c")
    found.unpin("a")
    found.acquire("b")
    assert found.loaded == ("b", "c")


def test_the_limit_of_bytes_names_its_own_knob():
    found = registered("a", "b", count=5, nbytes=60)
    found.acquire("a")
    with pytest.raises(AdaptersBusy, match="44 of 60 bytes") as error:
        found.acquire("b")
    assert "max_adapter_bytes" in error.value.hint


def test_as_many_are_evicted_as_a_large_one_needs():
    found = registered("a", "b", "c", count=5, nbytes=140)
    for name in "abc":
        found.acquire(name)
        found.release(name)
    found.register(adapter("large", size=21))
    found.acquire("large")
    assert found.loaded == ("c", "large")


def test_one_that_could_never_be_loaded_is_refused_at_once():
    found, _ = slots(nbytes=40)
    with pytest.raises(OutOfMemoryPlan, match="44 bytes of the 40 allowed") as error:
        found.register(adapter("a"))
    assert "max_adapter_bytes" in error.value.hint
    none, _ = slots(count=0)
    with pytest.raises(OutOfMemoryPlan) as error:
        none.register(adapter("a"))
    assert "max_adapters" in error.value.hint


def test_an_evicted_one_is_read_again_from_its_folder():
    reads = []

    def load(path: Path, spec) -> LoraAdapter:
        reads.append(path)
        return adapter("a")

    found, _ = slots(count=1, load=load)
    found.register(adapter("a"), Path("folder"))
    found.register(adapter("b"))
    for name in ("a", "b", "a"):
        found.acquire(name)
        found.release(name)
    assert reads == [Path("folder")] * 2


def test_a_folder_that_changed_is_refused_and_evicts_nobody():
    found, _ = slots(count=1, load=lambda *_: adapter("a", value=2.0))
    found.register(adapter("a"), Path("folder"))
    found.register(adapter("b"))
    found.acquire("b")
    found.release("b")
    with pytest.raises(CheckpointError, match="has changed since"):
        found.acquire("a")
    assert found.loaded == ("b",)


def test_a_name_stands_for_one_content():
    found = registered("a")
    found.register(adapter("a"))
    assert found.digest("a") == adapter("a").digest != adapter("a", value=2.0).digest
    with pytest.raises(InvalidRequest, match="another adapter"):
        found.register(adapter("a", value=2.0))


def test_unknown_names_are_refused_with_the_known_ones():
    found = registered("a", "b")
    for call in (found.acquire, found.release, found.pin, found.unpin, found.digest):
        with pytest.raises(InvalidRequest, match="no adapter 'c'") as error:
            call("c")
        assert error.value.hint == "registered: a, b"


def test_unregistering_frees_the_slot_but_not_under_a_request():
    found, backend = slots()
    found.register(adapter("a"))
    found.acquire("a")
    with pytest.raises(InvalidRequest, match="used by 1 request"):
        found.unregister("a")
    found.release("a")
    found.unregister("a")
    assert found.names == ()
    assert backend.slots == [None] * 8


def test_releasing_more_often_than_acquiring_is_a_bug():
    found = registered("a")
    with pytest.raises(AssertionError, match="released more often"):
        found.release("a")


class AnyOrder(RuleBasedStateMachine):
    """Whatever is called in whatever order, users keep what they acquired and limits hold."""

    NAMES = "abcde"

    def __init__(self) -> None:
        super().__init__()
        self.found, self.backend = slots(3, 200)
        self.users: dict[str, list[int]] = {name: [] for name in self.NAMES}
        self.pinned: set[str] = set()
        for at, name in enumerate(self.NAMES):
            self.found.register(adapter(name, size=8 + 4 * at))

    @rule(name=st.sampled_from(NAMES))
    def acquire(self, name: str) -> None:
        possible = not self.found.busy_for(name)
        try:
            self.users[name].append(self.found.acquire(name))
        except AdaptersBusy:
            assert not possible
        else:
            assert possible

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in self.NAMES if self.users[n]]))
        self.users[name].pop()
        self.found.release(name)

    @rule(name=st.sampled_from(NAMES))
    def pin_or_unpin(self, name: str) -> None:
        if name in self.pinned:
            self.found.unpin(name)
            self.pinned.remove(name)
        elif not self.found.busy_for(name):
            self.found.pin(name)
            self.pinned.add(name)

    @invariant()
    def users_keep_theirs_within_the_limits(self) -> None:
        for name, indices in self.users.items():
            for index in indices:
                held = self.backend.slots[index]
                assert held is not None
                assert held.name == name
        loaded = [held for held in self.backend.slots if held is not None]
        assert len(loaded) <= 3
        assert sum(held.nbytes for held in loaded) <= 200
        assert {held.name for held in loaded} >= self.pinned


TestAnyOrder = AnyOrder.TestCase
