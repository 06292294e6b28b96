"""Look at the test images once, with the chosen model, and make what they say part of it.

The order matters: the model is chosen, its temperature fitted and its threshold set on validation;
only then are the test images opened. Everything lands in FOLDER/evaluation, from where `sync`
writes it into MLflow; the calibrated classifier becomes a new registered version.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from visiontuner.data.dataset import ImageDataset
from visiontuner.data.images import decode_image, read_pixels
from visiontuner.errors import (
    BadImageError,
    SearchFailed,
    TrackingError,
    UserMistake,
    VisiontunerError,
)
from visiontuner.evaluation.calibration import (
    ChosenThreshold,
    probabilities_of,
    reliability,
    risk_coverage,
)
from visiontuner.evaluation.choice import Choice, edges
from visiontuner.evaluation.compare import NetworkPoint, front_table
from visiontuner.evaluation.intervals import share_interval
from visiontuner.evaluation.projection import MOST_POINTS
from visiontuner.evaluation.report import EvaluationReport, abstention_notes, evaluate_predictions
from visiontuner.evaluation.scores import confident_mistakes, confused_pairs
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import temporary_folder
from visiontuner.journal import SearchRecord, TrialRecord, is_running, newest_search, packaged_trial
from visiontuner.model.classifier import FEATURE_MAP, Classifier
from visiontuner.model.classifier_files import recalibrate, replacing, write_json
from visiontuner.model.heatmaps import Explainer
from visiontuner.model.novelty import balanced_sample
from visiontuner.paths import (
    CLASSIFIER_FOLDER,
    EVALUATION_CLASSES,
    EVALUATION_FOLDER,
    EVALUATION_PREDICTIONS,
    EVALUATION_REPORT,
    EXPERIMENT_FILE,
    IMAGE_MAP_FILE,
    TEST_LOOKS_FILE,
    tracking_uri,
)
from visiontuner.search.plan import stage_of
from visiontuner.serving.cost import NetworkCost, measure_costs
from visiontuner.serving.registry import classifier_digest, digest_of_test_set, earlier_looks
from visiontuner.text import csv_row, next_command
from visiontuner.tracking.figures.evaluation import (
    Caption,
    contact_sheet,
    evaluation_figures,
    network_front,
)
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.searches import importances
from visiontuner.workflow.answering import Answers, answer_images
from visiontuner.workflow.image_checks import check_labels_if_quick, find_outliers
from visiontuner.workflow.image_map import Marks, draw_image_map, write_test_features
from visiontuner.workflow.inputs import NAMED, Inputs, Observer, Silent, require_same_data
from visiontuner.workflow.promote import open_store
from visiontuner.workflow.run import is_packaged, package_trial
from visiontuner.workflow.selection import ValidationAnswers
from visiontuner.workflow.sync import sync_search

# What an evaluation leaves in FOLDER/evaluation; the folder appears whole.
#
# report.json          numbers with intervals, choice, mistakes, evaluations of the test set
# predictions.npz      probabilities (N, C), labels, content digests, paths; for paired tests; known
# classes.csv          one line a class
# networks.csv         of a search over several: accuracy against what an answer costs
# *.png                reliability, risk and coverage, confusion, mistakes


# Sides of the images on the contact sheet, in pixels.
_THUMBNAIL = 224


def num_test_evaluations(folder: Path) -> int:
    """How many evaluations of its test set a search has had."""
    files = (folder / TEST_LOOKS_FILE, folder / EVALUATION_FOLDER / EVALUATION_REPORT)
    return max(map(_read_num_evaluations, files))


def count_test_evaluation(folder: Path) -> int:
    """Count one more evaluation of the test set, whether or not it is finished.

    Raises:
        VisiontunerError: the folder cannot be written.
    """
    looks = num_test_evaluations(folder) + 1
    path = folder / TEST_LOOKS_FILE
    try:
        fresh = path.with_suffix(".part")  # a kill must not leave half of it
        fresh.write_text(json.dumps({"looks": looks}) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {path} ({error.strerror}). Make room.") from None
    return looks


def _read_num_evaluations(file: Path) -> int:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["looks"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def write_evaluation(
    folder: Path,
    *,
    report: EvaluationReport,
    facts: Mapping[str, Any],
    answers: Answers,
    classifier: Classifier,
    root: Path,
    mistakes: int,
) -> None:
    """Write the folder of an evaluation in place of an older one.

    Args:
        facts: plain JSON values, written beside the report's own.
        root: what the samples' paths are relative to.
        classifier: which gave the answers.
        mistakes: how many of the most confidently wrong images to show.

    Raises:
        VisiontunerError: the folder cannot be written.
    """
    with replacing(folder) as temporary:
        more = _write_test(temporary, report, answers, classifier, root, mistakes)
        _write_networks(temporary, facts.get("networks") or [])
        write_json(temporary / EVALUATION_REPORT, {**report.to_dict(), **facts, **more})


def _write_test(
    folder: Path,
    report: EvaluationReport,
    answers: Answers,
    classifier: Classifier,
    root: Path,
    count: int,
) -> dict[str, Any]:
    """Tables and figures over the test images; returns what the report says of them."""

    if not answers.samples:
        return {"mistakes": [], "confused_pairs": []}
    labels = np.array([sample.label for sample in answers.samples])
    probabilities = probabilities_of(answers.logits, report.temperature)
    arrays: dict[str, NDArray[Any]] = {
        "probabilities": probabilities.astype(np.float32),
        "labels": labels,
        "digests": np.array([sample.digest for sample in answers.samples]),
        "paths": np.array([sample.path for sample in answers.samples]),
    }
    if classifier.novelty is not None and answers.novelty is not None:
        arrays["known"] = answers.novelty <= classifier.novelty.threshold
    np.savez_compressed(folder / EVALUATION_PREDICTIONS, allow_pickle=False, **arrays)
    rows = [
        {k: v for k, v in asdict(score).items() if not isinstance(v, dict)}
        for score in report.classes
    ]
    table = [tuple(rows[0]), *(row.values() for row in rows)]
    (folder / EVALUATION_CLASSES).write_text("".join(map(csv_row, table)), encoding="utf-8")
    wrong = confident_mistakes(probabilities, labels, report.class_names, count)
    _draw(folder, report, answers, probabilities, labels)
    shown = [(answers.samples[m.index].path, (m.true, m.predicted, m.probability)) for m in wrong]
    write_contact_sheet(folder / "mistakes.png", root, shown, report.class_names)
    _write_explained_sheet(folder / "mistakes_explained.png", classifier, root, shown)
    return {
        "mistakes": [
            {
                "path": answers.samples[mistake.index].path,
                "true": mistake.true,
                "predicted": mistake.predicted,
                "probability": mistake.probability,
            }
            for mistake in wrong
        ],
        "confused_pairs": [
            asdict(pair) for pair in confused_pairs(report.confusion, report.class_names)
        ],
    }


def _write_networks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy against cost of the networks, as a table and a figure; nothing without any."""
    if not rows:
        return
    lines = [tuple(rows[0]), *(tuple(row.values()) for row in rows)]
    (folder / "networks.csv").write_text("".join(map(csv_row, lines)), encoding="utf-8")
    (folder / "networks.png").write_bytes(to_png(network_front(rows)))


