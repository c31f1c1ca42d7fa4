"""How good a model is: perplexity, divergence from another, multiple choice, matching answers."""

from localllm.eval.divergence import Divergence, divergence
from localllm.eval.report import EvalReport
from localllm.eval.run import evaluate
from localllm.eval.tasks import Choice, Match, Task, Text, read_tasks

__all__ = [
    "Choice",
    "Divergence",
    "EvalReport",
    "Match",
    "Task",
    "Text",
    "divergence",
    "evaluate",
    "read_tasks",
]
