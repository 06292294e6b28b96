"""One page about a search that needs nothing else: no server, no network, no MLflow."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from visiontuner.diagnostics.history import best_trials, find_recording, history_of_trial
from visiontuner.diagnostics.rules import diagnose_history, not_refuted
from visiontuner.errors import ExperimentError
from visiontuner.evaluation.choice import edges
from visiontuner.evaluation.report import EvaluationReport
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import (
    Event,
    Finding,
    SearchRecord,
    TrialRecord,
    is_running,
    read_events,
)
from visiontuner.paths import EVALUATION_FOLDER, EVALUATION_REPORT, MLFLOW_FILE
from visiontuner.text import next_command, shown
from visiontuner.tracking.figures.parts import LABELS, count, readable, to_png
from visiontuner.tracking.figures.recording import Explained
from visiontuner.tracking.figures.searches import importances, search_figures
from visiontuner.tracking.map_symbols import HEIGHT, WIDTH, ImageMap, read_image_map

if TYPE_CHECKING:
    from visiontuner.evaluation.intervals import Interval
    from visiontuner.evaluation.scores import ClassScore, Threshold


# What a search's page says about the test images: an evaluation -> words and rows.


METRICS = {
    "accuracy": "Accuracy",
    "top5_accuracy": "Accuracy among the first five answers",
    "macro_f1": "Macro F1",
    "nll": "Negative log-likelihood, after temperature",
    "nll_uncalibrated": "Negative log-likelihood, before",
    "ece": "Expected calibration error, after temperature",
    "ece_uncalibrated": "Expected calibration error, before",
}


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    label: str
    value: str
    interval: str


@dataclass(frozen=True, kw_only=True)
class TestPart:
    """Everything that the page says about the test images."""

    accuracy: str
    accuracy_detail: str
    summary: str
    notes: tuple[str, ...]
    metrics: tuple[MetricRow, ...]
    threshold: str
    classes: tuple[ClassScore, ...]
    drawn_as: Mapping[str, str]  # names that no font here has -> what the figures call them
    pairs: tuple[Mapping[str, Any], ...]
    mistakes: tuple[Mapping[str, Any], ...]
    choice: tuple[str, ...]


def describe_test(evaluation: Mapping[str, Any]) -> TestPart:
    """Put what `evaluation/report.json` holds into words.

    Raises:
        ValueError: it is no evaluation.
    """

    report = EvaluationReport.from_dict(evaluation)
    accuracy = report.metrics.get("accuracy")
    return TestPart(
        accuracy=percent(accuracy.value) if accuracy else "",
        accuracy_detail=f"{_interval(accuracy)} on {report.num_images:,} images"
        if accuracy
        else "",
        summary=_summary(report, evaluation),
        notes=report.notes,
        metrics=tuple(_metric_rows(report.metrics)),
        threshold=_threshold(report.threshold) if report.threshold else "",
        classes=tuple(sorted(report.classes, key=_weakest_first)),
        drawn_as={
            name: text
            for name, text in zip(report.class_names, readable(report.class_names), strict=True)
            if text.startswith("class ") and not name.startswith("class ")
        },
        pairs=tuple(_complete(evaluation.get("confused_pairs"), _PAIR)),
        mistakes=tuple(_complete(evaluation.get("mistakes"), _MISTAKE)),
        choice=tuple(_choice(evaluation)),
    )


def percent(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{decimals}%}"


_PAIR = ("true", "predicted", "count", "share")
_MISTAKE = ("path", "true", "predicted", "probability")


def _complete(rows: object, keys: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    """Rows that hold every key; another version's rows are passed over."""
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and all(key in row for key in keys):
            yield row


def _summary(report: EvaluationReport, evaluation: Mapping[str, Any]) -> str:
    looks = evaluation.get("looks") or 1
    trial = evaluation.get("trial_id") or "the best trial"
    text = f"{trial}, its probabilities calibrated on validation (T = {report.temperature:.3g})"
    if report.num_images:
        text += f", on {report.num_images:,} images that no choice was made with."
    else:
        text += "; no test image was looked at."
    if looks != 1:
        text += (
            f" This was evaluation {looks} of the test set: the best of several is too "
            "good to be true."
        )
    if evaluation.get("model"):
        text += f" Registered as {evaluation['model']}."
    return text


