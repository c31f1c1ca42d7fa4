"""What a run can be resumed from: written between two steps, checked before it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from localllm.errors import InvalidRequest, TrainingStopped
from localllm.hub.progress import human_bytes
from localllm.hub.store import folder_size
from localllm.train.checkpoint import Checkpoints, Snapshot
from localllm.train.config import TrainConfig, differences, load_config
from localllm.train.optimizers import Optimizer
from localllm.train.parts import Parts
from localllm.train.progress import Progress
from localllm.train.runs import Run

_SHOWN = 12  # digits of a hash


class Copies:
    """Parameters and optimizer as they were between two steps, for the thread that writes them.

    Always in the same memory: new copies amid the steps' own would break the heap into pieces.
    """

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def take(self, parameters: np.ndarray, optimizer: Optimizer) -> dict[str, np.ndarray]:
        """By their names in a checkpoint."""
        now = {"parameters": parameters}
        now |= {f"optimizer.{name}": array for name, array in optimizer.state().items()}
        for name, array in now.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != array.shape or kept.dtype != array.dtype:
                self._kept[name] = np.array(array)
            else:
                np.copyto(kept, array)
        return dict(self._kept)

    def drop(self) -> None:
        """Makes room, while nothing is being written."""
        self._kept.clear()


class Saving:
    """The checkpoints of a run that is being trained. warn: told what does not end the run."""

    def __init__(
        self,
        run: Run,
        parts: Parts,
        config: TrainConfig,
        copies: Copies,
        warn: Callable[[str], None],
    ) -> None:
        self.checkpoints = Checkpoints(run.checkpoints, keep=config.run.keep)
        self._run, self._parts, self._config = run, parts, config
        self._copies, self._warn = copies, warn

    def close(self) -> None:
        self.checkpoints.close()

    def warn_of_little_space(self, parameters: np.ndarray, optimizer: Optimizer) -> None:
        """Before the first step rather than at the end: a full disk costs the result."""
        one = sum(array.nbytes for array in self._copies.take(parameters, optimizer).values())
        # Those kept, the best, the one being written, and the result.
        needed = (self._config.run.keep + 2) * one + parameters.nbytes
        free = shutil.disk_usage(self._run.folder).free + folder_size(self._run.checkpoints)
        if needed > free:
            self._warn(
                f"checkpoints and the result take up to {human_bytes(needed)}, and "
                f"{human_bytes(free)} are free in {self._run.folder} (a lower --keep takes less, "
                "another --out may have more)"
            )

    def save(
        self, progress: Progress, parameters: np.ndarray, optimizer: Optimizer, metrics: int
    ) -> None:
        """Begins to write a checkpoint; metrics: bytes of the metrics that belong to it."""
        self.checkpoints.wait()  # its copy is about to be written over
        arrays = self._copies.take(parameters, optimizer)
        facts = {
            "progress": progress.facts(),
            "metrics": metrics,
            "identity": self._identity(),
            "arrays": {name: (array.dtype.str, array.shape) for name, array in arrays.items()},
            "seed": self._config.seed,  # all randomness is a function of it and the step
        }
        self.checkpoints.save(Snapshot(progress.step, arrays, facts), best=progress.best_step)

    def newest(self) -> Snapshot | None:
        """What a resumed run goes on from, later ones removed; None if it has saved nothing yet.

        Raises TrainingStopped if all are damaged, InvalidRequest naming what is not as it was.
        """
        self.checkpoints.sweep()
        snapshot, complaints = self.checkpoints.newest()
        for complaint in complaints:
            self._warn(complaint)
        if snapshot is None:
            if complaints:
                raise TrainingStopped(
                    f"no checkpoint of {self._run.name} is sound",
                    hint="train it anew in another --out, or here after "
                    f"`localllm runs delete {self._run.name}`",
                )
            self._warn(f"{self._run.name} has no checkpoint yet: it begins anew")
            return None
        self._refuse_changes(snapshot.facts)
        if complaints:
            self._warn(f"going back to the checkpoint of step {snapshot.step}")
        self.checkpoints.drop_after(snapshot.step)
        return snapshot

    def tell_problems(self) -> None:
        """Of writes that are over."""
        for problem in self.checkpoints.problems():
            self._warn(f"{problem} ({problem.hint})" if problem.hint else str(problem))

    def _refuse_changes(self, facts: Mapping[str, Any]) -> None:
        changed = differences(load_config(self._run.config), self._config)
        mine = self._identity()
        for name, value in facts["identity"].items():
            if mine[name] != value:
                changed.append(f"{name} was {value[:_SHOWN]} and is {mine[name][:_SHOWN]}")
        if changed:
            raise InvalidRequest(
                f"{self._run.name} cannot go on as it began: " + "; ".join(changed),
                hint="put it back as it was, or train anew in another --out",
            )

    def _identity(self) -> dict[str, str]:
        """What must be the same for the rest of a run to be what it would have been."""
        parts = self._parts
        return {
            "the data's content": parts.data.fingerprint,
            "the model's content": parts.fingerprint,
            "the program": parts.program.name,
            "the trained parameters": parts.layout_digest,
        }
