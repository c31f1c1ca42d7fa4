"""Which files make up a model, and what is said when there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.safetensors import write_safetensors
from localllm.errors import CheckpointError, LocalLLMError
from tests.checkpoint.files import write_gguf

ONE = np.ones((2, 3), np.float32)


def sharded(folder: Path, count: int = 2, index: bool = True) -> dict[str, str]:
    """Shard n holds the tensor `layer.n`, all n."""
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for n in range(1, count + 1):
        file = f"model-{n:05d}-of-{count:05d}.safetensors"
        write_safetensors(folder / file, {f"layer.{n}": ONE * n})
        weight_map[f"layer.{n}"] = file
    if index:
        write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def error(path: Path | str, kind: type[LocalLLMError] = CheckpointError) -> LocalLLMError:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    return caught.value


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_model(tmp_path: Path, index: bool) -> None:
    sharded(tmp_path, 3, index)
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == ["layer.1", "layer.2", "layer.3"]
    for n in (1, 2, 3):
        assert np.array_equal(checkpoint.tensor(f"layer.{n}").to_float32(), ONE * n)


@pytest.mark.parametrize("index", [True, False])
def test_naming_one_shard_opens_the_whole_model(tmp_path: Path, index: bool) -> None:
    sharded(tmp_path, 3, index)
    checkpoint = open_checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    assert sorted(checkpoint.names()) == ["layer.1", "layer.2", "layer.3"]


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    sharded(tmp_path, 3, index)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in str(error(tmp_path))


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    write_index(tmp_path, {**files, "layer.9": files["layer.1"]})
    assert "model-00001-of-00002.safetensors: has no tensor 'layer.9'" in str(error(tmp_path))
    write_index(tmp_path, {**files, "layer.1": files["layer.2"]})
    assert "model-00002-of-00002.safetensors: has no tensor 'layer.1'" in str(error(tmp_path))


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    write_safetensors(tmp_path / files["layer.2"], {"layer.1": ONE, "layer.2": ONE})
    assert "tensor 'layer.1' is also in model-00001" in str(error(tmp_path))


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", 3, "a\\b.safetensors"],
)
def test_an_index_cannot_reach_out_of_its_folder(tmp_path: Path, file: object) -> None:
    inner = tmp_path / "model"
    inner.mkdir()
    sharded(inner)
    write_safetensors(tmp_path / "x.safetensors", {"w": ONE})
    write_index(inner, {"w": file})
    assert "model.safetensors.index.json: tensor 'w' is in" in str(error(inner))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 99999]
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in str(error(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", "\x00", "[" * 99999, "7" * 9999])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"w": ONE})
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in str(error(tmp_path))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"w": ONE})
    assert "config.json" in str(error(tmp_path))
    assert "config.json" in str(error(tmp_path / "model.safetensors"))


def test_a_single_file_of_another_name_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path / "weights.safetensors", {"w": ONE})
    assert list(open_checkpoint(tmp_path).names()) == ["w"]
    write_safetensors(tmp_path / "other.safetensors", {"v": ONE})
    assert "several models: other.safetensors, weights.safetensors" in str(error(tmp_path))
    assert list(open_checkpoint(tmp_path / "other.safetensors").names()) == ["v"]
    write_safetensors(tmp_path / "model.safetensors", {"m": ONE})
    assert list(open_checkpoint(tmp_path).names()) == ["m"]


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "adapter_model.safetensors", {"w": ONE})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in str(error(tmp_path))


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"w": ONE})
    assert open_checkpoint(str(tmp_path)).format == "gguf"
    write_gguf(tmp_path / "b.gguf", {"w": ONE})
    assert "several models: a.gguf, b.gguf" in str(error(tmp_path))


def test_a_gguf_file_may_have_any_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "blob", {"w": ONE})
    assert open_checkpoint(path).format == "gguf"


def split(folder: Path, count: int = 3) -> list[Path]:
    def part(n: int) -> Path:
        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_uint16("split.no", n)
            writer.add_uint16("split.count", count)
            if n == 0:
                writer.add_string("only.first", "yes")

        path = folder / f"m-{n + 1:05d}-of-{count:05d}.gguf"
        return write_gguf(path, {f"layer.{n}": ONE * n}, fill)

    return [part(n) for n in range(count)]


def test_a_split_gguf_is_one_model_whichever_part_is_named(tmp_path: Path) -> None:
    for path in [tmp_path, *split(tmp_path)]:
        checkpoint = open_checkpoint(path)
        assert sorted(checkpoint.names()) == ["layer.0", "layer.1", "layer.2"]
        assert checkpoint.config["only.first"] == "yes"
        assert np.array_equal(checkpoint.tensor("layer.2").to_float32(), ONE * 2)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[1].unlink()
    assert "m-00002-of-00003.gguf" in str(error(parts[0]))


def test_parts_under_wrong_names_are_refused(tmp_path: Path) -> None:
    parts = split(tmp_path)
    lone = tmp_path / "lone.gguf"
    parts[0].rename(lone)
    assert "part 0 (from 0) of 3, against its name" in str(error(lone))
    parts[1].rename(parts[0])
    parts[2].rename(parts[1])
    write_gguf(parts[2], {})
    assert "part 1 (from 0) of 3, against its name" in str(error(parts[0]))


def test_a_tensor_in_two_parts_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m-00001-of-00002.gguf", {"w": ONE})
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"w": ONE})
    assert "tensor 'w' is already in m-00001-of-00002.gguf" in str(error(tmp_path))


@pytest.mark.parametrize("name", ["m-00003-of-00002.gguf", "m-00000-of-00002.gguf"])
def test_an_impossible_part_is_refused(tmp_path: Path, name: str) -> None:
    assert "not a possible part" in str(error(write_gguf(tmp_path / name, {"w": ONE})))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    for path in (tmp_path, tmp_path / name):
        raised = error(path)
        assert name in str(raised)
        assert "never loaded" in str(raised)
        assert "safetensors" in str(raised.hint)


def test_an_index_of_pickles_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"w": "pytorch_model-00001-of-00002.bin"})
    assert "no safetensors file" in str(error(tmp_path))


IMPOSTORS = {
    "is empty": b"",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "web page": b"\n <!DOCTYPE html><html><body>404</body></html>",
}


@pytest.mark.parametrize("message", IMPOSTORS)
@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "blob"])
def test_what_a_failed_download_leaves_is_recognized(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes(IMPOSTORS[message])
    raised = error(tmp_path / name)
    assert message in str(raised)
    assert name in str(raised)
    assert raised.hint


def test_paths_without_a_model_are_named(tmp_path: Path) -> None:
    assert "no such file or folder" in str(error(tmp_path / "absent"))
    assert "no such file or folder" in str(error(tmp_path / "absent.gguf"))
    assert "holds no weights" in str(error(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a .gguf nor a .safetensors" in str(error(tmp_path / "notes.txt"))
    assert "cannot be read" in str(error("x" * 5000))


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    assert "not a regular file" in str(error(tmp_path / "model.gguf"))


def test_a_link_into_a_store_of_blobs_is_followed(tmp_path: Path) -> None:
    blob = write_gguf(tmp_path / "0a1b2c", {"w": ONE})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "m.gguf").symlink_to(blob)
    assert list(open_checkpoint(tmp_path / "snapshot").names()) == ["w"]
    blob.unlink()
    assert "m.gguf" in str(error(tmp_path / "snapshot"))