def _metric_rows(metrics: Mapping[str, Interval]) -> Iterable[MetricRow]:
    for name, interval in metrics.items():
        yield MetricRow(
            label=METRICS.get(name, name),
            value=_number(name, interval.value),
            interval=f"{_number(name, interval.low)} to {_number(name, interval.high)}",
        )


def _number(name: str, value: float) -> str:
    return f"{value:.3f}" if name.startswith("nll") else percent(value)


def _interval(interval: Interval) -> str:
    return f"{percent(interval.low)} to {percent(interval.high)}"


def _threshold(threshold: Threshold) -> str:
    wanted = percent(threshold.wanted_precision)
    if threshold.value is None or threshold.precision is None:
        return (
            f"A precision of {wanted} was wanted; no confidence reached it on validation with "
            "enough images, so every answer abstains."
            if threshold.value is None
            else f"A precision of {wanted} was wanted; no test image reached the confidence "
            f"{threshold.value:.3f} that gave it on validation."
        )
    return (
        f"Answers with a confidence of at least {threshold.value:.3f}, chosen on validation for a "
        f"precision of {wanted}, are right in {percent(threshold.precision.value)} of the cases "
        f"({_interval(threshold.precision)}) and cover {percent(threshold.coverage.value)} of the "
        f"test images ({_interval(threshold.coverage)})."
    )


def _weakest_first(score: ClassScore) -> tuple[bool, float, str]:
    return math.isnan(score.f1), score.f1 if not math.isnan(score.f1) else 0.0, score.name


def _choice(evaluation: Mapping[str, Any]) -> Iterable[str]:
    """The choice with its reason, ties, and what the edges of the space suggest."""
    choice = evaluation.get("choice")
    if isinstance(choice, Mapping):
        if choice.get("reason"):
            yield str(choice["reason"])
        tied = [str(trial) for trial in choice.get("tied") or () if trial != choice.get("chosen")]
        if tied:
            yield f"Statistically tied with it on the validation images: {', '.join(tied)}."
    edges = evaluation.get("edges")
    for edge in edges if isinstance(edges, list) else ():
        yield str(edge.get("sentence", edge)) if isinstance(edge, Mapping) else str(edge)


# What a search's page says: the record of a search -> words, numbers and rows. No HTML here.


_WEIGHT = {"error": 0, "warning": 1, "info": 2}
_NAMED_TRIALS = 6
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number of the headline."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class FindingRow:
    """One rule, and where it fired; `weight` sorts errors first, the words are of `trial`."""

    severity: str
    weight: int
    rule: str
    where: str
    evidence: str
    advice: str
    trial: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial of the table; `parameters` in the order of the page's."""

    trial_id: str
    best: bool
    parameters: tuple[Any, ...]
    value: float | None
    best_epoch: int | None
    epochs: int
    seconds: float | None
    state: str
    findings: str
    remark: str
    run_id: str | None


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    """One network of a search over several; costs are words, and empty before an evaluation."""

    backbone: str
    licence: str
    trials: int
    best_trial: str
    value: float | None
    feature_seconds: float | None
    accuracy: str
    milliseconds: str
    size: str
    price: str
    remark: str


@dataclass(frozen=True, kw_only=True)
class PageData:
    """Everything on the page but the figures."""

    title: str
    question: str
    state: str
    outcome: str
    notes: tuple[str, ...]
    tiles: tuple[Tile, ...]
    choice: tuple[str, ...]
    test: TestPart | None
    not_tested: str
    findings: tuple[FindingRow, ...]
    objective: str
    is_loss: bool
    parameters: tuple[str, ...]
    trials: tuple[TrialRow, ...]
    networks: tuple[NetworkRow, ...]
    data: dict[str, str]
    splits: tuple[str, ...]
    class_table: tuple[tuple[str, tuple[int, ...]], ...]
    class_names: tuple[str, ...]
    commands: str
    origin: dict[str, str]
    experiment: str
    look_for_suspects: str
    version: str = field(default="unknown")


