"""What Python calls: the verbs of the command line with values in and short, printable results out.

`visiontuner/__init__.py` names what is public; `docs/python.md` shows it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from PIL import Image

from visiontuner.cli.console import SearchConsole, TrainingConsole
from visiontuner.errors import ClassifierError, UserMistake
from visiontuner.experiment.schema import QUICKSTART, Experiment, search_networks
from visiontuner.journal import SearchRecord, TrialRecord, newest_search
from visiontuner.model.classifier import Classifier
from visiontuner.model.runtimes import Exported, Form
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EVALUATION_FOLDER,
    EXPERIMENT_FILE,
    JOURNAL_FILE,
)
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.searches import all_curves, learning_rate_batch_size_map
from visiontuner.workflow import deploy as endpoint_verbs
from visiontuner.workflow import train as training_verbs
from visiontuner.workflow import tune as search_verbs
from visiontuner.workflow.compare import compare as compare_runs
from visiontuner.workflow.diagnose import diagnose as diagnose_trials
from visiontuner.workflow.drift import find_drift
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.evaluate_folder import FolderEvaluation
from visiontuner.workflow.evaluate_folder import evaluate_folder as score_folder
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.lineage import trace
from visiontuner.workflow.preflight import preflight as run_preflight
from visiontuner.workflow.prepare import prepare as look_at_images
from visiontuner.workflow.promote import promote as promote_model
from visiontuner.workflow.quantize import QuantizeResult
from visiontuner.workflow.quantize import export as export_model
from visiontuner.workflow.quantize import quantize as quantize_model
from visiontuner.workflow.query import query as query_images
from visiontuner.workflow.suggest import suggest_images
from visiontuner.workflow.suspects import find_suspects
from visiontuner.workflow.tune import experiment_of, find_search

if TYPE_CHECKING:
    from visiontuner.aws.endpoint import DeploymentPlan
    from visiontuner.serving.client import ImageAnswer
    from visiontuner.serving.lineage import Lineage
    from visiontuner.serving.preflight import PreflightReport
    from visiontuner.serving.promotion import Promotion
    from visiontuner.workflow.drift import DriftResult
    from visiontuner.workflow.evaluate import EvaluationResult
    from visiontuner.workflow.prepare import Prepared
    from visiontuner.workflow.run import SearchResult
    from visiontuner.workflow.suggest import SuggestResult
    from visiontuner.workflow.suspects import SuspectsResult

Settings = Mapping[str, Any] | Sequence[str]
"""Overrides of an experiment: {"training.epochs": 5}, or ["training.epochs=5"] as `--set` takes."""


@dataclass(frozen=True, repr=False)
class DataReport:
    """What is in a data set, and what is wrong with it.

    Attributes:
        result: everything: dataset, summary with sizes and imbalance, findings.
    """

    result: Prepared

    @property
    def counts(self) -> pd.DataFrame:
        """Images of each class (rows) in train, validation and test (columns)."""
        summary = self.result.summary
        return pd.DataFrame(summary.counts, index=pd.Index(summary.class_names, name="class"))

    @property
    def findings(self) -> pd.DataFrame:
        """One row a finding: severity, rule, evidence, advice."""
        columns = ["severity", "rule", "evidence", "advice"]
        return pd.DataFrame(map(asdict, self.result.findings), columns=columns)

    def files(self, split: Literal["train", "validation", "test"]) -> list[Path]:
        """The images of a split."""
        dataset = self.result.dataset
        return [dataset.root / sample.path for sample in dataset.splits[split]]

    def __repr__(self) -> str:
        summary, rules = self.result.summary, [found.rule for found in self.result.findings]
        totals = ", ".join(f"{count:,} {split}" for split, count in summary.totals.items())
        more = f" and {len(rules) - 3} more" if len(rules) > 3 else ""
        return (
            f"DataReport {self.result.dataset.root} ({len(summary.class_names)} classes)\n"
            f"images: {totals}\n"
            f"findings: {', '.join(rules[:3]) or 'none'}{more}"
        )


class Search:
    """A search or a single training: a search folder, and what can be asked of it.

    Args:
        folder: an existing search folder; default: the newest one in `searches/`.

    Raises:
        JournalError: there is none.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else newest_search()
        self.record = SearchRecord.load(self.folder)
        self.model: str | None = None
        """`models:/NAME/VERSION` in MLflow, where this process registered it."""
        self.model_int8: str | None = None
        """Likewise its int8 form, where the experiment says `package: int8`."""
        self.tracking_problem: str | None = None
        """Why MLflow does not hold everything; `sync` writes the rest."""

    @classmethod
    def _of(cls, result: SearchResult) -> Search:
        search = cls(result.folder)
        search.model, search.model_int8 = result.model, result.model_int8
        search.tracking_problem = result.tracking_problem
        return search

    @property
    def state(self) -> str:
        """How it ended: completed, interrupted, time_budget …; running while it has no end."""
        return str((self.record.ended or {"state": "running"})["state"])

    @property
    def best(self) -> TrialRecord | None:
        """The trial or baseline that is kept; None if nothing can be used."""
        return self.record.kept

    @property
    def trials(self) -> pd.DataFrame:
        """One row a trial, the best first; the columns of `visiontuner compare`."""
        return compare(self)

    @property
    def experiment(self) -> Experiment:
        return Experiment.load(self.folder / EXPERIMENT_FILE)

    @cached_property
    def classifier(self) -> Classifier:
        """The best trial as a classifier, calibrated once `evaluate` has run.

        Raises:
            ClassifierError: no trial could be packaged.
        """

        folder = self.folder / CLASSIFIER_FOLDER
        if not folder.is_dir():
            raise ClassifierError(f"{self.folder} has no classifier: no trial of it could be used.")
        return Classifier.load(folder)

    def evaluate(
        self,
        *,
        prefer: Literal["best", "cheapest", "fastest"] = "best",
        precision: float = 0.95,
        within: float | None = None,
        max_latency_ms: float | None = None,
        progress: bool = True,
    ) -> Evaluation:
        """Choose and calibrate on validation, then look at the test images once.

        Args:
            prefer: `cheapest` takes the fastest of the trials that are tied with the best one,
                `fastest` the one whose network answers fastest here.
            within: with `fastest`, how much less accurate it may be, 0.01 is a point.
            max_latency_ms: only networks that answer one image as fast, on one thread.
            precision: how many of the answers called confident shall be right, in (0, 1].

        Raises:
            UserMistake: the search still runs, or its images have changed.
        """

        with _console(progress) as console:
            result = evaluate_search(
                self.folder,
                prefer=prefer,
                precision=precision,
                within=within,
                max_latency_ms=max_latency_ms,
                observer=console,
            )
        self.__dict__.pop("classifier", None)  # it has another temperature now
        self.model = result.model or self.model
        return Evaluation(result)

    def plot(self, kind: Literal["curves", "map"] = "curves") -> Image.Image:
        """All trials as one image, about 700 pixels wide.

        Args:
            kind: `curves`, objective and loss by epoch; `map`, the objective by learning rate and
                batch size.

        Raises:
            UserMistake: the map of a search in which not both were searched.
        """
        if kind == "curves":
            figure = all_curves(self.record)
        else:
            drawn = learning_rate_batch_size_map(self.record.searching())
            if drawn is None:
                raise UserMistake(
                    "There is no map: no finished trial has a searched learning rate and batch "
                    'size. plot("curves") shows every trial.'
                )
            figure = drawn
        return Image.open(io.BytesIO(to_png(figure)))

    def __repr__(self) -> str:
        number = len(self.record.trials)
        trials = "1 trial" if number == 1 else f"{number} trials"
        lines = [f"Search {self.folder} ({self.state}, {trials})"]
        if self.best is not None:
            values = ", ".join(
                f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in self.best.configuration.items()
            )
            value, objective = self.best.best_value, self.record.objective
            reached = "" if value is None else f": {objective} {value:.4f}"
            lines.append(f"best {self.best.trial_id}{reached} ({values})")
        if self.model:
            lines.append(f"model {self.model}")
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What the test images say about a chosen model.

    Attributes:
        result: everything: choice, report with confusion matrix and classes, notes.
    """

    result: EvaluationResult

    @property
    def accuracy(self) -> float:
        """Share of the test images that are named right, in [0, 1]; NaN without test images."""
        metric = self.result.report.metrics.get("accuracy")
        return metric.value if metric else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy; NaN without test images."""
        metric = self.result.report.metrics.get("accuracy")
        return (metric.low, metric.high) if metric else (float("nan"), float("nan"))

    @property
    def metrics(self) -> dict[str, float]:
        """Each metric's value; `result.report.metrics` has the intervals."""
        return {name: metric.value for name, metric in self.result.report.metrics.items()}

    @property
    def table(self) -> pd.DataFrame:
        """One row a metric: value, low and high ends of its 95 % interval."""
        return pd.DataFrame.from_dict(
            {name: (m.value, m.low, m.high) for name, m in self.result.report.metrics.items()},
            orient="index",
            columns=["value", "low", "high"],
        )

    def plot(self, kind: str = "reliability") -> Image.Image:
        """A figure of the evaluation, about 700 pixels wide.

        Args:
            kind: reliability, risk_coverage, per_class, confusion (up to 30 classes, confused_pairs
                above) or mistakes.

        Raises:
            UserMistake: there is no such figure, such as `mistakes` where none was made.
        """
        folder = self.result.folder / EVALUATION_FOLDER
        figures = {path.stem: path for path in sorted(folder.glob("*.png"))}
        if kind not in figures:
            raise UserMistake(f"No figure {kind!r} here; there are: {', '.join(figures)}.")
        return Image.open(io.BytesIO(figures[kind].read_bytes()))

    @property
    def notes(self) -> list[str]:
        """Sentences without which the numbers mislead."""
        return [self.result.choice.reason, *self.result.edges, *self.result.report.notes]

    @property
    def model(self) -> str | None:
        """`models:/NAME/VERSION` of the calibrated classifier, if MLflow took it."""
        return self.result.model

    def __repr__(self) -> str:
        low, high = self.interval
        number = self.result.report.num_images
        return (
            f"Evaluation {self.result.folder}\n"
            f"accuracy {self.accuracy:.4f} ({low:.4f} to {high:.4f}) on {number:,} test images\n"
            f"model {self.model or 'not registered'}"
        )


