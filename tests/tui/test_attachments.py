from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.tui.attachments import (
    MOST_BYTES,
    MOST_FILES,
    Attachment,
    attach,
    attach_now,
    decode,
    mentions,
    read_attachment,
    token_costs,
)
from tests.tui.fake_engine import FakeEngine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("Milk\n")
    (tmp_path / "two words.md").write_text("# Two")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "main.py").write_text("print('hi')\n")
    return tmp_path


class TestMentions:
    @pytest.mark.parametrize(
        ("text", "paths"),
        [
            ("Read @notes.txt please", ["notes.txt"]),
            ("Is it in @notes.txt?", ["notes.txt"]),
            ("(see @deep/main.py, or @notes.txt)", ["deep/main.py", "notes.txt"]),
            ('@"two words.md"', ["two words.md"]),
            ("@'two words.md'", ["two words.md"]),
            ("@two\\ words.md!", ["two words.md"]),
            ("write to me@notes.txt", []),
            ("ask @anna about it", []),
            ("\\@notes.txt", []),
            ("@pytest.fixture\ndef app(): ...\n@app.route('/x')", []),
            ("@", []),
        ],
    )
    def test_files_that_a_message_names(self, folder, text, paths):
        found = mentions(text, folder)
        assert [one.path for one in found] == paths
        for one in found:
            assert text[one.start] == "@"
            assert text[one.start : one.end].strip("@\"'").replace("\\", "") == one.path

    @pytest.mark.parametrize("text", ["@missing.txt", '@"any thing"', "@./here", "@/no/where"])
    def test_a_path_that_is_not_there_is_told(self, folder, text):
        with pytest.raises(InvalidRequest, match="there is no file") as told:
            mentions(text, folder)
        assert "\\@" in (told.value.hint or "")

    def test_a_home_and_an_absolute_path(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder))
        text = f"@~/notes.txt @{folder}/notes.txt"
        assert len(mentions(text, Path("/"))) == 2
        assert len(attach_now(text, Path("/")).files) == 1  # the same file once

    @given(st.text(max_size=80))
    @example("@\\")
    @example("@\x00.txt")
    @example("@~nobody-of-this-name/x")
    def test_no_text_is_too_strange(self, text):
        try:
            found = mentions(text, Path("/nowhere"))
        except InvalidRequest:
            return
        assert found == []


class TestMessage:
    def test_files_follow_what_was_typed(self, folder):
        told = asyncio.run(attach("Compare @notes.txt and @deep/main.py", folder))
        assert told.content == (
            "Compare @notes.txt and @deep/main.py\n\n"
            "File `notes.txt`:\n```\nMilk\n```\n\n"
            "File `main.py`:\n```python\nprint('hi')\n```"
        )
        assert told.content[: told.typed] == "Compare @notes.txt and @deep/main.py"
        assert [one["name"] for one in told.extra["attachments"]] == ["notes.txt", "main.py"]

    def test_a_message_without_files_stays_as_it_is(self, folder):
        told = attach_now("mail \\@me", folder)
        assert (told.content, told.extra) == ("mail @me", {})

    @given(st.text(alphabet="`\na", max_size=60))
    def test_nothing_in_a_file_ends_its_fence(self, text):
        fenced = Attachment(Path("a.txt"), "a.txt", text, "utf-8", 0).fenced
        _, fence, *body = fenced.split("\n")
        assert re.fullmatch(r"`{3,}", fence)
        assert body[-1] == fence
        assert all(fence not in line for line in body[:-1])

    def test_a_files_name_is_no_markup(self, folder):
        name = "a\x1b[31m\nb.txt"
        (folder / name).write_text("x")
        assert read_attachment(folder / name).fenced.startswith("File `a b.txt`:\n```\nx")

    def test_too_many_files_are_refused(self, folder):
        for number in range(MOST_FILES + 1):
            (folder / f"f{number}.txt").touch()
        with pytest.raises(InvalidRequest, match="at most"):
            attach_now(" ".join(f"@f{n}.txt" for n in range(MOST_FILES + 1)), folder)

    def test_what_files_cost_in_tokens(self, folder):
        files = attach_now("@notes.txt", folder).files
        assert asyncio.run(token_costs(FakeEngine(), files)) == [len(files[0].fenced) // 4]


class TestReading:
    @pytest.mark.parametrize(
        ("encoding", "found"),
        [
            ("utf-8", "utf-8"),
            ("utf-8-sig", "utf-8-sig"),
            ("utf-16", "utf-16"),
            ("utf-32", "utf-32"),
            ("utf-16-le", "utf-16-le"),
            ("utf-16-be", "utf-16-be"),
            ("cp1252", "cp1252"),
        ],
    )
    def test_encodings(self, encoding, found):
        text = "Größe \u201cquoted\u201d, done: a longer line of plain words\n"
        assert decode(text.encode(encoding), Path("x")) == (text, found)

    @given(st.text(max_size=200).filter(lambda text: "\0" not in text))
    def test_every_utf8_text_is_read_as_it_is(self, text):
        if text.startswith("\ufeff"):
            return
        assert decode(text.encode(), Path("x"))[0] == text.replace("\r\n", "\n").replace("\r", "\n")

    @given(st.binary(max_size=300))
    def test_any_bytes_are_text_or_refused(self, data):
        try:
            text, _ = decode(data, Path("x"))
        except InvalidRequest:
            return
        assert "\r" not in text

    @pytest.mark.parametrize(
        ("begin", "kind"),
        [(b"\x89PNG\r\n\x1a\n\0\0", "PNG"), (b"PK\x03\x04\0\0", "ZIP"), (b"ab\0cd", "binary")],
    )
    def test_what_is_no_text_is_named(self, tmp_path, begin, kind):
        path = tmp_path / "x"
        path.write_bytes(begin + bytes(range(256)))
        with pytest.raises(InvalidRequest, match=kind):
            read_attachment(path)

    def test_too_large_a_file_a_folder_a_pipe_and_one_that_is_gone(self, tmp_path):
        big = tmp_path / "big"
        with big.open("wb") as file:
            file.truncate(MOST_BYTES + 1)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for path, why in (
            (big, "at most"),
            (tmp_path, "folder"),
            (pipe, "no ordinary file"),
            (tmp_path / "gone", "cannot be read"),
        ):
            with pytest.raises(InvalidRequest, match=why):
                read_attachment(path)


class TestPdf:
    def test_its_text_is_taken_out(self, tmp_path):
        path = tmp_path / "a.pdf"
        path.write_bytes(pdf("The tide comes twice a day."))
        found = read_attachment(path)
        assert found.text.strip() == "The tide comes twice a day."
        assert (found.encoding, found.nbytes) == ("pdf", path.stat().st_size)

    def test_a_damaged_one_and_one_without_text_are_refused(self, tmp_path):
        path = tmp_path / "a.pdf"
        path.write_bytes(b"%PDF-1.7\n" + bytes(range(1, 256)) * 20)
        with pytest.raises(InvalidRequest, match="damaged"):
            read_attachment(path)
        path.write_bytes(pdf(""))
        with pytest.raises(InvalidRequest, match="no text"):
            read_attachment(path)

    def test_without_pypdf_the_extra_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "pypdf.py").write_text("raise ImportError('not here')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        path = tmp_path / "a.pdf"
        path.write_bytes(pdf("x"))
        with pytest.raises(InvalidRequest) as told:
            read_attachment(path)
        assert "localllm[pdf]" in (told.value.hint or "")


def pdf(text: str) -> bytes:
    """A page with one line."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        start,
    )
