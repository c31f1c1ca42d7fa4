"""From a model's name to a running engine: files, spec, tokenizer, memory plan, backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from localllm import hub
from localllm.adapters import load_adapter, weights_in
from localllm.adapters.dora import Base
from localllm.backend.packed_folder import PackedFolder, PackedPlace
from localllm.backend.protocol import Activations, Backend
from localllm.backend.select import BackendStatus, candidates, check_activations, open_backend
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.opening import files_digest, sha256s
from localllm.checkpoint.quantize import quantize_like
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.engine import Engine
from localllm.engine.adapters import AdapterSlots
from localllm.engine.disk_tier import DiskTier
from localllm.engine.drafters import DraftModel, HeadDrafter
from localllm.engine.planner import Plan, Wish
from localllm.engine.speculative import Drafter
from localllm.errors import (
    CheckpointError,
    InvalidRequest,
    OutOfMemoryPlan,
    StoreError,
    UnsupportedModel,
)
from localllm.hub.environment import is_set
from localllm.hub.progress import Progress, human_bytes
from localllm.hub.store import Store
from localllm.machine import cores, memory, return_freed_memory
from localllm.models import load_mtp, load_spec, load_weights
from localllm.models.draft_head import DraftHead
from localllm.planning import fitting_plan, model_of
from localllm.sampling import SamplingParams
from localllm.spec import DecoderSpec
from localllm.tokenizer import Tokenizer, load_tokenizer

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MAX_CONFIG_BYTES = 1 << 20
_SMALL_LAYER = 16 << 20  # bytes of a draft head that one thread reads before others have woken
OWN_DRAFT_HEAD = "mtp"  # instead of a folder: the head that the checkpoint brings along


@dataclass(frozen=True)
class LoadedModel:
    """Everything `LLM` stands on."""

    name: str
    path: Path
    format: str
    tokenizer: Tokenizer | None
    backend: Backend
    backend_note: str | None
    engine: Engine
    plan: Plan
    eos_ids: frozenset[int]
    default_params: SamplingParams
    base: Base  # its weights as in its files, for adapters that need them
    disk: DiskTier | None
    drafters: tuple[Backend, ...]  # what drafters compute with, beside the model

    def close(self) -> None:
        self.engine.close()
        if self.disk is not None:
            self.disk.close()
        for drafter in self.drafters:
            drafter.close()
        self.backend.close()


def load(
    name: str,
    *,
    backend: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv_tokens: int | None = None,
    max_batch: int = 32,
    activations: Activations | None = None,
    kv_bits: int | None = None,
    chat_template: str | None = None,
    draft_model: str | None = None,
    draft_head: Path | None = None,
    kv_disk: int | None = None,
    expert_memory: int | None = None,
    max_adapters: int = 16,
    max_adapter_bytes: int = 1 << 30,
    offline: bool | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads a model; `LLM` tells what the parameters mean and what is raised."""
    if max_batch < 1:
        raise InvalidRequest(f"max_batch must be at least 1, not {max_batch}")
    stored = hub.resolve(name, progress=progress, offline=offline)
    usable = candidates(backend)
    check_activations(usable[0], activations)
    usable[0].checked_kv_bits(kv_bits)
    checkpoint = open_checkpoint(stored.path)
    try:
        spec = load_spec(checkpoint)
        tokenizer = load_tokenizer(stored.path, checkpoint.config)
        if chat_template is not None:
            if tokenizer is None:
                raise InvalidRequest("a chat template needs a tokenizer, and this model has none")
            tokenizer.chat_template = chat_template
        checkpoint.forget_vocabulary()
        settings = _generation_config(stored.path)
        wishes = _Wishes(
            threads, context, kv_tokens, max_batch, activations, kv_bits, expert_memory
        )
        opened, plan, note = _open(usable, spec, checkpoint, wishes)
        key, disk = b"", None
        if kv_disk is not None:
            key, disk = _disk(opened, checkpoint, kv_disk)
        beside, drafters = list[Backend](), list[Drafter]()
        if draft_model is not None:
            draft = load_draft(draft_model, spec, tokenizer, plan, threads=threads, offline=offline)
            beside.append(draft)
            drafters.append(DraftModel(draft))
        if draft_head is not None:
            head = _draft_head(draft_head, checkpoint, spec)
            layer = _head_layer(head, opened.name, plan, threads)
            rows = None if head.tokens is None else head_rows(checkpoint, spec, head.tokens)
            beside.append(layer)
            drafters.append(HeadDrafter(head, opened, layer, rows))
        base = weights_in(stored.path, spec, partial(_digest, checkpoint.files()))
        return LoadedModel(
            name=name,
            path=stored.path,
            format=checkpoint.format,
            tokenizer=tokenizer,
            backend=opened,
            backend_note=note,
            engine=Engine(
                opened,
                context=plan.context,
                max_batch=max_batch,
                drafters=drafters,
                disk=disk,
                key=key,
                adapters=AdapterSlots(
                    opened,
                    max_adapters=max_adapters,
                    max_bytes=max_adapter_bytes,
                    load=partial(load_adapter, base=base),
                ),
            ),
            base=base,
            disk=disk,
            drafters=tuple(beside),
            plan=plan,
            eos_ids=_eos_ids(tokenizer, settings, checkpoint),
            default_params=_default_params(stored, settings),
        )
    finally:
        checkpoint.close()
        del checkpoint  # its metadata holds the vocabulary once more
        return_freed_memory()  # tables and vocabularies on their way in


