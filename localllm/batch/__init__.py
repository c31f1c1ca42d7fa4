"""Offline work: a file of requests in, a file of answers out, resumable."""

from localllm.batch.run import BatchRun, Progress

__all__ = ["BatchRun", "Progress"]