def _draw(
    folder: Path,
    report: EvaluationReport,
    answers: Answers,
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
) -> None:
    figures = evaluation_figures(
        report,
        reliability(probabilities_of(answers.logits), labels),
        reliability(probabilities, labels),
        risk_coverage(probabilities, labels),
    )
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(to_png(figure))


def write_contact_sheet(
    file: Path,
    root: Path,
    shown: Sequence[tuple[str, Caption]],
    class_names: Sequence[str],
) -> None:
    """Draw images with their captions; without any that can still be read there is no file.

    Args:
        root: what the images' paths are relative to.
    """
    images: list[Image] = []
    captions: list[Caption] = []
    for path, caption in shown:
        try:
            image = decode_image(root / path, target=_THUMBNAIL)
        except BadImageError:  # it was there a minute ago
            continue
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        images.append(image)
        captions.append(caption)
    if images:
        file.write_bytes(to_png(contact_sheet(images, captions, class_names)))


def _write_explained_sheet(
    file: Path, classifier: Classifier, root: Path, shown: Sequence[tuple[str, Caption]]
) -> None:
    """The same images as the network saw them, under the heat map of what they were taken for.

    There is no file where the network has no heat maps.
    """
    if FEATURE_MAP not in classifier.output_names:
        return
    explainer = Explainer(classifier)
    images: list[NDArray[np.uint8]] = []
    captions: list[Caption] = []
    for path, caption in shown:
        try:
            pixels = read_pixels(root / path, classifier.preprocessing)
        except BadImageError:  # it was there a minute ago
            continue
        (heat,) = explainer.explain(pixels[None])
        images.append(heat.over(pixels))
        captions.append(caption)
    if images:
        file.write_bytes(to_png(contact_sheet(images, captions, classifier.class_names)))


