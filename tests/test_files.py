"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from localllm.files import replace_file


def test_the_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "file"
    for parts in ([b"old"], [b"n", memoryview(b"ew")], []):
        replace_file(path, parts)
        assert path.read_bytes() == b"".join(parts)
        assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_only_its_owner_may_read_what_is_private(tmp_path):
    replace_file(tmp_path / "file", [b"secret"], mode=0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_what_breaks_off_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def parts():
        yield b"half of the n"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, parts())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(tmp_path / "file", [b"new"])
    assert len(list(tmp_path.iterdir())) == 1
