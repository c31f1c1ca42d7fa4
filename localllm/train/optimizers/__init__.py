"""Optimizers by name, over one flat float32 vector of parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping

from localllm.errors import InvalidRequest
from localllm.train.optimizers.adafactor import Adafactor
from localllm.train.optimizers.adamw import AdamW
from localllm.train.optimizers.adamw8 import AdamW8bit
from localllm.train.optimizers.clipping import clip
from localllm.train.optimizers.lion import Lion
from localllm.train.optimizers.protocol import Optimizer, pieces
from localllm.train.optimizers.sgd import SGD
from localllm.train.program import Layout

__all__ = ["OPTIMIZERS", "Optimizer", "clip", "make_optimizer"]

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    kind.name: kind for kind in (AdamW, AdamW8bit, Lion, Adafactor, SGD)
}


def make_optimizer(
    name: str,
    layout: Layout,
    *,
    weight_decay: float = 0.0,
    lora_plus: float | None = None,
    **settings: float,
) -> Optimizer:
    """lora_plus: see `LoRAConfig`. settings: "beta1", "beta2", "eps", as far as it has them.

    Raises InvalidRequest for an unknown optimizer, for a setting it has not, or one out of range.
    """
    if name not in OPTIMIZERS:
        raise InvalidRequest(
            f"there is no optimizer {name!r}", hint=f"there are {', '.join(OPTIMIZERS)}"
        )
    known = {*inspect.signature(OPTIMIZERS[name]).parameters} - {"pieces", "weight_decay"}
    for setting, value in settings.items():
        if setting not in known:
            hint = f"it has {', '.join(sorted(known)) or 'no settings'}"
            raise InvalidRequest(f"the optimizer {name} has no setting {setting!r}", hint=hint)
        if setting.startswith("beta") and not 0 <= value < 1:
            raise InvalidRequest(f"{setting} must be at least 0 and below 1, not {value:g}")
        if setting == "eps" and not (math.isfinite(value) and value > 0):
            raise InvalidRequest(f"eps must be above 0, not {value:g}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InvalidRequest(f"weight decay must be at least 0, not {weight_decay:g}")
    if lora_plus is not None and not layout.scales:
        raise InvalidRequest("LoRA+ sets how fast B learns, and full fine-tuning has no B")
    return OPTIMIZERS[name](pieces(layout, lora_plus), weight_decay=weight_decay, **settings)
