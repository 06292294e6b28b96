"""Runs, searches and networks side by side: summaries in, pandas tables out. No MLflow."""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from visiontuner.errors import UserMistake
from visiontuner.evaluation.intervals import Interval
from visiontuner.journal import SearchRecord, TrialRecord
from visiontuner.text import csv_row, shown

# Tables of runs as CSV, Markdown and JSON, and one cell as a person reads it.


_MARKDOWN = re.compile(r"([\\`*\[\]|~!])")
_LONGEST_CELL = 60


def to_csv(frame: pd.DataFrame) -> str:
    """Every value in full, with a header; see `text.csv_row`."""
    columns = [
        [value if isinstance(value, float) else _plain(value) for value in frame[name]]
        for name in frame.columns
    ]
    return csv_row(frame.columns) + "".join(map(csv_row, zip(*columns, strict=True)))


def to_json(frame: pd.DataFrame) -> str:
    """A list of objects; what is missing or not finite is null, times are ISO 8601 in UTC."""
    columns = {name: [_plain(value) for value in frame[name]] for name in frame.columns}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return json.dumps(records, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(frame: pd.DataFrame) -> str:
    """A table as GitHub shows it, values as in the terminal; nothing in them acts as markup."""
    aligned = ["---" if _is_text(frame[name]) else "---:" for name in frame.columns]
    rows = [
        [_unmarked(cell(value, name)) for name, value in zip(frame.columns, row, strict=True)]
        for row in frame.itertuples(index=False, name=None)
    ]
    lines = [[_unmarked(cell(name, "")) for name in frame.columns], aligned, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: object, column: str) -> str:
    """One value in a few characters: no control characters, no more digits than they are worth."""
    if value is None or value is pd.NaT or value is pd.NA:
        return "–"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return _decimal(value, column)
    text = shown(str(value), keep="").strip()
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"


def _decimal(value: float, column: str) -> str:
    if math.isnan(value):
        return "–"
    if column == "seconds":
        return f"{value:,.1f}"
    if column.startswith(("best_", "validation_", "test_", "train_")) and 1e-3 <= abs(value) < 1e3:
        return f"{value:.4f}"
    return f"{value:.4g}"


def _is_text(column: pd.Series) -> bool:
    return not (
        pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column)
    )


def _unmarked(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def _plain(value: Any) -> object:
    if value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str) else int(value)


# Runs side by side: summaries of runs in, a pandas table out. No files, no MLflow.
#
# A run is one trial of a search or a run of any other tool. Rows keep the order in which runs were
# given until `sort`; the index of a row is the run's position in that order, through all of these
# functions.


Mode = Literal["min", "max"]

IN_ORDER = ("completed", "stopped_early", "finished")
"""States of runs that may be called best; `finished` is what MLflow says of other tools' runs."""
WITHOUT_RESULT = ("failed", "interrupted", "killed")

