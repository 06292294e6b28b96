"""Does what a lineage says still hold? Everything that can be is computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visiontuner.data.files import temporary_folder
from visiontuner.errors import TrackingError, VisiontunerError
from visiontuner.experiment import Experiment
from visiontuner.layout import CLASSIFIER_FOLDER
from visiontuner.provenance import describe_code, describe_machine
from visiontuner.workflow.observing import Observer, Silent
from visiontuner.workflow.pictures import load_data
from visiontuner.workflow.promote import open_store

if TYPE_CHECKING:
    from visiontuner.serving.lineage import Facts, Lineage

# Other processors round differently; a class never changes by so little.
REFERENCE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class LineageCheck:
    """One thing that was looked at again; `unknown` if it cannot be, `detail` says why."""

    what: str
    state: Literal["ok", "differs", "unknown"]
    detail: str


def verify(lineage: Lineage, *, observer: Observer | None = None) -> list[LineageCheck]:
    """Compare the artifact, the pictures, the code and the packages with what was recorded.

    The classifier is downloaded, and the pictures are read where the experiment found them; an
    archive at a URL that is not in the cache is downloaded again.
    """
    return [
        *_check_classifier(lineage),
        _check_data(lineage, observer or Silent()),
        _check_code(lineage.code or {}),
        _check_packages((lineage.environment or {}).get("packages") or {}),
    ]


def _check_classifier(lineage: Lineage) -> Iterator[LineageCheck]:
    """The artifact's digest, and its answers to its reference pictures."""
    with temporary_folder() as temporary:
        try:
            folder = _fetch_classifier(lineage, temporary)
        except TrackingError as error:
            from visiontuner.serving.versions import is_missing

            if is_missing(error):
                yield _differs("classifier", "its files are gone from MLflow")
            else:
                yield _unknown("classifier", str(error))
            return
        if folder is None:
            yield _unknown("classifier", "no version is registered, and no classifier/ is here")
            return
        yield _check_digest(folder, (lineage.model or {}).get("classifier_digest"))
        yield _check_reference(folder)


def _fetch_classifier(lineage: Lineage, temporary: Path) -> Path | None:
    """The registered artifact, else the search folder's own."""
    from visiontuner.serving.lineage import download_classifier

    model_id = (lineage.model or {}).get("model_id")
    if model_id:
        return download_classifier(open_store(), model_id, temporary)
    folder = (lineage.search or {}).get("folder")
    local = Path(folder) / CLASSIFIER_FOLDER if folder else None
    return local if local and local.is_dir() else None


def _check_digest(folder: Path, recorded: str | None) -> LineageCheck:
    from visiontuner.serving.registry import classifier_digest

    what = "classifier digest"
    if recorded is None:
        return _unknown(what, "it was never registered")
    try:
        digest = classifier_digest(folder)
    except VisiontunerError:
        return _differs(what, "classifier.json is gone")
    if digest != recorded:
        return _differs(what, f"{digest[:12]} instead of {recorded[:12]}")
    return _ok(what, recorded[:12])


def _check_reference(folder: Path) -> LineageCheck:
    from visiontuner.model.classifier import Classifier

    what = "reference pictures"
    try:
        difference = Classifier.load(folder).verify_reference()
    except VisiontunerError as error:
        # The text names a temporary folder, which is gone when it is read.
        return _differs(what, str(error).replace(f"{folder}/", "").replace(str(folder), "it"))
    if not difference <= REFERENCE_TOLERANCE:
        return _differs(what, f"probabilities are off by up to {difference:.2g}")
    return _ok(what, f"the same probabilities within {REFERENCE_TOLERANCE:g}")


def _check_data(lineage: Lineage, observer: Observer) -> LineageCheck:
    what, data = "data digest", lineage.data or {}
    recorded = data.get("digest")
    if recorded is None or lineage.experiment is None:
        return _unknown(what, "no digest or no experiment file was recorded")
    try:
        dataset = load_data(Experiment.parse(lineage.experiment), observer)
    except VisiontunerError as error:
        return _unknown(what, str(error))
    if dataset.digest == recorded:
        return _ok(what, f"{recorded[:12]}, {dataset.root}")
    counts = {name: len(samples) for name, samples in dataset.splits.items()}
    detail = f"{dataset.digest[:12]} instead of {recorded[:12]}"
    return _differs(what, detail + _changes(data.get("counts") or {}, counts))


def _changes(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    changed = [
        f"{now.get(name, 0):,} {name} instead of {count:,}"
        for name, count in before.items()
        if now.get(name, 0) != count
    ]
    return f"; {', '.join(changed)}" if changed else "; as many pictures, but not the same"


def _check_code(recorded: Facts) -> LineageCheck:
    what, now = "code", describe_code()
    then, commit = recorded.get("commit"), now["commit"]
    if then is None:
        return _unknown(what, "no commit was recorded: it ran from no git checkout")
    if commit is None:
        return _unknown(what, f"commit {then[:12]}; this visiontuner runs from no git checkout")
    if then != commit:
        return _differs(what, f"commit {commit[:12]} instead of {then[:12]}")
    if now["dirty"]:
        return _differs(what, f"commit {then[:12]}, and this checkout has changes")
    if recorded.get("dirty"):
        return _unknown(what, f"commit {then[:12]} with changes of which only their being is known")
    return _ok(what, f"commit {then[:12]}")


def _check_packages(recorded: Mapping[str, Any]) -> LineageCheck:
    what, machine = "packages", describe_machine()
    if not recorded:
        return _unknown(what, "no versions were recorded")
    installed = {"python": machine["python"], **machine["packages"]}
    changed = [
        f"{name} {installed.get(name, 'missing')} instead of {version}"
        for name, version in recorded.items()
        if version is not None and installed.get(name) != version
    ]
    if changed:
        return _differs(what, ", ".join(changed))
    return _ok(what, f"{len(recorded)} versions as recorded")


def _ok(what: str, detail: str) -> LineageCheck:
    return LineageCheck(what=what, state="ok", detail=detail)


def _differs(what: str, detail: str) -> LineageCheck:
    return LineageCheck(what=what, state="differs", detail=detail)


def _unknown(what: str, detail: str) -> LineageCheck:
    return LineageCheck(what=what, state="unknown", detail=detail)
