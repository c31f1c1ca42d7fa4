"""Logits to token ids."""

from localllm.sampling.batch import draw_batch
from localllm.sampling.constraints import (
    Constraint,
    Vocabulary,
    compile_constraint,
    with_breaker_ids,
)
from localllm.sampling.params import SamplingParams, check_token_ids
from localllm.sampling.processors import log_softmax
from localllm.sampling.sampler import Draw, Sampler, logprobs_of

__all__ = [
    "Constraint",
    "Draw",
    "Sampler",
    "SamplingParams",
    "Vocabulary",
    "check_token_ids",
    "compile_constraint",
    "draw_batch",
    "log_softmax",
    "logprobs_of",
    "with_breaker_ids",
]