def describe_search(
    record: SearchRecord,
    *,
    evaluation: Mapping[str, Any] | None,
    findings: Sequence[Finding],
    where: Mapping[str, Any],
    state: str | None,
    notes: Sequence[str],
) -> PageData:
    """Put a search into words; the arguments are those of `html.search_page`."""
    data, started = _section(record, "data"), record.started
    state = state or str((record.ended or {}).get("state", "running"))
    test = describe_test(evaluation) if evaluation is not None else None
    splits, table = _classes(data)
    return PageData(
        title=str(started.get("name") or record.search_id or "A search"),
        question=_question(record),
        state=state,
        outcome=_outcome(record, state, where),
        notes=tuple(notes),
        tiles=tuple(_tiles(record, test)),
        choice=(test.choice if test and test.choice else tuple(_choice_lines(record, where))),
        test=test,
        not_tested=_not_tested(record, where),
        findings=tuple(_finding_rows(record, findings)),
        objective=label(record.objective),
        is_loss=record.mode == "min",
        parameters=_parameters(record),
        trials=tuple(_trial_rows(record, state, where)),
        networks=tuple(_network_rows(record, evaluation)),
        data=_data_facts(data),
        splits=splits,
        class_table=table,
        class_names=tuple(map(str, data.get("class_names") or ())),
        commands=_commands(record, where),
        origin=_origin(record, where),
        experiment=_experiment_text(record),
        look_for_suspects=_command("suspects", where=where),
        version=str(_section(record, "code").get("version") or "unknown"),
    )


def label(name: str) -> str:
    """`learning_rate` -> `Learning rate`."""
    return LABELS.get(name, name)