def prepare(
    data: str | Path | Experiment | None = None, *, settings: Settings = (), progress: bool = True
) -> DataReport:
    """Fetch the images and look at every one of them, before anything is trained.

    Args:
        data: as `tune` takes it.

    Raises:
        VisiontunerError: they cannot be fetched or read.
    """
    experiment = _experiment(data, {}, settings)
    with _console(progress) as console:
        return DataReport(look_at_images(experiment, observer=console))


def tune(
    data: str | Path | Experiment | None = None,
    *,
    start: str | Path | Search | None = None,
    backbone: str | None = None,
    backbones: Sequence[str] | None = None,
    trials: int | None = None,
    algorithm: Literal["random", "optuna", "grid"] | None = None,
    settings: Settings = (),
    output: str | Path | None = None,
    on: Literal["local", "auto"] = "local",
    progress: bool = True,
) -> Search:
    """Search hyperparameters; every trial becomes an MLflow run, the best one a model.

    Args:
        data: a folder, an archive (path or URL), s3://… or an `Experiment`; default: the
            quickstart on built-in images; with `start` None means the images of that.
        start: begin with what an earlier search found: its experiment, where `data` is none, its
            best configurations, and its trials for Optuna.
        backbone: a pretrained network; `visiontuner backbones` lists them.
        backbones: several, to search the best one of them too; `["offline"]` are those that need
            no download.
        trials: how many configurations to try.
        settings: overrides of any value of the experiment.
        output: a new folder for the search; default: `searches/NAME-TIME`.
        on: `local` starts a Ray on this machine, `auto` joins the cluster it is in.
        progress: show it.

    Raises:
        VisiontunerError: its message is one line that names the next step.
    """
    flags = {
        "model.backbone": backbone,
        "search.trials": trials,
        "search.algorithm": algorithm,
    }
    if backbone is not None and backbones is not None:
        raise UserMistake("backbone is one network and backbones are several; give one of them.")
    networks = [] if backbones is None else search_networks(backbones)
    overrides = [*networks, *_overrides(settings)]
    earlier = None if start is None else find_search(Path(_subject(start)))
    if earlier is None or isinstance(data, Experiment):
        experiment = _experiment(data, flags, overrides)
    else:
        images = None if data is None else {"source": _experiment(data, {}, ()).data.source}
        experiment = experiment_of(earlier, images, [*_given(flags), *overrides])
    with _console(progress) as console:
        result = search_verbs.run_search(
            experiment,
            output=Path(output) if output else None,
            on=on,
            start=earlier,
            observer=console,
        )
    return Search._of(result)


