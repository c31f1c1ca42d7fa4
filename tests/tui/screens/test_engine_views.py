from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from textual.widgets import Static, TabbedContent

from localllm.tui.engine.client import EngineEvents
from localllm.tui.screens.engine_views import EngineScreen
from localllm.tui.tokens import TokenView, keep_tokens
from localllm.tui.trace import trace_of
from localllm.tui.widgets.context_bar import ContextBar
from localllm.tui.widgets.kv_map import Block, KvMap
from localllm.tui.widgets.lanes import lanes
from tests.tui.fake_engine import RECEIPT, FakeEngine
from tests.tui.view_host import HostApp, run, until

# What the real engine told while it answered two requests: scripts/record_engine.py wrote it.
RECORDED = Path(__file__).parent.parent / "recorded" / "two_answers.jsonl"
EVENTS = [json.loads(line) for line in RECORDED.read_text("utf-8").splitlines()]


def block(number: int, *owners: int, name: str = "") -> SimpleNamespace:
    return SimpleNamespace(number=number, owners=owners, refcount=len(owners), name=name, group=0)


BLOCKS = [
    block(0, 1, 2, name="aa11"),
    block(1, 1, name="bb22"),
    block(2, 2),
    block(3, name="cc33"),
    *(block(number) for number in range(4, 40)),
]


def make(tab: str = "speed", events: list | None = None) -> HostApp:
    engine = FakeEngine(blocks=BLOCKS)
    host = HostApp(engine, EngineScreen(tab))
    chat = host.with_chat("Why?" * 40, "The sea is wide")
    host.store.edit_message(host.store.chat(chat).head, receipt=dict(RECEIPT))
    trace = trace_of(engine)
    for name, event in EVENTS if events is None else events:
        trace.add(name, event)
    return host


def text(app: HostApp, where: str) -> str:
    return str(app.screen.query_one(where, Static).content)


@run(make)
async def test_the_receipt_says_where_the_cached_prefix_ended(app, pilot):
    await until(pilot, lambda: "came from the cache" in text(app, "#cache"))
    assert text(app, "#cache") == (
        "96 of 120 prompt tokens came from the cache (80%). The reuse ended there because: what "
        "follows was never computed."
    )
    receipt = text(app, "#receipt")
    for said in ("120 ms", "61.2 tokens/s", "9 of 12 right (75%), by ngram", "seed", "cpu"):
        assert said in receipt


@run(make)
async def test_the_context_bar_counts_the_open_branch(app, pilot):
    bar = app.screen.query_one(ContextBar)
    await until(pilot, lambda: bar.use is not None)
    assert (bar.use.used, bar.use.context, bar.use.cached, bar.use.reserve) == (51, 8192, 25, 64)


@run(make)
async def test_it_follows_what_the_engine_tells(app, pilot):
    trace = trace_of(app.engine)
    before = len(trace.steps)
    step = next(event for event in EVENTS if event[0] == "StepDone")
    app.engine.tell(EngineEvents((step,)))
    assert len(trace.steps) == before + 1


@run(lambda: make("blocks"))
async def test_a_block_is_chosen_and_its_tokens_are_shown(app, pilot):
    await until(pilot, lambda: "held by" in text(app, "#block-text"))
    first = text(app, "#block-text")
    for said in ("shared", "request 1, request 2", "aa11", "the text of [b]block[/b] 0"):
        assert said in first
    head = text(app, "#kv-head")
    assert head.startswith("40 blocks: 3 in use, 1 shared ◆, 1 kept for reuse ▫, 36 free ·")
    assert "a request 1" in head
    app.screen.query_one(KvMap).focus()
    await pilot.press("right", "l", "right")
    await until(pilot, lambda: "cc33" in text(app, "#block-text"))
    assert "kept for reuse" in text(app, "#block-text")
    await pilot.press("end", "home", "down")
    await until(pilot, lambda: "block      0" in text(app, "#block-text"))


@run(lambda: make("blocks"))
async def test_a_click_chooses_a_block(app, pilot):
    await until(pilot, lambda: "held by" in text(app, "#block-text"))
    await pilot.click(KvMap, offset=(9, 0))  # the ninth cell, after a gap
    await until(pilot, lambda: "block      8" in text(app, "#block-text"))
    await pilot.click(KvMap, offset=(8, 0))  # the gap itself
    assert app.screen.query_one(KvMap).chosen.number == 8


