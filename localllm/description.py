"""What a checkpoint is, without loading it: architecture, parameters, quantization, memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from localllm.backend.select import choose_backend
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.base import Checkpoint, Format
from localllm.engine.planner import BLOCK_SIZE, DEFAULT_CONTEXT, Wish, make_plan
from localllm.models import load_spec
from localllm.planning import model_of, this_machine
from localllm.spec import AttentionSpec, DecoderSpec, GatedDeltaNetSpec, MoESpec
from localllm.spec.memory import active_parameters, parameters
from localllm.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Description:
    """Sizes in bytes. quantization: how tensors are stored -> share of the weights' bytes."""

    path: str
    format: Format
    file_bytes: int
    architecture: str
    layers: int
    hidden: int
    attention: str
    feed_forward: str
    parameters: int
    active_parameters: int
    vocabulary: int
    quantization: dict[str, float]
    context: int
    tokenizer: str | None
    chat_template: bool
    backend: str
    weight_bytes: int
    kv_bytes_per_token: int
    planned_context: int  # what `run` would take
    memory_bytes: int  # for one full planned context


def describe(path: Path) -> Description:
    """Reads headers and the tokenizer, no weights. Raises what loading would raise for them."""
    checkpoint = open_checkpoint(path)
    try:
        spec = load_spec(checkpoint)
        tokenizer = load_tokenizer(path, checkpoint.config)
        weight_bytes = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        quantization = _quantization(checkpoint, weight_bytes)
        model = model_of(checkpoint, spec)
        checkpoint_format = checkpoint.format
    finally:
        checkpoint.close()
    backend = choose_backend(None)
    context = min(spec.context, DEFAULT_CONTEXT)
    # One sequence of a full context; what several take besides is for `localllm plan` to tell.
    wish = Wish(context, -(-context // BLOCK_SIZE) * BLOCK_SIZE, max_batch=1)
    plan = make_plan(model, wish, this_machine(backend), backend)
    return Description(
        path=str(path),
        format=checkpoint_format,
        file_bytes=_size(path),
        architecture=spec.architecture,
        layers=len(spec.layers),
        hidden=spec.hidden,
        attention=_attention(spec),
        feed_forward=_feed_forward(spec),
        parameters=parameters(spec),
        active_parameters=active_parameters(spec),
        vocabulary=spec.vocab_size,
        quantization=quantization,
        context=spec.context,
        tokenizer=None if tokenizer is None else type(tokenizer).__name__,
        chat_template=tokenizer is not None and tokenizer.chat_template is not None,
        backend=backend.name,
        weight_bytes=plan.weight_bytes,
        kv_bytes_per_token=plan.kv_bytes // plan.kv_tokens,
        planned_context=context,
        memory_bytes=plan.peak,
    )


def _quantization(checkpoint: Checkpoint, total: int) -> dict[str, float]:
    sizes: Counter[str] = Counter()
    for name in checkpoint.names():
        sizes[checkpoint.kind(name)] += checkpoint.nbytes(name)
    return {kind: size / max(total, 1) for kind, size in sizes.most_common()}


def _attention(spec: DecoderSpec) -> str:
    kinds = [attn for _, attn in spec.attentions]
    one = kinds[0]
    text = f"{one.heads} heads on {one.kv_heads} KV heads of {one.head_dim}"
    windows = Counter(mixer.window for mixer in kinds)
    if set(windows) != {None}:
        counts = [
            f"{count} of {len(kinds)} layers see {'everything' if window is None else window}"
            for window, count in windows.items()
        ]
        text += f"; {', '.join(counts)}"
    text += _rope(kinds)
    recurrent = Counter(type(mixer) for _, mixer in spec.recurrences)
    for kind, count in recurrent.items():
        what = "gated delta nets" if kind is GatedDeltaNetSpec else "short convolutions"
        text += f"; {count} of {len(spec.layers)} layers are {what}"
    return text


def _rope(kinds: list[AttentionSpec]) -> str:
    ropes = {mixer.rope.kind for mixer in kinds if mixer.rope is not None}
    scaled = sorted(ropes - {"default"})
    return f"; RoPE scaling {', '.join(scaled)}" if scaled else ""


def _feed_forward(spec: DecoderSpec) -> str:
    first = next(
        (layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)), spec.layers[0].ffn
    )
    if isinstance(first, MoESpec):
        return f"{first.experts} experts of {first.hidden}, {first.top_k} a token"
    return f"{first.hidden}, {'gated ' if first.gated else ''}{first.activation}"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
