"""Who is told what happens in a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from localllm.errors import InvalidRequest

Event = Mapping[str, Any]  # "type" says which; docs/training.md lists them


class Callback(Protocol):
    """Called from the training thread between steps; what it raises ends the run."""

    def on_event(self, event: Event) -> None:
        """One thing that happened, as metrics.jsonl and --json have it."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars for TensorBoard in a folder. Needs the extra `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InvalidRequest(
                "TensorBoard files need tensorboardX",
                hint="pip install 'localllm[tensorboard]'",
            ) from error
        self._writer = SummaryWriter(str(folder))

    def on_event(self, event: Event) -> None:
        prefix = {"step": "train", "eval": "valid"}.get(event["type"])
        if prefix is None:
            return
        for name, value in scalars(event).items():
            self._writer.add_scalar(f"{prefix}/{name}", value, event["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in Weights & Biases. Needs the extra `wandb`; an account, or WANDB_MODE=offline."""

    def __init__(self, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InvalidRequest(
                "Weights & Biases needs wandb", hint="pip install 'localllm[wandb]'"
            ) from error
        self._run = wandb.init(project=project, config=dict(config))

    def on_event(self, event: Event) -> None:
        prefix = {"step": "train", "eval": "valid"}.get(event["type"])
        if prefix is not None:
            named = {f"{prefix}/{name}": value for name, value in scalars(event).items()}
            self._run.log(named, step=event["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event, without its place."""
    return {
        name: float(value)
        for name, value in event.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