_FRONT = ("run", "search", "state")
_BACK = ("best_epoch", "epochs", "seconds", "findings", "reason", "started", "run_id", "trial_id")
_LOWER_IS_BETTER = {"loss", "error", "nll", "ece", "mae", "mse", "rmse", "perplexity", "seconds"}
_NUMBER = re.compile(r"[+-]?(\d{1,300}(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", re.I | re.A)
# They differ between any two searches and explain nothing.
_UNINFORMATIVE = ("experiment.name", "search.", "data.sha256")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a table says of one run; None and empty where nobody recorded it.

    `started`, `ended` and `search_started` are seconds since the epoch. `metrics` holds last
    values, `best_value` the objective at the best epoch. `params` of a trial hold what was searched
    under plain names and the settings of its search under dotted ones.
    """

    run: str
    state: str
    search: str = ""
    params: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    objective: str | None = None
    best_value: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    started: float | None = None
    ended: float | None = None
    search_started: float | None = None
    findings: tuple[str, ...] = ()
    reason: str = ""
    run_id: str = ""
    trial_id: str = ""
    search_id: str = ""
    data_digest: str = ""

    @property
    def seconds(self) -> float | None:
        if self.started is None or self.ended is None:
            return None
        return max(0.0, self.ended - self.started)


def mode_of(metric: str) -> Mode:
    """Whether less or more of a metric is better, by the words in its name."""
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    return "min" if words & _LOWER_IS_BETTER else "max"


def table(runs: Sequence[RunSummary]) -> pd.DataFrame:
    """One row a run: who it is, its parameters, its best value, then every metric it holds.

    Columns: `run`, `search`, `state`; parameters; `best_<objective>`, where the runs say what they
    optimised (most of them, if they differ); `best_epoch`, `epochs`, `seconds`, `findings`,
    `reason`, `started` (UTC), `run_id`, `trial_id`; metrics at their last epoch. A parameter whose
    values are all numbers is a number. A name that is taken gets `param.` or `metric.` before it.

    `frame.attrs` holds `objective` (or None), `score` (its column or None), `params` and `metrics`
    (columns).
    """
    objective = _common_objective(runs)
    score = f"best_{objective}" if objective else None
    taken = {*_FRONT, *_BACK, *([score] if score else [])}
    params = _columns((run.params for run in runs), taken, "param")
    taken |= set(params.values())
    # best_<objective> is the score's own column.
    metrics = _columns(({k: 0 for k in run.metrics if k != score} for run in runs), taken, "metric")
    data: dict[str, pd.Series] = {
        name: _text([getattr(run, name) for run in runs]) for name in _FRONT
    }
    plain = [name for name in params if "." not in name]
    for name in (*plain, *(name for name in params if name not in plain)):
        data[params[name]] = _series([run.params.get(name) for run in runs])
    if objective and score:
        data[score] = _series([_score(run, objective) for run in runs], numbers=True)
    data |= _back(runs)
    for name, column in sorted(metrics.items()):
        data[column] = _series([_finite(run.metrics.get(name)) for run in runs], numbers=True)
    frame = pd.DataFrame(data)
    frame.attrs = {
        "objective": objective,
        "score": score,
        "params": list(params.values()),
        "metrics": list(metrics.values()),
    }
    return frame


def sort(frame: pd.DataFrame, by: str | None = None, *, reverse: bool = False) -> pd.DataFrame:
    """Best first by the score or a metric, smallest first by anything else; gaps last.

    Args:
        frame: from `table`.
        by: a column; None means the score, or the newest first where there is none.
        reverse: the other way round; gaps stay last.

    Raises:
        UserMistake: there is no such column.
    """
    name = known_column(frame, by) if by else frame.attrs.get("score") or "started"
    ascending = name != "started"
    if name in (*frame.attrs.get("metrics", ()), frame.attrs.get("score")):
        ascending = mode_of(name) == "min"
    values = frame[name]
    if not pd.api.types.is_numeric_dtype(values) and name != "started":
        values = values.astype("string").mask(lambda text: text == "")
    order = values.sort_values(
        ascending=ascending != reverse, kind="stable", na_position="last"
    ).index
    return frame.loc[order]


def best_row(frame: pd.DataFrame) -> int | None:
    """The index of the best run that ended in order; the first of equals in the frame's order."""
    score = frame.attrs.get("score")
    if score is None or score not in frame:
        return None
    values = frame.loc[frame["state"].isin(IN_ORDER), score].dropna()
    if values.empty:
        return None
    return int(values.idxmin() if mode_of(score) == "min" else values.idxmax())


def default_columns(frame: pd.DataFrame) -> list[str]:
    """What a person wants to see: what differs, what came out, what to look at; no empty column."""
    score = frame.attrs.get("score")
    params = [n for n in frame.attrs.get("params", ()) if _worth_a_column(frame, n)]
    outcome = [score] if score else list(frame.attrs.get("metrics", ()))[:6]
    names = ["run", "search", "state", *params, *outcome, "best_epoch", "epochs", "seconds"]
    names += ["findings", "reason"]
    if frame["search"].nunique() < 2:
        names.remove("search")
    return [name for name in names if not _empty(frame[name]) or name in ("run", "state", score)]


def pick_columns(frame: pd.DataFrame, wanted: Sequence[str]) -> list[str]:
    """Columns by name or pattern (`test_*`), in the order asked for.

    Raises:
        UserMistake: there is no such column.
    """
    chosen: list[str] = []
    for pattern in wanted:
        found = [n for n in frame.columns if fnmatchcase(n, pattern)] if "*" in pattern else []
        chosen += found or [known_column(frame, pattern)]
    return list(dict.fromkeys(chosen))


def known_column(frame: pd.DataFrame, name: str) -> str:
    """The name itself, if the frame has it.

    Raises:
        UserMistake: it has not; the message names the nearest ones.
    """
    if name in frame.columns:
        return name
    near = difflib.get_close_matches(name, list(frame.columns), n=3, cutoff=0.5)
    told = (
        f"Nearest: {', '.join(near)}." if near else f"There are: {', '.join(frame.columns[:40])}."
    )
    raise UserMistake(f"The runs have no column {name!r}. {told}")


