"""A condition on the figures of a sequence: `mean_entropy < 3 and length > 64`.

It is parsed as a Python expression and every part that is not a comparison, `and`, `or`, `not`,
arithmetic, a figure's name or a number is refused. Nothing is evaluated by Python itself.
"""

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decant.storage.cli.diagnosis import did_you_mean

LONGEST = 2000
"""Characters of a condition; a deeper one could exhaust the parser."""
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Predicate:
    """A condition that was understood; `names` are the figures that it asks for."""

    def __init__(self, text: str, known: Collection[str], absent: str = "") -> None:
        """Parse a condition over the figures that are `known`.

        `absent` says, for figures that exist elsewhere, why this cache lacks them. Raises
        ValueError, with the part that is not understood.
        """
        self.text = text
        self._known, self._absent = known, absent
        if not text.isprintable():
            raise ValueError(f"--where {text!r} holds characters that cannot be printed")
        if len(text) > LONGEST:
            raise ValueError(f"--where has {len(text)} characters: at most {LONGEST} are read")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self.names: set[str] = set()
            is_truth = self._check(self._tree)
        except SyntaxError as error:
            at = f" at character {error.offset}" if error.offset else ""
            raise ValueError(f"--where {text!r} is not a condition: {error.msg}{at}") from None
        except (RecursionError, MemoryError):
            raise ValueError("--where is nested too deeply") from None
        if not is_truth:
            raise self._refusal(self._tree, "is a number, expected a comparison such as length > 9")

    def holds(self, figures: Mapping[str, NDArray[np.float64]]) -> NDArray[np.bool_]:
        """[S] where the condition is true; false where a figure that it names is not known."""
        if not self.names:
            count = len(next(iter(figures.values())))
            return np.full(count, bool(self._value(self._tree, figures)))
        known = np.logical_and.reduce([~np.isnan(figures[name]) for name in sorted(self.names)])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            truth: NDArray[np.bool_] = np.asarray(self._value(self._tree, figures), bool) & known
        return truth

    def _refusal(self, node: ast.AST, why: str) -> ValueError:
        part = ast.get_source_segment(self.text.strip(), node) or self.text
        return ValueError(f"--where: {part!r} {why}")

    def _check(self, node: ast.expr) -> bool:
        """Refuse what is not understood; gives whether the part is a truth, not a number."""
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    if not self._check(value):
                        raise self._refusal(value, "is a number where a comparison is expected")
                return True
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                if not self._check(operand):
                    raise self._refusal(operand, "is a number where a comparison is expected")
                return True
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self._check_number(operand)
                return False
            case ast.Compare(left=left, ops=ops, comparators=right):
                for kind in ops:
                    if type(kind) not in COMPARISONS:
                        raise self._refusal(node, "compares by other than < <= > >= == !=")
                for part in (left, *right):
                    self._check_number(part)
                return True
            case ast.BinOp(left=left, op=op, right=right_part) if type(op) in ARITHMETIC:
                self._check_number(left)
                self._check_number(right_part)
                return False
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                try:
                    float(value)
                except OverflowError:
                    raise self._refusal(node, "is beyond what a float holds") from None
                return False
            case ast.Name(id=name):
                self._check_name(name)
                return False
        raise self._refusal(
            node,
            "is not understood: a condition has figures, numbers, + - * /, < <= > >= == !=, "
            "and, or, not, and parentheses",
        )

    def _check_number(self, node: ast.expr) -> None:
        if self._check(node):
            raise self._refusal(node, "is a comparison where a number is expected")

    def _check_name(self, name: str) -> None:
        from decant.storage.edit.figures import FIGURES

        if name in self._known:
            self.names.add(name)
        elif name in FIGURES:
            raise ValueError(f"--where: this cache cannot give {name}: {self._absent}")
        else:
            meant = did_you_mean(name, list(FIGURES)) or f": there are {', '.join(FIGURES)}"
            raise ValueError(f"--where: {name!r} is not a figure of a sequence{meant}")

    def _value(self, node: ast.expr, figures: Mapping[str, NDArray[np.float64]]) -> Any:
        match node:
            case ast.BoolOp(op=op, values=values):
                every = isinstance(op, ast.And)
                join = np.logical_and if every else np.logical_or
                truth = self._value(values[0], figures)
                for value in values[1:]:
                    truth = join(truth, self._value(value, figures))
                return truth
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, figures)
                if isinstance(op, ast.Not):
                    return np.logical_not(value)
                return -value if isinstance(op, ast.USub) else value
            case ast.Compare(left=left, ops=ops, comparators=right):
                truth, before = True, self._value(left, figures)
                for kind, part in zip(ops, right, strict=True):
                    after = self._value(part, figures)
                    truth = np.logical_and(truth, COMPARISONS[type(kind)](before, after))
                    before = after
                return truth
            case ast.BinOp(left=left, op=op, right=right_part):
                a, b = self._value(left, figures), self._value(right_part, figures)
                return ARITHMETIC[type(op)](np.float64(a) if np.ndim(a) == 0 else a, b)
            case ast.Constant(value=int() | float() as value):
                return np.float64(value)
            case ast.Name(id=name):
                return figures[name]
        raise AssertionError(f"{node} was checked")