def seconds_in_words(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


# The head of the page


def _question(record: SearchRecord) -> str:
    experiment = _section(record, "experiment")
    search, model = experiment.get("search") or {}, experiment.get("model") or {}
    space = search.get("space") or {}
    searched = [label(name).lower() for name in space]
    networks = (space.get("backbone") or {}).get("values") or [
        model.get("backbone", "an unknown backbone")
    ]
    how = search.get("algorithm", "unknown")
    scheduler = search.get("scheduler", "none")
    return (
        f"Searched: {', '.join(searched) or 'nothing'}, by {label(record.objective).lower()}, for "
        f"{_trained(model, search)} {', '.join(map(str, networks))} "
        f"(algorithm {how}, scheduler {scheduler}) with {_source(record)}."
    )


def _trained(model: Mapping[str, Any], search: Mapping[str, Any]) -> str:
    train = str(model.get("train", "head"))
    known = {"head": "a head on", "last_stage": "the last stage of", "all": "all of"}
    words = known.get(train, f"{train} of")
    return f"heads on, then for {words}" if search.get("stages") else words


def _source(record: SearchRecord) -> str:
    data = _section(record, "data")
    return str(data.get("source") or "images of an unknown source")


def _outcome(record: SearchRecord, state: str, where: Mapping[str, Any]) -> str:
    """One sentence or two: how the search ended, and whether anything came out."""
    done, planned = sum(trial.finished for trial in record.trials.values()), _planned(record)
    of_all = f"{done} of {count(planned, 'trial')}" if planned else count(done, "trial")
    said = {
        "completed": f"Completed: {of_all} finished{_when(record)}.",
        "running": f"Still running when this page was written: {of_all} finished so far.",
        "interrupted": f"Interrupted: {of_all} finished. {_resume(where)}",
        "time_budget": f"Ended by its time budget: {of_all} finished. {_resume(where)}",
        "failed": f"Failed: {(record.ended or {}).get('error') or 'no reason was recorded'}",
    }.get(state, f"{state}: {of_all} finished.")
    if record.best is None and done:
        failed = sum(trial.state == "failed" for trial in record.trials.values())
        said += f" No trial gave a usable result; {failed} of {done} failed."
    elif record.best is None and state != "running":
        said += " There is no result."
    return said


def _resume(where: Mapping[str, Any]) -> str:
    return f"`{_command('tune', '--resume', where=where)}` goes on."


def _command(verb: str, *flags: str, where: Mapping[str, Any]) -> str:
    """About this search, wherever the page is read."""
    folder = where.get("folder") or "FOLDER"
    return next_command(verb, *flags, folder, store=where.get("tracking_uri") or "")


def _when(record: SearchRecord) -> str:
    began, ended = record.started.get("time"), (record.ended or {}).get("time")
    if not isinstance(began, int | float) or not isinstance(ended, int | float):
        return ""
    moment = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f", {seconds_in_words(max(0.0, ended - began))} from {moment} on"


def _tiles(record: SearchRecord, test: TestPart | None) -> Iterable[Tile]:
    best = record.best
    if best is not None and best.best_value is not None:
        yield Tile(
            label=f"Best {label(record.objective).lower()}",
            value=_value(best.best_value, record),
            detail=f"{best.trial_id}, epoch {best.best_epoch}",
        )
    estimate = (record.choice or {}).get("estimate")
    if estimate:
        yield Tile(
            label="Expected accuracy",
            value=f"{estimate['value']:.1%}",
            detail=f"{estimate['low']:.1%} to {estimate['high']:.1%} on new images, from "
            f"{(record.choice or {}).get('images', 0):,} that the kept model did not learn from, "
            "corrected for the choice",
        )
    if test is not None and test.accuracy:
        yield Tile(label="Test accuracy", value=test.accuracy, detail=test.accuracy_detail)
    yield Tile(label="Trials", value=str(len(record.trials)), detail=_states(record))
    seconds = [s for s in map(_training_seconds, record.trials.values()) if s is not None]
    if seconds:
        detail = "all trials together, features and start not counted"
        yield Tile(label="Training", value=seconds_in_words(sum(seconds)), detail=detail)
    counts = _section(record, "data").get("counts") or {}
    if counts:
        yield Tile(
            label="Images",
            value=f"{sum(counts.values()):,}",
            detail=", ".join(f"{number:,} {split}" for split, number in counts.items()),
        )


def _states(record: SearchRecord) -> str:
    states = [trial.state for trial in record.trials.values()]
    return ", ".join(
        f"{states.count(state)} {state.replace('_', ' ')}" for state in dict.fromkeys(states)
    )


def _choice_lines(record: SearchRecord, where: Mapping[str, Any]) -> Iterable[str]:
    """What can be said about the best trial before an evaluation."""
    ranking = record.ranking()
    if not ranking:
        yield "No trial has a result yet." if not record.trials else "No trial has a usable result."
        return
    if record.is_unvalidated:
        yield (
            "The validation images were trained on as well: nothing was chosen by them, and only "
            "the test images can say how good it is."
        )
        return
    best, name = ranking[0], label(record.objective).lower()
    extreme = "lowest" if record.mode == "min" else "highest"
    ended = [t for t in ranking if record.ran_to_its_end(t)]
    equal = [t.trial_id for t in ended[1:] if t.best_value == best.best_value]
    yield (
        f"{best.trial_id} has the {extreme} {name}: {_value(best.best_value, record)} in epoch "
        f"{best.best_epoch}, with {_configuration(best)}."
    )
    if equal:
        yield f"{_some(equal)} reached the same value, with a higher loss or in more time."
    if record.choice is not None:
        yield from filter(None, (record.choice.get("reason"), record.choice.get("gain")))
    if len(ranking) == 1:
        yield "It is the only one with a result, so there is nothing to compare it with."
    else:
        command = _command("evaluate", where=where)
        yield f"`{command}` says which trials are statistically tied with it."
    yield from _edges(record)


def _edges(record: SearchRecord) -> Iterable[str]:
    """Where the best trial lies at the end of what was searched."""
    try:
        space = Experiment.parse(record.started["experiment"]).search.space
    except (KeyError, ExperimentError):  # another version's experiment
        return
    best, *others = record.ranking()
    equal = [trial.trial_id for trial in others if trial.best_value == best.best_value]
    found = edges(record, space, tied=equal, importance=importances(record))
    yield from (edge.sentence for edge in found)


def _not_tested(record: SearchRecord, where: Mapping[str, Any]) -> str:
    counts = _section(record, "data").get("counts") or {}
    if counts and not counts.get("test"):
        return (
            "There is no test split: nobody knows how the best trial does on images that no "
            "choice was made with."
        )
    if record.best is None:
        return "Not looked at: there is no result to test."
    return (
        "Not looked at yet. After the choice is made, "
        f"`{_command('evaluate', where=where)}` looks at them once."
    )


# Findings and trials


def _finding_rows(record: SearchRecord, findings: Sequence[Finding]) -> Iterable[FindingRow]:
    """One row for each rule and severity of trials, errors first; the best-ranked trial's words.

    What is found of the data has a row each: one rule may speak of several splits.
    """
    rows: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}
    for finding in findings:
        key = (finding.rule, finding.severity, finding.evidence)
        rows.setdefault(key, (finding, []))[1].append("the search")
    for trial in _ranked(record):
        for finding in trial.findings:
            rows.setdefault((finding.rule, finding.severity, ""), (finding, []))[1].append(
                trial.trial_id
            )
    for (rule, severity, _), (finding, places) in sorted(
        rows.items(), key=lambda row: (_WEIGHT.get(row[0][1], 3), -len(row[1][1]), row[0][0])
    ):
        yield FindingRow(
            severity=severity,
            weight=_WEIGHT.get(severity, 3),
            rule=rule,
            where=_some(list(dict.fromkeys(places))),
            evidence=finding.evidence,
            advice=finding.advice,
            trial=places[0] if places[0] in record.trials else None,
        )