def notes(runs: Sequence[RunSummary]) -> list[str]:
    """What a reader must know before believing the order, a sentence each."""
    told = []
    objectives = sorted({run.objective for run in runs if run.objective})
    if len(objectives) > 1:
        told.append(
            f"The runs optimised different things ({', '.join(objectives)}); "
            f"of the others the last value of {_common_objective(runs)} is shown."
        )
    if not objectives and runs:
        told.append(
            "No run says what it optimised, so the newest come first; name a metric with --sort."
        )
    if len({run.data_digest for run in runs if run.data_digest}) > 1:
        told.append("The searches used different images: their values cannot be compared.")
    going = sum(run.state == "running" for run in runs)
    if going:
        told.append(f"{_count(going, 'run')} still going: the last value so far is shown.")
    if runs and not going and not any(run.state in IN_ORDER for run in runs):
        told.append("No run ended in order, so there is no best one; `reason` says why.")
    if len(runs) == 1:
        told.append("One run: there is nothing to compare it with.")
    return told


def _count(number: int, noun: str) -> str:
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"


def _common_objective(runs: Iterable[RunSummary]) -> str | None:
    counts = Counter(run.objective for run in runs if run.objective)
    return max(counts, key=lambda name: counts[name]) if counts else None


def _score(run: RunSummary, objective: str) -> float | None:
    if run.state in WITHOUT_RESULT:
        return None
    if run.objective in (objective, None) and run.best_value is not None:
        return _finite(run.best_value)
    return _finite(run.metrics.get(f"best_{objective}", run.metrics.get(objective)))


def _finite(value: float | None) -> float | None:
    # MLflow's databases hold infinity as 1.8e308.
    return value if value is not None and math.isfinite(value) and abs(value) < 1e300 else None


def _columns(held: Iterable[Mapping[str, object]], taken: set[str], prefix: str) -> dict[str, str]:
    """Names in the order of their appearance -> their columns."""
    names = dict.fromkeys(name for mapping in held for name in mapping)
    return {name: f"{prefix}.{name}" if name in taken else name for name in names}


def _back(runs: Sequence[RunSummary]) -> dict[str, pd.Series]:
    columns = {
        n: _text([getattr(run, n) for run in runs]) for n in ("reason", "run_id", "trial_id")
    }
    columns["findings"] = _text([", ".join(run.findings) for run in runs])
    for name in ("best_epoch", "epochs", "seconds"):
        columns[name] = _series([getattr(run, name) for run in runs], numbers=True)
    columns["started"] = pd.to_datetime(
        pd.Series([run.started for run in runs], dtype="float64"), unit="s", utc=True
    ).dt.floor("s")
    return {name: columns[name] for name in _BACK}


def _series(values: Sequence[object], *, numbers: bool = False) -> pd.Series:
    """Numbers where all values are, or read as, numbers, gaps being missing; otherwise text."""
    read = [_number(value) for value in values]
    if not numbers and (any(r is None for r, v in zip(read, values, strict=True) if v is not None)):
        return _text(values)
    held = [number for number in read if number is not None]
    if held and all(isinstance(n, int) and abs(n) < 2**53 for n in held):
        # `Int64` has gaps, so that 64 is not shown as 64.0.
        return pd.Series(read, dtype="Int64" if len(held) < len(read) else "int64")
    return pd.Series([math.nan if n is None else float(n) for n in read], dtype="float64")


def _text(values: Sequence[object]) -> pd.Series:
    return pd.Series(["" if value is None else str(value) for value in values], dtype=object)


