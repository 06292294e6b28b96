"""Which version is the champion: it moves only to one that is better beyond noise."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from mlflow.entities.model_registry import ModelVersion
from numpy.typing import NDArray

from visiontuner.errors import TrackingError, UserMistake
from visiontuner.evaluation.intervals import (
    Interval,
    PairedTest,
    paired_test,
    share_interval,
)
from visiontuner.evaluation.report import image_count
from visiontuner.io.files import temporary_folder
from visiontuner.paths import (
    EVALUATION_FOLDER,
    EVALUATION_PREDICTIONS,
    EVALUATION_REPORT,
    MLFLOW_FILE,
    SEARCHES_FOLDER,
)
from visiontuner.serving.registry import (
    CHAMPION,
    DIGEST_TAG,
    QUANTIZED_FROM_TAG,
    Mlflow,
    ModelReference,
    aliases,
    digest_of_test_set,
    evaluated_on,
    find_version,
    get_version,
)
from visiontuner.text import next_command

# The test predictions that an evaluation stored with a model version.


_TRIAL_ID = "visiontuner.trial_id"


@dataclass(frozen=True, kw_only=True)
class StoredPredictions:
    """What one version answered on its test images.

    Args:
        predicted, labels: int64, shape (N,), indices into `class_names`; N > 0.
        digests: of the images' contents, hexadecimal, in the same order.
        data_digest: of the whole data set; None if the evaluation does not say.
    """

    class_names: tuple[str, ...]
    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]
    digests: tuple[str, ...]
    data_digest: str | None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which images were classified correctly, shape (N,)."""
        return np.asarray(self.predicted == self.labels)

    @property
    def images(self) -> list[tuple[str, str]]:
        """(content digest, name of the true class) of every image, in order."""
        names = (self.class_names[label] for label in self.labels)
        return list(zip(self.digests, names, strict=True))


def read_report(mlflow: Mlflow, run_id: str) -> dict[str, Any] | None:
    """The evaluation's report on a trial's run; None if it was never evaluated.

    Raises:
        UserMistake: the report is damaged.
        TrackingError: MLflow is away or refuses.
    """
    if f"{EVALUATION_FOLDER}/{EVALUATION_REPORT}" not in _stored(mlflow, run_id):
        return None
    with temporary_folder() as folder:
        path = _download(mlflow, run_id, EVALUATION_REPORT, str(folder))
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(report, dict):
                raise TypeError("it is not an object")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise _damaged(run_id, EVALUATION_REPORT, error) from None
    return report


def read_predictions(mlflow: Mlflow, version: ModelVersion) -> StoredPredictions | None:
    """A version's test predictions; None if it was never evaluated.

    Raises:
        UserMistake: what is stored is damaged, incomplete or of another trial.
        TrackingError: MLflow is away or refuses.
    """
    if not version.run_id:
        return None
    report = read_report(mlflow, version.run_id)
    if report is None:
        return None
    _require_same_model(version, report)
    if image_count(report) == 0:
        raise UserMistake(
            f"Version {version.version} of {version.name} was evaluated without any test image. "
            "Add a folder `test` beside `train` and search again; --force names a champion without."
        )
    if f"{EVALUATION_FOLDER}/{EVALUATION_PREDICTIONS}" not in _stored(mlflow, version.run_id):
        raise _damaged(version.run_id, EVALUATION_PREDICTIONS, FileNotFoundError("it is missing"))
    with temporary_folder() as folder:
        path = _download(mlflow, version.run_id, EVALUATION_PREDICTIONS, str(folder))
        try:
            return _parse(path, report)
        except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile) as error:
            raise _damaged(version.run_id, EVALUATION_PREDICTIONS, error) from None


def _require_same_model(version: ModelVersion, report: dict[str, Any]) -> None:
    """The report is of this very classifier, or at least of its trial.

    One run carries the classifiers of one trial from before and after calibration. Temperature and
    threshold never change which class is the most probable, so the same predictions stand for both.
    """
    if report.get("classifier_digest") == version.tags.get(DIGEST_TAG):
        return
    source = version.tags.get(QUANTIZED_FROM_TAG)
    if source is not None:
        raise UserMistake(
            f"Version {version.version} of {version.name} is the int8 form of {source}, and the "
            "test images were answered by that one. Promote it, or use --force."
        )
    evaluated, trial = report.get("trial_id"), version.tags.get(_TRIAL_ID)
    if evaluated != trial:
        raise UserMistake(
            f"The evaluation on run {version.run_id} is of trial {evaluated}, and version "
            f"{version.version} of {version.name} of trial {trial}. {_again()}"
        )