def _trial_rows(record: SearchRecord, state: str, where: Mapping[str, Any]) -> Iterable[TrialRow]:
    names, best = _parameters(record), record.best
    run_ids = where.get("runs") or {}
    for trial in _ranked(record):
        dead = trial.state == "running" and state != "running"
        yield TrialRow(
            trial_id=trial.trial_id,
            best=best is not None and trial.trial_id == best.trial_id,
            parameters=tuple(trial.configuration.get(name) for name in names),
            value=trial.best_value,
            best_epoch=trial.best_epoch,
            epochs=len(trial.epochs),
            seconds=_training_seconds(trial),
            state="interrupted" if dead else trial.state.replace("_", " "),
            findings=", ".join(sorted({finding.rule for finding in trial.findings})),
            remark=" ".join(filter(None, (_stage(trial), trial.error, trial.reason))),
            run_id=run_ids.get(trial.trial_id),
        )


def _stage(trial: TrialRecord) -> str:
    if trial.stage != "network":
        return ""
    return f"Network, begun with the head of {trial.starts_from}."


def _ranked(record: SearchRecord) -> list[TrialRecord]:
    """Usable trials, best first, then the others by id."""
    ranking = record.ranking()
    known = {trial.trial_id for trial in ranking}
    return ranking + [t for _, t in sorted(record.trials.items()) if t.trial_id not in known]


def _parameters(record: SearchRecord) -> tuple[str, ...]:
    names = (name for trial in record.trials.values() for name in trial.configuration)
    return tuple(dict.fromkeys(names))


def _training_seconds(trial: TrialRecord) -> float | None:
    spent = [s for s in trial.curve("epoch_seconds")[1] if math.isfinite(s)]
    return sum(spent) if spent else None


# Images and origin


def _data_facts(data: Mapping[str, Any]) -> dict[str, str]:
    counts = data.get("counts") or {}
    facts = {
        "Source": data.get("source"),
        "Found": data.get("described"),
        "Read from": data.get("root"),
        "Digest": data.get("digest"),
        "Classes": len(data.get("class_names") or ()) or None,
        "Images": ", ".join(f"{number:,} {split}" for split, number in counts.items()) or None,
    }
    return _known(facts)


def _classes(
    data: Mapping[str, Any],
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]:
    """The splits, and each class with its images in them; nothing in journals without these."""
    counts, names = data.get("class_counts") or {}, data.get("class_names") or ()
    splits = tuple(split for split in counts if len(counts[split]) == len(names))
    if not splits:
        return (), ()
    rows = zip(names, *(counts[split] for split in splits), strict=True)
    return splits, tuple((str(name), tuple(numbers)) for name, *numbers in rows)


def _commands(record: SearchRecord, where: Mapping[str, Any]) -> str:
    code = _section(record, "code")
    lines = []
    if code.get("commit"):
        dirty = "   # it had uncommitted changes, which are not in it" if code.get("dirty") else ""
        lines.append(f"git checkout {code['commit']}{dirty}")
    elif code.get("version"):
        lines.append(f"pip install visiontuner=={code['version']}")
    lines += [
        "visiontuner tune --experiment experiment.yaml   # the text below",
        _command("evaluate", where=where),
    ]
    return "\n".join(lines)


