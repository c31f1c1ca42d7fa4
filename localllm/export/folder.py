"""A folder as transformers, vLLM, MLX and we read it: config.json, safetensors, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from localllm.checkpoint.atomic import write_bytes, write_json
from localllm.checkpoint.form import AffineForm, Form
from localllm.checkpoint.mlx_quantization import BITS, GROUPS
from localllm.checkpoint.quantize import flat, quantize_like
from localllm.checkpoint.streaming import Entry, SafetensorsWriter
from localllm.checkpoint.tensor import Affine, Tensor
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.export.source import Source
from localllm.models import load_forms, load_kinds
from localllm.models.hub_config import hub_config
from localllm.models.layout import norm_offset, own_prefix
from localllm.models.registry import ARCHITECTURES
from localllm.models.writing import Stored, gather, stored_tensors, to_dense
from localllm.tokenizer import load_tokenizer
from localllm.tokenizer.hub_files import hub_tokenizer_files

Kept = Literal["keep", "float32", "float16", "bfloat16", "requantize"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_WEIGHTS = "model.safetensors"
_MAX_BESIDE = 256 << 20


@dataclass(frozen=True)
class Written:
    """folder; nbytes: of the weights. tensors: how many; changed: of those, by the adapter."""

    folder: Path
    nbytes: int
    tensors: int
    changed: int
    form: str


def write_folder(
    source: Source,
    out: Path,
    form: Kept = "keep",
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Writes the model, merged with the adapter if it has one.

    form: "keep" leaves dense weights in the type they have, and refuses quantized ones that would
        change, since rounding them again loses more than an adapter may have brought; a type makes
        everything dense; "requantize" keeps codes as they are and rounds what changed to the bits
        and groups it had, as an MLX folder.
    The folder must be new or empty. Raises InvalidRequest for that and for a form that needs to be
    chosen, UnsupportedModel for weights that no such folder holds.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"{out}: is there already", hint="name a folder that is new or empty")
    names = ARCHITECTURES[_architecture(source)].names
    spec = source.spec
    offset = norm_offset(spec.architecture)
    wanted = stored_tensors(spec, names, own_prefix(spec.architecture), norm_offset=offset)
    forms = load_forms(source.checkpoint, source.spec)
    kinds = load_kinds(source.checkpoint, source.spec)
    _check_form(source, form, forms)
    plans = [_plan(stored, form, forms, kinds) for stored in wanted]
    config = _config(source, plans, form)
    beside = _beside(source)
    out.mkdir(parents=True, exist_ok=True)
    entries = [entry for plan in plans for entry in plan.entries]
    by_name = {plan.stored.name: plan for plan in plans}
    total = sum(entry.nbytes for entry in entries)
    done = 0
    with SafetensorsWriter(out / _WEIGHTS, _in_order(source, wanted, by_name)) as writer:
        for stored, parts in gather(wanted, source.weights()):
            plan = by_name[stored.name]
            for entry, array in zip(plan.entries, plan.arrays(parts), strict=True):
                writer.write(entry.name, array)
                done += entry.nbytes
            progress(done, total)
    for name, content in beside.items():
        (out / name).parent.mkdir(exist_ok=True)
        write_bytes(out / name, content)
    write_json(out / "config.json", config)  # last: a folder without it is no model
    changed = sum(any(p in source.adapted for p in stored.parts) for stored in wanted)
    return Written(out, total, len(wanted), changed, form)


@dataclass(frozen=True)
class _Plan:
    """How a tensor is written. packing: bits and group of codes, None for dense."""

    stored: Stored
    entries: tuple[Entry, ...]
    packing: tuple[int, int] | None = None

    def arrays(self, parts: list[Tensor]) -> list[np.ndarray]:
        if self.packing is None:
            whole = self.stored.assemble([part.to_float32() for part in parts])
            return [_as(self.entries[0].dtype, whole)]
        wide = self._wide()
        codes = self.stored.assemble_codes([self._packed(part, wide) for part in parts])
        if codes is None:  # parts of several widths
            whole = self.stored.assemble([part.to_float32() for part in parts])
            codes = quantize_like(whole, *self.packing, wide)
        assert codes.biases is not None
        return [codes.codes, codes.scales.values, codes.biases.values]

    def _packed(self, part: Tensor, wide: np.dtype) -> Affine:
        assert self.packing is not None
        if isinstance(part, Affine):
            return flat(part, wide)
        return quantize_like(part.to_float32(), *self.packing, wide)

    def _wide(self) -> np.dtype:
        return np.dtype(np.float32 if self.entries[1].dtype == "F32" else np.float16)


def _as(dtype: str, values: np.ndarray) -> np.ndarray:
    named = next(name for name, short in _DTYPES.items() if short == dtype)
    found = to_dense(values, named).data
    if dtype == "F16" and not np.isfinite(found).all():
        raise UnsupportedModel(
            "a weight is too large for float16", hint="write bfloat16 or float32 instead"
        )
    return found


def _plan(stored: Stored, form: Kept, forms: Mapping[str, Form], kinds: Mapping[str, str]) -> _Plan:
    own = [forms[part] for part in stored.parts]
    if form == "requantize" and all(isinstance(f, AffineForm) for f in own):
        return _packed(stored, own)  # type: ignore[arg-type]
    if form in ("keep", "requantize"):
        dtypes = {kinds[part] for part in stored.parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        dtype = dtype if dtype in _DTYPES.values() else "F32"
    else:
        dtype = _DTYPES[form]
    return _Plan(stored, (Entry(stored.name, dtype, stored.shape),))


def _packed(stored: Stored, own: list[AffineForm]) -> _Plan:
    bits = max(form.bits for form in own)
    group = own[0].group
    if bits not in BITS or group not in GROUPS or len({f.group for f in own}) > 1:
        raise UnsupportedModel(
            f"{stored.name}: codes of {bits} bits in groups of {group} have no place in a folder",
            hint="write it dense: --dequantize bf16",
        )
    two_level = any(g is not None and g.multiplier for f in own for g in (f.scales, f.biases))
    wide = two_level or any(f.scales.value_bytes > 2 for f in own)
    name = stored.name.removesuffix(".weight")
    assert name != stored.name, f"{stored.name}: a packed tensor without .weight"
    *outer, inner = stored.shape
    groups = (*outer, inner // group)
    dtype = "F32" if wide else "F16"
    return _Plan(
        stored,
        (
            Entry(stored.name, "U32", (*outer, inner * bits // 32)),
            Entry(f"{name}.scales", dtype, groups),
            Entry(f"{name}.biases", dtype, groups),
        ),
        (bits, group),
    )


def _in_order(source: Source, wanted: list[Stored], plans: Mapping[str, _Plan]) -> list[Entry]:
    """Entries in the order in which `gather` gives tensors: when their last part has come."""
    place = {name: i for i, name in enumerate(load_forms(source.checkpoint, source.spec))}
    order = sorted(wanted, key=lambda stored: max(place[part] for part in stored.parts))
    return [entry for stored in order for entry in plans[stored.name].entries]


def _check_form(source: Source, form: Kept, forms: Mapping[str, Form]) -> None:
    quantized = sorted(name for name, f in forms.items() if isinstance(f, AffineForm))
    if form == "requantize" and not quantized:
        raise InvalidRequest(f"{source.name} is not quantized, so there is nothing to requantize")
    if form == "keep" and quantized:
        changed = [name for name in quantized if name in source.adapted]
        what = (
            f"{len(changed)} of the weights that the adapter changes"
            if changed
            else f"{len(quantized)} of its weights"
        )
        raise InvalidRequest(
            f"{source.name} is quantized: {what} would have to be rounded again or written dense",
            hint="choose: --dequantize bf16 (or f16, f32) for dense weights, --requantize to round "
            "what changed to the bits it had",
        )


def _config(source: Source, plans: list[_Plan], form: Kept) -> dict[str, Any]:
    config = hub_config(source.checkpoint, source.spec)
    dtypes = [plan.entries[0].dtype for plan in plans if plan.packing is None]
    common = max(set(dtypes), key=dtypes.count) if dtypes else "F16"
    config["dtype"] = next(name for name, short in _DTYPES.items() if short == common)
    packings = {plan.stored.name.removesuffix(".weight"): plan.packing for plan in plans}
    packed = [packing for packing in packings.values() if packing is not None]
    if packed:
        bits, group = max(set(packed), key=packed.count)
        settings: dict[str, Any] = {"group_size": group, "bits": bits}
        for name, packing in packings.items():
            if packing is not None and packing != (bits, group):
                settings[name] = {"group_size": packing[1], "bits": packing[0]}
        config["quantization"] = settings
    return config


def _architecture(source: Source) -> str:
    if source.checkpoint.format == "gguf":
        return source.spec.architecture
    kind = str(source.checkpoint.config.get("model_type"))
    return kind if kind in ARCHITECTURES else source.spec.architecture


def _beside(source: Source) -> dict[str, bytes]:
    """Tokenizer, templates and generation settings, by their place in the folder."""
    if source.checkpoint.format == "gguf":
        files = {
            name: text.encode()
            for name, text in hub_tokenizer_files(source.checkpoint.config).items()
        }
        tokenizer = load_tokenizer(source.path, source.checkpoint.config)
        if tokenizer is not None and tokenizer.eos_ids:
            ends = sorted(tokenizer.eos_ids)
            text = f'{{"eos_token_id": {ends}}}\n'
            files["generation_config.json"] = text.encode()
        return files
    found = [source.path / name for name in _BESIDE]
    found += sorted((source.path / "additional_chat_templates").glob("*.jinja"))
    files = {}
    for path in found:
        if not path.is_file():
            continue
        if path.stat().st_size > _MAX_BESIDE:
            raise CheckpointError(f"{path}: is too large to be what its name says")
        files[str(path.relative_to(source.path))] = path.read_bytes()
    return files