def _draft_head(place: Path, checkpoint: Checkpoint, spec: DecoderSpec) -> DraftHead:
    if str(place) == OWN_DRAFT_HEAD:
        return load_mtp(checkpoint, spec)
    return DraftHead.load(place, hidden=spec.hidden, vocab_size=spec.vocab_size)


def _head_layer(head: DraftHead, backend: str, plan: Plan, threads: int | None) -> Backend:
    """A draft head's layer, with a KV pool for as many positions as the model's."""
    blocks = plan.kv_tokens // plan.block_size + plan.wish.max_batch
    weights = {name: _narrow(weight) for name, weight in head.weights.items()}
    needed, free = sum(weight.nbytes for weight in weights.values()), memory().available
    if needed > free:
        raise OutOfMemoryPlan(
            f"the draft head takes {human_bytes(needed)}, and {human_bytes(free)} are free",
            hint="load the model without it, or with a shorter context",
        )
    if needed < _SMALL_LAYER:
        threads = 1
    return open_backend(backend, head.spec, weights.items(), num_blocks=blocks, threads=threads)


def _narrow(weight: Tensor) -> Tensor:
    """4 bits for a dense matrix: guesses need no more, and the fewer bytes the sooner."""
    if isinstance(weight, Dense) and len(weight.shape) == 2 and weight.shape[1] % 32 == 0:
        return quantize_like(weight.to_float32(), 4, 32, np.dtype(np.float16))
    return weight


def head_rows(checkpoint: Checkpoint, spec: DecoderSpec, tokens: np.ndarray) -> Tensor:
    """[M, hidden]: the rows of the model's head that make these tokens' logits."""
    wanted = "embed.weight" if spec.tied_head else "head.weight"
    ((_, head),) = load_weights(checkpoint, spec, only={wanted})
    return head.rows(tokens)


@dataclass(frozen=True)
class _Wishes:
    threads: int | None
    context: int | None
    kv_tokens: int | None
    max_batch: int
    activations: Activations | None
    kv_bits: int | None
    expert_memory: int | None = None


def _open(
    usable: list[BackendStatus], spec: DecoderSpec, checkpoint: Checkpoint, wishes: _Wishes
) -> tuple[Backend, Plan, str | None]:
    """The first of these backends that runs the model, its plan, and why better ones did not."""
    reasons: list[str] = []
    model = model_of(checkpoint, spec)
    wish = Wish(
        wishes.context,
        wishes.kv_tokens,
        wishes.max_batch,
        wishes.kv_bits,
        wishes.threads or cores().usable,
        wishes.activations == "float32",
        expert_bytes=wishes.expert_memory,
    )
    for status in usable:
        _check_fallback(status, wishes, reasons)
        plan = fitting_plan(model, wish, status)
        try:
            opened = open_backend(
                status.name,
                spec,
                load_weights(checkpoint, spec),
                num_blocks=plan.group_blocks,
                state_slots=plan.state_slots,
                threads=wishes.threads,
                activations=wishes.activations,
                kv_bits=wishes.kv_bits,
                packed=_packed_place(checkpoint),
                expert_bytes=plan.wish.expert_bytes,
            )
        except UnsupportedModel as error:
            if status is usable[-1]:
                raise
            reasons.append(f"not on {status.name}: {error}")
        else:
            return opened, plan, "; ".join(reasons) or None
    raise AssertionError("a usable backend either opens or raises")


