"""The loop's promises, on a tiny model."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localllm.adapters import load_adapter, weights_in
from localllm.errors import InvalidRequest, OutOfMemoryPlan, StoreError, TrainingStopped
from localllm.machine import Memory, memory
from localllm.train import checkpoint as checkpoint_module
from localllm.train import fitting, programs
from localllm.train.base import base_weights
from localllm.train.config import load_config
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig, LoRAConfig
from localllm.train.metrics import read_metrics
from localllm.train.native import train_kernels
from localllm.train.programs import open_program
from localllm.train.runs import all_runs, delete_run, open_run
from localllm.train.trainer import Trainer
from tests.adapters.test_parity import logits, opened
from tests.models.running import TOLERANCE, difference, golden
from tests.tiny_model import write_tiny_model
from tests.train import toy
from tests.train.toy import Told, toy_config, toy_parts

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "tokens_per_second", "memory_bytes")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("trainer") / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def train(config, *, resume=False, told=None, parts=toy_parts):
    callbacks = [] if told is None else [told]
    with Trainer(config, resume=resume, callbacks=callbacks, parts=parts) as trainer:
        return trainer.train()


def delivered(folder) -> bytes:
    """The weights of the adapter, or of the whole model."""
    adapter = Path(folder) / "adapter_model.safetensors"
    files = [adapter] if adapter.exists() else sorted(Path(folder).glob("model/*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def told_by(folder) -> list[dict]:
    """The metrics without what a clock or the machine says."""
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_metrics(Path(folder) / "metrics.jsonl")
    ]


def test_it_learns_and_leaves_what_it_says(model, tmp_path):
    told = Told()
    config = toy_config(model, out=str(tmp_path / "run"), run__steps=60, data__valid_fraction=0.25)
    result = train(config, told=told)
    assert (result.status, result.step) == ("finished", 60)
    losses = [event["loss"] for event in told.of("step")]
    assert len(losses) == 60
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert result.best_loss == min(event["loss"] for event in told.of("eval"))
    kinds = [event["type"] for event in told.events]
    assert kinds[:4] == ["data", "program", "plan", "start"]
    assert kinds[-1] == "end"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "run.json",
        "run.lock",
    ]
    adapter = load_adapter(tmp_path / "run", toy_parts(config).spec)
    assert len(adapter.targets) == 14
    assert result.run.status == "finished"
    saved = load_config(tmp_path / "run" / "config.toml")
    assert saved.run.steps == 60
    assert saved.run.final == "best"
    assert saved.optimizer.lr == 1e-2


def test_the_same_run_twice_is_the_same_to_the_bit(model, tmp_path):
    for name in ("a", "b"):
        train(toy_config(model, out=str(tmp_path / name), lora__dropout=0.1, neftune=5.0))
    assert delivered(tmp_path / "a") == delivered(tmp_path / "b")
    assert told_by(tmp_path / "a") == told_by(tmp_path / "b")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "lion", "adafactor", "sgd"])
def test_stopped_and_resumed_is_never_stopped(model, tmp_path, optimizer):
    settings = {
        "optimizer__name": optimizer,
        "optimizer__schedule": "cosine",
        "lora__dropout": 0.1,
        "neftune": 5.0,
        "data__valid_fraction": 0.2,
        "batch__accumulate": 2,
        "run__steps": 11,
    }
    whole = toy_config(model, out=str(tmp_path / "whole"), **settings)
    parts = toy_config(model, out=str(tmp_path / "parts"), **settings)
    train(whole)
    with Trainer(parts, parts=toy_parts) as trainer:
        trainer.add(Told(lambda event: event.get("step") == 4 and trainer.stop()))
        assert trainer.train().status == "interrupted"
    with Trainer.resumed(str(tmp_path / "parts"), parts=toy_parts) as trainer:
        told = Told(lambda event: event.get("step") == 7 and trainer.stop())
        trainer.add(told)
        assert trainer.train().step == 7
        assert told.of("start")[0]["step"] == 4
    assert train(parts, resume=True).status == "finished"
    assert delivered(tmp_path / "whole") == delivered(tmp_path / "parts")
    assert told_by(tmp_path / "whole") == told_by(tmp_path / "parts")


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_all_weights_stopped_and_resumed_on_other_threads_were_never_stopped(
    model, tmp_path, method
):
    settings = {"tune": "full", "method__name": method, "optimizer__lr": 1e-3, "run__steps": 6}
    settings |= {"batch__accumulate": 2, "data__valid_fraction": 0.2}
    settings |= {"neftune": 5.0 if method == "sft" else 0.0}
    whole = toy_config(model, out=str(tmp_path / "whole"), threads=1, **settings)
    parts = toy_config(model, out=str(tmp_path / "parts"), threads=3, **settings)
    told = Told()
    train(whole, told=told)
    assert told.of("program")[0]["name"] == "native"
    if method == "dpo":
        assert told.of("step")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    with Trainer(parts, parts=toy_parts) as trainer:
        trainer.add(Told(lambda event: event.get("step") == 4 and trainer.stop()))
        assert trainer.train().status == "interrupted"
    assert train(replace(parts, threads=2), resume=True).status == "finished"
    assert delivered(tmp_path / "whole") == delivered(tmp_path / "parts")
    assert told_by(tmp_path / "whole") == told_by(tmp_path / "parts")


RUN = """
import sys
sys.path.insert(0, {root!r})
from tests.train.toy import Told, toy_config, toy_parts
from localllm.train.trainer import Trainer
config = toy_config(sys.argv[1], out=sys.argv[2], run__steps=int(sys.argv[4]), run__save_every=3,
                    data__valid_fraction=0.2, lora__dropout=0.1, batch__accumulate=2,
                    optimizer__name=sys.argv[5])