def _number(value: object) -> int | float | None:
    """MLflow's parameters are text, a journal's are not: both end as the same number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if not isinstance(value, str):
        return value
    if not _NUMBER.fullmatch(value):
        return None
    return int(value) if value.lstrip("+-").isdigit() else float(value)


def _worth_a_column(frame: pd.DataFrame, name: str) -> bool:
    """A searched value, or a setting that differs; nothing that differs for no reason."""
    if _empty(frame[name]) or name.startswith(_UNINFORMATIVE):
        return False
    return frame[name].nunique(dropna=False) > 1 or ("." not in name and len(frame) == 1)


def _empty(series: pd.Series) -> bool:
    return bool(series.isna().all() or (series.astype("string").fillna("") == "").all())


# `learning_rate < 0.01 and batch_size == 64`: rows by a condition that cannot run code.
#
# Python's own parser reads the condition, everything but comparisons of columns with plain values
# is refused, and pandas sees a condition over names that were made here.


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


# The trials of a search's journal as rows of a comparison: no MLflow needed.


def runs_of_record(record: SearchRecord, *, name: str, running: bool) -> list[RunSummary]:
    """One summary a trial, the same that MLflow's runs of this search give.

    Args:
        name: shown as the search's.
        running: whether some process is still at it; if none is, its open trials are interrupted.
    """
    experiment = record.started.get("experiment")
    settings = flat(experiment) if isinstance(experiment, Mapping) else {}
    data = record.started.get("data")
    digest = str(data.get("digest") or "") if isinstance(data, Mapping) else ""
    return [
        _summary(record, trial, name=name, running=running, settings=settings, digest=digest)
        for trial in record.trials.values()
    ]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"training": {"epochs": 5}}` -> `{"training.epochs": "5"}`, as MLflow's parameters are.

    What is not set and the search's space are left out, as there.
    """
    held: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name != "search.space":
            held |= flat(value, f"{name}.")
        elif value is not None and name != "search.space":
            held[name if prefix else f"experiment.{key}"] = str(value)
    return held


def _summary(
    record: SearchRecord,
    trial: TrialRecord,
    *,
    name: str,
    running: bool,
    settings: Mapping[str, str],
    digest: str,
) -> RunSummary:
    over = not running or record.ended is not None
    state = "interrupted" if trial.state == "running" and over else trial.state
    last = trial.epochs[-1] if trial.epochs else None
    ended = trial.ended
    if state == "interrupted" and ended is None:
        ended = last.time if last else trial.started
    return RunSummary(
        run=trial.trial_id,
        state=state,
        search=name,
        params={**trial.configuration, **settings},
        metrics=dict(last.metrics) if last else {},
        objective=record.objective,
        best_value=trial.best_value,
        best_epoch=trial.best_epoch,
        epochs=len({epoch.step for epoch in trial.epochs}),
        started=trial.started,
        ended=ended,
        search_started=record.started.get("time"),
        findings=tuple(sorted({finding.rule for finding in trial.findings})),
        reason=trial.error or trial.reason or "",
        trial_id=trial.trial_id,
        search_id=record.search_id,
        data_digest=digest,
    )


# Searches side by side: how good each was after how many seconds and trials.


_MAX_OUTCOMES = 6


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """The best so far of one search, a point for each trial that ended, in the order they did.

    `seconds` are wall time since the search began (features included, and pauses before a resume),
    `best` is NaN until a trial ended in order. All three have shape (num_trials,), float64 but
    for the names.
    """

    name: str
    objective: str
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]
    best: NDArray[np.float64]
    trials: tuple[str, ...]

    @property
    def mode(self) -> Mode:
        return mode_of(self.objective)

    @property
    def final(self) -> float:
        return float(self.best[-1]) if len(self.best) else math.nan

    def reached(self, value: float) -> int | None:
        """The first position at which the best so far is at least as good as a value."""
        at_least = self.best <= value if self.mode == "min" else self.best >= value
        return int(np.argmax(at_least)) if at_least.any() else None


def search_progress(runs: Sequence[RunSummary]) -> list[SearchProgress]:
    """One for each search that has an ended trial and says what it optimised."""
    groups: dict[tuple[str, str], list[RunSummary]] = {}
    for run in runs:
        if run.trial_id:
            groups.setdefault((run.search_id, run.search), []).append(run)
    found = [_progress(name, members) for (_, name), members in groups.items()]
    return [progress for progress in found if progress is not None]


def describe_progress(searches: Sequence[SearchProgress]) -> list[str]:
    """A sentence for each search, the best first, then how each pair of the best three compares."""
    if len({search.objective for search in searches}) > 1:
        told = [_outcome(search) for search in searches[:_MAX_OUTCOMES]]
        return [*told, *_rest(searches), "They have different objectives, so none is ahead."]
    ranked = sorted(searches, key=_rank)
    told = [_outcome(search) for search in ranked[:_MAX_OUTCOMES]] + _rest(ranked)
    pairs = [
        _comparison(a, b) for a, b in combinations(ranked[:3], 2) if _comparable_searches(a, b)
    ]
    if pairs:
        pairs.append("One search each: whether a difference is more than chance is not said here.")
    return told + pairs