Prefer = Literal["best", "cheapest", "fastest"]

DEFAULT_PRECISION = 0.95
_MISTAKES = 24
_MOST_COMPARED = 5_000  # test images, whose features are computed for it: a minute or two


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        report: over the test images; without any, its notes say so and its metrics are empty.
        looks: how many times models of this name were evaluated on these test images, this time
            included.
        model: `models:/NAME/VERSION` of the calibrated classifier, if MLflow took it.
        tracking_problem: why MLflow does not hold everything; `sync` writes the rest.
        unreadable: test path -> why it was left out.
    """

    folder: Path
    choice: Choice
    edges: tuple[str, ...]
    report: EvaluationReport
    looks: int
    tracking_uri: str
    model: str | None
    tracking_problem: str | None
    unreadable: dict[str, str]


def evaluate_search(
    folder: Path | None = None,
    *,
    prefer: Prefer = "best",
    precision: float = DEFAULT_PRECISION,
    within: float | None = None,
    max_latency_ms: float | None = None,
    observer: Observer | None = None,
) -> EvaluationResult:
    """Choose, calibrate, look at the test images once, and register the result.

    Args:
        folder: a search folder; default: the newest search.
        prefer: `cheapest` takes, of the trials that cannot be told apart from the best one, the
            one with the fewest training seconds; `fastest`, of the networks that cannot be told
            apart from the best one, the one that answers fastest on this machine.
        within: with `fastest`, networks that are less accurate by so much count too; a fraction.
        max_latency_ms: only networks that answer one image in so many milliseconds on one thread
            of this machine.
        precision: the confidence threshold is set so that so many of the answers above it are
            right on validation.

    Raises:
        UserMistake: the search is still running, its images have changed, or a value is wrong.
        SearchFailed: no trial of the search can be used.
    """
    if not 0 < precision < 1:
        raise UserMistake(f"--precision must be between 0 and 1, got {precision:g}.")
    if within is not None and prefer != "fastest":
        raise UserMistake("--within is for --prefer fastest: how much less accurate it may be.")
    wanted = Wanted(prefer, precision, within, max_latency_ms)
    folder = folder or newest_search()
    record = SearchRecord.load(folder)
    if is_running(folder):
        raise UserMistake(f"{folder} is still running. Evaluate it when it has ended.")
    if record.best is None:
        raise SearchFailed(
            f"{folder} has no trial that could be evaluated. "
            f"`{next_command('diagnose', folder)}` says what went wrong."
        )
    return _Evaluation(folder, record, wanted, observer or Silent()).run()


class Wanted(NamedTuple):
    """What the model is to be, see `evaluate_search`."""

    prefer: Prefer
    precision: float
    within: float | None = None
    max_latency_ms: float | None = None


class _Evaluation:
    """One evaluation of one search."""

    def __init__(
        self,
        folder: Path,
        record: SearchRecord,
        wanted: Wanted,
        observer: Observer,
    ) -> None:
        self.folder = folder
        self.record = record
        self.wanted = wanted
        self.precision = wanted.precision
        self.observer = observer
        self.experiment = Experiment.load(folder / EXPERIMENT_FILE)
        self.inputs = Inputs(self.experiment, observer)
        self.validation = ValidationAnswers(folder, record, self.experiment, inputs=self.inputs)

    def run(self) -> EvaluationResult:
        dataset = self.inputs.dataset
        require_same_data(self.record, dataset)
        costs = self._costs()
        choice = self.validation.choose(
            self.wanted.prefer,
            milliseconds={name: cost.ms_one_thread for name, cost in costs.items()} or None,
            within=self.wanted.within,
            max_latency_ms=self.wanted.max_latency_ms,
        )
        self.observer.note(choice.reason)
        trial = self.record.named(choice.chosen)
        assert trial is not None
        self._package(trial)
        temperature, threshold, notes = self.validation.calibrate(choice.chosen, self.precision)
        self._calibrate(temperature, threshold)
        answers = self._answer(dataset, trial)
        looks = self._count_look(answers)
        self._note_unreadable(answers.bad)
        notes = [*notes, *self._leak_notes(answers)]
        report = self._report(answers, temperature, threshold, notes)
        at_edges = tuple(
            edge.sentence
            for edge in edges(
                self.record,
                self.experiment.search.space,
                tied=choice.tied,
                importance=importances(self.record),
            )
        )
        self._write(dataset.root, choice, at_edges, report, answers, looks, threshold, costs)
        self._draw_map(trial, answers)
        model, problem = self._track()
        return EvaluationResult(
            folder=self.folder,
            choice=choice,
            edges=at_edges,
            report=report,
            looks=looks,
            tracking_uri=tracking_uri(),
            model=model,
            tracking_problem=problem,
            unreadable=answers.bad,
        )

    def _costs(self) -> dict[str, NetworkCost]:
        """Of the networks, where there are several or an answer's time is asked about."""
        names = list(self.record.best_by_network()) or [self.experiment.model.backbone]
        wanted = self.wanted
        asked = wanted.prefer == "fastest" or wanted.max_latency_ms is not None
        if (len(names) < 2 and not asked) or self.record.is_unvalidated:
            return {}
        self.observer.note(f"Measuring what an answer of {', '.join(names)} takes here.")
        return _measure_networks(self.inputs, names)

    def _networks(self, costs: Mapping[str, NetworkCost]) -> list[dict[str, Any]]:
        """Accuracy against cost, one row a network."""
        if not costs:
            return []
        accuracy = self.validation.accuracy_by_network()
        return front_table(
            [
                NetworkPoint(backbone=name, accuracy=accuracy[name], cost=cost.to_dict())
                for name, cost in costs.items()
                if name in accuracy
            ]
        )

    def _package(self, trial: TrialRecord) -> None:
        """The chosen trial in `classifier/`; most often it is there already."""
        if (
            packaged_trial(self.folder) == trial.trial_id
            and is_packaged(self.folder, self.record)
            and self.validation.has_logits(trial.trial_id)
        ):
            return
        for said in (self.validation.restore(trial), self.validation.refit(trial)):
            if said:
                self.observer.note(said)
        self.observer.note(f"Packaging {trial.trial_id} as a classifier.")
        package_trial(
            self.folder,
            trial,
            inputs=self.inputs.of_trial(trial),
            record=self.record,
        )

    def _calibrate(self, temperature: float, threshold: ChosenThreshold | None) -> None:
        """Temperature and threshold into the classifier; its reference is answered anew."""

        if self.record.is_unvalidated:
            return  # it was packaged with what it took over, if there was something
        assert threshold is not None
        recalibrate(
            self.folder / CLASSIFIER_FOLDER,
            temperature=temperature,
            threshold=threshold.value,
            abstains=threshold.value is None,
            metadata={
                "calibration": {
                    "wanted_precision": self.precision,
                    "validation_precision": _finite(threshold.precision),
                    "validation_coverage": _finite(threshold.coverage),
                }
            },
        )

    # the test images

    @cached_property
    def _classifier(self) -> Classifier:
        """As it is served: with the temperature that was just set."""

        return Classifier.load(self.folder / CLASSIFIER_FOLDER)

    def _answer(self, dataset: ImageDataset, trial: TrialRecord) -> Answers:
        return answer_images(
            self._classifier,
            dataset.root,
            dataset.splits["test"],
            keep_features=self._on_the_map(dataset, trial),
            progress=lambda done, total: self.observer.progress("Test", done, total, "images"),
        )

    def _on_the_map(self, dataset: ImageDataset, trial: TrialRecord) -> frozenset[str]:
        """Test images whose features are kept; none of a fine-tuned network, which has its own."""
        is_head = trial.trial_id in self.record.baselines
        if not is_head and stage_of(self.experiment, trial).on_images:
            return frozenset()
        samples = dataset.splits["test"]
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        return frozenset(samples[row].path for row in balanced_sample(labels, MOST_POINTS))

    def _count_look(self, answers: Answers) -> int:
        if not answers.samples:
            return num_test_evaluations(self.folder)
        looks = count_test_evaluation(self.folder)
        name = self.record.started["experiment"]["name"]
        try:
            return max(looks, 1 + earlier_looks(open_store(), name, _test_set(answers)))
        except TrackingError:  # away, or there is none yet
            return looks

    def _note_unreadable(self, bad: Mapping[str, str]) -> None:
        for path, reason in list(bad.items())[:NAMED]:
            self.observer.note(f"warning: left out {path}: {reason}")
        if len(bad) > NAMED:
            self.observer.note(f"… and {len(bad) - NAMED} more; report.json names them all.")

    def _leak_notes(self, answers: Answers) -> list[str]:
        """That other splits show some test images as well, and the accuracy without these.

        Nothing where no features are there to compare, or `data.on_leak: drop` has left out what
        shows the same.
        """
        inputs, number = self.inputs, len(answers.samples)
        if not number or self.experiment.data.on_leak != "warn":
            return []
        if inputs.cached_features() is None:
            return []
        if number > _MOST_COMPARED:
            command = next_command("prepare", "--data", self.experiment.data.source)
            return [f"Whether training images show the same as test images, `{command}` says."]
        leaked = inputs.leaks.in_split("test")
        alone = np.array([sample.path not in leaked for sample in answers.samples])
        if alone.all():
            return []
        labels = np.array([sample.label for sample in answers.samples])
        right = (answers.logits.argmax(axis=1) == labels)[alone]
        note = (
            f"{number - len(right):,} of {number:,} test images show the same as a training or "
            "validation image, which makes accuracy read too high"
        )
        if len(right):
            rest = share_interval(int(right.sum()), len(right))
            note += f"; without them it is {rest.value:.4f} ({rest.low:.4f} to {rest.high:.4f})"
        command = next_command("prepare", "--all", "--data", self.experiment.data.source)
        return [f"{note}. `{command}` names them."]

    def _report(
        self,
        answers: Answers,
        temperature: float,
        threshold: ChosenThreshold | None,
        notes: Sequence[str],
    ) -> EvaluationReport:
        names = self._classifier.class_names
        if not answers.samples:
            return EvaluationReport(
                class_names=names,
                num_images=0,
                temperature=temperature,
                metrics={},
                classes=(),
                confusion=np.zeros((len(names), len(names)), dtype=np.int64),
                threshold=None,
                notes=(
                    _untested(answers.bad, self.experiment.data.source),
                    *notes,
                    *abstention_notes(threshold),
                ),
            )
        return evaluate_predictions(
            logits=answers.logits,
            labels=np.array([sample.label for sample in answers.samples]),
            class_names=names,
            temperature=temperature,
            threshold=threshold,
            seed=self.experiment.seed,
            notes=notes,
        )

    # what is kept

    def _write(
        self,
        root: Path,
        choice: Choice,
        at_edges: Sequence[str],
        report: EvaluationReport,
        answers: Answers,
        looks: int,
        threshold: ChosenThreshold | None,
        costs: Mapping[str, NetworkCost],
    ) -> None:
        networks = self._networks(costs)
        facts: dict[str, Any] = {
            "looks": looks,
            "test_set": _test_set(answers) if answers.samples else None,
            "time": round(time.time(), 3),
            "classifier_digest": classifier_digest(self.folder / CLASSIFIER_FOLDER),
            "trial_id": choice.chosen,
            "data_digest": self.record.started["data"]["digest"],
            "objective": self.record.objective,
            "choice": {
                "best": choice.best,
                "chosen": choice.chosen,
                "tied": list(choice.tied),
                "reason": choice.reason,
            },
            "edges": list(at_edges),
            "networks": networks,
            "unreadable": answers.bad,
            "validation_threshold": None if threshold is None else _facts(threshold),
        }
        write_evaluation(
            self.folder / EVALUATION_FOLDER,
            report=report,
            facts=facts,
            answers=answers,
            classifier=self._classifier,
            root=root,
            mistakes=_MISTAKES,
        )

    def _draw_map(self, trial: TrialRecord, answers: Answers) -> None:
        """For the report, where the features are still there."""
        inputs = self.inputs.of_trial(trial)
        try:
            (self.folder / IMAGE_MAP_FILE).unlink(missing_ok=True)  # of an earlier evaluation
            write_test_features(self.folder, inputs.description.name, answers.features)
            if inputs.cached_features() is None:
                return
            features, _ = inputs.features()
            checked = check_labels_if_quick(inputs, features)
            marks = Marks(suspects=None, outliers={})
            if checked is not None:
                outliers = find_outliers(inputs, features, checked.suspects)
                marks = Marks.of(checked.suspects, outliers)
            draw_image_map(self.folder, inputs, features, marks)
        except (VisiontunerError, OSError) as error:  # the evaluation is there
            self.observer.note(f"warning: no map of the images in the report: {error}")

    def _track(self) -> tuple[str | None, str | None]:
        self.observer.note("Writing to MLflow.")
        try:
            return sync_search(self.folder, observer=self.observer).model, None
        except TrackingError as error:
            return None, str(error)


