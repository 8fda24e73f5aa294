"""A Jinja sandbox in which every program ends soon and takes little memory.

A chat template comes with a checkpoint, perhaps a stranger's. Jinja's sandbox keeps it from files
and from Python, but not from looping for ever or from filling the memory. Here every turn of a
loop, call of a macro or filter, and everything that is made counts. The limits grow with the
messages, so that no honest template meets them. They count steps, not seconds, and so the same
messages are refused on every machine; only a program that still takes too long stops by the clock.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_STEPS = 1_000_000
_SIZE = 64 << 20
_SECONDS = 60
_SIZE_PER_INPUT = 200
_TURN = 4  # what a turn of a loop or a call of a macro counts as, in other steps
_ITEM = 8  # what an entry of a list counts as, in characters
_LARGEST_NUMBER = 100_000  # as Jinja's sandbox has it for `range`
_INTEGER_BITS = 4096
# All that do not make a long text of a short one; `join` and `replace` are counted beforehand.
_TEXT_METHODS = {name for name in dir(str) if not name.startswith("_")} - {
    *("center", "encode", "expandtabs", "format_map", "ljust", "maketrans", "rjust"),
    *("translate", "zfill"),
}
_STEP = " step"  # no template can use this name
_WEIGHED = frozenset(["join", "pprint", "string", "sum", "tojson"])
_OTHER_METHODS = {dict: {"get", "items", "keys", "values"}, list: {"count", "index"}}
_WIDE_FORMAT = re.compile(r"[%{:][^%{}a-zA-Z]*(?:\d{4,}|\*)|\{[^{}]*\{")


class Budget:
    """What a render may still do, for an input of `size` characters."""

    def __init__(self, size: int):
        self.steps = _STEPS + size
        self.size = _SIZE + _SIZE_PER_INPUT * size
        self._end = time.monotonic() + _SECONDS

    def take(self, *, steps: int = 1, size: int = 0) -> None:
        """Count steps and characters made. SecurityError if there were too many."""
        self.steps -= steps
        self.size -= size
        if self.steps < 0:
            raise SecurityError("it takes too many steps; it may loop for ever")
        if self.size < 0:
            raise SecurityError("it makes too much text")

    def step(self, size: int) -> None:
        """Count a turn of a loop. TimeoutError if the program has run for too long."""
        self.take(steps=_TURN, size=size)
        if time.monotonic() > self._end:
            raise TimeoutError(f"a chat template takes longer than {_SECONDS} s for one chat")

    def weigh(self, value: Any) -> int:
        """The characters that `value` takes when it is written. SecurityError if too many."""
        total, stack = 0, [value]
        for visited in itertools.count(1):
            if not stack:
                self.take(steps=visited)
                return total
            item = stack.pop()
            inside = _inside(item)
            total += len(item) if isinstance(item, str) else _ITEM * (1 + len(inside))
            if total > self.size or visited > self.steps:
                raise SecurityError("it makes too much text")
            stack += inside
        raise AssertionError("unreachable")


def weight(value: Any) -> int:
    """About the characters of a message or of a list of them, as JSON would write it."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        inside = _inside(item)
        total += len(item) if isinstance(item, str) else _ITEM * (1 + len(inside))
        stack += inside
    return total


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):
        raise SecurityError("a namespace cannot be written")
    return list(value) if isinstance(value, list | tuple | set) else []


_budget: ContextVar[Budget] = ContextVar("budget of the render under way")


@contextlib.contextmanager
def bounded(size: int) -> Iterator[Budget]:
    """While the block runs, templates of this thread use one budget, for an input of `size`."""
    token = _budget.set(Budget(size))
    try:
        yield _budget.get()
    finally:
        _budget.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Programs are compiled and rendered inside `bounded`, or fail with LookupError.

    It has no `random` and no `lipsum`: the same messages give the same text.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any):
        # Not optimised: that would work out counts once, when the template is read.
        super().__init__(finalize=_written, optimized=False, **options)
        del self.filters["random"], self.globals["lipsum"]
        self.tests[_STEP] = _stepped
        self.filters = {name: _bounded_filter(name, f) for name, f in self.filters.items()}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, or put it in the place of Jinja's own."""
        self.filters[name] = _bounded_filter(name, function)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As in Jinja's sandbox; of texts and numbers only what cannot make much of little."""
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, int | float | bytes):
            return False
        for kind, methods in _OTHER_METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `obj` for a template."""
        if isinstance(obj, Undefined):
            return super().call(context, obj, *args, **kwargs)  # which says what is missing
        name = getattr(obj, "__name__", "")
        value = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if name == "join" and args:
            args = (_held(args[0]), *args[1:])
            _take(args[0], name, [value])
        else:
            _take(value, name, [*args, *kwargs.values()])
        return _made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """left + right, left * right, left ** right or left % right."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _budget.get().take(size=len(left) + len(right))
        else:
            _require_bounded(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def concatenated(self, *parts: Any) -> str:
        """`a ~ b`."""
        return "".join([str(_written(part)) for part in parts])

    def literal(self, value: Any) -> Any:
        """A list, tuple or dict that the template writes out."""
        _budget.get().weigh(value)
        return value

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        return _made(value[start:stop:step])

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counted().visit(source), *args, **kwargs)


