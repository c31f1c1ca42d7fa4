"""The chat app as a person meets it: its start, its keys while it generates, its speed and size.

    python -m benchmarks.tui [--model smollm2:135m] [--rounds 5] [--only paint,keys,…]

Everything runs in a real pseudo-terminal (pexpect, pyte), chats in a folder of its own. Latencies
are from a key's way into the terminal to the bytes that show its letter, and to the letter on the
drawn screen: there the work of pyte is included, which is in Python and slower than a terminal.
Needs the extra `test`. The machine's load is printed beside the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll

from benchmarks.harness.machine import print_heading
from localllm.tui.store import Store
from localllm.tui.widgets.markdown import AnswerMarkdown

COMMAND = "from localllm.cli import main; main()"
STORY = "Write a very long story about a lighthouse."
TOKENS = 400
KEYS = 70  # a line of them
CHATS = 10_000
TURNS = 200
WORDS = ["lighthouse", "river", "engine", "garden", "winter", "letter", "copper", "violin"]
WORDS += ["market", "harbour"]
ENGINE_ALONE = """
import json, os, sys
from localllm import LLM, SamplingParams
from localllm.tui.engine.__main__ import NICER
os.nice(NICER)
with LLM(sys.argv[1]) as llm:
    params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
    messages = [{"role": "user", "content": sys.argv[3]}]
    print(json.dumps(llm.chat(messages, params).receipt.decode_tokens_per_second))
"""


class Terminal:
    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        folders = {"XDG_DATA_HOME": str(home / "data"), "XDG_CONFIG_HOME": str(home / "config")}
        self.screen = pyte.Screen(110, 34)
        self._stream = pyte.ByteStream(self.screen)
        self.started = time.perf_counter()
        self.process = pexpect.spawn(
            sys.executable,
            ["-c", COMMAND, "chat", *arguments],
            dimensions=(34, 110),
            env={**os.environ, **folders, "TERM": "xterm-256color", "COLORTERM": "truecolor"},  # type: ignore[arg-type]
        )
        self.process.delaybeforesend = None

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def until(self, holds: Callable[[str], bool], seconds: float = 120) -> float:
        """When it first held, seconds since the start."""
        while not holds(self.text):
            now = time.perf_counter() - self.started
            assert now < seconds, f"nothing came:\n{self.text}"
            self.read(0.002)
        return time.perf_counter() - self.started

    def read(self, seconds: float) -> None:
        try:
            data = self.process.read_nonblocking(1 << 16, timeout=seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self._stream.feed(data.replace(b"\x1b[>25u", b"").replace(b"\x1b[<u", b""))

    def wait_for(self, words: bytes, seconds: float = 120) -> None:
        """Without drawing, which in Python takes more processor time than the app."""
        end, seen = time.perf_counter() + seconds, b""
        while words not in seen:
            assert time.perf_counter() < end, f"nothing came:\n{seen!r}"
            with contextlib.suppress(pexpect.TIMEOUT):
                seen = seen[-1000:] + self.process.read_nonblocking(1 << 16, timeout=1)

    def typed(self) -> str:
        """What stands where one types."""
        lines = [line.partition("│")[2] for line in self.screen.display if "│" in line]
        return lines[-1].rpartition("│")[0].strip() if lines else ""

    def cursor_line(self) -> int:
        """Of the list of chats: the first line whose background is another than its neighbours'."""
        grounds = [self.screen.buffer[y][5].bg for y in range(2, 32)]
        usual = max(set(grounds), key=grounds.count)
        return next((y for y, ground in enumerate(grounds) if ground != usual), -1)

    def key_latencies(self, count: int) -> list[float]:
        """Milliseconds from a letter to its place on the screen, one at a time."""

        def shown(letter: str) -> None:
            start = time.perf_counter()
            while not self.typed().endswith(letter):
                assert time.perf_counter() - start < 10, self.text
                self.read(0.001)

        return self._latencies("abcdefghijklmnopqrstuvwxyz", count, shown, self.read)

    def byte_latencies(self, count: int) -> list[float]:
        """Milliseconds from a letter, of an alphabet that no answer uses, to the bytes of it."""

        def skip(seconds: float) -> None:
            with contextlib.suppress(pexpect.TIMEOUT):
                self.process.read_nonblocking(1 << 16, timeout=seconds)

        georgian = "".join(map(chr, range(0x10D0, 0x10F0)))
        return self._latencies(georgian, count, lambda letter: self.wait_for(letter.encode()), skip)

    def _latencies(
        self,
        letters: str,
        count: int,
        shown: Callable[[str], None],
        read: Callable[[float], None],
    ) -> list[float]:
        taken = []
        for number in range(count):
            letter = letters[number % len(letters)]
            start = time.perf_counter()
            self.process.send(letter)
            shown(letter)
            taken.append(1000 * (time.perf_counter() - start))
            until = start + 0.06
            while (left := until - time.perf_counter()) > 0:
                read(min(left, 0.01))
        return taken

    def children(self) -> list[int]:
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(number) for number in found.stdout.split()]

    def close(self) -> None:
        self.process.send("\x11")
        end = time.perf_counter() + 10
        while self.process.isalive() and time.perf_counter() < end:
            self.read(0.05)
        self.process.close(force=True)


