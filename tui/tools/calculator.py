"""Arithmetic that a model cannot do in its head. Nothing but numbers comes out of an expression."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from localllm.tui.tools.tool import Tool, ToolFailed

_MOST_CHARACTERS = 1000
_MOST_NODES = 300
_MOST_BITS = 10_000  # of a whole number

Number = int | float

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitXor: operator.pow,  # 2^10, as it is written by hand
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
_OF_MATH = (
    *("sqrt", "exp", "log", "log2", "log10", "floor", "ceil", "sin", "cos", "tan", "asin", "acos"),
    *("atan", "atan2", "sinh", "cosh", "tanh", "degrees", "radians", "hypot", "gcd"),
    *("factorial", "comb", "perm"),
)
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in _OF_MATH},
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
}
_COUNTING = frozenset({"factorial", "comb", "perm"})
_MOST_COUNTED = 1000


def calculate(expression: str) -> Number:
    """The value of an arithmetic expression. Raises ToolFailed for anything else.

    Knows + - * / // % ** ^ (a power too), parentheses, pi, e, tau and common functions.
    """
    if len(expression) > _MOST_CHARACTERS:
        raise ToolFailed(f"an expression has {_MOST_CHARACTERS} characters at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what looks odd: it would be drawn over the screen
            tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolFailed(f"{expression!r} is no arithmetic expression") from None
    if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
        raise ToolFailed("the expression is too long")
    try:
        return _bounded(_value(tree.body))
    except ZeroDivisionError:
        raise ToolFailed("division by zero") from None
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ToolFailed(f"it cannot be computed: {error}") from None


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _bounded(_UNARY[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            one, other = _value(left), _value(right)
            if isinstance(op, ast.Pow | ast.BitXor):
                _check_power(one, other)
            return _bounded(_BINARY[type(op)](one, other))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            values = [_value(arg) for arg in args]
            if name in _COUNTING and any(abs(value) > _MOST_COUNTED for value in values):
                raise ToolFailed(f"{name} takes numbers up to {_MOST_COUNTED}")
            return _bounded(_FUNCTIONS[name](*values))
    raise ToolFailed(f"{ast.unparse(node)[:80]!r} is no arithmetic")


def _bounded(number: Any) -> Number:
    if isinstance(number, complex) or not isinstance(number, int | float):
        raise ToolFailed("the result is no real number")
    if isinstance(number, int) and number.bit_length() > _MOST_BITS:
        raise ToolFailed("a number becomes too large")
    return number


def _check_power(base: Number, exponent: Number) -> None:
    """Before it is computed: a large one would take all time and memory there is."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if base.bit_length() * exponent > _MOST_BITS and abs(base) > 1:
            raise ToolFailed("a number becomes too large")
    elif isinstance(base, int) and base.bit_length() > 1023:
        raise ToolFailed("a number becomes too large")


async def _call(arguments: Mapping[str, Any]) -> str:
    value = calculate(str(arguments["expression"]))
    return str(value) if isinstance(value, int) else repr(value).removesuffix(".0")


CALCULATOR = Tool(
    "calculator",
    "Computes an arithmetic expression, such as (17 + 4) * 2.5 or sqrt(2) ** 3.",
    {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "what to compute"}},
        "required": ["expression"],
        "additionalProperties": False,
    },
    _call,
    harmless=True,
)
