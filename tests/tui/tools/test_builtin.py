from __future__ import annotations

import asyncio
import math
import os
import socket
from contextlib import suppress
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.tools.calculator import CALCULATOR, calculate
from localllm.tui.tools.clock import CLOCK
from localllm.tui.tools.files import read_below, reader
from localllm.tui.tools.tool import Tool, ToolFailed, check_arguments


class TestCalculator:
    @pytest.mark.parametrize(
        ("expression", "value"),
        [
            ("1 + 2 * 3", 7),
            ("(17 + 4) * 2.5", 52.5),
            ("2 ^ 10", 1024),
            ("2 ** -1", 0.5),
            ("-7 // 2", -4),
            ("7 % 3", 1),
            ("sqrt(16) + abs(-1)", 5.0),
            ("log(e) + cos(pi)", 0.0),
            ("factorial(20)", math.factorial(20)),
            ("max(1, 2, 3)", 3),
            ("123456789 * 987654321", 123456789 * 987654321),
        ],
    )
    def test_arithmetic(self, expression, value):
        assert calculate(expression) == value

    @pytest.mark.parametrize(
        "expression",
        [
            "__import__('os').system('id')",
            "().__class__",
            "[1, 2]",
            "'a' * 3",
            "x",
            "True",
            "1 if 1 else 2",
            "(lambda: 1)()",
            "9 ** 9 ** 9",
            "10 ** 100000",
            "(10 ** 400) ** 0.5",
            "factorial(100000)",
            "factorial(factorial(20))",
            "1 / 0",
            "sqrt(-1)",
            "(-8) ** 0.5",
            "comb(10 ** 9, 10 ** 8)",
            "max(1, key=abs)",
            "1 <<10",
            "",
            "1 +" * 200,
            "(" * 900,
            "+".join("1" * 400),
        ],
    )
    def test_anything_else_and_anything_large_fails_in_words(self, expression):
        with pytest.raises(ToolFailed):
            calculate(expression)

    @given(st.text(alphabet="0123456789.+-*/%^() episqrtlogfactorial,", max_size=40))
    def test_whatever_is_typed_gives_a_number_or_a_reason(self, text):
        with suppress(ToolFailed):
            assert isinstance(calculate(text), int | float)

    def test_nothing_is_warned_of_on_the_screen(self, recwarn):
        for odd in ("0x1for x in y", "1is 1", "'\\d'"):
            with suppress(ToolFailed):
                calculate(odd)
        assert not recwarn.list

    def test_as_a_tool(self):
        assert asyncio.run(CALCULATOR.call({"expression": "6 * 7"})) == "42"
        assert asyncio.run(CALCULATOR.call({"expression": "5 / 2"})) == "2.5"
        assert asyncio.run(CALCULATOR.call({"expression": "4 / 2"})) == "2"


def test_the_time_is_told_for_any_zone():
    told = asyncio.run(CLOCK.call({}))
    assert str(date.today().year) in told
    assert "(Asia/Tokyo)" in asyncio.run(CLOCK.call({"timezone": "Asia/Tokyo"}))
    for wrong in ("Nowhere/Town", "../../etc/passwd", "/etc/passwd", "\0"):
        with pytest.raises(ToolFailed, match="time zone"):
            asyncio.run(CLOCK.call({"timezone": wrong}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "chosen"
    (folder / "deep").mkdir(parents=True)
    (folder / "notes.txt").write_text("one\ntwo\nthree\n")
    (folder / "deep" / "more.md").write_text("# More")
    (tmp_path / "secret.txt").write_text("secret")
    return folder


class TestFiles:
    def test_a_file_its_lines_and_a_folder(self, folder):
        assert read_below(folder, "notes.txt") == "one\ntwo\nthree"
        assert read_below(folder, "./deep/more.md") == "# More"
        assert read_below(folder, "notes.txt", 2, 1) == "two\n[1 lines more, from line 3]"
        assert read_below(folder, ".") == "deep/\nnotes.txt"
        call = reader(folder).call({"path": "notes.txt", "start": 3})
        assert asyncio.run(call) == "three"

    @pytest.mark.parametrize(
        "path",
        [
            "../secret.txt",
            "deep/../../secret.txt",
            "/etc/passwd",
            "..",
            "a\0b",
            "~/x",
            "//etc/passwd",
        ],
    )
    def test_nothing_outside_is_read(self, folder, path):
        with pytest.raises(ToolFailed):
            read_below(folder, path)

    def test_links_lead_nowhere(self, folder, tmp_path):
        (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
        (folder / "up").symlink_to(tmp_path)
        (folder / "inner").symlink_to("notes.txt")
        for path in ("link.txt", "up/secret.txt", "up", "inner"):
            with pytest.raises(ToolFailed, match="links are not followed"):
                read_below(folder, path)
        assert read_below(folder, ".") == "deep/\nnotes.txt"

    def test_what_is_no_file_is_told(self, folder):
        os.mkfifo(folder / "pipe")  # opening it would wait for ever
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "socket"))
            for path in ("pipe", "socket", "missing", "notes.txt/x"):
                with pytest.raises(ToolFailed):
                    read_below(folder, path)
        (folder / "data").write_bytes(bytes(range(256)))
        with pytest.raises(ToolFailed, match="binary"):
            read_below(folder, "data")
        with (folder / "big").open("wb") as file:
            file.truncate(3 << 20)
        with pytest.raises(ToolFailed, match="at most"):
            read_below(folder, "big")
        with pytest.raises(ToolFailed, match="3 lines"):
            read_below(folder, "notes.txt", 9)

    def test_a_folder_that_has_gone(self, tmp_path):
        with pytest.raises(ToolFailed):
            read_below(tmp_path / "gone", ".")

    @given(st.text(max_size=30))
    def test_no_path_escapes(self, text):
        place = Path(__file__).parent
        try:
            shown = read_below(place, text)
        except ToolFailed:
            return
        assert shown  # only what is below the folder exists


class TestArguments:
    SCHEMA = {  # noqa: RUF012
        "properties": {
            "count": {"type": "integer"},
            "share": {"type": "number"},
            "kind": {"type": "string", "enum": ["a", "b"]},
            "any": {},
            "maybe": {"type": ["string", "null"]},
        },
        "required": ["count"],
        "additionalProperties": False,
    }

    @pytest.mark.parametrize(
        "given",
        [
            {"count": 1},
            {"count": 2.0},
            {"count": 1, "share": 1, "kind": "a", "any": [], "maybe": None},
        ],
    )
    def test_right_ones_pass(self, given):
        check_arguments(given, self.SCHEMA)

    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({}, "'count' is missing"),
            ({"count": "1"}, "of type integer"),
            ({"count": True}, "of type integer"),
            ({"count": 1.5}, "of type integer"),
            ({"count": 1, "kind": "c"}, "one of"),
            ({"count": 1, "maybe": 3}, "string or null"),
            ({"count": 1, "other": 3}, "no argument 'other'"),
        ],
    )
    def test_wrong_ones_are_named(self, given, why):
        with pytest.raises(ToolFailed, match=why):
            check_arguments(given, self.SCHEMA)

    def test_no_schema_takes_anything(self):
        check_arguments({"a": 1}, {})
        check_arguments({"a": 1}, {"properties": 3, "required": 4})


@given(st.text(max_size=80), st.text(max_size=20))
def test_every_tool_has_a_name_that_templates_take(server, name):
    tool = Tool(f"{server}/{name}", "", {}, CALCULATOR.call)
    assert 0 < len(tool.called) <= 64
    assert all(c.isascii() and (c.isalnum() or c in "_-") for c in tool.called)
