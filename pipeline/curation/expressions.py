"""Evaluates conditions such as ``sharpness > q10 and language == 'en'`` on whole columns.

The syntax is a subset of Python's: column names, numbers, texts, ``and``, ``or``, ``not``,
comparisons (also chained), ``in`` and ``not in`` a list, ``+ - * /``, ``abs(x)``, ``top(column, share)``,
``missing(column)``, and ``q10``: the 10th percentile of the column that it is compared with (``q2_5``: 2.5). The
expression is parsed and evaluated by this module and never run as code.

A comparison with a missing value is neither true nor false, as in SQL. A sample is selected only if all conditions are
true.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.options import ConfigError

Column = npt.NDArray[Any]
"""(n,): float64 with NaN for missing values, or texts (object) with None."""
Mask = npt.NDArray[np.bool_]

_QUANTILE = re.compile(r"q(\d{1,2}(?:_\d+)?)")
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 10_000  # characters
_DEEPEST = 50


@dataclass(frozen=True)
class Threshold:
    """A quantile of a column: ``share`` of its values are at most (``top``: at least) this value."""

    column: str
    share: float
    top: bool = False

    @property
    def name(self) -> str:
        """Name of the threshold in plans."""
        return f"{'top' if self.top else 'q'}({self.column}, {self.share:g})"

    def rank(self, count: int) -> int:
        """Its index among ``count`` values in ascending order."""
        taken = min(count, max(1, math.ceil(self.share * count - 1e-9)))
        return count - taken if self.top else taken - 1


@dataclass(frozen=True)
class Condition:
    """One of several conditions that must all hold."""

    text: str
    node: ast.expr = field(repr=False)
    columns: tuple[str, ...]
    thresholds: tuple[Threshold, ...]

    def holds(self, columns: Mapping[str, Column], values: Mapping[str, float]) -> Mask:
        """Whether the condition is true for each sample, (n,).

        Args:
            columns: the columns that the condition uses, by name.
            values: values of the thresholds, by name.

        Raises:
            ConfigError: a text is compared with a number.
        """
        count = len(next(iter(columns.values()))) if columns else 0
        return np.broadcast_to(_Walk(columns, values, self.text).truth(self.node)[0], (count,))


def parse(text: str) -> list[Condition]:
    """Split ``text`` at the outermost ``and`` into conditions that must all hold.

    Raises:
        ConfigError: the expression is invalid.
    """
    if not text.strip():
        return []
    if len(text) > _LONGEST:
        raise ConfigError(f"where=: longer than {_LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(f"where={text}: not a valid expression: {getattr(error, 'msg', error)}") from None
    nodes = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    found = []
    for node in nodes:
        check = _Check(text)
        if not check.visit(node, 0):
            raise ConfigError(
                f"where={text}: {ast.unparse(node)} is a value, not a condition: compare it with something"
            )
        if not check.columns:
            raise ConfigError(f"where={text}: {ast.unparse(node)} names no column")
        found.append(Condition(ast.unparse(node), node, tuple(check.columns), tuple(check.thresholds)))
    return found


class _Check:
    """Validates an expression tree before any data are read, and collects its columns and thresholds."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.columns: dict[str, None] = {}
        self.thresholds: dict[Threshold, None] = {}

    def visit(self, node: ast.AST, depth: int) -> bool:
        """Whether ``node`` is a condition, not a number or a text."""
        if depth > _DEEPEST:
            raise ConfigError(f"where=: nested more than {_DEEPEST} levels deep")
        match node:
            case ast.BoolOp(values=values):
                self._conditions(values, depth)
                return True
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._conditions([operand], depth)
                return True
            case ast.Compare(left=left, ops=ops, comparators=others):
                self._compared([left, *others], ops, depth)
                return True
            case ast.Call(func=ast.Name(id="missing"), args=[ast.Name(id=name)], keywords=[]):
                self.columns[name] = None
                return True
            case ast.Call(func=ast.Name(id="top"), args=[ast.Name(id=name), ast.Constant(value=share)], keywords=[]):
                if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                    raise self._wrong(node, "the share must be more than 0, at most 1")
                self.columns[name] = None
                self.thresholds[Threshold(name, float(share), top=True)] = None
                return True
            case ast.Call(func=ast.Name(id="abs"), args=[operand], keywords=[]):
                self._values([operand], depth)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                self._values([operand], depth)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                self._values([left, right], depth)
            case ast.Name(id=name):
                if _QUANTILE.fullmatch(name):
                    raise self._wrong(node, "compare a percentile with a column, as sharpness > q10")
                self.columns[name] = None
            case ast.Constant(value=str() | int() | float() as value) if not isinstance(value, bool):
                pass
            case _:
                raise self._wrong(node, "is not allowed here")
        return False

    def _compared(self, sides: list[ast.expr], ops: list[ast.cmpop], depth: int) -> None:
        for number, op in enumerate(ops):
            if isinstance(op, ast.In | ast.NotIn):
                listed = sides[number + 1]
                if not isinstance(listed, ast.Tuple | ast.List | ast.Set) or not all(
                    isinstance(item, ast.Constant) and isinstance(item.value, str | int | float) for item in listed.elts
                ):
                    raise self._wrong(listed, "write a list of texts or numbers, as ['en', 'de']")
            elif type(op) not in _COMPARE:
                raise self._wrong(sides[number], "is compared in a way that is not allowed")
        for number, side in enumerate(sides):
            if number and isinstance(ops[number - 1], ast.In | ast.NotIn):
                continue
            share = quantile_of(side)
            if share is None:
                self._values([side], depth)
                continue
            near = [sides[at] for at in (number - 1, number + 1) if 0 <= at < len(sides)]
            names = {one.id for one in near if isinstance(one, ast.Name) and quantile_of(one) is None}
            if len(names) != 1 or not all(isinstance(one, ast.Name) for one in near):
                raise self._wrong(side, "compare a percentile with one column, as sharpness > q10")
            self.thresholds[Threshold(names.pop(), share)] = None

    def _conditions(self, nodes: list[ast.expr], depth: int) -> None:
        for node in nodes:
            if not self.visit(node, depth + 1):
                raise self._wrong(node, "is a value, not a condition")

    def _values(self, nodes: list[ast.expr], depth: int) -> None:
        for node in nodes:
            if self.visit(node, depth + 1):
                raise self._wrong(node, "is a condition, not a value")

    def _wrong(self, node: ast.AST, why: str) -> ConfigError:
        return ConfigError(f"where={self._text}: {ast.unparse(node)}: {why}")


