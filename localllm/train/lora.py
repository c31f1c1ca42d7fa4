"""What is trained: low-rank adapters on some linears, or all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from localllm.errors import InvalidRequest

MAX_RANK = 4096


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters B A beside frozen matrices (https://arxiv.org/abs/2106.09685).

    rank, alpha: B A x is multiplied by alpha / rank, or with `rslora` by alpha / sqrt(rank)
        (https://arxiv.org/abs/2312.03732).
    targets: "all-linear", or names of linears: "attn.q" or "q_proj" in every layer,
        "layers.0.attn.q" in one; as in PEFT a name stands for all that end like it. A mixture's
        experts are no linears there, so they are named beside: "moe.gate", "moe.up", "moe.down", or
        as PEFT's target_parameters "experts.gate_up_proj", "experts.down_proj". Each expert then
        has a pair of its own. Routers stay as they are.
    dropout: chance that an entry of A's input is zeroed in training.
    dora: the rows of W + B A are brought to a trained length (https://arxiv.org/abs/2402.09353).
    lora_plus: B learns so many times as fast as A (https://arxiv.org/abs/2402.12354); None: alike.
    rank_pattern, alpha_pattern: rank and alpha of targets by name; the first that matches counts.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = "all-linear"
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    lora_plus: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank}
        ranks |= {f"rank of {name}": rank for name, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if not 1 <= rank <= MAX_RANK:
                raise InvalidRequest(f"the {name} must be from 1 to {MAX_RANK}, not {rank}")
        alphas = {"alpha": self.alpha}
        alphas |= {f"alpha of {name}": alpha for name, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not (math.isfinite(alpha) and alpha > 0):
                raise InvalidRequest(f"the {name} must be above 0, not {alpha:g}")
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {self.dropout:g}")
        if self.lora_plus is not None and not (
            math.isfinite(self.lora_plus) and self.lora_plus > 0
        ):
            raise InvalidRequest(f"the ratio of LoRA+ must be above 0, not {self.lora_plus:g}")
        if not self.targets:
            raise InvalidRequest(
                "no target to adapt", hint='name linears such as "attn.q", or "all-linear"'
            )


@dataclass(frozen=True)
class FullConfig:
    """All weights are trained, in float32.

    dequantize: take a quantized model's weights as they are read and train those; what comes out
        is no longer quantized. Without it such a model is refused.
    """

    dequantize: bool = False


TuneConfig = LoRAConfig | FullConfig
