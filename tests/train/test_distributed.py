"""Two processes on this machine end with the bits of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localllm.errors import InvalidRequest
from localllm.train.distributed import Alone, join_group
from localllm.train.trainer import Trainer
from tests.tiny_model import write_tiny_model
from tests.train.toy import toy_config, toy_parts

ROOT = Path(__file__).parents[2]
RUN = """
import sys
sys.path.insert(0, {root!r})
from tests.train.test_distributed import settings
from tests.train.toy import Told, toy_config, toy_parts
from localllm.train.trainer import Trainer
told = Told()
config = toy_config(sys.argv[1], out=sys.argv[2], **settings(sys.argv[3]))
with Trainer(config, resume=sys.argv[4] == "resume", callbacks=[told], parts=toy_parts) as trainer:
    if len(sys.argv) > 5:
        told._then = lambda event: event.get("step") == int(sys.argv[5]) and trainer.stop()
    print(trainer.train().status)
"""


def settings(method: str) -> dict:
    return {
        "method__name": method,
        "run__steps": 7,
        "batch__size": 2,
        "batch__accumulate": 3,  # the second process has none in every other turn
        "data__source": "toy:19",
        "data__valid_fraction": 0.3,
        "lora__dropout": 0.1,
        "threads": 1,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(tmp_path: Path, *words: object) -> list[str]:
    """What both processes print."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN.format(root=str(ROOT)), *map(str, words)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(out.strip().splitlines()[-1])
    return said


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("distributed") / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))


def losses(folder: Path) -> list[tuple]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["type"], line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_processes_end_with_the_bits_of_one(model, tmp_path, method):
    config = toy_config(model, out=str(tmp_path / "one"), **settings(method))
    with Trainer(config, parts=toy_parts) as trainer:
        trainer.train()
    assert launch(tmp_path, model, tmp_path / "two", method, "new") == ["finished"] * 2
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("one", "two")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_a_run_begun_by_two_is_ended_by_one(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "one"), **settings("sft"))
    with Trainer(config, parts=toy_parts) as trainer:
        trainer.train()
    said = launch(tmp_path, model, tmp_path / "two", "sft", "new", 3)
    assert said == ["interrupted"] * 2
    assert launch(tmp_path, model, tmp_path / "two", "sft", "resume", 5) == ["interrupted"] * 2
    with Trainer.resumed(str(tmp_path / "two"), parts=toy_parts) as trainer:
        assert trainer.train().status == "finished"
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("one", "two")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


class Two(Alone):
    size = 2


def test_more_processes_than_micro_batches_are_refused(model):
    with (
        Trainer(toy_config(model), parts=toy_parts, group=Two()) as trainer,
        pytest.raises(InvalidRequest, match="2 processes share"),
    ):
        trainer.prepare()


def test_nobody_is_joined_unless_launched(monkeypatch):
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    group = join_group()
    assert (group.rank, group.size) == (0, 1)
    np.testing.assert_array_equal(group.gather(np.arange(3)), [[0, 1, 2]])
    assert group.first(b"x") == b"x"
