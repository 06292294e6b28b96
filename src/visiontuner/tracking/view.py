"""What MLflow's pages show of a search: a view of its experiment, and each run's description."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from visiontuner.errors import JournalError
from visiontuner.evaluation.report import image_count
from visiontuner.journal import SearchRecord, TrialRecord, newest_search
from visiontuner.paths import MLFLOW_FILE, tracking_uri
from visiontuner.text import next_command

VIEW_TAG = "mlflow.sharedViewState.visiontuner"
"""An experiment tag that MLflow's front end reads where an address has `viewStateShareKey`."""

_LOCAL_SERVER = "http://127.0.0.1:5000"  # where `mlflow ui` answers
_EACH_EPOCH = ("validation_accuracy", "validation_loss")
# Sections of charts by id; MLflow adds a chart for every other metric to its own two.
_SECTION = "search"
_MLFLOWS_SECTIONS = (("model", "Model metrics"), ("system", "System metrics"))


def shared_view(objective: str, searched: Iterable[str]) -> str:
    """Columns, order and charts of a search's trials, as MLflow's front end keeps them.

    Args:
        objective: the metric that was optimised.
        searched: names of the searched values; learning rate and batch size come first.
    """
    names = list(dict.fromkeys(["learning_rate", "batch_size", *searched]))
    best = f"best_{objective}"
    columns = [
        f"metrics.`{best}`",
        *(f"params.`{name}`" for name in names),
        *(f"metrics.`{name}`" for name in (*_EACH_EPOCH, "test_accuracy")),
        *(f"tags.`visiontuner.{name}`" for name in ("best_epoch", "state", "findings")),
        "attributes.`Models`",
    ]
    state = {
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {columns[0]: 190, **dict.fromkeys(columns[1:], 130)},
        "orderByKey": columns[0],
        "orderByAsc": objective.endswith("loss"),
        "compareRunCharts": _charts(best, names),
        "compareRunSections": [
            {"uuid": uuid, "name": name, "display": uuid == _SECTION, "isReordered": False}
            for uuid, name in ((_SECTION, "Search"), *_MLFLOWS_SECTIONS)
        ],
        "isAccordionReordered": True,  # ours stays first
        "runsHiddenMode": "FIRST_20_RUNS",
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
    }
    return json.dumps(state, separators=(",", ":"))


def _charts(best: str, names: list[str]) -> list[dict[str, Any]]:
    objective = {"key": best, "type": "METRIC"}
    drawn: list[dict[str, Any]] = [
        {
            "type": "PARALLEL",
            "selectedParams": names,
            "selectedMetrics": [best],
            "showAllRuns": True,
        },
        {
            "type": "SCATTER",
            "xaxis": {"key": "learning_rate", "type": "PARAM"},
            "yaxis": objective,
            "runsCountToCompare": 100,
        },
        *({"type": "LINE", "metricKey": m, "selectedMetricKeys": [m]} for m in _EACH_EPOCH),
    ]
    place = {"metricSectionId": _SECTION, "deleted": False, "isGenerated": False}
    return [{"uuid": f"chart-{number}", **chart, **place} for number, chart in enumerate(drawn)]


def view_link(store: str, experiment_id: str) -> str:
    """Where a browser shows an experiment so; for a database, where `mlflow ui` answers."""
    server = _LOCAL_SERVER
    if store.startswith("http"):  # a browser asks for a password itself
        parts = urlsplit(store)
        netloc, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        server = urlunsplit((parts.scheme, netloc, path, "", ""))
    page = f"{server}/#/experiments/{quote(experiment_id)}/runs"
    return f"{page}?viewStateShareKey=visiontuner&workflowType=machine_learning"


