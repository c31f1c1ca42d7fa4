"""`localllm fuse` and `localllm export` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.export.cases import add_adapter


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    return add_adapter(tiny, tmp_path / "adapter")


def test_fuse_writes_a_model_that_runs_and_says_how_far_it_moved(
    localllm, tiny, adapter, tmp_path
) -> None:
    out = tmp_path / "fused"
    done = localllm("fuse", tiny, adapter, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["changed"] == 14
    assert facts["moved"]["kl"] < 1e-6
    assert facts["moved"]["tokens"] > 200
    ours = localllm("run", out, "hi", "--max-tokens", 8, "--temperature", 0)
    theirs = localllm(
        "run", tiny, "hi", "--adapter", adapter, "--max-tokens", 8, "--temperature", 0
    )
    assert ours.stdout == theirs.stdout


def test_fuse_says_it_in_words(localllm, tiny, adapter, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to compare on")
    done = localllm(
        "fuse", tiny, adapter, "--out", tmp_path / "f", "--dequantize", "bf16", "--text", text
    )
    assert "the adapter changed 14" in done.stdout
    assert "unfused against fused on" in done.stdout
    assert "KL " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--dequantize", "int3"), "no type 'int3'"),
        (("--requantize",), "not quantized"),
        (("--requantize", "--dequantize", "f16"), "exclude each other"),
        (("--text", "/nowhere.txt"), "/nowhere.txt"),
    ],
)
def test_fuse_refuses_what_makes_no_sense(
    arguments, named, localllm, tiny, adapter, tmp_path
) -> None:
    done = localllm("fuse", tiny, adapter, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_export_writes_gguf_lora_and_a_folder(localllm, tiny, adapter, tmp_path) -> None:
    import gguf

    # The tiny vocabulary has no merges, which GGUF cannot say; a model without one will do.
    for file in tiny.glob("token*"):
        assert file.exists()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((tiny / name).read_bytes())
    fused, lora, folder = tmp_path / "m.gguf", tmp_path / "l.gguf", tmp_path / "folder"
    done = localllm(
        "export", bare, "--adapter", adapter, "--gguf", fused, "--type", "f16", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kinds"] == {"F16": 15, "F32": 5}
    done = localllm("export", bare, "--adapter", adapter, "--gguf", lora, "--lora")
    assert done.returncode == 0, done.stderr
    assert "14 pairs" in done.stdout
    assert gguf.GGUFReader(lora).fields["general.type"].contents() == "adapter"
    done = localllm("export", tiny, "--safetensors", folder, "--type", "bf16")
    assert done.returncode == 0, done.stderr
    assert localllm("run", folder, "hi", "--max-tokens", 2).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--gguf FILE or --safetensors DIR"),
        (("--gguf", "a.gguf", "--safetensors", "b"), "--gguf FILE or --safetensors DIR"),
        (("--gguf", "a.gguf", "--lora"), "--lora needs"),
        (("--gguf", "a.gguf", "--type", "q9"), "no type 'q9'"),
        (("--safetensors", "b", "--type", "q8_0"), "no type 'q8_0'"),
    ],
)
def test_export_refuses_what_makes_no_sense(arguments, named, localllm, tiny) -> None:
    done = localllm("export", tiny, *arguments)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