def quantile_of(node: ast.expr) -> float | None:
    """The share of a percentile such as ``q10``; None for other nodes."""
    match = _QUANTILE.fullmatch(node.id) if isinstance(node, ast.Name) else None
    return float(match[1].replace("_", ".")) / 100 if match else None


Truth = tuple[Any, Any]
"""Masks of where a condition is true and where it is false; both are False for missing values."""


class _Walk:
    def __init__(self, columns: Mapping[str, Column], values: Mapping[str, float], text: str) -> None:
        self._columns = columns
        self._values = values
        self._text = text

    def truth(self, node: ast.AST) -> Truth:
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.truth(value) for value in values]
                yes, no = ([part[side] for part in parts] for side in (0, 1))
                every, some = np.logical_and.reduce, np.logical_or.reduce
                return (every(yes), some(no)) if isinstance(op, ast.And) else (some(yes), every(no))
            case ast.UnaryOp(operand=operand):
                yes, no = self.truth(operand)
                return no, yes
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                parts = [self._pair(sides[at], op, sides[at + 1]) for at, op in enumerate(ops)]
                return np.logical_and.reduce([p[0] for p in parts]), np.logical_or.reduce([p[1] for p in parts])
            case ast.Call(func=ast.Name(id="missing"), args=[ast.Name(id=name)]):
                gone = ~_known(self._columns[name])
                return gone, ~gone
            case ast.Call(args=[ast.Name(id=name), ast.Constant(value=share)]):
                limit = self._values[Threshold(name, float(share), top=True).name]  # type: ignore[arg-type]
                return self._judged(self._columns[name], ast.GtE(), np.float64(limit))
        raise AssertionError(node)

    def _pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Truth:
        if isinstance(op, ast.In | ast.NotIn):
            value = self.value(left)
            listed = [item.value for item in right.elts]  # type: ignore[attr-defined]
            if any(isinstance(item, str) != (value.dtype == object) for item in listed):
                raise ConfigError(f"where={self._text}: compares a text with a number")
            known = _known(value)
            texts = np.where(known, value, "").astype(str) if value.dtype == object else value
            inside = np.isin(texts, listed)
            yes, no = inside & known, ~inside & known
            return (yes, no) if isinstance(op, ast.In) else (no, yes)
        sides = []
        for side, other in ((left, right), (right, left)):
            share = quantile_of(side)
            sides.append(
                self.value(side) if share is None else np.float64(self._values[Threshold(other.id, share).name])  # type: ignore[attr-defined]
            )
        return self._judged(sides[0], op, sides[1])

    def _judged(self, left: Any, op: ast.cmpop, right: Any) -> Truth:
        left, right = np.asarray(left), np.asarray(right)
        known = _known(left) & _known(right)
        if (left.dtype == object) != (right.dtype == object):
            raise ConfigError(f"where={self._text}: compares a text with a number")
        if left.dtype == object:
            left, right = (np.where(_known(side), side, "") for side in (left, right))
        said = _COMPARE[type(op)](left, right).astype(bool)
        return said & known, ~said & known

    def value(self, node: ast.expr) -> npt.NDArray[Any]:
        match node:
            case ast.Name(id=name):
                return self._columns[name]
            case ast.Constant(value=str() as text):
                return np.array(text, object)
            case ast.Constant(value=number):
                return np.array(number, np.float64)
            case ast.UnaryOp(operand=operand):
                return -self._number(operand)
            case ast.Call(args=[operand]):
                found: npt.NDArray[Any] = np.abs(self._number(operand))
                return found
            case ast.BinOp(left=left, op=op, right=right):
                with np.errstate(all="ignore"):
                    result = np.asarray(_ARITHMETIC[type(op)](self._number(left), self._number(right)))
                return np.where(np.isfinite(result), result, np.nan)
        raise AssertionError(node)

    def _number(self, node: ast.expr) -> npt.NDArray[Any]:
        value = self.value(node)
        if value.dtype == object:
            raise ConfigError(f"where={self._text}: does arithmetic with a text")
        return value


def _known(value: npt.NDArray[Any]) -> Any:
    return np.array(value != None) if value.dtype == object else ~np.isnan(value)  # noqa: E711 - elementwise