def resume(
    folder: str | Path | Search, *, on: Literal["local", "auto"] = "local", progress: bool = True
) -> Search:
    """Go on with a search or a training after any interruption.

    Raises:
        JournalError: the folder holds no search, or another process runs it.
    """
    search = folder if isinstance(folder, Search) else Search(folder)
    if search.record.is_training:
        with _training_console(progress) as console:
            return Search._of(training_verbs.resume_training(search.folder, observer=console))
    with _console(progress) as console:
        return Search._of(search_verbs.resume_search(search.folder, on=on, observer=console))


def train(
    data: str | Path | Experiment | None = None,
    *,
    start: str | Path | Search | None = None,
    backbone: str | None = None,
    epochs: int | None = None,
    settings: Settings = (),
    on: Literal["train", "train+validation"] = "train",
    output: str | Path | None = None,
    progress: bool = True,
) -> Search:
    """Train once, without a search; the model registers like any other.

    Args:
        data: as `tune` takes it; with `start` None means the images of that.
        start: take the hyperparameters of a search's best trial, of a run, `champion` or a model.
        on: which images; of train+validation the last epoch counts.

    Raises:
        VisiontunerError: its message is one line that names the next step.
    """
    flags = {"model.backbone": backbone, "training.epochs": epochs}
    origin, where = None, "the arguments"
    overrides = [*_given(flags), *_overrides(settings)]
    if start is not None:
        origin = training_verbs.find_origin(
            str(start.folder if isinstance(start, Search) else start)
        )
    if origin is not None and data is None:
        raw = dict(origin.experiment)
    else:
        raw = _experiment(data, {}, ()).model_dump(mode="json")
    experiment = training_verbs.one_training(raw, overrides, origin, where=where)
    with _training_console(progress) as console:
        result = training_verbs.train(
            experiment,
            origin=origin,
            trained_on=on,
            output=Path(output) if output else None,
            observer=console,
        )
    return Search._of(result)