def _progress(name: str, runs: Sequence[RunSummary]) -> SearchProgress | None:
    objective = next((run.objective for run in runs if run.objective), None)
    ended = sorted(
        (r for r in runs if r.ended is not None and r.state not in ("running", "interrupted")),
        key=lambda r: (r.ended or 0.0, r.trial_id),
    )
    if objective is None or not ended:
        return None
    starts = [r.started if r.search_started is None else r.search_started for r in runs]
    began = min((start for start in starts if start is not None), default=ended[0].ended or 0.0)
    values = np.array([_value(run) for run in ended], dtype=float)
    keep_better = np.fmin if mode_of(objective) == "min" else np.fmax
    return SearchProgress(
        name=name,
        objective=objective,
        seconds=np.array([max(0.0, (run.ended or began) - began) for run in ended]),
        values=values,
        best=keep_better.accumulate(values),
        trials=tuple(run.trial_id for run in ended),
    )


def _value(run: RunSummary) -> float:
    usable = run.state in IN_ORDER and run.best_value is not None and math.isfinite(run.best_value)
    return float(run.best_value) if usable and run.best_value is not None else math.nan


def _outcome(search: SearchProgress) -> str:
    count, last = len(search.trials), _seconds(search.seconds[-1])
    head = f"{search.name}: {_trials(count)} in {last}"
    position = search.reached(search.final)
    if position is None:
        return f"{head}, none of them finished."
    when = _seconds(search.seconds[position])
    return (
        f"{head}, best {search.objective} {search.final:.4f} ({search.trials[position]}) "
        f"after {when} and {_trials(position + 1)}."
    )


def _rest(searches: Sequence[SearchProgress]) -> list[str]:
    left = len(searches) - _MAX_OUTCOMES
    return [f"And {left} more."] if left > 0 else []


def _rank(search: SearchProgress) -> tuple[bool, float, float]:
    """Best in the end first, the sooner of equals; last those without a result."""
    if not _has_result(search):
        return (True, 0.0, 0.0)
    value = search.final if search.mode == "min" else -search.final
    return (False, value, float(search.seconds[search.reached(search.final) or 0]))


def _comparable_searches(leader: SearchProgress, other: SearchProgress) -> bool:
    return _has_result(leader) and _has_result(other)


def _has_result(search: SearchProgress) -> bool:
    return math.isfinite(search.final)


def _comparison(leader: SearchProgress, other: SearchProgress) -> str:
    gap = abs(leader.final - other.final)
    position = leader.reached(other.final)
    needed = other.reached(other.final)
    assert position is not None
    assert needed is not None
    end = f"ends {gap:.4f} better than" if gap else "ends as good as"
    return (
        f"{leader.name} {end} {other.name}; it reached {other.final:.4f} after "
        f"{_seconds(leader.seconds[position])} and {_trials(position + 1)}, {other.name} after "
        f"{_seconds(other.seconds[needed])} and {_trials(needed + 1)}."
    )


def _trials(count: int) -> str:
    return f"{count:,} trial" + ("" if count == 1 else "s")


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 180 else f"{value / 60:.1f} min"


COSTS = ("ms_one_thread", "megabytes", "dollars_per_million")
"""What the front weighs accuracy against; the less the better."""


@dataclass(frozen=True, kw_only=True)
class NetworkPoint:
    """One network of a search.

    Args:
        accuracy: to expect of the best that was found with it, on other images, corrected for
            having been chosen; a fraction.
        cost: `NetworkCost` as plain values, see `serving/cost.py`.
    """

    backbone: str
    accuracy: Interval
    cost: Mapping[str, Any]

    def to_dict(self, *, on_front: bool) -> dict[str, Any]:
        """Plain JSON values, one row of a table."""
        return {
            "backbone": self.backbone,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            **self.cost,
            "on_front": on_front,
        }


def front(points: Sequence[NetworkPoint]) -> list[NetworkPoint]:
    """The points that no other one beats, in their order.

    One beats another if it is not worse in accuracy and in every cost, and better in one of them.
    """
    return [one for one in points if not any(_beats(other, one) for other in points)]


def _beats(one: NetworkPoint, other: NetworkPoint) -> bool:
    ours, theirs = _all_costs(one), _all_costs(other)
    not_worse = all(a <= b for a, b in zip(ours, theirs, strict=True))
    return not_worse and ours != theirs


def _all_costs(point: NetworkPoint) -> list[float]:
    """All that should be small, the share of wrong answers first."""
    return [1 - point.accuracy.value, *(float(point.cost[name]) for name in COSTS)]


def front_table(points: Sequence[NetworkPoint]) -> list[dict[str, Any]]:
    """One row a network, the most accurate first."""
    best = {point.backbone for point in front(points)}
    ranked = sorted(points, key=lambda point: -point.accuracy.value)
    return [point.to_dict(on_front=point.backbone in best) for point in ranked]
