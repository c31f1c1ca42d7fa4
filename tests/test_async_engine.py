"""Many asyncio callers and one engine: their answers, their leaving, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm import LLM, AsyncEngine, SamplingParams
from localllm.backend.protocol import StepCancelled
from localllm.engine.events import Ended, Queued, StepDone
from localllm.errors import InvalidRequest, LocalLLMError, PromptTooLong, TooManyRequests
from tests.examples import examples
from tests.tiny_model import write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, speculation="off")
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), max_batch=16) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = set(threading.enumerate())
    yield
    left = [t.name for t in set(threading.enumerate()) - before if t.name.startswith("localllm")]
    assert not left


def engine_of(llm: LLM):
    return llm._model.engine


def in_use(llm: LLM) -> int:
    return engine_of(llm).cache.in_use


async def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.001)


def slow_down(llm: LLM, monkeypatch, seconds: float = 0.01) -> None:
    """Every step takes so long, and does not hold the GIL meanwhile."""
    forward = llm._model.backend.forward

    def slow(*args):
        time.sleep(seconds)
        return forward(*args)

    monkeypatch.setattr(llm._model.backend, "forward", slow)


def params_of(seed: int, tokens: int = 8) -> SamplingParams:
    """Greedy or seeded, by turns."""
    if seed % 2:
        return SamplingParams(temperature=1.1, seed=seed, max_tokens=tokens, ignore_eos=True)
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


# ---- answers


def test_an_engine_loads_a_model_by_name_and_closes_it(folder):
    async def main():
        async with AsyncEngine(str(folder), max_batch=4, backend="reference") as engine:
            result = await engine.complete("Hello", GREEDY)
            assert engine.llm.info.backend == "reference"
            return result, engine

    result, engine = asyncio.run(main())
    assert len(result.token_ids) == 8
    with pytest.raises(LocalLLMError, match="closed"):
        asyncio.run(engine.start())
    with pytest.raises(LocalLLMError, match="closed"):
        engine.generate("Hello", GREEDY)


def test_what_cannot_be_loaded_is_told_at_the_start(tmp_path):
    async def main():
        async with AsyncEngine(str(tmp_path / "nothing")):
            pass

    with pytest.raises(LocalLLMError):
        asyncio.run(main())
    with pytest.raises(InvalidRequest, match="max_waiting"):
        AsyncEngine("any", max_waiting=-1)
    with pytest.raises(LocalLLMError, match="not started"):
        AsyncEngine("any").generate("Hello")


def test_a_stream_adds_up_to_the_result(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            params = SamplingParams(temperature=0, max_tokens=20, logprobs=1, ignore_eos=True)
            deltas = [delta async for delta in engine.generate("Hello", params)]
            return deltas, await engine.complete("Hello", params)

    deltas, whole = asyncio.run(main())
    result = deltas[-1].result
    assert "".join(d.text for d in deltas) == result.text == whole.text
    assert tuple(i for d in deltas for i in d.token_ids) == result.token_ids == whole.token_ids
    assert tuple(e for d in deltas for e in d.logprobs or ()) == result.logprobs == whole.logprobs
    assert [d.result for d in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_a_chat_is_answered_as_the_library_answers_it(llm):
    messages = [{"role": "user", "content": "hi"}]

    async def main():
        async with AsyncEngine(llm) as engine:
            return await engine.chat(messages, GREEDY).whole()

    assert asyncio.run(main()).token_ids == llm.chat(messages, GREEDY).token_ids


def test_200_clients_get_the_answers_they_get_alone(llm):
    work = [(f"{'long ' * (i % 30)}prompt {i}", params_of(i)) for i in range(200)]
    alone = [llm.generate(prompt, params).token_ids for prompt, params in work]

    async def client(engine, prompt, params):
        ids = []
        async for delta in engine.generate(prompt, params):
            ids += delta.token_ids
        return tuple(ids)

    async def main():
        async with AsyncEngine(llm) as engine:
            return await asyncio.gather(*(client(engine, *one) for one in work))

    assert asyncio.run(main()) == alone
    assert in_use(llm) == 0


def test_what_is_wrong_with_a_request_reaches_its_own_caller(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            good = engine.generate("fine", GREEDY)
            with pytest.raises(PromptTooLong):
                await engine.complete([1] * 300, GREEDY)
            with pytest.raises(InvalidRequest, match="empty"):
                await engine.generate("", GREEDY).accepted()
            with pytest.raises(InvalidRequest, match="regex"):
                async for _ in engine.generate("x", SamplingParams(regex="(")):
                    pass
            await good.accepted()
            return await good.whole()

    assert len(asyncio.run(main()).token_ids) == 8


def test_two_event_loops_and_synchronous_threads_share_one_batch(llm):
    prompts = [f"number {i}" for i in range(24)]
    alone = [llm.generate(p, params_of(i, 20)).token_ids for i, p in enumerate(prompts)]
    engine = AsyncEngine(llm)
    largest = 0

    async def half(offset):
        async def one(i):
            return i, (await engine.complete(prompts[i], params_of(i, 20))).token_ids

        return await asyncio.gather(*(one(i) for i in range(offset, 24, 3)))

    def synchronous(i):
        return i, llm.generate(prompts[i], params_of(i, 20)).token_ids

    async def main():
        nonlocal largest
        async with engine:
            with ThreadPoolExecutor(10) as pool:
                loops = [pool.submit(asyncio.run, half(o)) for o in (0, 1)]
                calls = [pool.submit(synchronous, i) for i in range(2, 24, 3)]
                while not all(f.done() for f in (*loops, *calls)):
                    largest = max(largest, engine.stats().running)
                    await asyncio.sleep(0)
                return [pair for f in loops for pair in f.result()] + [f.result() for f in calls]

    found = dict(asyncio.run(main()))
    assert [found[i] for i in range(24)] == alone
    assert largest > 1
    assert in_use(llm) == 0


def test_a_synchronous_stream_gets_its_tokens_while_the_engine_is_busy(llm, monkeypatch):
    """A plain lock would let the engine's thread take it again and again."""
    slow_down(llm, monkeypatch)

    async def main():
        async with AsyncEngine(llm) as engine:
            others = [engine.generate(f"other {i}", LONG) for i in range(4)]
            await others[0].accepted()
            began = engine_of(llm).scheduler._steps
            result = await asyncio.to_thread(llm.generate, "Hello", GREEDY)
            steps = engine_of(llm).scheduler._steps - began
            logits = await asyncio.to_thread(llm.logits, [1, 2, 3])
            for other in others:
                assert not other._call.done
                await other.aclose()
            return result, steps, logits

    result, steps, logits = asyncio.run(main())
    assert len(result.token_ids) == 8
    assert steps < 20
    assert logits.shape[0] == 3