def _origin(record: SearchRecord, where: Mapping[str, Any]) -> dict[str, str]:
    code, machine = _section(record, "code"), _section(record, "machine")
    packages = machine.get("packages") or {}
    dirty = {True: " with uncommitted changes", False: "", None: ""}[code.get("dirty")]
    facts = {
        "Search": record.search_id,
        "Folder": where.get("folder"),
        "MLflow": where.get("tracking_uri"),
        "MLflow run": where.get("parent_run_id"),
        "Model": where.get("model"),
        "Code": f"{code['commit']}{dirty}" if code.get("commit") else None,
        "visiontuner": code.get("version"),
        "Python": machine.get("python"),
        "Packages": ", ".join(f"{n} {v}" for n, v in packages.items()) or None,
        "Machine": ", ".join(
            str(machine[key]) for key in ("host", "platform") if machine.get(key)
        ) or None,
        "Processors": machine.get("cpus"),
        "Pretrained network": where.get("backbone"),
        "Digest of its weights": where.get("weights_digest"),
        "Licence of its weights": where.get("weights_licence"),
        "Features by": where.get("engine"),
    }  # fmt: skip
    return _known(facts)


def _experiment_text(record: SearchRecord) -> str:
    experiment = _section(record, "experiment")
    return yaml.safe_dump(dict(experiment), sort_keys=False, allow_unicode=True)


# Networks


def _network_rows(
    record: SearchRecord, evaluation: Mapping[str, Any] | None
) -> Iterable[NetworkRow]:
    """The networks of a search over several, the best first; then those without a trial."""
    best = record.best_by_network()
    rest = [name for name in (*record.stopped, *record.left_out) if name not in best]
    measured = (evaluation or {}).get("networks")
    costs = {str(row["backbone"]): row for row in measured or [] if isinstance(row, Mapping)}
    for name in [*best, *dict.fromkeys(rest)]:
        trial = best.get(name)
        yield NetworkRow(
            backbone=name,
            licence=str(record.networks.get(name, {}).get("weights_licence") or ""),
            trials=sum(t.configuration.get("backbone") == name for t in record.trials.values()),
            best_trial=trial.trial_id if trial else "",
            value=trial.best_value if trial else None,
            feature_seconds=record.networks.get(name, {}).get("seconds"),
            **_cost_words(costs.get(name)),
            remark=_network_remark(record, name),
        )


def _cost_words(row: Mapping[str, Any] | None) -> dict[str, str]:
    if row is None:
        return dict.fromkeys(("accuracy", "milliseconds", "size", "price"), "")
    low, high = percent(row["accuracy_low"]), percent(row["accuracy_high"])
    return {
        "accuracy": f"{percent(row['accuracy'])} ({low} to {high})",
        "milliseconds": f"{row['ms_one_thread']:.1f} / {row['ms_all_threads']:.1f}",
        "size": f"{row['megabytes']:.1f} / {row['memory_mb']:.0f}",
        "price": f"{row['dollars_per_million']:.2f} on {row['instance']}"
        + (", on the front" if row["on_front"] else ""),
    }


def _network_remark(record: SearchRecord, name: str) -> str:
    if name in record.left_out:
        return f"left out: {record.left_out[name]}"
    if name in record.stopped:
        return f"no more trials: {record.stopped[name]['reason']}"
    return ""


# Small things


def _section(record: SearchRecord, name: str) -> Mapping[str, Any]:
    found = record.started.get(name)
    return found if isinstance(found, Mapping) else {}


def _known(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value is not None}


def _planned(record: SearchRecord) -> int:
    """How many trials were asked for; a grid decides that itself."""
    search = _section(record, "experiment").get("search") or {}
    asked = search.get("trials") if search.get("algorithm") != "grid" else None
    return max(int(asked or 0), len(record.trials)) if asked else 0


def _configuration(trial: TrialRecord) -> str:
    return ", ".join(
        f"{label(name).lower()} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in trial.configuration.items()
    )


def _value(value: float | None, record: SearchRecord) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if record.mode == "min" else percent(value, 2)