def _parse(path: Path, report: dict[str, Any]) -> StoredPredictions:
    names = report["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("class_names must be a list of names")
    # Without pickle: an artifact store is not a place to run code from.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        probabilities, labels = stored["probabilities"], stored["labels"]
        digests = [str(digest) for digest in stored["digests"].tolist()]
    _check(names, probabilities, labels, digests)
    return StoredPredictions(
        class_names=tuple(names),
        predicted=probabilities.argmax(axis=1),
        labels=labels.astype(np.int64),
        digests=tuple(digests),
        data_digest=report.get("data_digest"),
    )


def _check(
    names: Sequence[str],
    probabilities: NDArray[Any],
    labels: NDArray[Any],
    digests: Sequence[str],
) -> None:
    if not len(labels):
        raise ValueError("it holds no images")
    if probabilities.shape != (len(labels), len(names)) or len(digests) != len(labels):
        raise ValueError(
            f"{probabilities.shape} probabilities, {labels.shape} labels and {len(digests)} "
            f"digests do not fit {len(names)} classes"
        )
    if len(set(names)) != len(names):
        raise ValueError("class names repeat")
    if not np.issubdtype(labels.dtype, np.integer) or not np.isfinite(probabilities).all():
        raise ValueError("labels must be whole numbers, and probabilities finite")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError("a label is outside the classes")


def _stored(mlflow: Mlflow, run_id: str) -> set[str]:
    return {item.path for item in mlflow.call("list_artifacts", run_id, EVALUATION_FOLDER)}


def _download(mlflow: Mlflow, run_id: str, name: str, folder: str) -> Path:
    return Path(mlflow.call("download_artifacts", run_id, f"{EVALUATION_FOLDER}/{name}", folder))


def _damaged(run_id: str, name: str, error: Exception) -> UserMistake:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return UserMistake(
        f"{EVALUATION_FOLDER}/{name} on run {run_id} cannot be used ({reason}). {_again()}"
    )


def _again() -> str:
    return f"Run `{next_command('evaluate', 'FOLDER')}` with the folder of its search again."


DECISION_TAG = "visiontuner.promotion"
REASON_TAG = "visiontuner.promotion_reason"

_NOTE = "Promotion: "

Decision = Literal["promoted", "kept", "unchanged"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Promotion:
    """What was decided about a challenger, and why.

    Args:
        decision: `promoted`; `kept` if the champion stays; `unchanged` if there was nothing to
            decide, because the challenger is the champion.
        reason: a sentence or two; written on the challenger.
        accuracy: of the challenger on its test images; None if it could not be read.
        champion: the version that was champion before; None if there was none.
        test: the challenger (a) against the champion (b); None if they were not compared.
        look: number of this comparison on these test images, from 1; None as `test`.
        images: test images of the challenger.
        changed: False if nothing was written: a dry run, or nothing to decide.
    """

    name: str
    challenger: str
    champion: str | None
    decision: Decision
    reason: str
    accuracy: Interval | None = None
    champion_accuracy: Interval | None = None
    test: PairedTest | None = None
    look: int | None = None
    images: int = 0
    forced: bool = False
    changed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"Promotion {self.name}/{self.challenger}: {self.decision}\n{self.reason}"


def promote(
    mlflow: Mlflow, reference: ModelReference, *, force: bool = False, dry_run: bool = False
) -> Promotion:
    """Make a version the champion if it is better than the one that is.

    Better means: more test images classified correctly, on the same images, by a paired test. The
    first evaluated version is champion at once. The decision and its reason are written on the
    version: tags `visiontuner.promotion`, `visiontuner.promotion_reason`, and its description.

    Args:
        reference: the challenger; the newest version if it names none.
        force: make it champion whatever the test says, or if there can be none.
        dry_run: decide and change nothing.

    Raises:
        UserMistake: there is no such version; or, without `force`, one of the two was not
            evaluated, or not on the same images and classes.
        TrackingError: MLflow is away or refuses, or another champion was named meanwhile.
    """
    challenger = find_version(mlflow, reference)
    name = challenger.name
    alias = aliases(mlflow, name).get(CHAMPION)
    if alias == str(challenger.version):
        return _nothing_to_do(challenger)
    # An alias outlives its version in some stores.
    champion = get_version(mlflow, name, alias) if alias else None
    decided = _decide(mlflow, challenger, champion, force=force)
    if alias and champion is None:
        gone = f"The champion, version {alias}, was deleted. {decided.reason}"
        decided = replace(decided, reason=gone)
    if dry_run:
        return decided
    _carry_out(mlflow, challenger, decided, alias)
    return replace(decided, changed=True)


def _nothing_to_do(challenger: ModelVersion) -> Promotion:
    number = str(challenger.version)
    return Promotion(
        name=challenger.name,
        challenger=number,
        champion=number,
        decision="unchanged",
        reason=f"Version {number} is the champion already.",
    )


def _decide(
    mlflow: Mlflow, challenger: ModelVersion, champion: ModelVersion | None, *, force: bool
) -> Promotion:
    decided = Promotion(
        name=challenger.name,
        challenger=str(challenger.version),
        champion=str(champion.version) if champion else None,
        decision="promoted",
        reason="",
    )
    try:
        mine = _require_predictions(mlflow, challenger)
        decided = replace(
            decided, accuracy=share_interval(int(mine.correct.sum()), len(mine)), images=len(mine)
        )
        if champion is None:
            return replace(decided, reason=_first(decided))
        theirs = _require_predictions(mlflow, champion)
        decided = replace(
            decided, champion_accuracy=share_interval(int(theirs.correct.sum()), len(theirs))
        )
        correct = _on_the_same_images(challenger, mine, champion, theirs)
    except UserMistake as error:
        if not force:
            raise
        return replace(decided, reason=f"Forced without a comparison. {error}", forced=True)
    look = _look(mlflow, challenger, champion, digest_of_test_set(mine.digests))
    test = paired_test(*correct, look=look)
    decided = replace(
        decided, test=test, look=look, decision="promoted" if test.a_is_better else "kept"
    )
    reason = _compared(decided, test) + _other_data(mine, theirs)
    if force and decided.decision == "kept":
        forced = f"Forced against the test. {reason}"
        return replace(decided, decision="promoted", reason=forced, forced=True)
    return replace(decided, reason=reason)


def _look(mlflow: Mlflow, challenger: ModelVersion, champion: ModelVersion, test_set: str) -> int:
    """Which comparison on these test images this is: the second evaluated model is the first.

    Versions of one trial have the same answers and count once. Their numbers give the order, so
    that a repetition is the same comparison again.
    """
    earlier = {
        version.run_id
        for version in evaluated_on(mlflow, challenger.name, test_set)
        if int(version.version) < int(challenger.version)
    }
    return max(1, len({*earlier, champion.run_id} - {challenger.run_id}))


def _require_predictions(mlflow: Mlflow, version: ModelVersion) -> StoredPredictions:
    predictions = read_predictions(mlflow, version)
    if predictions is None:
        raise UserMistake(
            f"Version {version.version} of {version.name} was never evaluated on test images. "
            f"{_how_to_evaluate(mlflow, version)} first; --force names a champion without."
        )
    return predictions


def _how_to_evaluate(mlflow: Mlflow, version: ModelVersion) -> str:
    """With the search's folder where it lies here, else with what MLflow calls the search."""
    try:
        run = mlflow.call("get_run", version.run_id)
        parent = mlflow.call("get_run", run.data.tags["mlflow.parentRunId"]).info
    except (TrackingError, LookupError):
        return f"Run `{next_command('evaluate', 'FOLDER')}` with the folder of its search"
    for memory in sorted(Path(SEARCHES_FOLDER).glob(f"*/{MLFLOW_FILE}")):
        try:
            known = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if known.get("parent_run_id") == parent.run_id:
            return f"Run `{next_command('evaluate', memory.parent)}`"
    command = next_command("evaluate", "FOLDER")
    return f"Run `{command}` with the folder of the search {parent.run_name}"


def _on_the_same_images(
    challenger: ModelVersion,
    mine: StoredPredictions,
    champion: ModelVersion,
    theirs: StoredPredictions,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What each classified correctly, bool, shape (N,), in one order of images.

    Images are known by their content and classes by their names, never by position.

    Raises:
        UserMistake: they were not asked for the same classes or not about the same images.
    """
    who = f"Versions {challenger.version} and {champion.version} of {challenger.name}"
    names, others = set(mine.class_names), set(theirs.class_names)
    if names != others:
        raise UserMistake(
            f"{who} tell other classes apart ({_difference(names, others)}), so they cannot be "
            "compared. Search again with the same classes, or use --force."
        )
    images, other_images = mine.images, theirs.images
    if Counter(images) != Counter(other_images):
        raise UserMistake(
            f"{who} were evaluated on different test images: {_overlap(mine, theirs)} "
            f"(data {_short(mine)} and {_short(theirs)}). Evaluate both on the same images, or "
            "use --force."
        )
    # Copies of one image within a class get the same answer: their order does not matter.
    order = sorted(range(len(images)), key=images.__getitem__)
    other_order = sorted(range(len(images)), key=other_images.__getitem__)
    return mine.correct[order], theirs.correct[other_order]


def _difference(names: set[str], others: set[str]) -> str:
    only, missing = sorted(names - others), sorted(others - names)
    parts = [
        f"{which} knows {', '.join(map(repr, some[:3]))}{' …' if len(some) > 3 else ''}"
        for which, some in (("only the first", only), ("only the second", missing))
        if some
    ]
    return "; ".join(parts)


def _overlap(mine: StoredPredictions, theirs: StoredPredictions) -> str:
    shared = sum((Counter(mine.digests) & Counter(theirs.digests)).values())
    if shared == len(mine) == len(theirs):
        changed = sum((Counter(mine.images) - Counter(theirs.images)).values())
        return f"the same {shared:,}, but {changed:,} with another class"
    return f"{len(mine):,} and {len(theirs):,}, with {shared:,} in common"


def _short(predictions: StoredPredictions) -> str:
    return (predictions.data_digest or "unknown")[:12]


def _first(decided: Promotion) -> str:
    accuracy = decided.accuracy
    assert accuracy is not None
    return (
        f"The first evaluated version: {round(accuracy.value * decided.images):,} of "
        f"{decided.images:,} test images right ({100 * accuracy.value:.1f} %, "
        f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})."
    )


def _compared(decided: Promotion, test: PairedTest) -> str:
    if test.a_is_better:
        verdict = "better beyond noise"
    elif test.b_is_better:
        verdict = "worse beyond noise"
    elif test.only_a == test.only_b == 0:
        verdict = "right and wrong on the same images"
    else:
        verdict = "no difference beyond noise"
    change = test.difference
    return (
        f"Against version {decided.champion} on the same {decided.images:,} test images: "
        f"{verdict}. Accuracy {change.value:+.4f} (95 %: {change.low:+.4f} to {change.high:+.4f}); "
        f"right alone on {test.only_a:,} and {test.only_b:,}, p = {test.p_value:.2g}; in "
        f"comparison {decided.look} on these images p below {test.level:.2g} counts."
    )


def _other_data(mine: StoredPredictions, theirs: StoredPredictions) -> str:
    if mine.data_digest == theirs.data_digest:
        return ""
    return f" Their data sets differ ({_short(mine)} and {_short(theirs)}), but not in test images."


def _carry_out(
    mlflow: Mlflow, challenger: ModelVersion, decided: Promotion, alias: str | None
) -> None:
    """Reason first, alias last: killed between the two, the next call decides again."""
    name, number = challenger.name, str(challenger.version)
    _require_champion(aliases(mlflow, name), alias, name)
    tags = {DECISION_TAG: decided.decision, REASON_TAG: decided.reason}
    for key, value in tags.items():
        mlflow.call("set_model_version_tag", name, number, key, value)
    text = _described(challenger.description, decided)
    mlflow.call("update_model_version", name, number, text)
    if decided.decision == "promoted":
        # MLflow has no way to move an alias only from a known place: look as late as possible.
        _require_champion(aliases(mlflow, name), alias, name)
        mlflow.call("set_registered_model_alias", name, CHAMPION, number)


def _require_champion(held: Mapping[str, str], expected: str | None, name: str) -> None:
    now = held.get(CHAMPION)
    if now != expected:
        raise TrackingError(
            f"Somebody moved the champion of {name} from {_version(expected)} to {_version(now)} "
            f"meanwhile. Run `{next_command('promote', name)}` again."
        )


def _version(number: str | None) -> str:
    return f"version {number}" if number else "none"


def _described(description: str | None, decided: Promotion) -> str:
    """A version's description with this decision in place of an earlier one; the rest stays."""
    lines = [line for line in (description or "").splitlines() if not line.startswith(_NOTE)]
    return "\n".join([*lines, f"{_NOTE}{decided.decision}. {decided.reason}"])
