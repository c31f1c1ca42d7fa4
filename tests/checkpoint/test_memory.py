"""Loading is streamed: all weights together take less than 1.3 x their file at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localllm.checkpoint.safetensors import write_safetensors
from tests.checkpoint.files import random_blocks, write_gguf

# Resident memory, mapped file pages included, over what the interpreter and numpy take.
PROBE = """
import sys
from localllm.checkpoint import open_checkpoint

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

before = status("VmRSS")
checkpoint = open_checkpoint(sys.argv[1])
kept = {name: checkpoint.tensor(name) for name in checkpoint.names()}
assert len(kept) == int(sys.argv[2])
print(status("VmHWM") - before)
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory"
)


def peak_growth(path: Path, tensors: int) -> int:
    command = [sys.executable, "-c", PROBE, str(path), str(tensors)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K", "Q8_0"])
def test_a_gguf_model(tmp_path: Path, kind: str) -> None:
    # One tensor is half of the model: converting it must not take its size once more.
    small, large = random_blocks(kind, 1024, 8), random_blocks(kind, 8192, 8)
    path = write_gguf(
        tmp_path / "m.gguf",
        {**{f"small.{n}": (small, kind) for n in range(8)}, "large": (large, kind)},
    )
    assert peak_growth(path, 9) < 1.3 * path.stat().st_size + (4 << 20)


def test_a_safetensors_folder(tmp_path: Path) -> None:
    weights = np.ones((1024, 4096), np.float16)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {f"layer.{n}": weights for n in range(6)})
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert peak_growth(tmp_path, 6) < 1.3 * path.stat().st_size


def test_smollm2(smollm2_file: Path) -> None:
    assert peak_growth(smollm2_file, 272) < 1.3 * smollm2_file.stat().st_size
