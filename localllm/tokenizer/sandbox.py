"""A jinja2 sandbox in which a hostile template ends in an error, soon and in little memory.

Jinja's own sandbox stops a template from reaching Python. It does not stop one from looping for
ever or building a string of terabytes. Here everything that loops or grows is charged to a
budget: loop turns, macro calls, output, and each text or list that an operation makes.
"""

from __future__ import annotations

import functools
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
UNITS = 20_000_000  # characters, list items and loop turns, beyond those the input pays for
MAX_NUMBER = 1_000_000  # the largest width, count or indent a function takes
MAX_INTEGER_BITS = 4096

# Methods of text that grow it without measure, or leave text.
_REFUSED_METHODS = {"translate", "maketrans", "encode", "expandtabs", "format_map"}
_REFUSED_FILTERS = {"wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "random"}
_WIDE = re.compile(r"\*|\d{5}")


class BudgetError(Exception):
    """The template asked for more than its budget."""


class _Budget:
    def __init__(self, units: int, seconds: float) -> None:
        self._left = units
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds

    def charge(self, units: int) -> None:
        self._left -= units
        if self._left < 0:
            raise BudgetError("it makes more text or loop turns than any conversation needs")
        if time.monotonic() > self._deadline:
            raise BudgetError(f"it runs for more than {self._seconds:g} seconds")


_budget: ContextVar[_Budget | None] = ContextVar("template_budget", default=None)


@contextmanager
def budget(units: int) -> Iterator[None]:
    """Everything templates do inside is charged to one budget."""
    token = _budget.set(_Budget(units, SECONDS))
    try:
        yield
    finally:
        _budget.reset(token)


def charge(units: int) -> None:
    current = _budget.get()
    if current is not None:
        current.charge(units)


def weigh(value: Any) -> int:
    """Charges the length of `str(value)`, roughly, and returns it.

    Lists within lists are followed as often as they occur, as writing them out would.
    """
    if isinstance(value, str):
        charge(len(value))
        return len(value)
    if isinstance(value, Mapping):
        items: Iterable[Any] = (part for pair in value.items() for part in pair)
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    elif isinstance(value, Namespace):
        items = object.__getattribute__(value, "_Namespace__attrs").values()
    else:
        charge(1)
        return 1
    charge(1)
    return 1 + sum(weigh(item) for item in items)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of Hugging Face chat templates, bounded. Use inside `budget()`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        # Constant folding would run operations while compiling.
        super().__init__(optimized=False, finalize=_finalize, **options)
        self.globals.pop("lipsum", None)
        self.globals["range"] = _range
        self.globals["dict"] = _dict
        for name in _REFUSED_FILTERS:
            self.filters.pop(name, None)
        self.filters.update(filters)
        for name, function in list(self.filters.items()):
            self.filters[name] = _bounded_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Meter().visit(tree)
        return tree

    # Called by what `_Meter` writes into the template.

    @staticmethod
    def metered_turn(units: int) -> str:
        charge(units)
        return ""

    @staticmethod
    def metered_literal(value: Any) -> Any:
        weigh(value)
        return value

    @staticmethod
    def metered_concat(*parts: Any) -> str:
        for part in parts:
            weigh(part)
        return "".join(map(str, parts))

    # Called by jinja.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        elif isinstance(left, str | list | tuple):
            charge(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice) and hasattr(obj, "__len__"):
            charge(len(obj))
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int | float):
            name = getattr(__obj, "__name__", "")
            if name in _REFUSED_METHODS:
                raise SecurityError(f"the method {name!r} is not open to templates")
            args = _check_call(name, owner, args)
            result = super().call(__context, __obj, *args, **kwargs)
            charge(len(result) if hasattr(result, "__len__") else 1)
            return result
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if value.__name__ in _REFUSED_METHODS:
            raise SecurityError(f"the method {value.__name__!r} is not open to templates")
        inner = wrapped

        def checked(*args: Any, **kwargs: Any) -> str:
            for _, _, width, _ in string.Formatter().parse(value.__self__):
                if width and ("{" in width or _WIDE.search(width)):
                    raise BudgetError(f"the width {width!r} of a format is too large")
            _charge_format(value.__self__, "{", [*args, *kwargs.values()])
            return inner(*args, **kwargs)

        return checked

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(
            f"it reaches for {attribute!r} of a {type(obj).__name__}, which is closed to templates"
        )


