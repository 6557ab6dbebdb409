"""A jinja2 environment in which an untrusted chat template can waste neither the machine's time nor its memory.

jinja2's sandbox keeps a template away from Python's internals, but not from `"x" * 10**10` or three nested loops of
100,000. Here the parsed template is rewritten so that what it builds is weighed and what it repeats is counted against
a `Budget`; what could be large before it can be weighed (repetition, replacement, joining) is estimated first. Of
filters and methods, only those that chat templates use are there.
"""

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS, do_indent, do_join, do_replace, do_round
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from paperworks.data.chat.budget import allow, counted, current, stepped, weighed, weight

_PLAIN_FILTERS = (
    *(
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "int",
        "items",
        "last",
    ),
    *(
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "reverse",
        "safe",
        "select",
        "selectattr",
    ),
    *("sort", "string", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)

_TEXT_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdecimal"),
    *("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_TEXT_METHODS),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(),
    float: frozenset(),
}
_WIDEST_INDENT = 16
_MOST_BITS = 1024  # of a whole number
_WIDE = re.compile(r"\*|\d{4}")  # a width or precision of thousands, or one taken from the arguments


class ChatSandbox(ImmutableSandboxedEnvironment):
    """Compiles chat templates as transformers does (same syntax, filters and functions), with every limit in force."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants folded while compiling would escape the limits
            finalize=_written,
            extensions=[LoopControlExtension, _Generation],
        )
        own: dict[str, Callable[..., Any]] = {
            "tojson": _tojson,
            "join": _join,
            "replace": _replace,
            "indent": _indent,
            "round": _round,
            "format": _format,
        }
        filters = {name: FILTERS[name] for name in _PLAIN_FILTERS} | own
        self.filters = {name: _metered(function) for name, function in filters.items()}
        self.filters |= {"\0weighed": weighed, "\0stepped": stepped, "\0spent": _spent, "\0concatenated": _concatenated}
        self.globals = {
            "range": self.globals["range"],  # at most 100,000, by jinja2
            "namespace": _SafeNamespace,
            "dict": _dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meters().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow what jinja2's sandbox allows, and of plain values only the methods listed above."""
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Fail at once rather than when the value is used."""
        raise SecurityError(f"the attribute {attribute!r} of {type(obj).__name__} is not for templates")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Let text be formatted when its fields cannot blow up; `format_map` is not for templates."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if value.__name__ != "format":
            raise SecurityError("str.format_map is not for templates")

        def formatted(*args: Any, **kwargs: Any) -> str:
            fields = [spec or "" for _, field, spec, _ in Formatter().parse(value.__self__) if field is not None]
            if any("{" in spec or _WIDE.search(spec) for spec in fields):
                raise SecurityError("a format with a computed or very large width is not for templates")
            allow(len(value.__self__) + len(fields) * (1000 + weight((args, kwargs))))
            return wrapped(*args, **kwargs)

        return formatted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Estimate an operation's result before computing it."""
        current().step()
        if operator == "%" and isinstance(left, str):
            return weighed(_formatted(left, right))
        if operator == "+":
            allow(weight(left) + weight(right))
        elif operator == "*":
            for times, other in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(other, str | list | tuple):
                    allow(times * (weight(other) + 1))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise SecurityError(f"whole numbers of more than {_MOST_BITS} bits are not for templates")
        return weighed(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count a call, estimate the methods whose result can be much larger than what they are given, weigh it."""
        current().step()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            method = getattr(__obj, "__name__", "")
            if method == "replace":
                _allow_replacement(text, *args[:2])
            elif method == "join":
                args = (list(counted(args[0])), *args[1:])
                allow(weight(args[0]) + len(text) * len(args[0]))
        return _measured(super().call(__context, __obj, *args, **kwargs))


class _Meters(NodeTransformer):
    """Rewrites a parsed template: loops and comparisons count steps, texts and containers it builds are weighed."""

    @staticmethod
    def _through(node: nodes.Expr, filter_name: str) -> nodes.Filter:
        return nodes.Filter(node, filter_name, [], [], None, None, lineno=node.lineno)

    def _statement(self, value: object, filter_name: str, line: int) -> nodes.ExprStmt:
        return nodes.ExprStmt(self._through(nodes.Const(value, lineno=line), filter_name), lineno=line)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body = [self._statement(None, "\0stepped", node.lineno), *node.body]
        if node.test is not None:
            every = self._through(nodes.Const(True, lineno=node.lineno), "\0stepped")
            node.test = nodes.And(every, node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        size = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        return [self._statement(size, "\0spent", node.lineno), node] if size else [node]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno), "\0concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Filter:
        self.generic_visit(node)
        return self._through(node, "\0stepped")

    def _container(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        stored: nodes.Expr = node
        return stored if getattr(node, "ctx", "load") == "store" else self._through(node, "\0weighed")

    visit_List = visit_Tuple = visit_Dict = _container


class _Generation(Extension):
    """The {% generation %} tag, which marks the assistant's part for training: its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (the attribute jinja2 reads)

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, with names of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _SafeNamespace(Namespace):
    """jinja2's namespace without names that begin with an underscore, which could stand in for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r} is not for templates, as it begins with an underscore")


@pass_context
def _written(context: Context, value: Any) -> Any:
    """Count what an expression writes into the text."""
    del context
    current().step()
    size = weight(value)
    allow(size)
    current().spend(size)
    return value


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Count a filter's use and weigh its result; `wraps` keeps the mark of what jinja2 passes to it first."""

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        current().step()
        return _measured(function(*args, **kwargs))

    return metered


def _measured(result: Any) -> Any:
    return counted(result) if isinstance(result, Iterator) else weighed(result)


def _spent(size: int) -> None:
    current().spend(size)


def _concatenated(parts: list[Any]) -> str:
    allow(weight(parts))
    return weighed("".join(map(str, parts)))


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if not isinstance(format, str) or len(format) > 200 or _WIDE.search(format):
        raise SecurityError("strftime_now takes a short date format")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does: no escapes for HTML, characters as they are; counted while it is written."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > _WIDEST_INDENT:
        raise SecurityError(f"tojson takes an indent of at most {_WIDEST_INDENT}")
    allow(weight(value))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=True
    )
    pieces = []
    for piece in encoder.iterencode(value):
        current().spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)


@pass_eval_context
def _join(eval_ctx: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    parts = list(counted(value))
    allow(weight(parts) + weight(d) * len(parts))
    out: str = do_join(eval_ctx, parts, d, attribute)
    return out


def _allow_replacement(text: Any, old: Any = "", new: Any = "") -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        allow(len(text) + text.count(old) * len(new))
    else:
        allow(weight(text) * (1 + weight(new)))


@pass_eval_context
def _replace(eval_ctx: EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    _allow_replacement(s, old, new)
    return do_replace(eval_ctx, s, old, new, count)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    step = len(width) if isinstance(width, str) else width
    allow(weight(s) + str(s).count("\n") * step + step)
    return do_indent(s, width, first, blank)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if not isinstance(precision, int) or abs(precision) > 100:
        raise SecurityError("round takes a precision of at most 100 digits")
    return do_round(value, precision, method)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    return _formatted(str(value), kwargs or args)


def _formatted(template: str, values: Any) -> str:
    """Apply `%` formatting when its fields cannot blow up."""
    if _WIDE.search(template):
        raise SecurityError("a format with a computed or very large width is not for templates")
    allow(len(template) + template.count("%") * (1000 + weight(values)))
    out: str = template % values
    return out
