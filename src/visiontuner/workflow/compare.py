"""Runs of search folders and of MLflow side by side: one table, and two figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from visiontuner.errors import JournalError, UserMistake
from visiontuner.evaluation.compare import (
    RunSummary,
    describe_progress,
    notes,
    runs_of_record,
    search_progress,
    table,
)
from visiontuner.evaluation.compare import sort as sort_rows
from visiontuner.evaluation.compare import where as keep
from visiontuner.journal import SearchRecord, TrialRecord, is_running, newest_search
from visiontuner.paths import JOURNAL_FILE, tracking_uri
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.searches import (
    MOST_CURVES,
    Curve,
    learning_curves,
    searches_side_by_side,
)
from visiontuner.tracking.reading import Reader

GetCurve = Callable[[str], tuple[list[int], list[float]]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs and their table; row `i` of the frame's index is `runs[i]`.

    `curves[i]` fetches steps and values of one metric of run `i`; `notes` are sentences that a
    reader must know.
    """

    runs: list[RunSummary]
    curves: list[GetCurve]
    frame: pd.DataFrame
    notes: list[str]


def compare(
    targets: str | Path | Sequence[str | Path] = (),
    *,
    where: str | None = None,
    sort: str | None = None,
    reverse: bool = False,
) -> pd.DataFrame:
    """All runs that some targets mean, best first, with everything that is known of them.

    Args:
        targets: search folders (or folders of such), MLflow run ids (a search's run means its
            trials), experiment names, names of searches, `models:/NAME/VERSION`; mixed as you like.
            Default: the newest search in `searches/`.
        where: `learning_rate < 0.01 and batch_size == 64`.
        sort: a column; default: the objective.
        reverse: worst first.

    Returns:
        One row a run; `visiontuner.evaluation.compare.table` names the columns.

    Raises:
        UserMistake: a target, column or condition that does not exist or fit.
        TrackingError: MLflow is away or refuses; never for search folders.
    """

    frame = sort_rows(load_runs(targets).frame, sort, reverse=reverse)
    return (keep(frame, where) if where else frame).reset_index(drop=True)


def load_runs(targets: str | Path | Sequence[str | Path] = ()) -> Comparison:
    """What `compare` compares, with its curves within reach; arguments and errors as there."""

    if isinstance(targets, str | Path):
        targets = [targets]
    sources = _Sources()
    for target in targets or [newest_search()]:
        sources.add(target)
    runs = [run for run, _ in sources.found.values()]
    return Comparison(
        runs=runs,
        curves=[curve for _, curve in sources.found.values()],
        frame=table(runs),
        notes=[*sources.empty, *notes(runs)],
    )


def draw_curves(
    comparison: Comparison, rows: Sequence[int], metrics: Sequence[str], file: Path
) -> list[str]:
    """Learning curves of some runs, one panel a metric, as PNG.

    Args:
        rows: index labels of the frame, those drawn first being the most important.
        metrics: at most four; empty: the objective and the loss, or what the runs hold.

    Returns:
        Sentences about what is not in the figure.

    Raises:
        UserMistake: none of the runs has a curve, or the file cannot be written.
    """

    drawn, names = list(rows)[:MOST_CURVES], list(metrics) or _usual_metrics(comparison, rows)
    labels = _labels([comparison.runs[i] for i in drawn])
    curves = {
        metric: [
            Curve(label, *comparison.curves[i](metric))
            for i, label in zip(drawn, labels, strict=True)
        ]
        for metric in names
    }
    bare = [
        label
        for position, label in enumerate(labels)
        if not any(curves[metric][position].steps for metric in names)
    ]
    if len(bare) == len(labels):
        asked = ", ".join(names) or "any metric"
        raise UserMistake(f"None of these runs has a curve of {asked}; name one with --metric.")
    write_file(file, to_png(learning_curves(curves)))
    told = [f"No curve: {', '.join(bare)}."] if bare else []
    if len(rows) > len(drawn):
        told.append(f"The first {len(drawn)} of {len(rows)} runs are drawn; choose with --where.")
    return told


def draw_searches(comparison: Comparison, file: Path) -> None:
    """Best so far of all searches by seconds and by trials, as PNG.

    Raises:
        UserMistake: no search has an ended trial, or the file cannot be written.
    """

    searches = search_progress(comparison.runs)
    if not searches:
        raise UserMistake("There is no search with an ended trial to draw; name a search.")
    write_file(file, to_png(searches_side_by_side(searches)))


def describe_searches(comparison: Comparison) -> list[str]:
    """How searches compare, in sentences; empty for fewer than two."""

    searches = search_progress(comparison.runs)
    return describe_progress(searches) if len(searches) > 1 else []


def write_file(file: Path, content: bytes) -> None:
    """Write a result where the user wants it.

    Raises:
        UserMistake: the file cannot be written.
    """
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UserMistake(f"Cannot write {file}: {error.strerror}. Name another file.") from None


class _Sources:
    """Runs of all targets so far, each once, however often it is named."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[RunSummary, GetCurve]] = {}
        self.empty: list[str] = []
        self._reader: Reader | None = None

    def add(self, target: str | Path) -> None:
        folders = _search_folders(Path(target))
        for folder in folders:
            self._add_journal(folder)
        if not folders:
            self._add_from_mlflow(str(target))

    def _add_journal(self, folder: Path) -> None:
        record = SearchRecord.load(folder)
        name = folder.resolve().name
        for run in runs_of_record(record, name=name, running=is_running(folder)):
            self._keep(run, partial(_recorded, record.trials[run.trial_id]))
        if not record.trials:
            self.empty.append(f"{folder} has no trial yet.")

    def _add_from_mlflow(self, target: str) -> None:
        if self._reader is None:
            self._reader = Reader(tracking_uri())
        found = self._reader.runs(target.removeprefix("runs:/"))
        for run in found:
            self._keep(run, partial(self._reader.curve, run.run_id))
        if not found:
            self.empty.append(f"{target} has no run yet.")

    def _keep(self, run: RunSummary, curve: GetCurve) -> None:
        key = (run.search_id, run.trial_id) if run.trial_id else ("", run.run_id)
        self.found.setdefault(key, (run, curve))


def _search_folders(path: Path) -> list[Path]:
    """A search folder, or all of those in a folder; none if it is no folder at all."""
    try:
        if (path / JOURNAL_FILE).is_file():
            return [path]
        if not path.is_dir():
            return []
    except OSError:  # a name longer than any file's
        return []
    inside = sorted(journal.parent for journal in path.glob(f"*/{JOURNAL_FILE}"))
    if not inside and ("/" in str(path) or str(path) in (".", "..")):
        raise JournalError(
            f"{path} is no search folder and holds none; a search has {JOURNAL_FILE}."
        )
    return inside


def _recorded(trial: TrialRecord, metric: str) -> tuple[list[int], list[float]]:
    return trial.curve(metric)


def _usual_metrics(comparison: Comparison, rows: Sequence[int]) -> list[str]:
    objective = comparison.frame.attrs.get("objective")
    if objective:
        return list(dict.fromkeys([objective, "validation_loss"]))
    held = (name for i in rows for name in comparison.runs[i].metrics)
    return list(dict.fromkeys(held))[:2]


def _labels(runs: Sequence[RunSummary]) -> list[str]:
    """Names; with the search's where one name is there twice, with the id where that is too."""
    names = [run.run for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.run} of {run.search}" if run.search else run.run for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} {run.run_id[:6]}" for name, run in zip(names, runs, strict=True)]
    return names
