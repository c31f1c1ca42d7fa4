"""Training data: files in the usual formats to token ids with exact masks."""

from localllm.train.data.example import Example, Preference, TrainingData
from localllm.train.data.loading import load_data
from localllm.train.data.preview import plain_preview, preview
from localllm.train.data.report import DataReport

__all__ = [
    "DataReport",
    "Example",
    "Preference",
    "TrainingData",
    "load_data",
    "plain_preview",
    "preview",
]