def _check_fallback(status: BackendStatus, wishes: _Wishes, reasons: list[str]) -> None:
    try:
        check_activations(status, wishes.activations)
        status.checked_kv_bits(wishes.kv_bits)
    except InvalidRequest as error:
        raise InvalidRequest("; ".join([*reasons, str(error)]), hint=error.hint) from error


def load_draft(
    name: str,
    spec: DecoderSpec,
    tokenizer: Tokenizer | None,
    plan: Plan,
    *,
    threads: int | None,
    offline: bool | None,
) -> Backend:
    """The draft model on the best backend, with a KV pool for as many positions as the model's.

    Raises InvalidRequest for one with another vocabulary.
    """
    stored = hub.resolve(name, offline=offline)
    checkpoint = open_checkpoint(stored.path)
    try:
        own = load_spec(checkpoint)
        if any(True for _ in own.recurrences):
            raise InvalidRequest(
                f"{name} has recurrent layers, and their state cannot take wrong guesses back",
                hint="a draft model is one all of whose layers attend; or leave it out: guesses "
                "from the text itself cost nothing",
            )
        other = load_tokenizer(stored.path, checkpoint.config)
        same = own.vocab_size == spec.vocab_size
        if tokenizer is not None and other is not None:
            same = same and tokenizer.all_token_bytes() == other.all_token_bytes()
        if not same:
            raise InvalidRequest(
                f"{name} has another vocabulary, so it cannot draft for this model",
                hint="a draft model is a smaller one of the same family",
            )
        context = min(own.context, plan.context)
        wishes = _Wishes(threads, context, max(context, plan.kv_tokens), 32, None, None)
        return _open(candidates(None), own, checkpoint, wishes)[0]
    finally:
        checkpoint.close()


def _disk(backend: Backend, checkpoint: Checkpoint, limit: int) -> tuple[bytes, DiskTier]:
    """What names this model's blocks on disk, and the disk."""
    store = Store()
    try:
        key = PackedFolder(store.packed).key(backend.spec, checkpoint.files(), backend.kv_form)
    except OSError as error:
        raise StoreError(f"no KV cache on disk: {error}") from error
    return key.encode(), DiskTier(backend, store.home / "kv", limit)


def _digest(files: Sequence[Path]) -> bytes:
    """The model's `content_digest`, from hashes that the store remembers."""
    keep = not is_set("LOCALLLM_NO_PACKED_CACHE")
    try:
        return files_digest(files, PackedFolder(Store().packed).sha256s if keep else sha256s)
    except OSError as error:
        raise CheckpointError(f"the model's files cannot be read again: {error}") from error


def _packed_place(checkpoint: Checkpoint) -> PackedPlace | None:
    """Where packed weights are kept; None where the user wants none kept."""
    if is_set("LOCALLLM_NO_PACKED_CACHE"):
        return None
    return PackedPlace(Store().packed, checkpoint.files())


def _generation_config(path: Path) -> Mapping[str, Any]:
    """generation_config.json beside the weights, or nothing."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {_MAX_CONFIG_BYTES} bytes")
        settings = json.loads(file.read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return settings


def _eos_ids(
    tokenizer: Tokenizer | None, settings: Mapping[str, Any], checkpoint: Checkpoint
) -> frozenset[int]:
    """The tokenizer knows best; without one, what the configs name."""
    if tokenizer is not None:
        return tokenizer.eos_ids
    named = settings.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in ids if isinstance(i, int))


def _default_params(stored: hub.StoredModel, settings: Mapping[str, Any]) -> SamplingParams:
    """The catalog's recommendation, else the checkpoint's own, else the plain defaults."""
    if stored.entry is not None:
        sampling = stored.entry.sampling
        values = {key: getattr(sampling, key) for key in _SAMPLING_KEYS}
    else:
        values = {key: settings.get(key) for key in _SAMPLING_KEYS}
        if settings.get("do_sample") is False:
            values = {"temperature": 0.0}
    try:
        return SamplingParams(**{key: v for key, v in values.items() if v is not None})
    except InvalidRequest as error:
        raise CheckpointError(f"{stored.path}/generation_config.json: {error}") from error
