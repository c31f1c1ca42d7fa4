"""The training loop: from a config to an adapter, stopped and resumed without losing a bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

import numpy as np

from localllm.errors import CheckpointError, InvalidRequest, OutOfMemoryPlan, StoreError
from localllm.files import replace_file
from localllm.machine import give_large_blocks_back, resident_memory
from localllm.train.batching import Batches
from localllm.train.callbacks import Callback, Event
from localllm.train.config import TrainConfig, load_config, make_config, to_toml
from localllm.train.delivery import Delivery
from localllm.train.distributed import Group, join_group
from localllm.train.fitting import Planned, is_out_of_memory, plan_run, rehearse
from localllm.train.metrics import MetricsFile
from localllm.train.parts import Opened, Parts, open_data, open_parts, tokens_of
from localllm.train.planner import MemoryPlan
from localllm.train.progress import Progress, Result
from localllm.train.runs import Run, create_run, delete_run, open_run, refuse_run, training
from localllm.train.samples import Sampler
from localllm.train.saving import Copies, Saving
from localllm.train.stepping import Stepper

_OFTEN = 10  # evaluations and checkpoints a run, unless told otherwise
_APART = 200  # but no more steps between two
_KEPT = ("step", "eval", "samples", "warning")  # in metrics.jsonl


class Trainer:
    """One run. Use it once; `close` (or `with`) gives the memory back.

    config: a TrainConfig, or the same as nested tables. resume: go on where `config.out` was left.
    callbacks: told every event (docs/training.md). parts: opens model, data and method (for tests).
    Raises InvalidRequest, CheckpointError and what loading model and data raises.

        config = {"model": "smollm2:135m", "data": {"source": "chats.jsonl"}}
        with Trainer(config) as trainer:
            print(trainer.train().adapter)
    """

    def __init__(
        self,
        config: TrainConfig | Mapping[str, Any],
        *,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        parts: Callable[[TrainConfig], Parts] = open_parts,
        group: Group | None = None,
    ) -> None:
        self.config = config if isinstance(config, TrainConfig) else make_config(config)
        self.plan: MemoryPlan | None = None
        self._resume = resume
        self._callbacks = list(callbacks)
        self._open_parts = parts
        self._parts: Parts | None = None
        self._group = group or join_group()
        self._stop = Flag()
        self._progress = Progress()
        self._run: Run | None = None
        self._metrics: MetricsFile | None = None
        self._saving: Saving | None = None
        self._sampler: Sampler | None = None
        self._copies = Copies()

    @classmethod
    def resumed(
        cls, run: Run | str, changes: Mapping[str, Any] | None = None, **settings: Any
    ) -> Trainer:
        """Goes on with a run by its folder, its name or "last".

        changes: settings by dotted name; those that touch the weights are refused.
        """
        found = open_run(run) if isinstance(run, str) else run
        config = load_config(found.config, {**(changes or {}), "out": str(found.folder)})
        return cls(config, resume=True, **settings)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model and closes the callbacks."""
        if self._parts is not None:
            self._parts.close()
        for callback in self._callbacks:
            callback.close()

    @property
    def leads(self) -> bool:
        """Whether this process tells and writes; of several, the first."""
        return self._group.rank == 0

    def add(self, callback: Callback) -> None:
        """One more to be told of events."""
        self._callbacks.append(callback)

    def open_data(self) -> Opened:
        """The data in the model's tokens, without loading weights."""
        return open_data(self.config)

    def stop(self) -> None:
        """From any thread or a signal handler: the step under way is the last one, and saved."""
        self._stop.set()

    def prepare(self) -> MemoryPlan:
        """Opens everything, reports data, program and memory, and tries the largest micro-batch.

        Raises OutOfMemoryPlan with what would fit.
        """
        if self.plan is None:
            self._rehearse(self._plan_memory())
        assert self.plan is not None, "it is there once it was tried"
        return self.plan

    def _plan_memory(self) -> Planned:
        """Opens everything; raises OutOfMemoryPlan where it does not fit."""
        give_large_blocks_back()
        parts = self._parts = self._open_parts(self.config)
        self._tell(
            {"type": "data", **parts.data.report.as_dict(), "lines": parts.data.report.lines()}
        )
        self.config = parts.config
        self._batches = Batches(
            [tokens_of(example) for example in parts.data.train],
            size=self.config.batch.size,
            accumulate=self.config.batch.accumulate,
            tokens=parts.budget,
            seed=self.config.seed,
        )
        self.config = _with_steps(self.config, self._batches, bool(parts.data.valid))
        if self._group.size > self.config.batch.accumulate:
            raise InvalidRequest(
                f"{self._group.size} processes share the micro-batches of a step, and there are "
                f"only {self.config.batch.accumulate}",
                hint=f"give --accumulate {self._group.size} or more, and a smaller --batch-size",
            )
        self._parameters = parts.initial  # in place: with all weights a copy is as large as a model
        self._stepper = Stepper(parts, self.config, self._group)
        # Evaluating takes no more at once than training does.
        self._stepper.eval_tokens = sum(
            tokens_of(parts.data.train[place]) for place in self._batches.largest
        )
        self._tell(
            {
                "type": "program",
                "name": parts.program.name,
                "note": parts.note,
                "trainable": parts.layout.size,
                "processes": self._group.size,
            }
        )
        return plan_run(parts, self.config, self._batches, self._stepper)

    def _rehearse(self, planned: Planned) -> None:
        """Tries the largest micro-batch and tells the plan."""
        if self.leads:
            self._copies.take(self._parameters, self._stepper.optimizer)
        measured = rehearse(planned, self._opened.program, self._stepper, self._parameters)
        self.plan = planned.plan
        self._tell(
            {
                "type": "plan",
                "items": [vars(item) for item in self.plan.items],
                "total_bytes": self.plan.total,
                "available_bytes": self.plan.available,
                "dry_step_peak_bytes": measured,
                "steps": self.config.run.steps,
                "lines": self.plan.lines(),
            }
        )

    def train(self) -> Result:
        """Trains until the end, or until told to stop."""
        if self.leads and not self._resume and self.config.out is not None:
            refuse_run(self.config.out)
        planned = None if self.plan is not None else self._plan_memory()
        with ExitStack() as stack:
            if self.leads:
                self._run = self._enter_run(stack)
            if planned is not None:
                try:
                    self._rehearse(planned)
                except BaseException:
                    stack.close()
                    self._forget_run()
                    raise
            self._begin(stack)
            try:
                return self._finish(self._loop())
            except BaseException as error:
                self._note(status="failed", reason=str(error) or type(error).__name__)
                if is_out_of_memory(error):
                    raise self._out_of_memory(error) from error
                raise

    # ---- the loop

    def _loop(self) -> tuple[str, str | None]:
        """Steps until the run is over: its status, and the reason if it is not the end."""
        progress, run = self._progress, self.config.run
        assert run.steps is not None, "the number of steps is settled before"
        if run.early_stop is not None and progress.worse >= run.early_stop:
            return "early-stop", "it had ended so before"
        while progress.step < run.steps:
            reason = self._one_step()
            if reason is not None:
                return "diverged", reason
            last = progress.step == run.steps
            if self._due(run.eval_every) or last:
                self._evaluate()
            if self._due(run.sample_every):
                self._draw_samples()
            early = run.early_stop is not None and progress.worse >= run.early_stop
            stopped = self._group_agrees_to_stop()
            fresh = progress.best_step == progress.step
            if self._due(run.save_every) or last or early or stopped or fresh:
                self._save()
            if early and not last:
                return "early-stop", f"no lower validation loss in {run.early_stop} evaluations"
            if stopped and not last:
                return "interrupted", None
        return "finished", None

    def _one_step(self) -> str | None:
        """One step of the optimizer; a reason to stop instead of taking it."""
        progress, started = self._progress, time.perf_counter()
        number = progress.step
        batch = self._batches.at(number)
        done = self._stepper.gradient(batch, self._parameters, number)
        norm = self._stepper.clip()
        progress.loss = done.loss
        reason = progress.guard.check(done.loss, norm)
        if reason is not None:
            return f"at step {number + 1}, {reason}"
        rate = self._stepper.update(self._parameters, number)
        progress.step += 1
        progress.tokens += done.tokens
        took = time.perf_counter() - started
        progress.seconds += took
        self._tell(
            {
                "type": "step",
                "step": progress.step,
                "steps": self.config.run.steps,
                "epoch": round(batch.epoch + batch.share, 4),
                "loss": done.loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": done.tokens,
                "trained_tokens": done.trained,
                "tokens_per_second": round(done.tokens / took, 1),
                "seconds": round(took, 4),
                "memory_bytes": resident_memory()[0],
                **done.metrics,
            }
        )
        return None

    def _evaluate(self) -> None:
        parts, progress = self._opened, self._progress
        if not parts.data.valid:
            return
        started = time.perf_counter()
        done = self._stepper.evaluate(parts.data.valid, self._parameters)
        progress.valid_loss = done.loss
        if progress.best_loss is None or done.loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = done.loss, progress.step, 0
        else:
            progress.worse += 1
        self._tell(
            {
                "type": "eval",
                "step": progress.step,
                "loss": done.loss,
                "best": progress.worse == 0,
                "seconds": round(time.perf_counter() - started, 3),
                **done.metrics,
            }
        )

    def _draw_samples(self) -> None:
        if self._sampler is None:
            return

        def save(folder: Path) -> None:
            self._delivery.write(folder, self._parameters)

        texts = self._sampler.answers(save)
        answers = [
            {"prompt": prompt, "answer": text}
            for prompt, text in zip(self.config.run.sample_prompts, texts, strict=True)
        ]
        event = {"type": "samples", "step": self._progress.step, "answers": answers}
        self._tell(event)

    def _due(self, every: int | None) -> bool:
        return bool(every) and self._progress.step % (every or 1) == 0

    def _group_agrees_to_stop(self) -> bool:
        """Whether anyone was told to stop: all must leave the loop after the same step."""
        told = np.array([self._stop.is_set()])
        return bool(self._group.gather(told).any())

    # ---- beginning and end

    def _begin(self, stack: ExitStack) -> None:
        """Opens or makes the run's folder and takes the state of a resumed one."""
        parts, leader = self._opened, self._group.rank == 0
        self._delivery = Delivery(parts, self.config)
        if leader:
            assert self._run is not None, "it was entered"
            run = self._run
            self._saving = Saving(run, parts, self.config, self._copies, self._warn)
            stack.callback(self._saving.close)
        position = self._take_up() if self._resume else 0
        if self._saving is not None:
            self._metrics = MetricsFile(run.metrics, position=position)
            stack.callback(self._metrics.close)
            replace_file(run.config, [to_toml(self.config).encode()])
            self._note(status="running", reason=None)
            self._saving.warn_of_little_space(self._parameters, self._stepper.optimizer)
            if self.config.run.sample_every:
                self._sampler = self._delivery.sampler()
                stack.callback(self._sampler.close)
        self._tell(
            {
                "type": "start",
                "run": None if self._run is None else self._run.name,
                "folder": None if self._run is None else str(self._run.folder),
                "step": self._progress.step,
                "steps": self.config.run.steps,
                "epoch_steps": self._batches.steps_in(1),
            }
        )

    def _enter_run(self, stack: ExitStack) -> Run:
        """The run's folder, locked; of a new one with all that resuming needs.

        The kernel may yet kill the process where memory is short, and then the run shall be found.
        """
        if self._resume:
            assert self.config.out is not None, "what is resumed has a place"
            run = open_run(self.config.out)
            stack.enter_context(training(run))
            return run
        run = create_run(self.config.out, {**self._facts(), "status": "running"})
        stack.enter_context(training(run))
        replace_file(run.config, [to_toml(self.config).encode()])
        return run

    def _forget_run(self) -> None:
        """A new run that did not begin leaves nothing behind."""
        if self._run is not None and not self._resume:
            delete_run(self._run)

    def _take_up(self) -> int:
        """The newest sound checkpoint's state, on every process; where its metrics ended."""
        packed = b""
        arrays: dict[str, np.ndarray] = {}
        self._copies.drop()  # what is read takes their place
        if self._saving is not None and (snapshot := self._saving.newest()) is not None:
            arrays = dict(snapshot.arrays)
            packed = json.dumps(snapshot.facts).encode()
            del snapshot  # each array goes as soon as it is taken: the plan has no room for two
        packed = self._group.first(packed)
        if not packed:
            return 0
        facts = json.loads(packed)
        self._progress = Progress.restored(facts["progress"])
        state = {}
        for name, (dtype, shape) in facts["arrays"].items():
            data = self._group.first(arrays.pop(name).tobytes() if name in arrays else b"")
            state[name] = np.frombuffer(data, dtype).reshape(shape)  # copied where it is loaded
        self._parameters[...] = state.pop("parameters")
        self._stepper.optimizer.load_state(
            {name.removeprefix("optimizer."): array for name, array in state.items()}
        )
        return int(facts["metrics"])

    def _save(self) -> None:
        if self._saving is None:
            return
        started = time.perf_counter()
        self._tell_problems()
        assert self._metrics is not None
        self._saving.save(
            self._progress, self._parameters, self._stepper.optimizer, self._metrics.position()
        )
        self._note()
        took = round(time.perf_counter() - started, 4)  # that the run stood still
        self._tell({"type": "checkpoint", "step": self._progress.step, "seconds": took})

    def _tell_problems(self) -> None:
        if self._saving is not None:
            self._saving.tell_problems()
        if self._metrics is not None and self._metrics.failed is not None:
            failed, self._metrics.failed = self._metrics.failed, None
            self._warn(f"metrics are being lost: {failed}")

    def _finish(self, ended: tuple[str, str | None]) -> Result:
        status, reason = ended
        progress = self._progress
        adapter: Path | None = None
        if self._saving is not None:
            assert self._run is not None
            self._saving.checkpoints.wait()
            self._copies.drop()
            self._tell_problems()
            chosen = self._chosen(status)
            if chosen is not None:
                adapter = self._deliver(self._run.folder, chosen)
            self._note(
                status=status,
                reason=reason,
                adapter=None if adapter is None else str(adapter),
                peak_bytes=resident_memory()[1],
            )
        self._tell(
            {
                "type": "end",
                "status": status,
                "reason": reason,
                "step": progress.step,
                "steps": self.config.run.steps,
                "loss": progress.loss,
                "valid_loss": progress.valid_loss,
                "best_loss": progress.best_loss,
                "best_step": progress.best_step,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
                "peak_bytes": resident_memory()[1],
                "adapter": None if adapter is None else str(adapter),
            }
        )
        assert self._run is not None or self._group.rank
        return Result(
            status,
            self._run or Run("", Path(), {}),
            progress.step,
            self.config.run.steps or 0,
            progress.loss,
            progress.valid_loss,
            progress.best_loss,
            progress.best_step,
            adapter,
            reason,
        )

    def _out_of_memory(self, error: BaseException) -> OutOfMemoryPlan:
        """The largest step had fitted before the first: something else takes the memory now."""
        goes_on = ""
        if self._run is not None and self._saving is not None:
            self._saving.checkpoints.wait()
            if saved := self._saving.checkpoints.steps():
                goes_on = (
                    f"; `localllm finetune --resume {self._run.folder}` goes on from its "
                    f"checkpoint of step {saved[-1]}"
                )
        return OutOfMemoryPlan(
            f"memory ran out after step {self._progress.step}: {error}",
            hint=f"end other programs that take memory{goes_on}",
        )

    def _deliver(self, folder: Path, parameters: np.ndarray) -> Path:
        assert self._saving is not None
        try:
            return self._delivery.write(folder, parameters)
        except (OSError, CheckpointError) as error:
            saved = self._saving.checkpoints.steps()
            raise StoreError(
                f"what was trained could not be written: {error}",
                hint=f"free some space, then `localllm finetune --resume {folder}` goes on from "
                f"its checkpoint of step {saved[-1]}"
                if saved
                else "no checkpoint could be written either: free some space and train it anew",
            ) from error

    def _chosen(self, status: str) -> np.ndarray | None:
        """The parameters that the run delivers; of a diverged one those of its last checkpoint."""
        assert self._saving is not None
        step: int | None = self._progress.step
        if status == "diverged":
            steps = self._saving.checkpoints.steps()
            step = self._progress.best_step or (steps[-1] if steps else None)
        elif self.config.run.final == "best" and self._progress.best_step is not None:
            step = self._progress.best_step
        if step is None:
            return None
        if step == self._progress.step and status != "diverged":
            return self._parameters
        return self._saving.checkpoints.read(step).arrays["parameters"]

    # ---- telling

    def _tell(self, event: Event) -> None:
        """To the metrics where a line belongs there, and to every callback; by the leader alone."""
        if self._group.rank:
            return
        if self._metrics is not None and event["type"] in _KEPT:
            self._metrics.write(event)
        for callback in self._callbacks:
            callback.on_event(event)

    def _warn(self, text: str) -> None:
        self._tell({"type": "warning", "text": text})

    def _facts(self) -> dict[str, Any]:
        """What run.json says of the run as it stands."""
        progress = self._progress
        return {
            "model": self.config.model,
            "method": self.config.method.name,
            "tune": self.config.tune,
            "steps": self.config.run.steps,
            "step": progress.step,
            "loss": progress.loss,
            "valid_loss": progress.valid_loss,
            "best_loss": progress.best_loss,
            "best_step": progress.best_step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "program": self._opened.program.name,
        }

    def _note(self, **more: Any) -> None:
        """Brings run.json up to date; a full disk is told and costs nothing else."""
        if self._run is None:
            return
        try:
            self._run = self._run.update(**self._facts(), **more)
        except OSError as error:
            self._warn(f"run.json cannot be written: {error.strerror or error}")

    @property
    def _opened(self) -> Parts:
        assert self._parts is not None, "prepare comes first"
        return self._parts


def _with_steps(config: TrainConfig, batches: Batches, valid: bool) -> TrainConfig:
    """With every default that depends on the data filled in."""
    run, optimizer = config.run, config.optimizer
    steps = run.steps
    if steps is None or run.epochs is not None:
        counted = batches.steps_in(1.0 if run.epochs is None else run.epochs)
        steps = counted if steps is None else min(steps, counted)
    every = max(1, min(_APART, steps // _OFTEN))
    run = replace(
        run,
        steps=steps,
        save_every=run.save_every or every,
        eval_every=run.eval_every or every,
        final=run.final or ("best" if valid else "last"),
    )
    if optimizer.lr is None:
        optimizer = replace(optimizer, lr=2e-4 if config.tune == "lora" else 2e-5)
    return replace(config, run=run, optimizer=optimizer)