@run(lambda: make("blocks"))
async def test_the_chosen_block_is_read_again_when_it_changes(app, pilot):
    await until(pilot, lambda: "held by" in text(app, "#block-text"))
    app.engine.blocks = [block(0, 3, name="dd44"), *BLOCKS[1:]]
    await until(pilot, lambda: "dd44" in text(app, "#block-text"))


@run(lambda: make("guesses"))
async def test_guesses_of_the_last_answer_are_shaded(app, pilot):
    head = app.store.chat(app.chat_id).head
    tokens = [
        TokenView(0, "The"),
        TokenView(1, " land", fate="rejected"),
        TokenView(2, " sea", fate="accepted"),
        TokenView(3, " is wide"),
    ]
    keep_tokens(app, head, tokens)
    await until(pilot, lambda: "The" in text(app, "#shaded"))
    assert text(app, "#shaded") == "The land sea is wide"
    spans = {
        str(span.style): text(app, "#shaded")[span.start : span.end]
        for span in app.screen.query_one("#shaded", Static).content.spans
    }
    assert " sea" in [v for k, v in spans.items() if "success" in k]
    assert " land" in [v for k, v in spans.items() if "error" in k]
    assert "1 guessed and right" in text(app, "#legend")


@run(lambda: make("guesses"))
async def test_why_guessing_is_on_or_off_is_told_in_figures(app, pilot):
    await until(pilot, lambda: text(app, "#why") != "")
    drafted = sum(
        row["rows"] - 1
        for name, event in EVENTS
        if name == "StepDone"
        for row in event["batch"]
        if row["kind"] == "verify"
    )
    assert drafted > 0, "the recording must hold guesses"
    assert f"of {drafted} guessed tokens were right" in text(app, "#why")
    assert "accepted a step, mean" in text(app, "#acceptance")
    app.store.edit_chat(app.chat_id, params={"speculation": "off"})
    await until(pilot, lambda: text(app, "#why").startswith("Off: the chat's parameters"))


@run(lambda: make("lanes"))
async def test_lanes_show_both_requests_of_the_recording(app, pilot):
    trace = trace_of(app.engine)
    shown = lanes(trace, 200).plain
    requests = {event["request_id"] for name, event in EVENTS if name == "Queued"}
    assert len(requests) == 2
    for request in requests:
        assert f"#{request} " in shown
    assert "▓" in shown
    assert "▪" in shown


@run(make)
async def test_keys_change_tabs_and_space_holds_still(app, pilot):
    tabs = app.screen.query_one(TabbedContent)
    for key, tab in (("2", "blocks"), ("3", "guesses"), ("4", "lanes"), ("1", "speed")):
        await pilot.press(key)
        await pilot.pause()
        assert tabs.active == tab
    await pilot.press("space")
    assert app.screen._paused


@run(lambda: HostApp(FakeEngine(model=None), EngineScreen("blocks")))
async def test_without_a_model_it_says_so(app, pilot):
    await until(pilot, lambda: "no model" in text(app, "#kv-head"))
    await pilot.press("1")
    await pilot.pause()
    assert text(app, "#receipt") == "No answer in this chat yet."


@pytest.mark.parametrize("width", [20, 60, 120])
def test_the_map_wraps_at_any_width(width):
    app = HostApp(FakeEngine())

    @run(size=(width, 20))
    async def drive(app, pilot):
        view = KvMap()
        await app.screen.mount(view)
        view.show([Block(number, (number % 3,), 1) for number in range(300)])
        await pilot.pause()
        assert view.columns % 8 == 0
        assert view.columns * 9 // 8 <= max(width, 9)
        view.focus()
        await pilot.press("end")
        await pilot.pause()
        assert view.chosen.number == 299
        line = (299 // view.columns) - view.scroll_offset.y
        assert 0 <= line < view.size.height
        assert "".join(s.text for s in view.render_line(line)).strip() != ""

    drive(app)


@run(lambda: make("guesses"))
async def test_guesses_are_shaded_while_the_answer_comes(app, pilot):
    told = SimpleNamespace(id=1, text="Once", logprob=None, top=(), drafted="accepted")
    app.answers.live[app.chat_id] = SimpleNamespace(seen=[told])
    await until(pilot, lambda: text(app, "#shaded") == "Once")