def link_of(folder: Path, store: str) -> str | None:
    """The view of a search folder's experiment; None where there is none, as on Databricks."""
    if not store.startswith(("http", "sqlite", "postgresql", "mysql", "mssql")):
        return None
    try:
        places = json.loads((folder / MLFLOW_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    experiment_id = places.get("experiment_id")
    return view_link(store, str(experiment_id)) if experiment_id else None


# Descriptions of runs, in Markdown.


DESCRIPTION = "mlflow.note.content"
_OURS = "*Written by visiontuner; a description of yours stays.*"
_BEST = 5


def described(text: str, held: Mapping[str, str]) -> dict[str, str]:
    """The tag that describes a run; nothing where a person has described it.

    Args:
        held: the tags that the run has.
    """
    there = held.get(DESCRIPTION, "")
    return {} if there and not there.endswith(_OURS) else {DESCRIPTION: f"{text}\n\n{_OURS}"}


def describe_search(record: SearchRecord, folder: Path, report: Mapping[str, Any] | None) -> str:
    """The best value, the test result, the five best trials, and the next command.

    Args:
        report: of the evaluation (report.json), if there was one.
    """
    ranking, ended = record.ranking(), sum(trial.finished for trial in record.trials.values())
    parts = [f"{ended} of {len(record.trials)} trials finished; none can be used."]
    if record.is_unvalidated:
        parts = ["Trained on train and validation: only the test images can judge it."]
    elif ranking:
        best = ranking[0]
        parts = [
            f"**Best of {ended} trials: {best.trial_id}**, {record.objective} "
            f"**{best.best_value:.4f}** in epoch {best.best_epoch}: {_values(best)}."
        ]
    parts += _chosen(record)
    parts += _test_result(report)
    if len(ranking) > 1:
        parts.append(_table(ranking[:_BEST], record.objective))
    parts.append("The artifact `report.html` shows all of it on one page.")
    name = str(record.started.get("experiment", {}).get("name", "NAME"))
    command = next_command("promote", name) if report else next_command("evaluate", _near(folder))
    parts.append(f"Next: `{command}`")
    return "\n\n".join(parts)


def _chosen(record: SearchRecord) -> list[str]:
    """What is kept, what the search gained, and what to expect of the model."""
    if record.choice is None or record.kept is None:
        return []
    parts = [f"**Kept: {record.kept.trial_id}** ({_values(record.kept)})."]
    parts += [record.choice["gain"]] if record.choice.get("gain") else []
    if estimate := record.choice.get("estimate"):
        parts.append(
            f"Expected accuracy on new images: **{estimate['value']:.1%}** "
            f"({estimate['low']:.1%} to {estimate['high']:.1%}), corrected for the choice."
        )
    return ["\n\n".join(parts)]


def describe_trial(record: SearchRecord, name: str, report: Mapping[str, Any] | None) -> str:
    """Its value and the epoch that is kept, the test result, and what went wrong.

    Args:
        name: of a trial or a baseline.
        report: of the evaluation of this trial (report.json), if there was one.
    """
    trial, objective = record.named(name), record.objective
    if trial is None:
        return f"{name}."
    parts = [f"{_values(trial)}: {trial.state.replace('_', ' ')}."]
    if name in record.baselines:
        parts = [f"What trials are compared with: {_values(trial)}."]
    elif trial.best_value is not None:
        parts[0] = (
            f"{objective} **{trial.best_value:.4f}** in epoch {trial.best_epoch} of "
            f"{len(trial.epochs)}: {_values(trial)}."
        )
    parts += _test_result(report)
    parts += [f"{f.severity}: {f.rule}, {f.evidence}. {f.advice}" for f in trial.findings]
    parts += [trial.error] if trial.error else []
    return "\n\n".join(parts)


def _test_result(report: Mapping[str, Any] | None) -> list[str]:
    accuracy = ((report or {}).get("metrics") or {}).get("accuracy")
    if report is None or not accuracy:
        return []
    return [
        f"**Test:** accuracy {accuracy['value']:.4f} (95 %: {accuracy['low']:.4f} to "
        f"{accuracy['high']:.4f}) on {image_count(report):,} images, "
        f"trial {report['trial_id']}."
    ]


def _table(trials: list[TrialRecord], objective: str) -> str:
    names = list(dict.fromkeys(name for trial in trials for name in trial.configuration))
    head = ["trial", objective, "epoch", *names]
    rows = [
        [
            trial.trial_id,
            f"{trial.best_value:.4f}",
            str(trial.best_epoch),
            *(_short(trial.configuration.get(name, "")) for name in names),
        ]
        for trial in trials
    ]
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)
    )


def _values(trial: TrialRecord) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in trial.configuration.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _near(folder: Path) -> Path:
    """Without the path to where the command runs, which is nobody else's."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


if __name__ == "__main__":  # `make ui`
    with suppress(JournalError):
        found = link_of(newest_search(), tracking_uri())
        print(f"The newest search: {found}" if found else "")
