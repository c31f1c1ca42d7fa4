"""What a run leaves: an adapter in PEFT's format, or all weights as a model folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from localllm.adapters import load_adapter, weights_in
from localllm.adapters.writing import save_adapter
from localllm.train.config import TrainConfig
from localllm.train.lora import LoRAConfig
from localllm.train.model_folder import write_model
from localllm.train.parts import Parts
from localllm.train.samples import Sampler


class Delivery:
    """Writes parameters in the form they are used in."""

    def __init__(self, parts: Parts, config: TrainConfig) -> None:
        self._parts, self._config = parts, config

    def write(self, folder: Path, parameters: np.ndarray) -> Path:
        """Into a folder that is there or not; gives where a user finds it.

        Atomically, so that nothing half written is ever met: an adapter in the folder itself, all
        weights as a model below it.
        """
        parts = self._parts
        if not isinstance(parts.tune, LoRAConfig):
            write_model(
                folder / "model",
                parts.spec,
                parts.layout.views(parameters),
                beside=parts.tokenizer_at,
                config=parts.scratch,
            )
            return folder / "model"
        save_adapter(
            folder,
            parts.layout,
            parameters,
            config=parts.tune,
            base_model=self._config.model,
            spec=parts.spec,
        )
        if parts.tune.dora:  # it keeps the lengths of rows, for which the first chat would wait
            load_adapter(folder, parts.spec, base=weights_in(parts.tokenizer_at, parts.spec))
        return folder

    def sampler(self) -> Sampler:
        config = self._config
        return Sampler(
            config.model,
            config.run.sample_prompts,
            max_tokens=config.run.sample_tokens,
            threads=config.threads,
            chat_template=config.data.chat_template,
            offline=config.offline or None,
        )