told = Told(lambda event: print(event["type"], event.get("step"), flush=True))
with Trainer(config, resume=sys.argv[3] == "resume", callbacks=[told], parts=toy_parts) as trainer:
    trainer.train()
"""


def kill_and_resume(model, folder, kills: int, *, steps: int, optimizer: str, seed: int) -> None:
    """Trains in processes of their own that are killed at random moments, until one ends."""
    random = np.random.default_rng(seed)
    for attempt in range(kills + 1):
        there = (Path(folder) / "run.json").exists()
        words = [RUN.format(root=str(ROOT)), model, folder, "resume" if there else "new", steps]
        process = subprocess.Popen(
            [sys.executable, "-c", *map(str, words), optimizer], stdout=subprocess.PIPE, text=True
        )
        if attempt == kills:
            process.communicate()
            assert process.returncode == 0
            return
        until = int(random.integers(1, 14))
        for _, line in zip(range(until), process.stdout, strict=False):
            assert not line.startswith("end"), "it ended before it was killed"
        time.sleep(float(random.uniform(0, 0.02)))
        process.kill()
        process.communicate()


def test_killed_and_resumed_is_never_killed(model, tmp_path):
    train(kill_config(model, tmp_path / "whole", 18))
    kill_and_resume(model, tmp_path / "killed", 3, steps=18, optimizer="adamw", seed=1)
    assert delivered(tmp_path / "whole") == delivered(tmp_path / "killed")
    assert told_by(tmp_path / "whole") == told_by(tmp_path / "killed")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(model, tmp_path):
    train(kill_config(model, tmp_path / "whole", 60, "adamw-8bit"))
    kill_and_resume(model, tmp_path / "killed", 20, steps=60, optimizer="adamw-8bit", seed=2)
    assert delivered(tmp_path / "whole") == delivered(tmp_path / "killed")
    assert told_by(tmp_path / "whole") == told_by(tmp_path / "killed")


def kill_config(model, out, steps, optimizer="adamw"):
    return toy_config(
        model,
        out=str(out),
        run__steps=steps,
        run__save_every=3,
        data__valid_fraction=0.2,
        lora__dropout=0.1,
        batch__accumulate=2,
        optimizer__name=optimizer,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adafactor"])
def test_experts_learn_and_what_they_learned_is_served(tmp_path, monkeypatch, optimizer):
    base = golden("gpt_oss-top2-yarn")
    model, out = base.write(tmp_path / "model"), tmp_path / "run"
    monkeypatch.setattr(toy, "VOCAB", base.config["vocab_size"])
    told = Told()
    config = toy_config(
        model, out=str(out), optimizer__name=optimizer, lora__targets=("moe.gate", "moe.down")
    )
    train(config, told=told)
    losses = [event["loss"] for event in told.of("step")]
    assert losses[-1] < losses[0]
    found = {}
    for backend in ("reference", "cpu"):
        running, adapter = opened(model, backend, out)
        found[backend] = logits(running, base.tokens, running.add_adapter(adapter))
    assert set(adapter.targets) == {f"layers.{n}.moe.{s}" for n in (0, 1) for s in ("gate", "down")}
    assert difference(found["cpu"], found["reference"]) < TOLERANCE
    assert difference(found["cpu"], base.whole) > 0.01


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(model, tmp_path):
    settings = {"run__steps": 12, "run__save_every": 4, "run__keep": 3}
    train(toy_config(model, out=str(tmp_path / "whole"), **settings))
    config = toy_config(model, out=str(tmp_path / "run"), **settings)
    with Trainer(config, parts=toy_parts) as trainer:
        trainer.add(Told(lambda event: event.get("step") == 8 and trainer.stop()))
        trainer.train()
    path = tmp_path / "run" / "checkpoints" / "step-00000008" / "parameters.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    told = Told()
    train(config, resume=True, told=told)
    damaged, taken = (event["text"] for event in told.of("warning"))
    assert "step-00000008" in damaged
    assert taken == "going back to the checkpoint of step 4"
    assert told.of("start")[0]["step"] == 4
    assert delivered(tmp_path / "whole") == delivered(tmp_path / "run")


def test_with_no_sound_checkpoint_it_does_not_begin_anew_in_silence(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"), run__steps=2)
    train(config)
    for path in (tmp_path / "run" / "checkpoints").glob("*/parameters.npy"):
        path.write_bytes(b"")
    with pytest.raises(TrainingStopped, match="no checkpoint of run is sound") as error:
        train(config, resume=True)
    assert "localllm runs delete run" in error.value.hint


def test_a_place_with_a_run_is_refused_before_anything_is_read(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"), run__steps=2)
    train(config)
    told = Told()
    with pytest.raises(InvalidRequest, match="holds a run already"):
        train(config, told=told)
    assert told.events == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data__source": "toy:24:9"}, "data.source was"),
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"optimizer__lr": 0.5}, r"optimizer.lr was 0.01 and is 0.5"),
        ({"lora__rank": 8}, "lora.rank was 4 and is 8"),
        ({"run__steps": 13}, "run.steps was 12 and is 13"),
        ({"batch__size": 2}, "batch.size was 4 and is 2"),
    ],
)
def test_changed_settings_are_refused_by_name(model, tmp_path, change, named):
    train(toy_config(model, out=str(tmp_path / "run")))
    with pytest.raises(InvalidRequest, match=named):
        train(toy_config(model, out=str(tmp_path / "run"), **change), resume=True)


def test_changed_data_and_another_model_are_refused(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"))
    train(config)

    def edited(config):
        parts = toy_parts(config)
        return replace(parts, data=replace(parts.data, fingerprint="other"))

    with pytest.raises(InvalidRequest, match="the data's content was"):
        train(config, resume=True, parts=edited)
    (model / "model.safetensors").rename(model / "kept")
    try:
        other = write_tiny_model(tmp_path / "other", rope_theta=5000.0)
        data = bytearray((other / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (model / "model.safetensors").write_bytes(data)
        with pytest.raises(InvalidRequest, match="the model's content was"):
            train(config, resume=True)
    finally:
        (model / "kept").rename(model / "model.safetensors")


def test_what_does_not_touch_the_weights_may_change(model, tmp_path):
    train(toy_config(model, out=str(tmp_path / "whole")))
    config = toy_config(model, out=str(tmp_path / "run"))
    with Trainer(config, parts=toy_parts) as trainer:
        trainer.add(Told(lambda event: event.get("step") == 4 and trainer.stop()))
        trainer.train()
    changes = {"threads": 1, "run.save_every": 1, "run.keep": 1}
    with Trainer.resumed(str(tmp_path / "run"), changes, parts=toy_parts) as trainer:
        trainer.train()
    assert delivered(tmp_path / "whole") == delivered(tmp_path / "run")
    with (
        Trainer.resumed(str(tmp_path / "run"), {"seed": 1}, parts=toy_parts) as trainer,
        pytest.raises(InvalidRequest, match="seed was 0 and is 1"),
    ):
        trainer.train()


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
@pytest.mark.parametrize("pack", [False, True])
def test_cut_into_micro_batches_a_step_is_the_same(model, tmp_path, monkeypatch, method, pack):
    """One big batch and the same in pieces: equal but for the order of additions.

    In float32: a factor that another order rounds to the next bfloat16 is 1/256 away, and steps as
    steep as these make more of that. One step's gradient is compared by every kind below.
    """
    exact = [name for name in train_kernels() if not name.endswith("bf16")]
    monkeypatch.setenv("LOCALLLM_TRAIN_CPU", exact[-1])
    losses = []
    for size, accumulate in ((8, 1), (2, 4)):
        told = Told()
        settings = {"batch__size": size, "batch__accumulate": accumulate}
        if pack:
            settings |= {"batch__pack": True, "batch__tokens": 160, "batch__accumulate": 1}
        out = str(tmp_path / f"{size}")
        train(
            toy_config(
                model, out=out, method__name=method, lora__dropout=0.1, run__steps=4, **settings
            ),
            told=told,
        )
        losses.append([event["loss"] for event in told.of("step")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


@pytest.mark.parametrize("kernels", train_kernels())
def test_packing_gives_each_example_the_loss_it_has_alone(model, monkeypatch, kernels):
    monkeypatch.setenv("LOCALLLM_TRAIN_CPU", kernels)
    config = toy_config(model, data__source="toy:12")
    parts = toy_parts(config)
    method, examples = parts.method, parts.data.train
    parameters = parts.initial + np.random.default_rng(0).normal(
        scale=0.05, size=parts.layout.size
    ).astype(np.float32)
    total = method.count(examples)
    gradients, losses = [], []
    for groups in ([examples], [[one] for one in examples]):
        gradient, loss = np.zeros_like(parameters), 0.0
        for group in groups:
            batch = method.step_rows(group)
            weights = method.weights(batch, total).weights
            loss += parts.program.gradients(batch.rows, weights, parameters, gradient)
        gradients.append(gradient)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    scale = np.abs(gradients[0]).max()
    np.testing.assert_allclose(gradients[0] / scale, gradients[1] / scale, atol=1e-5)
    parts.close()


def test_dpo_begins_at_ln_2_and_learns_to_prefer(model, tmp_path):
    told = Told()
    train(
        toy_config(model, out=str(tmp_path / "run"), method__name="dpo", run__steps=20), told=told
    )
    first, last = told.of("step")[0], told.of("step")[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margin"] == 0
    assert last["rewards/margin"] > 0
    assert last["loss"] < first["loss"]


def test_all_weights_are_delivered_to_the_bit(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"), tune="full", run__steps=4)
    result = train(config)
    made = base_weights(result.adapter)
    layout = layout_for(made.spec, FullConfig())
    last = checkpoint_module.Checkpoints(tmp_path / "run" / "checkpoints").read(4)
    loaded = initial(layout, 0, made)
    assert loaded.tobytes() == last.arrays["parameters"].tobytes()
    assert loaded.tobytes() != initial(layout, 0, base_weights(model)).tobytes()


def test_dora_leaves_what_its_first_use_would_wait_for(model, tmp_path):
    run = train(toy_config(model, out=str(tmp_path / "run"), lora__dora=True, run__steps=2)).run
    lengths = tmp_path / "run" / "dora_lengths.f32"
    assert lengths.exists()
    written = lengths.stat().st_mtime_ns
    spec = base_weights(model).spec
    load_adapter(tmp_path / "run", spec, base=weights_in(model, spec))
    assert lengths.stat().st_mtime_ns == written
    delete_run(run)
    assert not (tmp_path / "run").exists()


def test_one_example_is_enough(model, tmp_path):
    told = Told()
    config = toy_config(model, out=str(tmp_path / "run"), data__source="toy:1", run__steps=20)
    assert train(config, told=told).status == "finished"
    assert told.of("step")[-1]["loss"] < told.of("step")[0]["loss"]


class Broken:
    """A program that fails at one step's gradients."""

    def __init__(self, program, at: int, fault) -> None:
        self._program, self._left, self._fault = program, at, fault

    def __getattr__(self, name):
        return getattr(self._program, name)

    def gradients(self, *arguments):
        self._left -= 1
        if self._left == -1:
            return self._fault(arguments)
        return self._program.gradients(*arguments)


