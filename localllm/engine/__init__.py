"""The engine: token ids in, token ids out. It never sees text."""

from localllm.engine.engine import Engine, Finished, Token
from localllm.engine.events import EngineEvent, Watch
from localllm.engine.receipt import Receipt
from localllm.engine.sequence import FinishReason, Request

__all__ = [
    "Engine",
    "EngineEvent",
    "FinishReason",
    "Finished",
    "Receipt",
    "Request",
    "Token",
    "Watch",
]
