"""One step: from examples to a gradient over all trainable parameters, and the optimizer's update.

batch -> rows -> (log-probs, where the method's weights depend on them) -> weights -> gradients,
summed over micro-batches in a fixed order -> clip -> optimizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localllm.train.batching import Step
from localllm.train.config import TrainConfig
from localllm.train.distributed import Group
from localllm.train.methods import Method, MethodRows
from localllm.train.optimizers import clip, make_optimizer
from localllm.train.parts import Parts, sequences, tokens_of
from localllm.train.program import Noise
from localllm.train.schedules import make_schedule

Told = tuple[float, Mapping[str, float]]  # a micro-batch's part of the loss and of the metrics
NOTHING: Told = (0.0, {})
_TOLD_BYTES = 4096
_EVAL_TOKENS = 4096  # of a micro-batch when nothing is differentiated


@dataclass(frozen=True)
class Done:
    """loss: of the whole step, by the method's own weighting. metrics: the method's.

    tokens: all that were computed; trained: those the loss counts.
    """

    loss: float
    tokens: int
    trained: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Stepper:
    """Holds the gradient and the optimizer. Everyone of a group takes the same steps."""

    def __init__(self, parts: Parts, config: TrainConfig, group: Group) -> None:
        assert config.run.steps is not None, "the number of steps is settled before"
        self._parts, self._config, self._group = parts, config, group
        self._method, self._program = parts.method, parts.program
        told = config.optimizer
        settings = {"beta1": told.beta1, "beta2": told.beta2, "eps": told.eps}
        self.optimizer = make_optimizer(
            told.name,
            parts.layout,
            weight_decay=told.weight_decay,
            lora_plus=config.lora.lora_plus if config.tune == "lora" else None,
            **{name: value for name, value in settings.items() if value is not None},
        )
        self._schedule = make_schedule(
            told.schedule,
            config.run.steps,
            warmup=told.warmup,
            minimum=told.min_lr,
            decay=told.decay,
        )
        self._total = np.zeros(parts.layout.size, np.float32)
        self.eval_tokens = _EVAL_TOKENS
        # With one micro-batch a step its gradient is the step's, and no second one is held.
        alone = config.batch.accumulate == 1
        self._part = self._total if alone else np.zeros_like(self._total)

    def gradient(self, batch: Step, parameters: np.ndarray, number: int) -> Done:
        """The step's gradient, kept for `clip` and `update`."""
        train = self._parts.data.train
        noise = noise_of(self._config, number)
        items = [[train[place] for place in places] for places in batch.micro_batches]
        total = sum(self._method.count(micro) for micro in items)
        self._total[:] = 0
        results: list[Told] = []
        for turn, mine in self._shares(list(_laid_out(self._method, items))):
            self._part[:] = 0
            told = NOTHING
            if mine is not None:
                told = self._one(mine, total, parameters, self._part, noise)
            self._add_up(turn)
            results += self._exchanged(turn, told)
        return _summed(results, items)

    def clip(self) -> float:
        """The gradient's norm before it was cut to the limit."""
        return clip(self._total, self._config.optimizer.clip)

    def update(self, parameters: np.ndarray, number: int) -> float:
        """Takes the step, number from 0; gives the learning rate it had."""
        rate = (self._config.optimizer.lr or 0.0) * self._schedule(number)
        self.optimizer.update(parameters, self._total, rate, number + 1)
        return rate

    def evaluate(self, examples: Sequence[Any], parameters: np.ndarray) -> Done:
        """The same loss without noise or gradient, over all examples as one step."""
        items = [
            [examples[place] for place in places]
            for places in _by_tokens(examples, self.eval_tokens)
        ]
        total = sum(self._method.count(micro) for micro in items)
        laid_out = list(_laid_out(self._method, items))
        results: list[Told] = []
        for turn, mine in self._shares(laid_out):
            told = NOTHING
            if mine is not None:
                log_probs = self._program.log_probs(mine.rows, parameters)
                found = self._method.weights(mine, total, log_probs, self._reference(mine))
                assert found.loss is not None, "with log-probabilities there is a loss"
                told = found.loss, found.metrics
            results += self._exchanged(turn, told)
        return _summed(results, items)

    def dry(self, places: Sequence[int], parameters: np.ndarray) -> None:
        """Computes one micro-batch for nothing, to see that it can be computed."""
        items = [self._parts.data.train[place] for place in places]
        batch = self._method.step_rows(items)
        self._one(
            batch, self._method.count(items), parameters, self._part, noise_of(self._config, 0)
        )
        self._part[:] = 0

    def _one(
        self,
        batch: MethodRows,
        total: int,
        parameters: np.ndarray,
        gradient: np.ndarray,
        noise: Noise | None,
    ) -> Told:
        """Adds a micro-batch's gradient, and gives its part of the loss and of the metrics."""
        log_probs = None
        if self._method.needs_log_probs:
            log_probs = self._program.log_probs(batch.rows, parameters, noise)
        found = self._method.weights(batch, total, log_probs, self._reference(batch))
        loss = self._program.gradients(batch.rows, found.weights, parameters, gradient, noise)
        return loss if found.loss is None else found.loss, found.metrics

    def _reference(self, batch: MethodRows) -> np.ndarray | None:
        """The base model's log-probabilities: the adapter is off, so no second model is held."""
        if not self._method.needs_reference:
            return None
        return self._program.log_probs(batch.rows, None)

    # ---- sharing with other processes

    def _shares(self, batches: Sequence[MethodRows]) -> Iterator[tuple[int, MethodRows | None]]:
        """Turns: in each, everyone has a micro-batch or, in the last one, possibly none.

        Gives how many have one, and this process's own.
        """
        size, rank = self._group.size, self._group.rank
        for start in range(0, len(batches), size):
            turn = batches[start : start + size]
            yield len(turn), turn[rank] if rank < len(turn) else None

    def _add_up(self, turn: int) -> None:
        """Adds the turn's gradients to the step's, in the order of their micro-batches."""
        if self._part is self._total:
            return
        if self._group.size == 1:
            self._total += self._part
        else:
            for part in self._group.gather(self._part)[:turn]:
                self._total += part

    def _exchanged(self, turn: int, told: Told) -> list[Told]:
        """What everyone who had a micro-batch tells of it. JSON keeps every bit of a float."""
        if self._group.size == 1:
            return [told]
        text = json.dumps([told[0], dict(told[1])]).encode()
        assert len(text) <= _TOLD_BYTES, f"{len(text)} bytes of metrics"
        mine = np.frombuffer(text.ljust(_TOLD_BYTES), np.uint8)
        rows = self._group.gather(mine)[:turn]
        return [(loss, metrics) for loss, metrics in (json.loads(row.tobytes()) for row in rows)]


