"""Logits to token ids."""

from localllm.sampling.params import SamplingParams
from localllm.sampling.sampler import Draw, Sampler

__all__ = ["Draw", "Sampler", "SamplingParams"]
