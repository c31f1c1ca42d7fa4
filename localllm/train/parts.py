"""From a config to what a run is made of: model, data, parameters, program, method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localllm import hub
from localllm.checkpoint.opening import content_digest
from localllm.errors import InvalidRequest, UnsupportedModel
from localllm.machine import memory, resident_memory
from localllm.spec import DecoderSpec
from localllm.tokenizer import Tokenizer, load_tokenizer
from localllm.train.base import BaseWeights, base_weights
from localllm.train.config import TrainConfig
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig, TuneConfig
from localllm.train.methods import Method, make_method
from localllm.train.program import Layout, Program
from localllm.train.programs import open_program
from localllm.train.scratch import scratch_weights

if TYPE_CHECKING:
    from localllm.train.data import Example, Preference, TrainingData

_SEQ_LEN = 2048  # tokens of an example at most, unless told


@dataclass(frozen=True)
class Opened:
    """A model's spec and tokenizer and the data in its tokens.

    config: with a length filled in, and files by their full paths: a run goes on from any folder.
    """

    config: TrainConfig
    base: BaseWeights
    tokenizer: Tokenizer
    tokenizer_at: Path
    data: TrainingData


@dataclass(frozen=True)
class Parts:
    """note: why the native program is not used, where it is not. fingerprint: of the model's files.

    initial: float32 [layout.size], what training starts from; it is trained in place. tokenizer_at:
    the model or folder that the tokenizer is of; scratch: a new model's config.json, None where one
    is tuned.
    """

    config: TrainConfig
    spec: DecoderSpec
    data: TrainingData
    tune: TuneConfig
    layout: Layout
    initial: np.ndarray
    program: Program
    note: str | None
    method: Method
    fingerprint: str
    tokenizer_at: Path = Path()
    scratch: Mapping[str, Any] | None = None

    @property
    def budget(self) -> int | None:
        """Tokens that a packed micro-batch is filled up to; None without packing."""
        batch = self.config.batch
        if not batch.pack:
            return None
        return batch.tokens or batch.size * (self.config.data.seq_len or _SEQ_LEN)

    @property
    def layout_digest(self) -> str:
        told = repr([(name, shape) for name, shape in self.layout.shapes.items()])
        return hashlib.sha256(f"{told}{dict(self.layout.scales)}".encode()).hexdigest()

    def close(self) -> None:
        self.program.close()


def open_data(config: TrainConfig) -> Opened:
    """Everything but the weights. Raises what loading a model and data raises."""
    from localllm.train.data import load_data

    base, tokenizer, place = _model_of(config)
    if tokenizer is None:
        raise UnsupportedModel(
            f"{config.model} has no tokenizer, so no text can be turned into its tokens",
            hint="put tokenizer.json beside its weights",
        )
    if tokenizer.vocab_size > base.spec.vocab_size:
        raise UnsupportedModel(
            f"the tokenizer of {config.model} has {tokenizer.vocab_size:,} tokens and its "
            f"embedding only {base.spec.vocab_size:,} rows",
            hint="the tokenizer is another model's, or tokens were added without resizing",
        )
    context = base.spec.context
    length = config.data.seq_len or min(_SEQ_LEN, context)
    if length > context:
        raise InvalidRequest(
            f"--seq-len {length:,} is more than the {context:,} positions {config.model} knows",
            hint=f"give at most {context:,}",
        )
    data = load_data(
        config.data.source,
        tokenizer,
        kind=_kind(config),
        train_on=config.data.train_on,
        max_length=length,
        on_long=config.data.on_long,
        valid=config.data.valid,
        valid_fraction=config.data.valid_fraction,
        seed=config.seed,
        limit=config.data.limit,
        chat_template=config.data.chat_template,
    )
    files = replace(
        config.data,
        source=_full_path(config.data.source),
        valid=config.data.valid and _full_path(config.data.valid),
        seq_len=length,
    )
    config = replace(
        config,
        model=str(place) if Path(config.model).expanduser().absolute() == place else config.model,
        scratch=config.scratch and _full_path(config.scratch),
        data=files,
    )
    return Opened(config, base, tokenizer, place, data)


def _model_of(config: TrainConfig) -> tuple[BaseWeights, Tokenizer | None, Path]:
    """The weights, the tokenizer, and the file or folder that the tokenizer is of."""
    given = Path(config.model).expanduser()
    if config.scratch is not None and given.is_dir():
        place = given.absolute()  # with a tokenizer, and no model beside it
    else:
        place = hub.resolve(config.model, offline=config.offline or None).path
    tokenizer = load_tokenizer(place)
    if config.scratch is None:
        return base_weights(config.model, offline=config.offline or None), tokenizer, place
    base = scratch_weights(config.scratch, seed=config.seed)
    if tokenizer is not None and base.spec.vocab_size < tokenizer.vocab_size:
        size = tokenizer.vocab_size
        base = scratch_weights(config.scratch, seed=config.seed, vocab_size=size)
    return base, tokenizer, place


def open_parts(config: TrainConfig) -> Parts:
    """Raises what loading model and data raises, InvalidRequest for settings that do not fit."""
    method = _method(config)
    opened = open_data(config)
    config, base, data = opened.config, opened.base, opened.data
    if not data.train:
        raise InvalidRequest(
            f"nothing is left of {config.data.source} to train on",
            hint="the report above says what became of its rows",
        )
    tune: TuneConfig = config.lora if config.tune == "lora" else FullConfig(config.dequantize)
    layout = layout_for(base.spec, tune)
    program, note = open_program(
        base,
        layout,
        tune,
        threads=config.threads,
        program=config.program,
        with_base=method.needs_reference,
    )
    return Parts(
        config=config,
        spec=base.spec,
        data=data,
        tune=tune,
        layout=layout,
        initial=initial(layout, config.seed, base),
        program=program,
        note=note,
        method=method,
        fingerprint=_scratch_digest(config) or fingerprint(base),
        tokenizer_at=opened.tokenizer_at,
        scratch=None if config.scratch is None else _read_config(config.scratch),
    )


def sequences(example: Example | Preference) -> tuple[Example, ...]:
    """What goes through the model for it: one sequence, or of a pair two."""
    from localllm.train.data import Preference

    if isinstance(example, Preference):
        return example.chosen, example.rejected
    return (example,)


def tokens_of(example: Example | Preference) -> int:
    return sum(len(one.tokens) for one in sequences(example))


def lengths_of(example: Example | Preference) -> tuple[int, ...]:
    """Rows of each sequence: the last token is a target alone."""
    return tuple(max(1, len(one.tokens) - 1) for one in sequences(example))


def available_memory() -> int:
    """Bytes this process may come to hold, with what it holds already."""
    return memory().available + (resident_memory()[0] or 0)


def fingerprint(base: BaseWeights) -> str:
    """A hash of the content of the model's files."""
    return "" if base.path is None else content_digest(base.path).hex()


def _full_path(name: str) -> str:
    """Of a file or folder that is there; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _read_config(path: str) -> dict[str, Any]:
    file = Path(path)
    return dict(json.loads((file / "config.json" if file.is_dir() else file).read_text("utf-8")))


def _scratch_digest(config: TrainConfig) -> str:
    if config.scratch is None:
        return ""
    told = json.dumps(_read_config(config.scratch), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _kind(config: TrainConfig) -> str:
    """Preference methods take pairs; said here, an "auto" needs no guess."""
    preference = config.method.name in ("dpo", "orpo")
    if preference and config.data.kind not in ("auto", "preference"):
        raise InvalidRequest(
            f"{config.method.name} learns from preferences, not from {config.data.kind}",
            hint='rows of {"prompt", "chosen", "rejected"}',
        )
    if not preference and config.data.kind == "preference":
        raise InvalidRequest(
            "preferences are learned with --method dpo or orpo", hint="or give another --kind"
        )
    return "preference" if preference else config.data.kind


def _method(config: TrainConfig) -> Method:
    settings = {}
    if config.method.beta is not None:
        settings["beta"] = config.method.beta
    if config.method.label_smoothing:
        settings["label_smoothing"] = config.method.label_smoothing
    return make_method(config.method.name, **settings)
