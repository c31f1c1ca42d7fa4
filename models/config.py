"""Checked access to a model's config, which is untrusted input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localllm.errors import CheckpointError, UnsupportedModel
from localllm.spec.decoder import Activation

MAX_LAYERS = 1000
MAX_VOCAB = 10_000_000
MAX_WIDTH = 1_000_000  # hidden sizes, head counts
MAX_CONTEXT = 1_000_000_000

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_REQUIRED: Any = object()


class Config:
    """Values by Hugging Face's key names, each checked for type and range when asked for.

    source: the file, for messages. aliases: what a key is called in that file, where it differs
    (GGUF). A key that is missing or null takes the default; without one it is a
    `CheckpointError` naming the key, like a value of the wrong type or out of range.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: Path,
        aliases: Mapping[str, str] | None = None,
        at: str = "",
    ) -> None:
        self.values = values
        self.source = source
        self._aliases = aliases or {}
        self._at = at

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = _REQUIRED, *, low: int = 1, high: int) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, f"must be a whole number, not {_short(value)}")
        if not low <= value <= high:
            raise self.bad(key, f"is {_short(value)}, outside {low} … {high}")
        return value

    def number(
        self, key: str, default: Any = _REQUIRED, *, above: float = 0.0, high: float = 1e30
    ) -> float:
        """A float in (above, high]; never NaN or infinite."""
        return self._number(key, self._get(key, default), above, high)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, f"must be true or false, not {_short(value)}")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.bad(key, f"must be a string, not {_short(value)}")
        return value

    def items(self, key: str, *, length: int | None = None) -> list[Any]:
        """A list, of the given length."""
        value = self._get(key, _REQUIRED)
        if not isinstance(value, list | tuple):
            raise self.bad(key, f"must be a list, not {_short(value)}")
        if length is not None and len(value) != length:
            raise self.bad(key, f"has {len(value)} entries; {length} are needed")
        return list(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of that many finite positive floats."""
        return tuple(self._number(key, v, 0.0, 1e30) for v in self.items(key, length=length))

    def section(self, key: str) -> Config:
        value = self._get(key, _REQUIRED)
        if not isinstance(value, Mapping):
            raise self.bad(key, f"must be an object, not {_short(value)}")
        return Config(value, self.source, self._aliases, f"{self._at}{key}.")

    def activation(self, key: str, default: str) -> Activation:
        name = self.text(key, default)
        if name not in _ACTIVATIONS:
            raise self.unsupported(key, name, known=_ACTIVATIONS)
        return _ACTIVATIONS[name]

    def bad(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self.name(key)} {problem}")

    def unsupported(
        self, key: str, value: Any, known: Mapping[str, Any] | tuple[str, ...] = ()
    ) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.source}: {self.name(key)} = {_short(value)} is not supported",
            hint=f"Known: {', '.join(known)}." if known else None,
        )

    def refuse(self, *keys: str) -> None:
        """Raises UnsupportedModel if one of these options, which change the result, is on."""
        for key in keys:
            if self.values.get(key):
                raise self.unsupported(key, self.values[key])

    def name(self, key: str) -> str:
        """What the file calls this key."""
        return self._aliases.get(self._at + key, self._at + key)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.source}: {self.name(key)} is missing")
            return default
        return value

    def _number(self, key: str, value: Any, above: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key, f"must be a number, not {_short(value)}")
        if not above < value <= high:  # false for NaN, and for infinity
            raise self.bad(key, f"is {_short(value)}; it must be above {above:g}, at most {high:g}")
        return float(value)


def _short(value: Any) -> str:
    """A value as JSON would show it, cut so that a hostile file cannot fill the screen."""
    text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    text = text or (repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "huge")
    return text if len(text) <= 60 else text[:60] + "…"