def broken(at: int, fault):
    def parts(config):
        made = toy_parts(config)
        return replace(made, program=Broken(made.program, at, fault))

    return parts


def spoil(arguments) -> float:
    arguments[3][:] = np.nan
    return math.nan


def test_nan_stops_with_the_reason_and_keeps_what_was_good(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"), run__save_every=2)
    result = train(config, parts=broken(6, spoil))  # the dry step is one
    assert result.status == "diverged"
    assert result.reason == "at step 6, the loss is nan"
    assert result.run.status == "diverged"
    train(toy_config(model, out=str(tmp_path / "good"), run__steps=4))
    assert delivered(tmp_path / "run") == delivered(tmp_path / "good")


class Rising:
    """A program whose losses double from some step on."""

    def __init__(self, program, good: int) -> None:
        self._program, self._good, self._by = program, good, 1.0

    def __getattr__(self, name):
        return getattr(self._program, name)

    def gradients(self, *arguments):
        self._good -= 1
        self._by *= 2 if self._good < 0 else 1
        return self._program.gradients(*arguments) * self._by


def test_a_loss_that_runs_away_stops(model, tmp_path):
    def parts(config):
        made = toy_parts(config)
        return replace(made, program=Rising(made.program, 31))  # the dry step is one

    config = toy_config(model, out=str(tmp_path / "run"), run__steps=100, run__save_every=5)
    result = train(config, parts=parts)
    assert result.status == "diverged"
    assert "the loss runs away" in (result.reason or "")
    assert 30 < result.step < 40
    assert result.adapter is not None


def test_early_stop(model, tmp_path):
    config = toy_config(
        model,
        out=str(tmp_path / "run"),
        data__valid_fraction=0.25,
        run__steps=400,
        run__eval_every=5,
        run__early_stop=2,
        optimizer__lr=0.05,
    )
    told = Told()
    result = train(config, told=told)
    assert result.status == "early-stop"
    assert result.step < 400
    best = result.best_step
    assert [event["best"] for event in told.of("eval")][-2:] == [False, False]
    assert result.step == best + 10
    assert best in checkpoint_module.Checkpoints(tmp_path / "run" / "checkpoints").steps()
    again = train(config, resume=True)
    assert (again.status, again.step) == ("early-stop", result.step)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(model, tmp_path, monkeypatch):
    real = checkpoint_module._write_array
    full = {"step-00000004"}

    def failing(path, array):
        if full and len(list(path.parent.parent.glob("step-*"))) == 1:
            full.clear()
            raise OSError(28, os.strerror(28))
        return real(path, array)

    monkeypatch.setattr(checkpoint_module, "_write_array", failing)
    told = Told()
    config = toy_config(model, out=str(tmp_path / "run"), run__save_every=2, run__keep=9)
    assert train(config, told=told).status == "finished"
    assert "the disk is full" in told.of("warning")[0]["text"]
    steps = checkpoint_module.Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert steps == [2, 6, 8, 10, 12]


def test_a_result_that_cannot_be_written_can_be_had_later(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"))
    in_the_way = tmp_path / "run" / "adapter_model.safetensors"
    in_the_way.mkdir(parents=True)
    with pytest.raises(StoreError, match="could not be written") as error:
        train(config)
    assert f"--resume {tmp_path / 'run'}` goes on from its checkpoint of step 12" in (
        error.value.hint or ""
    )
    in_the_way.rmdir()
    assert train(config, resume=True).adapter == tmp_path / "run"


def test_too_little_disk_is_told_before_the_first_step(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    told = Told()
    train(toy_config(model, out=str(tmp_path / "a")), told=told)
    assert told.of("warning") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    train(toy_config(model, out=str(tmp_path / "b")), told=told)
    kinds = [event["type"] for event in told.events]
    assert kinds.index("warning") < kinds.index("step", kinds.index("end"))
    assert "50.0 kB are free" in told.of("warning")[0]["text"]


def out_of_memory(arguments) -> float:
    raise MemoryError("std::bad_alloc")


def test_out_of_memory_in_the_first_step_is_advice(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"))
    with pytest.raises(OutOfMemoryPlan, match="ran out of memory") as error:
        train(config, parts=broken(0, out_of_memory))
    assert "--batch-size 2 --accumulate 2" in (error.value.hint or "")
    assert not (tmp_path / "run").exists()


def test_a_first_step_that_takes_more_than_may_be_used_is_advice_and_no_kill(
    model, tmp_path, monkeypatch
):
    free = memory()
    monkeypatch.setattr(fitting, "memory", lambda: replace(free, available=64 << 20))
    config = toy_config(model, out=str(tmp_path / "run"))
    with pytest.raises(OutOfMemoryPlan, match=r"largest micro-batch .* ran out of memory"):
        train(config, parts=broken(0, lambda arguments: float(bytearray(256 << 20)[0])))
    assert not (tmp_path / "run").exists()
    bytearray(256 << 20)  # the limit was of that step alone


def test_weights_that_do_not_fit_are_refused_before_they_are_read(model, monkeypatch):
    base = replace(base_weights(model), read=lambda: pytest.fail("it was read"))
    layout = layout_for(base.spec, LoRAConfig())
    monkeypatch.setattr(programs, "memory", lambda: Memory(64 << 20, 1 << 10))
    for program in ("native", "reference"):
        with pytest.raises(OutOfMemoryPlan, match=r"loading .* and 1\.0 kB may still be used"):
            open_program(base, layout, LoRAConfig(), program=program)


def test_a_run_killed_in_its_first_step_is_listed_and_resumed(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"))
    child = os.fork()
    if not child:
        train(config, parts=broken(0, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [(run.name, run.status) for run in all_runs()] == [("run", "killed")]
    told = Told()
    train(config, resume=True, told=told)
    assert "has no checkpoint yet" in told.of("warning")[0]["text"]
    train(toy_config(model, out=str(tmp_path / "whole")))
    assert delivered(tmp_path / "run") == delivered(tmp_path / "whole")


def test_out_of_memory_later_on_says_how_to_go_on(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"), run__save_every=2)
    with pytest.raises(OutOfMemoryPlan, match="memory ran out after step 5") as error:
        train(config, parts=broken(6, out_of_memory))  # the dry step is one
    assert f"--resume {tmp_path / 'run'}` goes on from its checkpoint of step 4" in (
        error.value.hint or ""
    )
    assert open_run(tmp_path / "run").status == "failed"
    train(toy_config(model, out=str(tmp_path / "whole"), run__save_every=2))
    train(config, resume=True)
    assert delivered(tmp_path / "run") == delivered(tmp_path / "whole")


def test_two_processes_cannot_train_one_run(model, tmp_path):
    config = toy_config(model, out=str(tmp_path / "run"))

    def also(event):
        if event["type"] == "step" and event["step"] == 3:
            with pytest.raises(InvalidRequest, match="another process is training"):
                train(config, resume=True)

    train(config, told=Told(also))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_process_saves_and_ends(model, tmp_path):
    words = [RUN.format(root=str(ROOT)), model, tmp_path / "run", "new", 10_000, "adamw"]
    script = words[0].replace(
        "    trainer.train()",
        "    import signal\n    signal.signal(signal.SIGINT, lambda *_: trainer.stop())\n"
        "    print(trainer.train().status)",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words[1:])], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 5"):
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert rest.splitlines()[-1] == "interrupted"
    step = int(rest.splitlines()[-2].split()[1])
    assert checkpoint_module.Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == step