class _Counted(NodeTransformer):
    """Puts a count into every loop and macro, and a check where a value may grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(_data(node))))
        if node.test is not None:
            node.test = nodes.And(_step(0), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(_data(node))))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", *node.nodes)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if constant else _call("literal", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("cut", node.node, *(end or nodes.Const(None) for end in ends))


def _step(size: int) -> nodes.Test:
    """Counts a turn of a loop that writes up to `size` characters. It is true."""
    return nodes.Test(nodes.Const(size), _STEP, [], [], None, None)


def _stepped(size: int) -> bool:
    _budget.get().step(size)
    return True


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), [*arguments], [], None, None)


def _data(node: nodes.Node) -> int:
    """The number of characters that are written out in a node."""
    return sum(len(text.data) for text in node.find_all(nodes.TemplateData))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded_filter(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            value = _held(args[first]) if name in _WEIGHED else _made(args[first])
            args = (*args[:first], value, *args[first + 1 :])
            _take(value, name, [*args[first + 1 :], *kwargs.values()])
        return _made(function(*args, **kwargs))

    return bounded_filter


def _held(values: Any) -> Any:
    """`values` as a list if they come one by one, to see how much they are."""
    return list(_made(values)) if isinstance(values, Iterator) else values


def _counting(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        _budget.get().take(size=_ITEM)  # and one step
        yield value


def _take(value: Any, name: str, options: list[Any]) -> None:
    """Count a filter on `value`, or a call of its method, before it runs."""
    budget = _budget.get()
    budget.take(steps=1 + (_length(value) >> 6))
    if any(isinstance(n, int) and abs(n) > _LARGEST_NUMBER for n in options):
        raise SecurityError(f"{name} is given a number above {_LARGEST_NUMBER}")
    weight = budget.weigh(value) if name in _WEIGHED else 0
    if name == "replace" and isinstance(value, str) and len(options) > 1:
        old, new = str(options[0]), str(options[1])
        growth = max(0, len(new) - len(old)) if old else len(new)
        budget.take(steps=0, size=growth * (value.count(old)))
    elif name == "join":
        budget.take(steps=0, size=weight + _longest(options) * _length(value))
    elif name == "format" and isinstance(value, str):
        _require_narrow(value, options)
    elif name in ("indent", "tojson", "wordwrap"):
        lines = value.count("\n") + 1 if name == "indent" and isinstance(value, str) else weight
        budget.take(steps=0, size=(_longest(options) if options else 0) * lines)
    elif name == "strftime_now" and any(_WIDE_FORMAT.search(text) for text in _texts(options)):
        raise SecurityError("a date's format asks for too much")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _texts(values: list[Any]) -> list[str]:
    flat = [i for value in values for i in (value if isinstance(value, tuple) else (value,))]
    return [text for text in flat if isinstance(text, str)]


def _longest(options: list[Any]) -> int:
    numbers = (n for n in options if isinstance(n, int))
    return max([0, *map(len, _texts(options)), *numbers])


def _made(value: Any) -> Any:
    """Count a value that a call has made."""
    budget = _budget.get()
    if isinstance(value, str):
        budget.take(steps=0, size=len(value))
    elif isinstance(value, list | tuple | dict):
        budget.take(steps=0, size=_ITEM * len(value))
    elif isinstance(value, Iterator):
        return _counting(value)
    return value


def _written(value: Any) -> Any:
    """Count a value that the template writes."""
    size = len(value) if isinstance(value, str) else _budget.get().weigh(value)
    _budget.get().take(steps=0, size=size)
    return value


def _require_bounded(operator: str, left: Any, right: Any) -> None:
    """Count the result of an operator before it is made. SecurityError if it would be too large."""
    budget = _budget.get()
    if operator == "%" and isinstance(left, str):
        _require_narrow(left, list(right) if isinstance(right, tuple) else [right])
    elif isinstance(left, int) and isinstance(right, int):
        bits = [number.bit_length() for number in (left, right)]
        if (bits[0] * right if operator == "**" else sum(bits)) > _INTEGER_BITS:
            raise SecurityError("a number has too many digits")
    elif operator in "+*":
        unit = 1 if isinstance(left, str) or isinstance(right, str) else _ITEM
        numbers = [abs(n) for n in (left, right) if isinstance(n, int)]
        length = _length(left) + _length(right)
        budget.take(size=unit * length * (numbers[0] if operator == "*" and numbers else 1))


def _require_narrow(pattern: str, values: list[Any]) -> None:
    """SecurityError if a format would make much of little."""
    if _WIDE_FORMAT.search(pattern):
        raise SecurityError("a format asks for too much")
    fields = pattern.count("%") + pattern.count("{")
    _budget.get().take(size=fields * sum(_budget.get().weigh(value) for value in values))
