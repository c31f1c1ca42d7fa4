"""What a run that trains a draft head is told and tells, and the folder that is its own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from localllm.checkpoint.atomic import write_json
from localllm.checkpoint.shards import read_json
from localllm.errors import InvalidRequest

Stage = Literal["answers", "states", "training", "measuring"]
_SETTINGS = "draft_head_training.json"


@dataclass(frozen=True)
class DraftHeadConfig:
    """model, out: the target by any name it loads by, and the folder to make.

    prompts: a file, one prompt a line (text, or JSON with "prompt" or "messages"); None for those
        built in. held_out: how many are kept for measuring.
    tokens: of answers to learn from. max_tokens: of one answer. temperature: of the answers after
        the first round over the prompts, which is greedy.
    inner: width of the layer's feed-forward, 0 for one like the model's.
    vocabulary: how many tokens, the most frequent ones, it may guess; 0 for all.
    candidates: tokens that a step of training compares, those of the batch among them; 0 for all.
    unroll: how many guesses in a row it learns to make. closeness: weight of how far its states are
        from the model's. decay: of each guess's weight against the one before.
    alone: share of the steps, the first ones, that learn the first guess alone, which takes a
        third of the time.
    noise: on the states that guesses begin with, as a share of their root mean square; like
        weight_decay against learning the answers by heart.
    batch: texts a step. epochs: over all texts.
    """

    model: str
    out: Path
    prompts: Path | None = None
    held_out: int = 12
    tokens: int = 600_000
    max_tokens: int = 192
    temperature: float = 0.8
    inner: int = 0
    vocabulary: int = 4096
    candidates: int = 2048
    unroll: int = 3
    alone: float = 0.8
    closeness: float = 0.0
    decay: float = 0.8
    noise: float = 0.0
    weight_decay: float = 0.05
    batch: int = 16
    epochs: float = 3.5
    learning_rate: float = 2e-3
    seed: int = 0
    save_every: int = 50
    threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("held_out", 1), ("tokens", 64), ("max_tokens", 8), ("inner", 0), ("vocabulary", 0),
            ("unroll", 1), ("candidates", 0), ("batch", 1), ("save_every", 1),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise InvalidRequest(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in (
            "temperature",
            "alone",
            "closeness",
            "decay",
            "noise",
            "weight_decay",
            "epochs",
            "learning_rate",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name} must be a number from 0 on")

    def lasting(self) -> dict[str, object]:
        """What decides the result: a run goes on only with the same."""
        facts = {**asdict(self), "prompts": None if self.prompts is None else str(self.prompts)}
        for name in ("out", "threads", "resume", "save_every"):
            del facts[name]
        return facts


def resumed_config(out: Path, threads: int | None = None) -> DraftHeadConfig:
    """The config of the run in `out`, to go on with. Raises InvalidRequest where there is none."""
    path = out / _SETTINGS
    if not path.exists():
        raise InvalidRequest(f"{out}: there is no run to resume")
    facts = {name: value for name, value in read_json(path).items() if name != "prompts_sha256"}
    facts["prompts"] = None if facts.get("prompts") is None else Path(facts["prompts"])
    try:
        return DraftHeadConfig(out=out, threads=threads, resume=True, **facts)
    except TypeError as error:
        raise InvalidRequest(f"{path}: not the settings of a draft head: {error}") from error


@dataclass(frozen=True)
class DraftProgress:
    """done, total: tokens of answers or states, steps of training, prompts measured.

    loss: of the last step. agreed: of positions that it was not trained on, how many guesses in a
        row are the model's likeliest tokens, on average.
    """

    stage: Stage
    done: int
    total: int
    loss: float | None = None
    agreed: float | None = None


Report = Callable[[DraftProgress], None]


def begin(config: DraftHeadConfig, prompts: Sequence[str]) -> None:
    """Claims the folder for this config, or finds it claimed by the same."""
    out, path = config.out, config.out / _SETTINGS
    facts = config.lasting()
    facts["prompts_sha256"] = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    facts = json.loads(json.dumps(facts))
    if path.exists():
        known = read_json(path)
        if not config.resume:
            raise InvalidRequest(
                f"{out}: a draft head was begun here", hint="resume it, or name another folder"
            )
        changed = sorted(k for k in {*facts, *known} if facts.get(k) != known.get(k))
        if changed:
            raise InvalidRequest(
                f"{out}: was begun with another {', '.join(changed)}",
                hint="resume it with the same settings, or name another folder",
            )
        return
    if config.resume:
        raise InvalidRequest(f"{out}: there is no run to resume")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