def _some(names: Sequence[str]) -> str:
    """`t0001, t0004 and 7 more`."""
    shown = ", ".join(names[:_NAMED_TRIALS])
    rest = len(names) - _NAMED_TRIALS
    return f"{shown} and {rest} more" if rest > 0 else shown


# One page about a search that needs nothing else: no server, no network, no MLflow.
#
# `page.py` puts the words and numbers together, `report/` holds the template with its style and
# its script. Every value is escaped. The page carries a content security policy that lets it load
# nothing and run no script but its own, so that a class called `<script>` stays a name.


PAGE_FILE = "report.html"

_WIDE = ("confusion", "confused_pairs", "per_class", "mistakes", "mistakes_explained")
_PHOTOGRAPHS = ("mistakes", "mistakes_explained")
_CAPTIONS = {
    "all_curves": "Learning curves of all trials",
    "best_so_far": "Best objective so far against time",
    "learning_rate_batch_size": "Learning rate against batch size, coloured by the objective",
    "parallel_coordinates": "Every trial's searched values and its outcome",
    "importance": "How much each searched value decided",
    "reliability": "Confidence against accuracy, before and after temperature scaling",
    "risk_coverage": "Share of wrong answers against the share of answered images",
    "confusion": "Confusion matrix: true classes in rows, predicted ones in columns",
    "confused_pairs": "The most confused pairs of classes",
    "per_class": "Recall and precision of the weakest classes",
    "networks": "What each network gives for what an answer costs; those of the front in green",
    "mistakes": "The images that were most confidently taken for another class",
    "mistakes_explained": "The same: red to yellow where the network saw the class that it named",
}


