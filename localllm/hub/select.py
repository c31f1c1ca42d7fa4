"""Which of the files a source offers make the model."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from localllm.errors import ModelNotFound, UnsupportedModel

# What a folder needs besides its weights. Never code and never pickles (.bin, .pt, .py).
FOLDER_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "model.safetensors.index.json",
    }
)
INDEX = "model.safetensors.index.json"

# First the best answers for the size, then larger, then smaller ones.
PREFERENCE = (
    *("Q4_K_M", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K", "Q5_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K"),
    *("Q6_K", "Q8_0", "BF16", "F16", "F32", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q3_K", "Q2_K"),
)

_QUANT = re.compile(r"(?:^|[-._])((?:I?Q\d(?:_[A-Z0-9]+)*)|BF16|F16|FP16|F32|FP32)$", re.I)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class GgufChoice:
    file: str
    quantization: str | None
    others: tuple[str, ...]  # quantizations that could be had instead


def quantization_of(file: str) -> str | None:
    """`Q4_K_M` from `Model-135M.Q4_K_M.gguf`; None if the name does not tell."""
    stem = _SPLIT.sub("", PurePosixPath(file).name.removesuffix(".gguf"))
    match = _QUANT.search(stem)
    return match[1].upper().replace("FP", "F") if match else None


def choose_gguf(where: str, files: Collection[str], wanted: str | None = None) -> GgufChoice | None:
    """The .gguf to take of `files`: the `wanted` one (by path or quantization), else the best
    by PREFERENCE. None if there is no .gguf at all. `where` names the source in errors.

    Raises ModelNotFound when `wanted` is not there, UnsupportedModel when all are unusable.
    """
    models = sorted(file for file in files if _is_model(file))
    if wanted is not None:
        return _wanted(where, models, wanted)
    if not models:
        return None
    whole = [file for file in models if not _is_split(file)]
    if not whole:
        raise _split_error(where, models[0])
    ranked = sorted(whole, key=lambda file: (_rank(quantization_of(file)), file))
    best = ranked[0]
    if (quantization_of(best) or "").startswith("IQ"):
        raise UnsupportedModel(
            f"{where} holds only IQ quantizations, which cannot be read",
            hint=f"look for a repository with one of {', '.join(PREFERENCE[:5])}",
        )
    others = tuple(quantization_of(file) or file for file in ranked[1:])
    return GgufChoice(best, quantization_of(best), others)


def _wanted(where: str, models: list[str], wanted: str) -> GgufChoice:
    matches = [file for file in models if file == wanted]
    if not matches:
        matches = [
            file
            for file in models
            if wanted.lower() in (file.lower(), (quantization_of(file) or "").lower())
        ]
    if not matches:
        held = ", ".join(models[:12]) + (", …" if len(models) > 12 else "")
        raise ModelNotFound(
            f"{where} has no file {wanted!r}",
            hint=f"it has {held}" if held else "it has no .gguf files; leave the :file out",
        )
    if any(_is_split(file) for file in matches):
        raise _split_error(where, matches[0])
    if len(matches) > 1:
        raise ModelNotFound(
            f"{where} has several files for {wanted!r}", hint=f"name one of {', '.join(matches)}"
        )
    return GgufChoice(matches[0], quantization_of(matches[0]), ())


def choose_weights(names: Collection[str], indexed: Collection[str] | None) -> list[str]:
    """The .safetensors of a folder: what the index lists, else model.safetensors, else all
    except other packings of the same weights and adapters. `names` are the root's files."""
    if indexed is not None:
        return sorted(indexed)
    if "model.safetensors" in names:
        return ["model.safetensors"]
    return sorted(
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith(("consolidated", "adapter"))
    )


def _is_model(file: str) -> bool:
    name = PurePosixPath(file).name.lower()
    # Vision projectors and calibration data are GGUF files, but no language models.
    return name.endswith(".gguf") and "mmproj" not in name and "imatrix" not in name


def _is_split(file: str) -> bool:
    return _SPLIT.search(file.removesuffix(".gguf")) is not None


def _rank(quantization: str | None) -> int:
    if quantization in PREFERENCE:
        return PREFERENCE.index(quantization)
    # Unnamed is probably fine; IQ formats cannot be read.
    return len(PREFERENCE) + (1 if (quantization or "").startswith("IQ") else 0)


def _split_error(where: str, file: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where}: {file} is one piece of a split GGUF, which cannot be read",
        hint="choose a single-file quantization or a safetensors repository, or join the pieces "
        "with llama.cpp's `llama-gguf-split --merge` and give the path",
    )
