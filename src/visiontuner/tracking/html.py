"""One page about a search that needs nothing else: no server, no network, no MLflow.

`page.py` puts the words and numbers together, `report/` holds the template with its style and its
script. Every value is escaped. The page carries a content security policy that lets it load nothing
and run no script but its own, so that a class called `<script>` stays a name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from visiontuner.journal import Event, Finding, SearchRecord, is_running, read_events
from visiontuner.layout import EVALUATION_FOLDER, EVALUATION_REPORT, MLFLOW_FILE
from visiontuner.text import shown
from visiontuner.tracking import figures as drawing
from visiontuner.tracking.page import PageData, describe_search, label
from visiontuner.tracking.recordings import Explained
from visiontuner.training.recording.records import find_recording
from visiontuner.training.rules import diagnose_history, history_of_trial

PAGE_FILE = "report.html"

_WIDE = ("confusion", "confused_pairs", "per_class", "mistakes")
_CAPTIONS = {
    "all_curves": "Learning curves of all trials",
    "best_so_far": "Best objective so far against time",
    "learning_rate_batch_size": "Learning rate against batch size, coloured by the objective",
    "parallel_coordinates": "Every trial's searched values and its outcome",
    "importance": "How much each searched value decided",
    "reliability": "Confidence against accuracy, before and after temperature scaling",
    "risk_coverage": "Share of wrong answers against the share of answered pictures",
    "confusion": "Confusion matrix: true classes in rows, predicted ones in columns",
    "confused_pairs": "The most confused pairs of classes",
    "per_class": "Recall and precision of the weakest classes",
    "mistakes": "The pictures that were most confidently taken for another class",
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
        figures = {n: drawing.to_png(f) for n, f in drawing.search_figures(record).items()}
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
        where={**_features(events), **facts},
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
    text = _render(page, figures, explain, evaluation_figures or {})
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
    """Add what the rules say of each trial's curves and recording, if the journal has not."""
    for trial in record.trials.values():
        known = {finding.rule for finding in trial.findings}
        recording = find_recording(folder / "trials" / trial.trial_id)
        found = diagnose_history(history_of_trial(record, trial, recording=recording))
        trial.findings += [finding for finding in found if finding.rule not in known]


def _render(
    page: PageData,
    figures: Mapping[str, bytes],
    explain: Callable[[str | None, str], bytes | None],
    test: Mapping[str, bytes],
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


def _data_uri(png: bytes) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))


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
    from visiontuner.evaluation.report import EvaluationReport

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
    return {path.stem: path.read_bytes() for path in paths}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # MLflow was away, or a kill came first: the page does without
    return raw if isinstance(raw, dict) else {}


def _features(events: Sequence[Event]) -> dict[str, Any]:
    kinds = ("features_ready", "pictures_ready")
    found = next((event for event in events if event["event"] in kinds), {})
    return {name: found.get(name) for name in ("backbone", "weights_digest", "engine")}


def _write_whole(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path