def evaluate(search: str | Path | Search | None = None, **options: Any) -> Evaluation:
    """`Search.evaluate` of a search or its folder; default: the newest."""
    return (search if isinstance(search, Search) else Search(search)).evaluate(**options)


def evaluate_folder(
    data: str | Path,
    model: str | Path | Search | None = None,
    *,
    classes: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> FolderEvaluation:
    """Score a model on labelled images from anywhere, as `evaluate --data` does.

    Args:
        data: class folders, a table of paths and labels, or an archive.
        model: a search, a classifier folder or a registered model; default: the newest search's.
        classes: a table with the columns class and becomes, for names that differ from the model's.
        output: where the numbers go; default: `evaluations/NAME` in the search folder, or here.

    Raises:
        UserMistake: there is no such model, or the images have other classes than it.
        DataError: there are no labelled images, or none can be read.
    """
    with _console(progress) as console:
        return score_folder(
            str(data),
            model=None if model is None else _subject(model),
            classes=Path(classes) if classes else None,
            output=Path(output) if output else None,
            observer=console,
        )


def compare(
    *targets: str | Path | Search,
    where: str | None = None,
    sort: str | None = None,
    reverse: bool = False,
) -> pd.DataFrame:
    """Runs side by side, the best first.

    Args:
        targets: searches, search folders, MLflow run ids, experiment names, models.
        where: a condition such as `learning_rate < 0.01 and batch_size == 64`.
        sort: a column; default: the objective.

    Raises:
        UserMistake: a target, column or condition that does not exist.
    """

    subjects = [_subject(target) for target in targets]
    return compare_runs(subjects, where=where, sort=sort, reverse=reverse)


def diagnose(target: str | Path | Search | None = None) -> pd.DataFrame:
    """What the rules find in trainings, and what to change: one row a finding.

    Args:
        target: a search, its folder, an MLflow run or experiment; default: the newest search.

    Returns:
        Columns run, severity, rule, step, evidence, advice; rows on the images have the run "".
    """

    diagnosis = diagnose_trials(None if target is None else _subject(target))
    found = [("", finding) for finding in diagnosis.data]
    found += [(run.name, finding) for run in diagnosis.runs for finding in run.findings]
    columns = ["run", "severity", "rule", "step", "evidence", "advice"]
    rows = [(run, *(getattr(finding, name) for name in columns[1:])) for run, finding in found]
    return pd.DataFrame(rows, columns=columns)


def suspects(
    target: str | Path | Search | Experiment | None = None,
    *,
    settings: Settings = (),
    output: str | Path | None = None,
    progress: bool = True,
) -> SuspectsResult:
    """Name the images whose label is probably wrong, in a table that `data.labels` reads.

    Args:
        target: a search or its folder, whose images and network are taken, or images as `tune`
            takes them; default: the newest search.
        settings: overrides of the experiment, with images.
        output: where suspects.csv is written; default: `suspects` in the search folder, or here.

    Raises:
        UserMistake: the images are too few or too many, or suspects.csv is there and was edited.
    """
    search, experiment = _labelled(target, settings)
    with _console(progress) as console:
        return find_suspects(
            search,
            experiment=experiment,
            output=Path(output) if output else None,
            observer=console,
        )


def suggest(
    images: str | Path,
    target: str | Path | Search | Experiment | None = None,
    *,
    budget: int = 50,
    settings: Settings = (),
    output: str | Path | None = None,
    progress: bool = True,
) -> SuggestResult:
    """Choose the images of a folder that are most worth a label.

    Args:
        images: the folder of unlabelled images.
        target: a search or its folder, whose images and network are taken, or labelled images as
            `tune` takes them; default: the newest search.
        budget: how many images are chosen.
        settings: overrides of the experiment, with labelled images.
        output: a new folder; default: `suggestions`, here.

    Raises:
        UserMistake: there is nothing to choose from, or the output folder is taken.
    """
    search, experiment = _labelled(target, settings)
    with _console(progress) as console:
        return suggest_images(
            Path(images),
            search,
            experiment=experiment,
            budget=budget,
            output=Path(output) if output else None,
            observer=console,
        )


def drift(
    source: str | Path,
    search: str | Path | Search | None = None,
    *,
    since: timedelta | None = None,
    false_alarms: float = 0.05,
    without: Sequence[str] = (),
    output: str | Path | None = None,
    region: str | None = None,
    progress: bool = True,
) -> DriftResult:
    """Say whether images are still like those that a search's model was made with.

    Args:
        source: a folder of images, or the name of an endpoint with data capture.
        search: default: the newest search.
        since: of an endpoint, no older requests.
        false_alarms: how often any measure may move where nothing has changed, in (0, 1).
        without: measures to leave out, such as `classes`.
        output: default: `drift/NAME` in the search folder.

    Raises:
        UserMistake: there is nothing to compare, or the search's images have changed.
    """
    folder = search.folder if isinstance(search, Search) else search
    with _console(progress) as console:
        return find_drift(
            str(source),
            Path(folder) if folder else None,
            output=Path(output) if output else None,
            since=since,
            region=region,
            false_alarms=false_alarms,
            without=without,
            observer=console,
        )


def _labelled(
    target: str | Path | Search | Experiment | None, settings: Settings
) -> tuple[Path | None, Experiment | None]:
    """A search's folder or an experiment; neither for the newest search."""
    search, experiment = None, None
    if isinstance(target, Search):
        search = target.folder
    elif target is not None and not isinstance(target, Experiment) and _is_search(target):
        search = Path(target)
    elif target is not None:
        experiment = _experiment(target, {}, settings)
    if experiment is None and settings:
        raise UserMistake("Settings go with images: a search has its own.")
    return search, experiment


def _is_search(target: str | Path) -> bool:
    return (Path(target) / JOURNAL_FILE).is_file()


def promote(
    model: str | Search | None = None, *, force: bool = False, dry_run: bool = False
) -> Promotion:
    """Make a model's newest version the champion, if it is better beyond noise.

    Args:
        model: a search, or NAME, NAME/VERSION, NAME@ALIAS, models:/…; default: the newest search's.

    Raises:
        UserMistake: there is nothing to compare; `force` is the way out.
    """
    return promote_model(_model_name(model), force=force, dry_run=dry_run)


def lineage(subject: str | Path | Search | None = None) -> Lineage:
    """Where a model comes from: trial, search, experiment, images, code, machine.

    Args:
        subject: a search, its folder, an MLflow run, a model, or endpoint:NAME.
    """
    return trace(None if subject is None else _subject(subject))


def preflight(
    model: str | Path | Search | None = None,
    *,
    env_manager: Literal["uv", "local"] = "uv",
    progress: bool = True,
) -> PreflightReport:
    """Serve a model on this machine as an endpoint will, ask it over HTTP, and end the server.

    Args:
        model: a search or any folder of a model, NAME, NAME/VERSION, NAME@ALIAS or models:/…;
            default: the newest search's.
        env_manager: a clean environment from the model's pinned requirements, or this one.

    Raises:
        ServingError: it cannot be installed or served at all.
    """
    with _console(progress) as console:
        return run_preflight(_located(model), env_manager=env_manager, note=console.note)


def quantize(
    model: str | Path | Search | None = None, *, max_loss: float = 0.005, progress: bool = True
) -> QuantizeResult:
    """Make a registered model's int8 form and register it as a version of its own.

    Args:
        model: as `preflight` takes it.
        max_loss: refused where it loses more accuracy than this beyond noise, a fraction.

    Raises:
        UserMistake: there is no such model, or its images are gone or others.
        ServingError: it loses more than `max_loss`.
    """
    with _console(progress) as console:
        return quantize_model(_located(model), max_loss=max_loss, observer=console)


def export(
    model: str | Path | Search | None = None,
    *,
    to: Form = "onnx",
    output: str | Path,
    progress: bool = True,
) -> Exported:
    """Write a model's network for another runtime, with all that it needs to be used.

    Args:
        model: as `preflight` takes it.
        to: `onnx`, `onnx-int8` or `openvino`.
        output: a new folder.

    Raises:
        UserMistake: there is no such model, the folder holds something, or the runtime is missing.
        ExportError: the runtime cannot read the network, or answers differently.
    """
    with _console(progress) as console:
        return export_model(_located(model), to, Path(output), observer=console)


def deploy(
    model: str | Search | None = None,
    *,
    preflight: bool = True,
    dry_run: bool = False,
    progress: bool = True,
    **options: Any,
) -> DeploymentPlan:
    """Put a model behind a SageMaker endpoint; an endpoint costs money until `undeploy`.

    Args:
        model: a search, or a registered model by NAME, NAME/VERSION, NAME@ALIAS or models:/….
        preflight: serve the model here first, as the endpoint will.
        dry_run: find and check everything, and make nothing.
        options: of `visiontuner.workflow.deploy.DeployOptions`: name, region, instance_type, ttl ….

    Returns:
        What was made, or with `dry_run` would be; `name` is the endpoint's.

    Raises:
        ServingError: the preflight fails, or AWS refuses; nothing that costs money is left.
    """
    chosen = endpoint_verbs.DeployOptions(**options)
    aws, plan = endpoint_verbs.plan_deployment(_model_name(model), chosen)
    if not dry_run:
        with _console(progress) as console:
            endpoint_verbs.deploy(
                aws, plan, preflight="uv" if preflight else None, note=console.note
            )
    return plan


def endpoints(region: str | None = None) -> pd.DataFrame:
    """The endpoints that visiontuner deployed in a region, oldest first: one row each.

    Returns:
        Columns name, state, model, age_hours, ttl_hours, cost (US dollars), overdue.

    Raises:
        ServingError: AWS refuses or cannot be reached.
    """
    columns = ["name", "state", "model", "age_hours", "ttl_hours", "cost", "overdue"]
    found = endpoint_verbs.endpoints(region)
    rows = [[getattr(endpoint, column) for column in columns] for endpoint in found]
    return pd.DataFrame(rows, columns=columns)


def undeploy(
    name: str, *, region: str | None = None, artifacts: bool = False, progress: bool = True
) -> dict[str, str]:
    """Delete an endpoint, its configuration and its model, or what is left of them.

    Args:
        artifacts: also the model's archive in S3.

    Returns:
        The archives that were kept, and for each the command that deletes it.

    Raises:
        UserMistake: there is no such endpoint, and nothing is left of one.
        ServingError: AWS refuses or cannot be reached.
    """
    with _console(progress) as console:
        return endpoint_verbs.undeploy(name, region=region, artifacts=artifacts, note=console.note)


def query(
    images: str | Path | Sequence[str | Path],
    *,
    endpoint: str | None = None,
    url: str | None = None,
    model: str | Path | Search | None = None,
    **options: Any,
) -> list[ImageAnswer]:
    """Ask an endpoint, a scoring server or a model what is on images.

    Args:
        images: files, folders and http(s) URLs.
        endpoint, url, model: exactly one of them.
        options: region, top_k, threshold, workers.

    Returns:
        One answer an image, in their order.

    Raises:
        UserMistake: not exactly one way is named, or an option breaks a rule.
        ServingError: nothing answers.
    """
    sources = [images] if isinstance(images, str | Path) else images
    asked = None if model is None else _subject(model)
    answers = query_images(
        [str(source) for source in sources], endpoint=endpoint, url=url, model=asked, **options
    )
    return list(answers)


def _experiment(
    data: str | Path | Experiment | None, flags: Mapping[str, Any], settings: Settings
) -> Experiment:
    overrides = [*_given(flags), *_overrides(settings)]
    if isinstance(data, Experiment):
        raw, where = data.model_dump(mode="json"), "the experiment"
    elif data is None:
        raw, where = dict(QUICKSTART), "the quickstart"
    elif Path(data).suffix in (".yaml", ".yml"):
        raise UserMistake(f"{data} is an experiment file: pass Experiment.load({str(data)!r}).")
    else:
        raw, where = {"data": {"source": str(data)}}, "the arguments"
    return Experiment.parse(raw, overrides, where=where)


def _overrides(settings: Settings) -> list[str]:
    """Python's values as JSON, which YAML reads as what they are: None is null, not "None"."""
    if not isinstance(settings, Mapping):
        return list(settings)
    return [
        f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"
        for key, value in settings.items()
    ]


def _given(flags: Mapping[str, Any]) -> list[str]:
    return _overrides({key: value for key, value in flags.items() if value is not None})


def _model_name(model: str | Search | None) -> str | None:
    return model.model or model.experiment.name if isinstance(model, Search) else model


def _located(model: str | Path | Search | None) -> str | None:
    """As commands take a model that may be a folder."""
    return str(model) if isinstance(model, Path) else _model_name(model)


def _subject(target: str | Path | Search) -> str:
    return str(target.folder if isinstance(target, Search) else target)


@contextmanager
def _console(progress: bool) -> Iterator[Any]:
    """The live view of the command line, or one that shows nothing."""

    console = SearchConsole() if progress else None
    try:
        yield console or Silent()
    finally:
        if console is not None:
            console.close()


@contextmanager
def _training_console(progress: bool) -> Iterator[Any]:
    console = TrainingConsole() if progress else None
    try:
        yield console or training_verbs.SilentTraining()
    finally:
        if console is not None:
            console.close()
