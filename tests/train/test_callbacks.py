"""Reporters, with stand-ins for the services they report to."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from localllm.errors import InvalidRequest
from localllm.train.callbacks import TensorBoard, WeightsAndBiases

STEP = {"type": "step", "step": 3, "loss": 1.5, "lr": 0.1, "note": "text", "best": True}
EVAL = {"type": "eval", "step": 3, "loss": 2.5}


def test_tensorboard_gets_scalars_by_step(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add_scalar=lambda *what: written.append(what), close=lambda: None)
    fake = ModuleType("tensorboardX")
    fake.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    reporter = TensorBoard(tmp_path)
    for event in (STEP, EVAL, {"type": "checkpoint", "step": 3}):
        reporter.on_event(event)
    reporter.close()
    assert written == [
        ("train/loss", 1.5, 3),
        ("train/lr", 0.1, 3),
        ("valid/loss", 2.5, 3),
    ]


def test_weights_and_biases_gets_the_config_and_scalars(monkeypatch):
    logged, begun = [], {}
    run = SimpleNamespace(
        log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append("end")
    )

    def init(**settings):
        begun.update(settings)
        return run

    fake = ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    reporter = WeightsAndBiases("mine", {"seed": 0})
    reporter.on_event(STEP)
    reporter.on_event(EVAL)
    reporter.close()
    assert begun == {"project": "mine", "config": {"seed": 0}}
    assert logged == [
        ({"train/loss": 1.5, "train/lr": 0.1}, 3),
        ({"valid/loss": 2.5}, 3),
        "end",
    ]


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("tensorboardX", lambda: TensorBoard("x"), "tensorboard"),
        ("wandb", lambda: WeightsAndBiases("x", {}), "wandb"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, make, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidRequest) as error:
        make()
    assert f"localllm[{extra}]" in (error.value.hint or "")