def write_page(
    folder: Path,
    *,
    figures: Mapping[str, bytes] | None = None,
    state: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Path:
    """Write `report.html` into a search folder, whole or not at all.

    Args:
        folder: the search folder; `evaluation/` in it is shown if it is there.
        figures: PNG by name, as `search_figures` names them; None: they are drawn.
        state: how the search ended, if the caller knows better than the journal.
        where: where MLflow holds it, as in `mlflow.json`; None: that file.

    Returns:
        The page's path.

    Raises:
        JournalError: the folder holds no search.
    """
    events = read_events(folder).events
    record = SearchRecord.of(events)
    _apply_rules(record, folder)
    if figures is None:
        figures = {n: to_png(f) for n, f in search_figures(record).items()}
    if state is None and record.ended is None:
        state = "running" if is_running(folder) else "interrupted"
    evaluation, problem = _read_evaluation(folder)
    facts = {
        "folder": str(folder),
        **(_read_json(folder / MLFLOW_FILE) if where is None else where),
    }
    text = search_page(
        record,
        figures=figures,
        explain=Explained(folder),
        evaluation=evaluation,
        evaluation_figures=_read_figures(folder / EVALUATION_FOLDER) if evaluation else {},
        findings=data_findings(events),
        image_map=read_image_map(folder),
        where={**record.network_of(record.kept), **facts},
        state=state,
        notes=[problem] if problem else [],
    )
    return _write_whole(folder / PAGE_FILE, text)


def search_page(
    record: SearchRecord,
    *,
    figures: Mapping[str, bytes],
    explain: Callable[[str | None, str], bytes | None] = lambda _trial, _rule: None,
    evaluation: Mapping[str, Any] | None = None,
    evaluation_figures: Mapping[str, bytes] | None = None,
    findings: Sequence[Finding] = (),
    image_map: ImageMap | None = None,
    where: Mapping[str, Any] | None = None,
    state: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as HTML text that can be encoded as UTF-8.

    Args:
        figures: of the search, PNG by name, in the order in which they are shown.
        explain: the figure for a trial's finding, PNG, by the trial's id and the rule.
        evaluation: what `evaluation/report.json` holds; None: not evaluated yet.
        evaluation_figures: PNG by name.
        findings: about the data or the search as a whole; those of trials are in the record.
        image_map: what is known of single images; None: nobody has looked.
        where: what is known of the places: `folder`, `tracking_uri`, `parent_run_id`, `runs` (run
            id by trial id), `engine`, `weights_digest`.
        state: of the search; None: what the journal says.
        notes: sentences for the head of the page.

    Raises:
        ValueError: `evaluation` is no evaluation.
    """
    page = describe_search(
        record,
        evaluation=evaluation,
        findings=findings,
        where=where or {},
        state=state,
        notes=notes,
    )
    text = _render(page, figures, explain, evaluation_figures or {}, image_map)
    # A file name that is not UTF-8 holds halves of surrogate pairs.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def data_findings(events: Sequence[Event]) -> list[Finding]:
    """Findings about the data or the whole search: those that name no trial."""
    fields = Finding.__dataclass_fields__
    return [
        Finding(**{name: event.get(name) for name in fields})  # type: ignore[arg-type]
        for event in events
        if event["event"] == "finding" and not event.get("trial_id")
    ]


def _apply_rules(record: SearchRecord, folder: Path) -> None:
    """Add what the rules say of each trial's curves and recording; leave out what is refuted."""
    best = best_trials(record)
    for trial in record.trials.values():
        known = {finding.rule for finding in trial.findings}
        recording = find_recording(folder / "trials" / trial.trial_id)
        history = history_of_trial(record, trial, recording=recording, best=best.get(trial.stage))
        new = [finding for finding in diagnose_history(history) if finding.rule not in known]
        trial.findings = [*not_refuted(trial.findings, history), *new]


def _render(
    page: PageData,
    figures: Mapping[str, bytes],
    explain: Callable[[str | None, str], bytes | None],
    test: Mapping[str, bytes],
    image_map: ImageMap | None,
) -> str:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        code=_code, data_uri=_data_uri, percent=_percent, label=label, score=_score, short=_short,
        seconds=_seconds,
    )  # fmt: skip
    style, script = _asset("report.css"), _asset("report.js")
    return environment.from_string(_asset("report.html.j2")).render(
        page=page,
        test=page.test,
        trials=page.trials,
        findings=page.findings,
        search_figures=figures,
        explain=explain,
        test_figures=test,
        image_map=image_map,
        map_size=(WIDTH, HEIGHT),
        captions=_CAPTIONS,
        wide=_WIDE,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _shown(value: object) -> object:
    """The page is made to be passed on."""
    return shown(value) if type(value) is str else value


def _data_uri(image: bytes) -> Markup:
    """Of a PNG or a WebP file."""
    kind = "webp" if image.startswith(b"RIFF") else "png"
    return Markup(f"data:image/{kind};base64," + base64.b64encode(image).decode("ascii"))


def _code(text: str) -> Markup:
    """A sentence of our own: what stands in backticks is a command."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(_shown(text)))))


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}"


def _score(value: float | None, is_loss: bool) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if is_loss or not math.isfinite(value) else f"{value:.2%}"


def _short(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


@lru_cache
def _asset(name: str) -> str:
    return files("visiontuner.tracking").joinpath("report", name).read_text(encoding="utf-8")


def _hash(text: str) -> Markup:
    """What a content security policy knows an inline style or script by."""
    digest = hashlib.sha256(text.encode()).digest()
    return Markup("sha256-" + base64.b64encode(digest).decode("ascii"))


def _read_evaluation(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What `evaluate` left in the search folder, or why it cannot be shown."""
    path = folder / EVALUATION_FOLDER / EVALUATION_REPORT
    if not path.exists():
        return None, None

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        EvaluationReport.from_dict(raw)
    except (OSError, ValueError, TypeError) as error:
        return None, f"The evaluation in {path} cannot be read ({error}); evaluate again."
    return raw, None


def _read_figures(folder: Path) -> dict[str, bytes]:
    order = list(_CAPTIONS)
    paths = sorted(
        folder.glob("*.png"),
        key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p.stem),
    )
    return {
        path.stem: _as_webp(path) if path.stem in _PHOTOGRAPHS else path.read_bytes()
        for path in paths
    }


def _as_webp(path: Path) -> bytes:
    """A contact sheet in a tenth of its bytes; as it is, if it cannot be read."""
    try:
        with Image.open(path) as image, io.BytesIO() as file:
            image.convert("RGB").save(file, "WEBP", quality=80)
            return file.getvalue()
    except OSError:
        return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # MLflow was away, or a kill came first: the page does without
    return raw if isinstance(raw, dict) else {}


def _write_whole(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path
