"""`learning_rate < 0.01 and batch_size == 64`: rows by a condition that cannot run code.

Python's own parser reads the condition, everything but comparisons of columns with plain values is
refused, and pandas sees a condition over names that were made here.
"""

from __future__ import annotations

import ast
import re
import warnings

import pandas as pd

from visiontuner.errors import UserMistake
from visiontuner.evaluation.compare import known_column

_LONGEST = 2000
_DEEPEST = 50
_PLACEHOLDER = "column_{}"


def where(frame: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows for which a condition holds; a gap fulfils no comparison but `!=`.

    Args:
        frame: any frame; columns whose names are no Python names are put in backticks.
        condition: columns and values joined by `<`, `<=`, `>`, `>=`, `==`, `!=`, `in [..]`,
            `not in [..]`, `and`, `or`, `not` and parentheses.

    Raises:
        UserMistake: it is something else, names no column, or compares text with a number.
    """
    checked = _Checked(frame, condition)
    plain = frame.set_axis([_PLACEHOLDER.format(i) for i in range(frame.shape[1])], axis=1)
    plain = plain[[name for name in plain.columns if name in checked.used]]
    plain = plain.apply(_comparable)
    try:
        kept = plain.query(checked.text, engine="python", local_dict={}, global_dict={})
    except (TypeError, ValueError, SyntaxError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserMistake(
            f"--where {condition!r} compares what does not compare ({reason}); "
            "put text in quotes, and numbers not."
        ) from None
    return frame.loc[kept.index]


def _comparable(values: pd.Series) -> pd.Series:
    if isinstance(values.dtype, pd.DatetimeTZDtype):
        # A time in a condition has no zone: it is UTC.
        return pd.Series(values.dt.tz_localize(None))
    # An integer column with gaps would answer "unknown", and `not` would keep that.
    return values.astype("float64") if isinstance(values.dtype, pd.Int64Dtype) else values


class _Checked:
    """A condition as pandas may have it: `text` over placeholders, `used` names them."""

    def __init__(self, frame: pd.DataFrame, condition: str) -> None:
        self._frame, self._condition = frame, condition
        self._quoted: dict[str, str] = {}
        self.used: set[str] = set()
        if len(condition) > _LONGEST:
            raise UserMistake(f"--where is longer than {_LONGEST:,} characters; shorten it.")
        text = re.sub(r"`([^`\n]+)`", self._take_quoted, condition)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # '\d' in a text is no news for anybody
                tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._refuse("is no condition") from None
        self.text = ast.unparse(self._joined(tree.body, depth=0))

    def _take_quoted(self, match: re.Match[str]) -> str:
        name = f"_quoted_{len(self._quoted)}"
        self._quoted[name] = match.group(1)
        return name

    def _joined(self, node: ast.expr, depth: int) -> ast.expr:
        if depth > _DEEPEST:
            raise self._refuse("is nested too deeply")
        if isinstance(node, ast.BoolOp):
            values = [self._joined(value, depth + 1) for value in node.values]
            return ast.BoolOp(op=node.op, values=values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ast.UnaryOp(op=node.op, operand=self._joined(node.operand, depth + 1))
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        raise self._refuse("holds more than comparisons")

    def _comparison(self, node: ast.Compare) -> ast.expr:
        sides = [node.left, *node.comparators]
        members = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
        if members and (len(sides) > 2 or not isinstance(sides[1], ast.List | ast.Tuple)):
            raise self._refuse("needs a list after `in`, as in batch_size in [32, 64]")
        if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            raise self._refuse("holds `is`; use == or !=")
        if not any(isinstance(side, ast.Name) for side in (sides[:1] if members else sides)):
            raise self._refuse("compares without naming a column")
        left, *others = [self._side(side) for side in sides]
        return ast.Compare(left=left, ops=node.ops, comparators=others)

    def _side(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name):
            return self._column(node.id)
        if isinstance(node, ast.List | ast.Tuple):
            return ast.List(elts=[self._value(item) for item in node.elts], ctx=ast.Load())
        return self._value(node)

    def _column(self, written: str) -> ast.Name:
        name = known_column(self._frame, self._quoted.get(written, written))
        placeholder = _PLACEHOLDER.format(list(self._frame.columns).index(name))
        self.used.add(placeholder)
        return ast.Name(id=placeholder, ctx=ast.Load())

    def _value(self, node: ast.expr) -> ast.expr:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            sign, node = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                raise self._refuse("puts a sign before text")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return ast.Constant(value=sign * node.value)
        raise self._refuse("compares with something that is neither a column nor a plain value")

    def _refuse(self, why: str) -> UserMistake:
        return UserMistake(
            f"--where {self._condition[:80]!r} {why}; write it like "
            "\"learning_rate < 0.01 and optimizer == 'adamw'\", odd names in backticks."
        )