def _test_set(answers: Answers) -> str:
    return digest_of_test_set(sample.digest for sample in answers.samples)


def _untested(bad: Mapping[str, str], source: str) -> str:
    """Why there are no numbers: no test images, or none that can be read."""
    why = "There are no test images"
    step = "Add a folder `test` beside `train`."
    if bad:
        why = f"None of the {len(bad)} test images can be read"
        command = next_command("prepare", "--all", "--data", source)
        step = f"Repair them; `{command}` lists what is wrong with each."
    return f"{why}: nothing is known about images that played no part in the choice. {step}"


def _facts(threshold: ChosenThreshold) -> dict[str, Any]:
    return {
        "wanted_precision": threshold.wanted_precision,
        "value": threshold.value,
        "precision": _finite(threshold.precision),
        "coverage": _finite(threshold.coverage),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# What an answer of each network of a search costs here: time, memory, size, price.


_MEASURED_IMAGES = 20


def _measure_networks(inputs: Inputs, names: Sequence[str]) -> dict[str, NetworkCost]:
    """Time, memory, size and price of an answer of each network, measured on this machine.

    A head changes none of it, so that nothing has to be trained.

    Args:
        names: networks that are searched; or the experiment's own alone.

    Raises:
        DataError: there are no validation images.
        ServingError: a network cannot be loaded.
    """
    from visiontuner.model.package import package_untrained

    samples = inputs.readable("validation")
    step = max(1, len(samples) // _MEASURED_IMAGES)
    images = [
        (inputs.dataset.root / sample.path).read_bytes()
        for sample in samples[::step][:_MEASURED_IMAGES]
    ]
    searched = inputs.experiment.search.backbones
    with temporary_folder() as temporary:
        folders = {}
        for number, name in enumerate(names):
            own = inputs.of_network(name if name in searched else None)
            folders[name] = package_untrained(
                temporary / str(number),
                own.backbone,
                inputs.dataset.class_names,
                cache=own.cache,
            )
            own.release()
        return measure_costs(folders, images)