def resident(process: int) -> float:
    """MB of memory."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    return int(told.stdout or 0) / 1024


def processor_seconds(process: int) -> float:
    """What it has computed so far; on a quiet machine that is about the time it took."""
    path = Path(f"/proc/{process}/stat")
    if not path.exists():
        return float("nan")
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> str:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return f"p50 {statistics.median(values):.1f} ms, p95 {p95:.1f} ms, worst {ordered[-1]:.1f} ms"


def ready(text: str) -> bool:
    return "@ for a file" in text


def paint(home: Path, model: str, rounds: int) -> None:
    """From the command to a box that can be typed into, and to the whole screen."""
    box, whole, worked = [], [], []
    for _ in range(rounds + 1):
        terminal = Terminal(home, model)
        box.append(terminal.until(lambda text: "Say something" in text))
        whole.append(terminal.until(ready))
        worked.append(processor_seconds(terminal.process.pid))
        terminal.close()
    # The first run fills the file cache.
    for name, taken in (("a box to type into", box[1:]), ("the whole screen", whole[1:])):
        print(f"{name}: median {statistics.median(taken):.2f} s, fastest {min(taken):.2f} s")
    print(f"processor time until the whole screen: {statistics.median(worked[1:]):.2f} s")


def keys(home: Path, model: str, rounds: int) -> None:
    """Letters typed while nothing else goes on, and while an answer comes at full speed."""
    terminal = Terminal(home, model, "--temperature", "0", "--set", "ignore_eos=true")
    try:
        terminal.until(ready)
        terminal.until(lambda text: "loading" not in text and "starting" not in text)
        kinds = {"to their bytes": terminal.byte_latencies, "drawn": terminal.key_latencies}
        for how, latencies in kinds.items():
            print(f"keys, idle, {how}: {spread(latencies(KEYS))}")
            terminal.process.send("\x15")  # clears the line
            terminal.until(ready)
        for how, latencies in kinds.items():
            terminal.process.send(STORY + "\r")
            terminal.until(lambda text: "tok/s" in text)
            print(f"keys, while it generates, {how}: {spread(latencies(KEYS))}")
            terminal.read(0.1)
            assert "tok/s" in terminal.text, "the answer ended before the keys did"
            terminal.process.send("\x15\x1b")  # ends the answer
            terminal.until(lambda text: ready(text) and "tok/s" not in text.splitlines()[-2])
            terminal.process.send("/new\r")
            terminal.until(lambda text: ready(text) and "lighthouse" not in terminal.typed())
        app = resident(terminal.process.pid)
        engine = sum(map(resident, terminal.children()))
        print(f"memory: app {app:.0f} MB, engine {engine:.0f} MB")
    finally:
        terminal.close()


def speed(home: Path, model: str, rounds: int) -> None:
    """The same answer in the app and from the engine alone, in turn and at the same priority."""
    options = ("--temperature", "0", "--set", "ignore_eos=true", "--max-tokens", str(TOKENS))
    ours, alone = [], []
    for number in range(rounds):
        own = home / f"speed{number}"
        terminal = Terminal(own, model, *options)
        terminal.until(ready)
        terminal.process.send(STORY + "\r")
        terminal.wait_for(b"reached its limit")
        terminal.close()
        with Store(next(own.rglob("chats.db"))) as store:
            ours.append(store.tree(1)[-1].receipt["decode_tokens_per_second"])
        told = subprocess.run(
            [sys.executable, "-c", ENGINE_ALONE, model, str(TOKENS), STORY],
            capture_output=True,
            text=True,
            check=True,
        )
        alone.append(json.loads(told.stdout))
    app, engine = statistics.median(ours), statistics.median(alone)
    print(f"tokens/s: app {app:.1f}, engine alone {engine:.1f}, ratio {app / engine:.2f}")


def many(home: Path, model: str, rounds: int) -> None:
    """10,000 chats in the list and a chat of 200 turns."""
    path = home / "data" / "localllm" / "chats.db"
    with Store(path) as store:
        words = [
            "lighthouse",
            "river",
            "engine",
            "garden",
            "winter",
            "letter",
            "copper",
            "violin",
            "market",
            "harbour",
        ]
        with store.together():
            for number in range(CHATS):
                chat = store.new_chat(title=f"{words[number % 10]} {number}")
                parent = None
                for turn in range(4):
                    text = " ".join(words[(number * 7 + turn * 3 + k) % 10] for k in range(40))
                    role = "assistant" if turn % 2 else "user"
                    parent = store.add_message(chat.id, parent, role, f"{text} n{number}").id  # type: ignore[arg-type]
            chat = store.new_chat(title="two hundred turns")
            parent = None
            for turn in range(2 * TURNS):
                text = f"turn {turn}: " + " ".join(words[(turn + k) % 10] for k in range(60))
                parent = store.add_message(
                    chat.id, parent, "assistant" if turn % 2 else "user", text
                ).id
            store.touch(chat.id)
        for query in ("lighthouse", "copper violin", f"n{CHATS - 7}", "harb"):
            taken = []
            for _ in range(max(5, rounds)):
                start = time.perf_counter()
                found = len(store.search(query, 100))
                taken.append(1000 * (time.perf_counter() - start))
            print(f"search of {CHATS:,} chats, {query!r}: {found} hits, {spread(taken)}")
    terminal = Terminal(home, model, "--resume")
    try:
        terminal.until(lambda text: "turn 399" in text and ready(text))
        terminal.until(lambda text: "loading" not in text and "starting" not in text)
        print(f"keys in a chat of {TURNS} turns: {spread(terminal.key_latencies(KEYS))}")
        terminal.process.send("\x15")  # clears the line
        terminal.until(ready)
        terminal.process.send("\x0c")  # to the list of chats
        terminal.until(lambda text: "Rename" in text)
        taken = []
        for _ in range(25):  # the lines that are seen
            before = terminal.cursor_line()
            start = time.perf_counter()
            terminal.process.send("j")
            while terminal.cursor_line() == before:
                assert time.perf_counter() - start < 10, terminal.text
                terminal.read(0.001)
            taken.append(1000 * (time.perf_counter() - start))
        print(f"down the list of {CHATS:,} chats: {spread(taken)}")
    finally:
        terminal.close()


def long(home: Path, model: str, rounds: int) -> None:
    """Answers beyond the usual, drawn whole and by one piece more: processor seconds of the app."""
    table = "| row | square | said of it | mark |\n| - | - | - | - |\n"
    table += "".join(f"| row {n} | {n * n} | some text here | x |\n" for n in range(400))
    prose = "".join(f"Paragraph {n}: {'words and more words ' * 12}\n\n" for n in range(400))
    one = "word " * 5_000

    class Page(App[None]):
        def compose(self) -> ComposeResult:
            with VerticalScroll():
                yield AnswerMarkdown()

    async def drawn(text: str, more: str) -> tuple[float, float]:
        app = Page()
        async with app.run_test(size=(110, 34)) as pilot:
            markdown = app.query_one(AnswerMarkdown)
            taken = []
            for piece in (text, more):
                start = time.process_time()
                await markdown.append(piece)
                await pilot.pause()
                taken.append(time.process_time() - start)
        return taken[0], taken[1]

    for name, text, more in (
        ("a table of 400 rows", table, "| row 400 | 160000 | some text here | x |\n"),
        ("400 paragraphs", prose, "next words "),
        ("one paragraph", one, "next words "),
    ):
        runs = [asyncio.run(drawn(text, more)) for _ in range(rounds)]
        whole, piece = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{name}, {len(text):,} characters: {whole:.2f} s, one piece more {piece:.3f} s")


PARTS = {"paint": paint, "keys": keys, "speed": speed, "many": many, "long": long}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS))
    given = parser.parse_args()
    print_heading()
    print(f"load: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    for name in given.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            settings = Path(folder) / "config" / "localllm"
            settings.mkdir(parents=True)
            (settings / "settings.toml").write_text("titles = false\n")
            PARTS[name](Path(folder), given.model, given.rounds)


if __name__ == "__main__":
    main()
