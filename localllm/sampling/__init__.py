"""Logits to token ids."""

from localllm.sampling.params import SamplingParams, check_token_ids
from localllm.sampling.sampler import Draw, Sampler

__all__ = ["Draw", "Sampler", "SamplingParams", "check_token_ids"]
