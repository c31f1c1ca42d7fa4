"""The real command in a real terminal with a real model: start to end, and killed midway."""

from __future__ import annotations

import re
import sys
import time

import pytest

from localllm.tui.store import Store

pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("a pseudo-terminal is needed", allow_module_level=True)

import termios

from tests.tui.terminal import Terminal

ENTER, ESCAPE, CTRL_F, CTRL_G, CTRL_R, CTRL_T = "\r", "\x1b", "\x06", "\x07", "\x12", "\x14"
WORD = "Say the word pineapple."
STORY = "Write a long story about a lighthouse."
QUIET = "titles = false\n"
COSTS = re.compile(r"\d+ tokens · \d+ tok/s")  # of an answer that is whole


def writing(text):
    """Whether the status line tells of an answer under way."""
    return re.search(r"· (?:\d+\.\d tok/s|reading|writing|waits)", text) is not None


@pytest.fixture
def home(tmp_path):
    (tmp_path / "config" / "localllm").mkdir(parents=True)
    (tmp_path / "config" / "localllm" / "settings.toml").write_text(QUIET)
    return tmp_path


def chats(home):
    """The database, where the app keeps it."""
    (path,) = home.rglob("chats.db")
    return Store(path)


def test_start_ask_stop_branch_search_quit_and_all_is_there_again(home, smollm2):
    model = str(smollm2)
    with Terminal(home, "chat", model, "--temperature", "0") as terminal:
        terminal.until("Say something")
        terminal.type(STORY + ENTER)
        terminal.until("tok/s")  # of one that has not begun nothing would be kept
        terminal.type(ESCAPE)
        terminal.until("[stopped]")

        terminal.type("/set max_tokens=24" + ENTER)  # what it says next depends on its part
        terminal.until("Say something")
        terminal.type(WORD + ENTER)
        # The answer before may be longer than the screen.
        terminal.until(
            lambda text: (
                WORD in text
                and COSTS.search(text.rpartition(WORD)[2]) is not None
                and not writing(text)
            )
        )
        terminal.type(CTRL_R)
        terminal.until(lambda text: "2/2" in text and not writing(text))

        terminal.type(CTRL_T)
        terminal.until("in 2 branches")
        terminal.type(ESCAPE)
        terminal.until("Say something")
        terminal.type(CTRL_F)
        terminal.until("search all")
        terminal.type("long story about")
        terminal.until("1 messages")
        terminal.type(ENTER)
        terminal.until(lambda text: STORY in text and "Say something" in text)
        assert terminal.leave() == 0

    with chats(home) as store:
        (chat,) = store.chats()
        tree = [(m.role, m.status) for m in store.tree(chat.id)]
    assert tree == [
        ("user", "complete"),
        ("assistant", "stopped"),
        ("user", "complete"),
        ("assistant", "complete"),
        ("assistant", "complete"),
    ]

    with Terminal(home, "chat", model, "--resume") as terminal:
        terminal.until("pineapple")
        terminal.until("2/2")
        assert terminal.leave() == 0


def test_a_kill_in_mid_answer_costs_no_more_than_its_last_second(home, smollm2):
    with Terminal(home, "chat", str(smollm2), "--temperature", "0") as terminal:
        while "Say something" not in terminal.text:  # the first frame, long before the app's own
            terminal.read(0.01)
        terminal.type(STORY + ENTER)
        # The figure is on the screen: so many words had arrived a second before the kill.
        terminal.until(lambda text: len(_answer(text)) > 150)
        seen = _answer(terminal.text)
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            terminal.read()
        terminal.kill()

    with chats(home) as store:
        (chat,) = store.chats()
        question, answer = store.branch(chat.head)
    assert question.content == STORY
    assert answer.status == "interrupted"
    kept = "".join(answer.content.split())
    assert "".join(seen.split()) in kept

    with Terminal(home, "chat", str(smollm2), "--resume") as terminal:
        terminal.until("the app ended before it did")
        assert terminal.leave() == 0


def test_chats_that_cannot_be_opened_leave_the_terminal_as_it_was(home):
    (home / "data" / "localllm" / "chats.db").mkdir(parents=True)
    with Terminal(home, "chat") as terminal:
        before = termios.tcgetattr(terminal.process.child_fd)
        terminal.until("cannot be opened")
        terminal.process.wait()
        assert terminal.process.exitstatus == 1
        assert termios.tcgetattr(terminal.process.child_fd) == before


def _answer(text: str) -> str:
    """Lines of the answer that are whole on the screen; its Markdown is plain here."""
    lines = [line.split("▌", 1)[1] for line in text.split("\n") if "▌" in line]
    return "".join(line.strip() + " " for line in lines[3:6])
