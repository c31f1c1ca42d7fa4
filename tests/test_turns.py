"""Who leads, who sleeps, and that no turn is lost."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest

from localllm.turns import Turns


class Worker(threading.Thread):
    """Takes a turn, notes its name, and keeps the lead until it is told to give it."""

    def __init__(self, turns: Turns, name: str, order: list[str], **how: bool) -> None:
        super().__init__(daemon=True)
        self.turns, self.label, self.order, self.how = turns, name, order, how
        self.ready = False
        self.led: bool | None = None
        self.leads, self.go = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.led = self.turns.take(lambda: self.ready, **self.how)
            if self.led:
                self.order.append(self.label)
                self.leads.set()
                self.go.wait()
        finally:
            self.turns.give()


def waits(turns: Turns, count: int) -> None:
    end = time.monotonic() + 5
    while len(turns._waiting) + len(turns._urgent) != count:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_turns_go_in_order_and_urgent_ones_first():
    turns, order = Turns(), []
    assert turns.take(lambda: False)
    workers = []
    for count, (name, urgent) in enumerate([("a", False), ("b", False), ("c", True)], 1):
        workers.append(Worker(turns, name, order, urgent=urgent))
        waits(turns, count)
    assert turns.wanted
    turns.give()
    for worker in (workers[2], workers[0], workers[1]):
        assert worker.leads.wait(5)
        worker.go.set()
    for worker in workers:
        worker.join()
    assert order == ["c", "a", "b"]
    assert not turns.wanted
    assert turns.take_free()
    turns.give()


def test_who_need_not_lead_any_more_is_woken_and_passed_over():
    turns, order = Turns(), []
    assert turns.take(lambda: False)
    first, second = Worker(turns, "first", order), Worker(turns, "second", order)
    waits(turns, 2)
    turns.wake()
    assert first.led is None
    first.ready = True
    turns.wake()
    first.join()
    assert first.led is False
    turns.give()
    assert second.leads.wait(5)
    second.go.set()
    second.join()
    assert not turns.take(lambda: True), "ready at once: no turn is needed"


def test_only_the_leader_gives():
    turns = Turns()
    assert turns.take(lambda: False)
    thread = threading.Thread(target=turns.give)
    thread.start()
    thread.join()
    assert turns.leading
    assert not turns.take_free()
    turns.give()
    assert not turns.leading


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_while_waiting_leaves_the_queue():
    turns, order = Turns(), []
    holder = Worker(turns, "holder", order)
    assert holder.leads.wait(5)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        turns.take(lambda: False)
    assert not turns._waiting
    holder.go.set()
    holder.join()
    assert turns.take_free()


def test_many_threads_lead_one_at_a_time_and_none_is_forgotten():
    turns, inside, counts = Turns(), [], [0] * 8

    def work(index: int) -> None:
        for step in range(300):
            try:
                if turns.take(lambda: False, urgent=step % 7 == 0):
                    inside.append(index)
                    assert inside == [index]
                    inside.pop()
                    counts[index] += 1
            finally:
                turns.give()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counts == [300] * 8
    gc.collect()
    assert turns.take_free()
