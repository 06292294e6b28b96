"""Runs side by side: summaries of runs in, a pandas table out. No files, no MLflow.

A run is one trial of a search or a run of any other tool. Rows keep the order in which runs were
given until `sort`; the index of a row is the run's position in that order, through all of these
functions.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import pandas as pd

from visiontuner.errors import UserMistake

Mode = Literal["min", "max"]

IN_ORDER = ("completed", "stopped_early", "finished")
"""States of runs that may be called best; `finished` is what MLflow says of other tools' runs."""
WITHOUT_RESULT = ("failed", "interrupted", "killed")

_FRONT = ("run", "search", "state")
_BACK = ("best_epoch", "epochs", "seconds", "findings", "reason", "started", "run_id", "trial_id")
_LOWER_IS_BETTER = {"loss", "error", "nll", "ece", "mae", "mse", "rmse", "perplexity", "seconds"}
_NUMBER = re.compile(r"[+-]?(\d{1,300}(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", re.I | re.A)
# They differ between any two searches and explain nothing.
_DULL = ("experiment.name", "search.", "data.sha256")


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
        told.append("The searches looked at different pictures: their values do not compare.")
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
    if _empty(frame[name]) or name.startswith(_DULL):
        return False
    return frame[name].nunique(dropna=False) > 1 or ("." not in name and len(frame) == 1)


def _empty(series: pd.Series) -> bool:
    return bool(series.isna().all() or (series.astype("string").fillna("") == "").all())
