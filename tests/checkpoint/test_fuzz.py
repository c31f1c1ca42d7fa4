"""Damaged files of any kind: they are read, or an error of ours says why not. Nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.checkpoint import open_checkpoint
from localllm.errors import LocalLLMError
from tests.checkpoint.files import random_blocks, write_gguf
from tests.examples import examples

EXAMPLES = settings(
    max_examples=examples(80),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MEMORY = 32 << 20  # the files are some kilobytes

# Numbers at which size calculations go wrong.
EDGES = [0, 1, 2, 7, 9, 31, 33, 255, (1 << 61) + 1]
EDGES += [(1 << bits) + by for bits in (15, 16, 24, 31, 32, 40, 63) for by in (-1, 0)]
EDGES += [(1 << 64) - 1]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Path]]:
    """One small sound model of each format; what is damaged is always its last file."""
    root = Path(tempfile.mkdtemp())

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_array("tokens", ["a", "bc", "日本"])
        writer.add_array("scores", [0.5, 1.5])
        writer.add_array("types", [1, 2, 3])
        writer.add_custom_alignment(32)
        writer.add_bool("flag", True)

    (root / "gguf").mkdir()
    kinds = {kind: (random_blocks(kind, 2, 1), kind) for kind in ("Q4_0", "Q5_1", "Q3_K", "Q6_K")}
    write_gguf(root / "gguf" / "m.gguf", {"dense": np.ones((2, 3), np.float32), **kinds}, fill)

    weights = mx.array(np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32))
    packed = dict(zip(("l.weight", "l.scales", "l.biases"), mx.quantize(weights), strict=True))
    for name, config in (("mlx", {"quantization": {"bits": 4, "group_size": 64}}), ("plain", {})):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        tensors = {"w": weights, "h": weights.astype(mx.bfloat16)}
        tensors |= packed if name == "mlx" else {}
        mx.save_safetensors(str(root / name / "model.safetensors"), tensors)
    yield {
        "gguf": root / "gguf" / "m.gguf",
        "mlx": root / "mlx" / "model.safetensors",
        "plain": root / "plain" / "model.safetensors",
        "config": root / "mlx" / "config.json",
    }
    shutil.rmtree(root)


def read_everything(folder: Path) -> None:
    """Asks for all there is. Errors of ours are an answer; anything else fails the test."""
    tracemalloc.start()
    try:
        with contextlib.suppress(LocalLLMError):
            checkpoint = open_checkpoint(folder)
            for key in checkpoint.config:
                with contextlib.suppress(LocalLLMError):
                    checkpoint.config[key]
            for name in [*checkpoint.names(), "absent"]:
                for ask in (checkpoint.shape, checkpoint.kind, checkpoint.nbytes):
                    with contextlib.suppress(LocalLLMError):
                        ask(name)
                with contextlib.suppress(LocalLLMError):
                    assert np.isfinite(checkpoint.tensor(name).to_float32()).all()
            checkpoint.close()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


def damaged(file: Path, content: bytes) -> None:
    """Reads the model with `content` in place of `file`, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other in file.parent.iterdir():
            if other != file:
                shutil.copy(other, folder)
        (folder / file.name).write_bytes(content)
        read_everything(folder)


MODELS = ("gguf", "mlx", "plain", "config")


@pytest.mark.parametrize("model", MODELS)
def test_the_sound_models_read_without_an_error(models: dict[str, Path], model: str) -> None:
    checkpoint = open_checkpoint(models[model].parent)
    assert all(np.isfinite(checkpoint.tensor(n).to_float32()).all() for n in checkpoint.names())


@pytest.mark.parametrize("model", MODELS)
@EXAMPLES
@given(data=st.data())
def test_a_file_cut_anywhere(models: dict[str, Path], model: str, data: st.DataObject) -> None:
    content = models[model].read_bytes()
    damaged(models[model], content[: data.draw(st.integers(0, len(content) - 1))])


@pytest.mark.parametrize("model", MODELS)
@EXAMPLES
@given(data=st.data())
def test_bytes_changed_anywhere(models: dict[str, Path], model: str, data: st.DataObject) -> None:
    content = bytearray(models[model].read_bytes())
    head = st.integers(0, min(1200, len(content) - 1))
    anywhere = st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(head | anywhere)] = data.draw(st.integers(0, 255))
    damaged(models[model], bytes(content))


@pytest.mark.parametrize("model", MODELS)
@EXAMPLES
@given(data=st.data())
def test_numbers_put_anywhere_in_the_header(
    models: dict[str, Path], model: str, data: st.DataObject
) -> None:
    content = bytearray(models[model].read_bytes())
    at = data.draw(st.integers(0, min(1200, len(content) - 1)))
    number = data.draw(st.sampled_from(EDGES))
    width = data.draw(st.sampled_from([1, 2, 4, 8]))
    content[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    damaged(models[model], bytes(content))


@pytest.mark.parametrize("model", ["mlx", "plain", "config"])
@EXAMPLES
@given(data=st.data())
def test_numbers_written_into_json(
    models: dict[str, Path], model: str, data: st.DataObject
) -> None:
    content = models[model].read_bytes()
    start = 0 if model == "config" else 8
    end = len(content) if model == "config" else 8 + int.from_bytes(content[:8], "little")
    text = content[start:end].decode()
    places = [at for at, letter in enumerate(text) if letter.isdigit()]
    at = data.draw(st.sampled_from(places))
    values = [str(edge) for edge in EDGES] + ["-1", "1e999", "0.5", "null", "[]", '"4"', "true"]
    text = text[:at] + data.draw(st.sampled_from(values)) + text[at + 1 :]
    size = b"" if model == "config" else len(text.encode()).to_bytes(8, "little")
    damaged(models[model], size + text.encode() + content[end:])


@EXAMPLES
@given(content=st.binary(max_size=300), suffix=st.sampled_from(["gguf", "safetensors"]))
def test_any_bytes_at_all(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text("{}")
        (Path(name) / f"model.{suffix}").write_bytes(content)
        read_everything(Path(name))
