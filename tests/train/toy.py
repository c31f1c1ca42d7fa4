"""A real but tiny run: random examples, a random Llama of two layers and its program."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from localllm.train.base import base_weights
from localllm.train.config import TrainConfig, make_config
from localllm.train.data import DataReport, Example, Preference, TrainingData
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig
from localllm.train.methods import make_method
from localllm.train.parts import Parts, fingerprint
from localllm.train.programs import open_program
from tests.tiny_model import VOCAB


def toy_config(model, **changes) -> TrainConfig:
    """changes: by dotted name with __ for the dot."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    defaults = {
        "model": str(model),
        "data.source": "toy:24",
        "run.steps": 12,
        "batch.size": 4,
        "optimizer.lr": 1e-2,
        "optimizer.schedule": "constant",
    }
    if named.get("tune") != "full":
        defaults["lora.rank"] = 4
    return make_config(None, {**defaults, **named})


def example(random: np.random.Generator, name: str, least: int = 3) -> Example:
    """Rising tokens, so that there is something to learn."""
    size = int(random.integers(least, 40))
    tokens = (int(random.integers(VOCAB)) + np.arange(size)) % VOCAB
    trained = random.random(size) < 0.6
    trained[0], trained[-1] = False, True
    return Example(tokens.astype(np.int32), trained, name)


def toy_data(config: TrainConfig) -> TrainingData:
    """source: "toy:COUNT" or "toy:COUNT:SEED"; validation as the fraction says."""
    _, count, *seed = config.data.source.split(":")
    random = np.random.default_rng(int(seed[0]) if seed else 0)
    made: list = []
    for number in range(int(count)):
        one = example(random, f"toy:{number}")
        if config.method.name in ("dpo", "orpo"):
            other = example(random, f"toy:{number}")
            made.append(Preference(one, other, one.origin))
        else:
            made.append(one)
    held = round(len(made) * config.data.valid_fraction)
    digest = hashlib.sha256(config.data.source.encode()).hexdigest()
    report = DataReport("text", config.data.train_on, rows=len(made), train=len(made) - held)
    return TrainingData(tuple(made[held:]), tuple(made[:held]), report, digest)


def toy_parts(config: TrainConfig) -> Parts:
    method = make_method(config.method.name)
    base = base_weights(config.model)
    tune = config.lora if config.tune == "lora" else FullConfig(config.dequantize)
    layout = layout_for(base.spec, tune)
    program, note = open_program(base, layout, tune, threads=config.threads, program=config.program)
    config = replace(config, data=replace(config.data, seq_len=config.data.seq_len or 64))
    return Parts(
        config=config,
        spec=base.spec,
        data=toy_data(config),
        tune=tune,
        layout=layout,
        initial=initial(layout, config.seed, base),
        program=program,
        note=note,
        method=method,
        fingerprint=fingerprint(base),
        tokenizer_at=base.path,
    )


class Told:
    """A callback that remembers."""

    def __init__(self, then=None) -> None:
        self.events: list[dict] = []
        self._then = then

    def on_event(self, event) -> None:
        self.events.append(dict(event))
        if self._then is not None:
            self._then(event)

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["type"] == kind]