# ---- slow readers


def test_a_reader_that_stops_holds_nobody_up_and_gets_the_rest_as_one(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            params = SamplingParams(temperature=0, max_tokens=100, logprobs=0, ignore_eos=True)
            slow = engine.generate("slow", params)
            first = await anext(slow)
            for i in range(10):
                assert len((await engine.complete(f"quick {i}", GREEDY)).token_ids) == 8
            await until(lambda: slow.result is not None)
            rest = [delta async for delta in slow]
            return first, rest

    first, rest = asyncio.run(main())
    assert len(rest) == 1
    result = rest[0].result
    assert first.text + rest[0].text == result.text
    assert first.token_ids + rest[0].token_ids == result.token_ids
    assert first.logprobs + rest[0].logprobs == result.logprobs
    assert len(result.token_ids) == 100


# ---- leaving


def test_break_ends_the_request(llm, monkeypatch):
    slow_down(llm, monkeypatch, 0.001)

    async def main():
        async with AsyncEngine(llm) as engine:
            async for _ in engine.generate("Hello", LONG):
                break
            await until(lambda: engine.stats().running == 0)
            assert in_use(llm) == 0
            with suppress(ZeroDivisionError):
                async for _ in engine.generate("Hello", LONG):
                    raise ZeroDivisionError
            await until(lambda: engine.stats().running == 0)
            async with engine.generate("Hello", LONG) as stream:
                await anext(stream)
            assert in_use(llm) == 0
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    asyncio.run(main())


def test_cancel_keeps_what_was_said(llm, monkeypatch):
    slow_down(llm, monkeypatch, 0.001)

    async def main():
        async with AsyncEngine(llm) as engine:
            stream = engine.generate("Hello", LONG)
            deltas = [await anext(stream) for _ in range(3)]
            engine.cancel(stream)
            deltas += [delta async for delta in stream]
            early = engine.generate("Hello", LONG)
            early.cancel()
            return deltas, await early.whole()

    deltas, early = asyncio.run(main())
    result = deltas[-1].result
    assert (result.finish_reason, result.receipt.stopped_by) == ("cancelled", "cancelled")
    assert result.text == "".join(d.text for d in deltas)
    assert early.finish_reason == "cancelled"


def test_a_cancel_stops_the_step_only_if_nobody_else_is_in_it(llm, monkeypatch):
    stopped = []
    cancel = llm._model.backend.cancel

    def note():
        stopped.append(True)
        cancel()

    monkeypatch.setattr(llm._model.backend, "cancel", note)
    slow_down(llm, monkeypatch)

    async def main():
        async with AsyncEngine(llm) as engine:
            one, two = engine.generate("one", LONG), engine.generate("two", LONG)
            await anext(one)
            await anext(two)
            await one.aclose()
            assert not stopped
            await two.aclose()
            assert stopped

    asyncio.run(main())
    assert in_use(llm) == 0


EXITS = ("stay", "before", "cancel", "task", "aclose", "raise", "drop", "timeout")
clients = st.lists(
    st.tuples(
        st.sampled_from(EXITS),
        st.integers(0, 12),  # deltas read before it leaves
        st.sampled_from([1, 5, 40, 180]),  # prompt tokens
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=examples(40), suppress_health_check=list(HealthCheck))
@given(clients)
def test_whoever_leaves_at_any_time_changes_nothing_for_the_others(llm, plans):
    async def client(engine, index, how, after, length, seeded):
        prompt = [(index * 7 + i) % 250 for i in range(length)]
        params = params_of(2 * index + seeded, 40)
        stream = engine.generate(prompt, params, timeout=0.002 if how == "timeout" else None)
        if how == "stay":
            result = await stream.whole()
            return prompt, params, result.token_ids
        if how == "before":
            stream.cancel()
        with suppress(asyncio.CancelledError, ZeroDivisionError):
            read = 0
            async for _ in stream:
                read += 1
                if read < after:
                    continue
                if how == "cancel":
                    stream.cancel()
                elif how == "task":
                    asyncio.current_task().cancel()
                elif how == "aclose":
                    await stream.aclose()
                elif how == "raise":
                    raise ZeroDivisionError
                elif how == "drop":
                    break
        return None

    async def main():
        async with AsyncEngine(llm) as engine:
            tasks = [asyncio.create_task(client(engine, i, *p)) for i, p in enumerate(plans)]
            for task, (how, after, *_) in zip(tasks, plans, strict=True):
                if how == "task" and after > 6:
                    await asyncio.sleep(0.001 * (after - 7))  # before it, or in its prefill
                    task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: engine.stats().running + engine.stats().waiting == 0)
            assert in_use(llm) == 0
            return found

    for answer in asyncio.run(main()):
        if answer is not None and not isinstance(answer, BaseException):
            prompt, params, ids = answer
            assert llm.generate(prompt, params).token_ids == ids
        else:
            assert answer is None or isinstance(answer, asyncio.CancelledError)
    assert in_use(llm) == 0


def test_a_stream_that_the_garbage_collector_finds_during_a_step_ends(llm, monkeypatch):
    slow_down(llm, monkeypatch, 0.001)
    forward = llm._model.backend.forward

    def collecting(*args):
        gc.collect()
        return forward(*args)

    lost = llm.stream("lost", LONG)
    next(lost)
    cycle = [lost]
    cycle.append(cycle)
    monkeypatch.setattr(llm._model.backend, "forward", collecting)
    del lost, cycle
    assert len(llm.generate("Hello", GREEDY).token_ids) == 8
    assert in_use(llm) == 0


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_synchronous_call_while_another_thread_runs_the_engine(llm, monkeypatch):
    slow_down(llm, monkeypatch)
    started, over = threading.Event(), threading.Event()

    async def serve():
        async with AsyncEngine(llm) as engine:
            stream = engine.generate("other", LONG)
            await anext(stream)
            started.set()
            await asyncio.to_thread(over.wait)
            assert engine.stats().running == 1
            stream.cancel()
            return await stream.whole()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(asyncio.run, serve())
        started.wait()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Hello", LONG)
        over.set()
        assert len(other.result().token_ids) > 1
    assert in_use(llm) == 0


# ---- closing


def test_close_ends_running_requests_with_what_they_have(llm, monkeypatch):
    slow_down(llm, monkeypatch)

    async def main():
        engine = await AsyncEngine(llm).start()
        streams = [engine.generate(f"prompt {i}", LONG) for i in range(20)]
        waiting = asyncio.create_task(streams[-1].whole())
        await anext(streams[0])
        watch = engine.watch()
        await engine.close()
        await engine.close()
        assert in_use(llm) == 0
        assert asyncio.all_tasks() <= {asyncio.current_task(), waiting}
        assert (await waiting).finish_reason == "cancelled"
        async for _ in watch:
            pass
        return [await s.whole() for s in streams[:-1]]

    results = asyncio.run(main())
    assert {r.finish_reason for r in results} == {"cancelled"}
    assert results[0].token_ids
    assert len(llm.generate("Hello", GREEDY).token_ids) == 8, "the model stays its owner's"


def test_closing_the_model_beneath_ends_the_requests(folder):
    async def main():
        llm = LLM(str(folder))
        async with AsyncEngine(llm) as engine:
            stream = engine.generate("Hello", LONG)
            await anext(stream)
            await asyncio.to_thread(llm.close)
            result = await stream.whole()
            with pytest.raises(LocalLLMError, match="closed"):
                await engine.complete("Hello", GREEDY)
            return result

    assert asyncio.run(main()).finish_reason in ("cancelled", "length")


def test_leaving_while_the_model_loads_leaves_no_thread(folder, monkeypatch):
    left = threading.Event()

    def slow(*args):
        left.wait(10)
        return LLM(*args)

    async def main():
        engine = AsyncEngine(str(folder))
        monkeypatch.setattr("localllm.async_engine.LLM", slow)
        task = asyncio.create_task(engine.start())
        asyncio.get_running_loop().call_later(0.1, left.set)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.close()

    asyncio.run(main())


# ---- limits


def test_a_full_queue_refuses_and_takes_again_later(folder, monkeypatch):
    async def main():
        async with AsyncEngine(str(folder), max_batch=2, max_waiting=2) as engine:
            slow_down(engine.llm, monkeypatch)
            streams = [engine.generate(f"prompt {i}", LONG) for i in range(4)]
            for stream in streams:
                await stream.accepted()
            with pytest.raises(TooManyRequests, match="2 requests wait"):
                engine.generate("one too many", GREEDY)
            for stream in streams[:2]:
                await anext(stream)
            assert (engine.stats().running, engine.stats().waiting) == (2, 2)
            with pytest.raises(TooManyRequests):
                await engine.complete("one too many", GREEDY)
            for stream in streams:
                await stream.aclose()
            assert len((await engine.complete("now", GREEDY)).token_ids) == 8

    asyncio.run(main())


def test_without_a_queue_only_what_the_batch_holds_is_taken(folder):
    async def main():
        async with AsyncEngine(str(folder), max_batch=1, max_waiting=0) as engine:
            stream = engine.generate("one", LONG)
            with pytest.raises(TooManyRequests):
                engine.generate("two", GREEDY)
            await stream.aclose()
            await engine.complete("two", GREEDY)

    asyncio.run(main())


def test_a_request_that_takes_too_long_ends_with_what_it_has(llm, monkeypatch):
    slow_down(llm, monkeypatch)

    async def main():
        async with AsyncEngine(llm) as engine:
            late = await engine.complete("Hello", LONG, timeout=0.3)
            never = await engine.complete("Hello", LONG, timeout=0)
            fine = await engine.complete("Hello", GREEDY, timeout=60)
            return late, never, fine

    late, never, fine = asyncio.run(main())
    assert (late.finish_reason, late.receipt.stopped_by) == ("cancelled", "timeout")
    assert 0 < len(late.token_ids) < 100
    assert (never.receipt.stopped_by, never.token_ids) == ("timeout", ())
    assert fine.finish_reason == "length"
    assert in_use(llm) == 0


def test_several_answers_come_from_one_request(llm):
    params = SamplingParams(temperature=1.1, seed=5, max_tokens=8, ignore_eos=True, n=3)
    expected = llm.generate("Hello", params)
    likeliest = replace(params, n=1, best_of=3)

    async def main():
        async with AsyncEngine(llm) as engine:
            texts = {}
            async for delta in engine.generate("Hello", params):
                texts[delta.sample] = texts.get(delta.sample, "") + delta.text
            with pytest.raises(InvalidRequest, match="best_of"):
                await anext(engine.generate("Hello", likeliest))
            for _ in range(20):  # left at any moment
                async for _ in engine.generate("Hello", replace(params, max_tokens=100)):
                    break
            return (
                texts,
                await engine.complete("Hello", params),
                await engine.complete("Hello", likeliest),
            )

    texts, whole, best = asyncio.run(main())
    answers = [expected, *expected.alternatives]
    assert [texts[i] for i in range(3)] == [a.text for a in answers]
    assert [whole.text, *(a.text for a in whole.alternatives)] == [a.text for a in answers]
    assert best.text == llm.generate("Hello", likeliest).text
    assert in_use(llm) == 0


def test_a_slow_grammar_holds_nobody_up(llm, monkeypatch):
    release = threading.Event()
    prepare = llm.prepare

    def slow(prompt, params, options, **more):
        if params.constrained:
            release.wait(10)
        return prepare(prompt, params, options, **more)

    monkeypatch.setattr(llm, "prepare", slow)

    async def main():
        async with AsyncEngine(llm) as engine:
            chosen = engine.generate("x", SamplingParams(choices=["yes", "no"], max_tokens=6))
            await engine.complete("quick", GREEDY)
            assert engine.stats().waiting == 1
            release.set()
            return (await chosen.whole()).text

    assert asyncio.run(main()) in ("yes", "no")


def test_requests_stay_in_the_order_in_which_they_came(folder):
    async def main():
        async with AsyncEngine(str(folder), max_batch=1) as engine:
            async with engine.watch() as watch:
                lengths = [(7 * i) % 31 + 1 for i in range(30)]
                streams = [engine.generate([1] * length, GREEDY) for length in lengths]
                await asyncio.gather(*(stream.whole() for stream in streams))
                events = watch._watch.take()
            return lengths, [e.prompt_tokens for e in events if isinstance(e, Queued)]

    lengths, queued = asyncio.run(main())
    assert queued == lengths


def test_priority_goes_first(folder, monkeypatch):
    async def main():
        async with AsyncEngine(str(folder), max_batch=1) as engine:
            slow_down(engine.llm, monkeypatch)
            order = []

            async def one(name, priority):
                await engine.complete(name, GREEDY, priority=priority)
                order.append(name)

            first = engine.generate("first", GREEDY)
            await anext(first)
            tasks = [asyncio.create_task(one(n, p)) for n, p in (("low", 5), ("high", 0))]
            await asyncio.gather(*tasks)
            return order

    assert asyncio.run(main()) == ["high", "low"]


# ---- what breaks


def test_a_step_that_raises_fails_one_request_only(llm, monkeypatch):
    forward = llm._model.backend.forward

    def breaking(batch, *rest):
        if any(66 in chunk.token_ids.tolist() for chunk in batch.chunks):
            raise RuntimeError("the model broke")
        return forward(batch, *rest)

    prompts = [[7, i] for i in range(6)]
    banned = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias={66: -1e9})
    alone = [llm.generate(p, banned).token_ids for p in prompts]
    monkeypatch.setattr(llm._model.backend, "forward", breaking)

    async def main():
        async with AsyncEngine(llm) as engine:
            calls = [engine.complete(p, banned) for p in [*prompts, [66]]]
            return await asyncio.gather(*calls, return_exceptions=True)

    *good, bad = asyncio.run(main())
    assert [r.token_ids for r in good] == alone
    assert isinstance(bad, RuntimeError)
    assert in_use(llm) == 0