def noise_of(config: TrainConfig, number: int) -> Noise | None:
    """The randomness of a step: a function of the seed and its number alone."""
    dropout = config.lora.dropout if config.tune == "lora" else 0.0
    if not dropout and not config.neftune:
        return None
    digest = hashlib.sha256(f"{config.seed}:{number}".encode()).digest()
    return Noise(int.from_bytes(digest[:8], "little"), dropout, config.neftune)


def _laid_out(method: Method, items: Sequence[Sequence[Any]]) -> Iterator[MethodRows]:
    first_row = 0
    for micro in items:
        made = method.step_rows(micro, first_row)
        first_row += made.tokens
        yield made


def _by_tokens(examples: Sequence[Any], budget: int) -> Iterator[tuple[int, ...]]:
    """Neighbours together, up to a number of tokens."""
    held: list[int] = []
    room = budget
    for place, example in enumerate(examples):
        tokens = tokens_of(example)
        if held and tokens > room:
            yield tuple(held)
            held, room = [], budget
        held.append(place)
        room -= tokens
    yield tuple(held)


def _summed(results: Sequence[Told], items: Sequence[Sequence[Any]]) -> Done:
    metrics: dict[str, float] = {}
    for _, own in results:
        for name, value in own.items():
            metrics[name] = metrics.get(name, 0.0) + value
    examples = [example for micro in items for example in micro]
    return Done(
        loss=float(sum(loss for loss, _ in results)),
        tokens=sum(tokens_of(example) for example in examples),
        trained=sum(one.targets for example in examples for one in sequences(example)),
        metrics=metrics,
    )
