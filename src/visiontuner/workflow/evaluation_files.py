"""What an evaluation leaves in FOLDER/evaluation; the folder appears whole.

report.json          numbers with intervals, choice, mistakes, how many looks
predictions.npz      probabilities (N, C), labels, content digests, paths; for paired tests
classes.csv          one line a class
*.png                reliability, risk and coverage, confusion, mistakes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner.data.files import temporary_folder
from visiontuner.errors import BadImageError, VisiontunerError
from visiontuner.layout import (
    EVALUATION_CLASSES,
    EVALUATION_FOLDER,
    EVALUATION_PREDICTIONS,
    EVALUATION_REPORT,
    TEST_LOOKS_FILE,
)
from visiontuner.text import csv_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from visiontuner.evaluation.mistakes import Mistake
    from visiontuner.evaluation.report import EvaluationReport
    from visiontuner.model.answers import Answers

# Sides of the pictures on the contact sheet, in pixels.
_THUMBNAIL = 224


def looks_so_far(folder: Path) -> int:
    """How many times a search's test pictures were looked at."""
    files = (folder / TEST_LOOKS_FILE, folder / EVALUATION_FOLDER / EVALUATION_REPORT)
    return max(map(_read_looks, files))


def count_look(folder: Path) -> int:
    """Write down one more look, so that it counts whatever becomes of its evaluation.

    Raises:
        VisiontunerError: the folder cannot be written.
    """
    looks = looks_so_far(folder) + 1
    path = folder / TEST_LOOKS_FILE
    try:
        fresh = path.with_suffix(".part")  # a kill must not leave half of it
        fresh.write_text(json.dumps({"looks": looks}) + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {path} ({error.strerror}). Make room.") from None
    return looks


def _read_looks(file: Path) -> int:
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
    root: Path,
    mistakes: int,
) -> None:
    """Write the folder of an evaluation in place of an older one.

    Args:
        facts: plain JSON values, written beside the report's own.
        root: what the samples' paths are relative to.
        mistakes: how many of the most confidently wrong pictures to show.

    Raises:
        VisiontunerError: the folder cannot be written.
    """
    from visiontuner.model.classifier_files import replace_folder, write_json

    folder = folder.absolute()
    try:
        with temporary_folder(folder.parent) as temporary:
            temporary.chmod(0o755)
            more = _write_test(temporary, report, answers, root, mistakes)
            write_json(temporary / EVALUATION_REPORT, {**report.to_dict(), **facts, **more})
            replace_folder(temporary, folder)
    except OSError as error:
        raise VisiontunerError(f"Cannot write {folder} ({error.strerror}). Make room.") from None


def _write_test(
    folder: Path, report: EvaluationReport, answers: Answers, root: Path, count: int
) -> dict[str, Any]:
    """Tables and figures over the test pictures; returns what the report says of them."""
    from dataclasses import asdict

    import numpy as np

    from visiontuner.evaluation.calibration import probabilities_of
    from visiontuner.evaluation.mistakes import confident_mistakes, confused_pairs

    if not answers.samples:
        return {"mistakes": [], "confused_pairs": []}
    labels = np.array([sample.label for sample in answers.samples])
    probabilities = probabilities_of(answers.logits, report.temperature)
    np.savez_compressed(
        folder / EVALUATION_PREDICTIONS,
        probabilities=probabilities.astype(np.float32),
        labels=labels,
        digests=np.array([sample.digest for sample in answers.samples]),
        paths=np.array([sample.path for sample in answers.samples]),
    )
    rows = [
        {k: v for k, v in asdict(score).items() if not isinstance(v, dict)}
        for score in report.classes
    ]
    table = [tuple(rows[0]), *(row.values() for row in rows)]
    (folder / EVALUATION_CLASSES).write_text("".join(map(csv_row, table)), encoding="utf-8")
    wrong = confident_mistakes(probabilities, labels, report.class_names, count)
    _draw(folder, report, answers, probabilities, labels)
    _draw_mistakes(folder, wrong, answers, root)
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


def _draw(
    folder: Path,
    report: EvaluationReport,
    answers: Answers,
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
) -> None:
    from visiontuner.evaluation.calibration import probabilities_of, reliability, risk_coverage
    from visiontuner.tracking.figures import evaluation_figures, to_png

    figures = evaluation_figures(
        report,
        reliability(probabilities_of(answers.logits), labels),
        reliability(probabilities, labels),
        risk_coverage(probabilities, labels),
    )
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(to_png(figure))


def _draw_mistakes(folder: Path, wrong: Sequence[Mistake], answers: Answers, root: Path) -> None:
    from visiontuner.data.images import decode_image
    from visiontuner.tracking.figures import contact_sheet, to_png

    pictures: list[Image] = []
    captions: list[tuple[str, str, float]] = []
    for mistake in wrong:
        try:
            picture = decode_image(root / answers.samples[mistake.index].path, target=_THUMBNAIL)
        except BadImageError:  # it was there a minute ago
            continue
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        pictures.append(picture)
        captions.append((mistake.true, mistake.predicted, mistake.probability))
    if pictures:
        (folder / "mistakes.png").write_bytes(to_png(contact_sheet(pictures, captions)))