def test_a_fault_of_the_engine_itself_reaches_everyone_and_it_goes_on(llm, monkeypatch):
    async def main():
        async with AsyncEngine(llm) as engine:
            with monkeypatch.context() as patch:

                def broken():
                    raise MemoryError("none left")

                patch.setattr(engine_of(llm).scheduler, "schedule", broken)
                calls = [engine.complete(f"p{i}", GREEDY) for i in range(5)]
                errors = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(e, MemoryError) for e in errors)
                with pytest.raises(MemoryError):
                    await asyncio.to_thread(llm.generate, "Hello", GREEDY)
            with monkeypatch.context() as patch:

                def worse(_):
                    raise RuntimeError("no turns today")

                patch.setattr(llm.pump, "drive", worse)
                with pytest.raises(RuntimeError, match="no turns today"):
                    await engine.complete("Hello", GREEDY)
            return await engine.complete("Hello", GREEDY)

    assert len(asyncio.run(main()).token_ids) == 8
    assert in_use(llm) == 0


def test_an_answer_that_cannot_be_text_fails_alone(llm, monkeypatch):
    stream_of = type(llm.tokenizer).stream

    class Broken:
        def push(self, token_id):
            raise UnicodeError("no such character")

        def finish(self):
            return ""

    async def main():
        async with AsyncEngine(llm) as engine:
            monkeypatch.setattr(type(llm.tokenizer), "stream", lambda self: Broken())
            bad = await engine.generate("bad", LONG).accepted()
            monkeypatch.setattr(type(llm.tokenizer), "stream", stream_of)
            good = engine.generate("good", GREEDY)
            with pytest.raises(UnicodeError):
                await bad.whole()
            return await good.whole()

    assert len(asyncio.run(main()).token_ids) == 8
    assert in_use(llm) == 0


