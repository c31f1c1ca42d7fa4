"""Qwen 3.5 MoE, text: Qwen 3.5 with a mixture of experts and a shared one in every layer."""

from __future__ import annotations

from localllm.models import qwen3_5
from localllm.models.config import Config
from localllm.models.layout import Names
from localllm.models.mtp import Mtp
from localllm.models.qwen3_next import MOE_NAMES, mixture
from localllm.spec import DecoderSpec

NAMES: Names = {**qwen3_5.NAMES, **MOE_NAMES}


def mtp(spec: DecoderSpec) -> Mtp:
    return qwen3_5.mtp(spec, NAMES)


def spec(config: Config) -> DecoderSpec:
    if config.has("text_config"):
        config = config.section("text_config")
    return mixture("qwen3_5_moe", config)