class _Meter(NodeTransformer):
    """Writes charges into a template's tree: loop turns, macro calls, concatenations, literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._with_charge(node)

    visit_Macro = visit_CallBlock = visit_Block = visit_FilterBlock = visit_For  # noqa: N815
    visit_AssignBlock = visit_For  # noqa: N815

    def _with_charge(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        units = 1 + sum(_literal_units(child) for child in node.body)
        call = self._call("metered_turn", [nodes.Const(units)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("metered_concat", node.nodes, node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or not list(node.iter_child_nodes()):
            return node
        return self._call("metered_literal", [node], node.lineno)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815

    @staticmethod
    def _call(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name, lineno=lineno)
        return nodes.Call(function, args, [], None, None, lineno=lineno)


def _literal_units(node: nodes.Node) -> int:
    """The characters a template's text writes, up to the next loop or macro."""
    if isinstance(node, nodes.TemplateData):
        return len(node.data)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
        return 0
    return sum(_literal_units(child) for child in node.iter_child_nodes())


def _finalize(value: Any) -> Any:
    weigh(value)
    return value


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_NUMBER:
        raise BudgetError(f"a range of {len(numbers)} numbers is too long")
    charge(1)
    return numbers


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    made = dict(*args, **kwargs)
    weigh(made)
    return made


def _check_product(operation: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, str | list | tuple):
        left, right = right, left
    if isinstance(left, str | list | tuple) and isinstance(right, int):
        charge(weigh(left) * max(right, 0))
    elif isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 0)
            if operation == "**"
            else (left.bit_length() + right.bit_length())
        )
        if bits > MAX_INTEGER_BITS:
            raise BudgetError("it computes with numbers too large to mean anything")


def _check_format(template: str, values: list[Any]) -> None:
    if any(_WIDE.search(spec) for spec in re.findall(r"%(?:\([^)]*\))?([-#0 +*\d.]*)", template)):
        raise BudgetError("the width of a format is too large")
    _charge_format(template, "%", values)


def _charge_format(template: str, mark: str, values: list[Any]) -> None:
    charge(len(template) + template.count(mark) * sum(weigh(value) for value in values))


def _check_call(name: str, owner: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses or charges what a method of text is about to make."""
    for arg in args:
        if isinstance(arg, int) and abs(arg) > MAX_NUMBER:
            raise BudgetError(f"the number {arg} is too large for {name}()")
    if name in ("center", "ljust", "rjust", "zfill"):
        charge(sum(arg for arg in args if isinstance(arg, int)))
    elif name == "replace" and isinstance(owner, str) and len(args) >= 2:
        _charge_replace(owner, args[0], args[1])
    elif name == "join" and args and isinstance(owner, str):
        parts = list(args[0])
        charge(len(owner) * len(parts))
        weigh(parts)
        return (parts, *args[1:])
    return args


def _charge_replace(text: str, old: Any, new: Any) -> None:
    charge(len(text) + text.count(str(old)) * len(str(new)))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its arguments checked, and what it makes charged."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context before the value

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        rest = [*args[skip + 1 :], *kwargs.values()]
        if any(isinstance(arg, int) and abs(arg) > MAX_NUMBER for arg in rest):
            raise BudgetError(f"a number is too large for the filter {name!r}")
        if name in _WRITING_FILTERS and len(args) > skip:
            value = args[skip]
            if name == "join" and not isinstance(value, str | list | tuple):
                value = list(value)
                args = (*args[:skip], value, *args[skip + 1 :])
            _charge_writing(name, value, rest)
        elif name in ("batch", "slice"):
            charge(sum(arg for arg in rest if isinstance(arg, int)))
        elif name == "sum" and any(isinstance(arg, list | tuple) for arg in rest):
            raise SecurityError("the filter 'sum' adds numbers only")
        result = function(*args, **kwargs)
        charge(len(result) if hasattr(result, "__len__") else 1)
        return result

    return bounded


_WRITING_FILTERS = {
    *("string", "trim", "upper", "lower", "title", "capitalize", "replace", "format", "indent"),
    *("join", "e", "escape", "forceescape", "safe", "striptags", "urlencode", "wordcount"),
    *("truncate", "center", "tojson"),
}


def _charge_writing(name: str, value: Any, rest: list[Any]) -> None:
    """Charges what a filter that turns its value into text is about to make."""
    written = weigh(value)
    if name == "join":
        charge(written * sum(weigh(arg) for arg in rest[:1]))
    elif name == "replace" and len(rest) >= 2:
        _charge_replace(str(value), rest[0], rest[1])
    elif name in ("indent", "center", "tojson"):
        width = max([arg if isinstance(arg, int) else weigh(arg) for arg in rest], default=0)
        charge(written * width if name != "center" else width)
    elif name == "format":
        _check_format(str(value), rest)