# ---- watching


def test_the_engine_can_be_watched(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            async with engine.watch() as watch:
                stream = engine.generate("Hello", GREEDY)
                events = []
                async for event in watch:
                    events.append(event)
                    if isinstance(event, Ended):
                        break
                result = await stream.whole()
            assert not engine_of(llm).events.watched
            async with engine.watch(capacity=4) as slow:
                await engine.complete("Hello", GREEDY)
                kept = [await anext(slow) for _ in range(4)]
                assert slow.dropped > 0
            engine.watch()  # held by nobody
            assert not engine_of(llm).events.watched
            return events, kept, result

    events, kept, result = asyncio.run(main())
    assert isinstance(events[0], Queued)
    assert any(isinstance(event, StepDone) for event in events)
    assert events[-1].receipt.generated_tokens == result.receipt.generated_tokens
    assert len(kept) == 4
    assert not engine_of(llm).events.watched


def test_stats_count_blocks_and_requests(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            stream = engine.generate("a prompt of some length", LONG)
            await anext(stream)
            busy = engine.stats()
            await stream.aclose()
            return busy, engine.stats()

    busy, idle = asyncio.run(main())
    assert idle.blocks == busy.blocks
    assert (idle.running, idle.waiting, idle.blocks_in_use) == (0, 0, 0)
    assert idle.blocks_idle > 0


def test_an_idle_engine_uses_no_processor_time(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            await engine.complete("Hello", GREEDY)
            began = time.process_time()
            await asyncio.sleep(0.3)
            return time.process_time() - began

    assert asyncio.run(main()) < 0.15


# ---- the long run


HOWS = ("whole", "whole", "read", "cancel", "drop", "aclose", "task", "thread")


def leave_early(llm: LLM, prompt: list[int], params: SamplingParams) -> None:
    for delta in llm.stream(prompt, params):
        if len(prompt) % 2 or delta.result is not None:
            break


async def soak(engine: AsyncEngine, count: int, clients: int, seed: int) -> None:
    todo = iter(range(count))

    async def client() -> None:
        for number in todo:
            chance = random.Random(seed * count + number)
            prompt = [chance.randrange(256) for _ in range(chance.randrange(1, 40))]
            params = params_of(number, chance.randrange(1, 8))
            stream = engine.generate(
                prompt, params, timeout=0.001 if chance.random() < 0.05 else None
            )
            how = chance.choice(HOWS)
            if how == "whole":
                await stream.whole()
            elif how == "read":
                assert [delta async for delta in stream][-1].result is not None
            elif how == "thread":
                await asyncio.to_thread(leave_early, engine.llm, prompt, params)
            elif how == "task":
                task = asyncio.create_task(stream.whole())
                await asyncio.sleep(chance.random() * 0.003)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            elif how == "drop":
                async for _ in stream:
                    break
            else:
                if chance.random() < 0.5:
                    with suppress(StopAsyncIteration):
                        await anext(stream)
                if how == "cancel":
                    stream.cancel()
                else:
                    await stream.aclose()

    await asyncio.gather(*(client() for _ in range(clients)))
    await until(lambda: engine.stats().running + engine.stats().waiting == 0)


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def objects() -> int:
    for _ in range(3):
        gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize(
    ("count", "clients"), [(500, 20), pytest.param(10_000, 50, marks=pytest.mark.slow)]
)
def test_nothing_grows_however_many_requests_come_and_go(folder, count, clients):
    async def main():
        async with AsyncEngine(str(folder), max_batch=16) as engine:
            await soak(engine, min(count // 2, 1000), clients, seed=1)  # pools and caches fill
            before = objects(), rss()
            await soak(engine, count, clients, seed=2)
            after = objects(), rss()
            stats = engine.stats()
            pools = engine_of(engine.llm).cache.pools
            free = sum(pool.available for pool in pools)
            assert stats.blocks_in_use == 0
            assert free == stats.blocks
            assert after[0] - before[0] < 500, "Python objects were left"
            assert after[1] - before[1] < 24 << 20, "memory was left"
            assert not engine._running
            assert not engine._preparing

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("reads /proc")
    asyncio.run(main())


def test_a_cancelled_step_is_run_again_for_the_others(llm, monkeypatch):
    """A step may be stopped by a cancel that came a moment before another request."""
    forward = llm._model.backend.forward
    alone = llm.generate("Hello", GREEDY).token_ids
    steps = 0

    def stopping(*args):
        nonlocal steps
        steps += 1
        if steps % 2:
            raise StepCancelled("cancelled")
        return forward(*args)

    monkeypatch.setattr(llm._model.backend, "forward", stopping)

    async def main():
        async with AsyncEngine(llm) as engine:
            return await engine.complete("Hello", GREEDY)

    assert asyncio.run(main()).token_ids == alone
