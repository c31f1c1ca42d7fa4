"""Training methods by name; each turns log-probabilities into one weight a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from localllm.errors import InvalidRequest
from localllm.train.methods.dpo import DPO
from localllm.train.methods.orpo import ORPO
from localllm.train.methods.protocol import Method, MethodRows, Weighted
from localllm.train.methods.sft import SFT

__all__ = ["METHODS", "Method", "MethodRows", "Weighted", "make_method"]

METHODS: Mapping[str, Callable[..., Method]] = {"sft": SFT, "dpo": DPO, "orpo": ORPO}


def make_method(name: str, **settings: float) -> Method:
    """settings: "beta" and "label_smoothing", as far as the method has them.

    Raises InvalidRequest for an unknown method, for a setting it has not, or one out of range.
    """
    if name not in METHODS:
        raise InvalidRequest(f"there is no method {name!r}", hint=f"there are {_listed(METHODS)}")
    known = inspect.signature(METHODS[name]).parameters
    for setting in settings:
        if setting not in known:
            hint = f"it has {_listed(known)}" if known else "it has no settings"
            raise InvalidRequest(f"the method {name} has no setting {setting!r}", hint=hint)
    return METHODS[name](**settings)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names)
