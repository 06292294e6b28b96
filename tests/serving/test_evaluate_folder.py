"""`visiontuner evaluate --data`: a classifier of colours on labelled images from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from visiontuner.cli.judge import evaluate
from visiontuner.evaluation.calibration import ChosenThreshold
from visiontuner.evaluation.intervals import Interval
from visiontuner.evaluation.scores import Threshold
from visiontuner.workflow.evaluate_folder import evaluate_folder, judge_threshold


@pytest.fixture
def classifier(colour_classifier: Path, tmp_path: Path) -> Path:
    """With a threshold that was to be right in 95 of 100 cases."""
    folder = tmp_path / "model" / "classifier"
    shutil.copytree(colour_classifier, folder)
    raw = json.loads((folder / "classifier.json").read_text())
    calibration = {
        "wanted_precision": 0.95,
        "validation_precision": 0.97,
        "validation_coverage": 0.9,
    }
    raw |= {"threshold": 0.9, "metadata": {"calibration": calibration}}
    (folder / "classifier.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    """Three red, a blue one among the red, and a yellow one called green."""
    for name, colours in {"red": ["red"] * 3 + ["blue"], "green": ["yellow"]}.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number, colour in enumerate(colours):
            content = make_image(colour, "BMP" if number % 2 else "PNG")
            (folder / f"{number}.{'bmp' if number % 2 else 'png'}").write_bytes(content)
    return tmp_path / "photos"


def test_images_from_elsewhere_are_scored_and_compared(classifier: Path, photos: Path) -> None:
    found = evaluate_folder(str(photos), model=str(classifier))
    # Three of four red ones; yellow is as red as it is green, and red comes first.
    assert found.report.metrics["accuracy"].value == pytest.approx(3 / 5)
    assert found.report.num_images == 5
    assert found.new is not None
    assert found.new.value == pytest.approx(1 / 5)
    # Yellow's probability is one half: four answers count, three of them are right.
    threshold = found.report.threshold
    assert threshold is not None
    assert threshold.precision is not None
    assert threshold.precision.value == pytest.approx(3 / 4)
    assert found.threshold_verdict == "cannot be told"
    assert found.statistics.side == (30, 30, 30)
    # 0.299 x 220 + 0.587 x 20 + 0.114 x 20 of red, the median image.
    assert found.statistics.brightness[0] == pytest.approx(79.8, abs=1)
    assert (found.test_images, found.looks, found.training_statistics) == (None, None, None)
    assert found.folder == Path("evaluations/photos")
    raw = json.loads((found.folder / "report.json").read_text())
    assert raw["new"]["value"] == pytest.approx(1 / 5)
    assert {"new.png", "mistakes.png", "mistakes_explained.png"} <= {
        path.name for path in found.folder.iterdir()
    }
    assert not any("test" in note for note in found.report.notes)


def test_the_command_prints_the_page_of_numbers(classifier: Path, photos: Path) -> None:
    done = CliRunner().invoke(evaluate, ["--data", str(photos), "--model", str(classifier)])
    assert done.exit_code == 0, done.output
    for text in (
        "5 images (95 % interval):",
        "accuracy         60.0%",
        "Too few images to tell whether the threshold keeps 95%",
        "unlike the training images  20.0%",
        "Whether test images of its search are among them is not known",
    ):
        assert text in done.stdout


def test_classes_of_other_names_are_mapped_or_refused(
    classifier: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "green").rename(photos / "reds")
    done = CliRunner().invoke(evaluate, ["--data", str(photos), "--model", str(classifier)])
    assert done.exit_code == 2
    assert "has classes that the model has not: reds (nearest to 'reds': 'red')" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "names.csv").write_text("class,becomes\nreds,\n")
    found = evaluate_folder(str(photos), model=str(classifier), classes=tmp_path / "names.csv")
    assert found.report.num_images == 4
    (tmp_path / "names.csv").write_text("class,becomes\nreds,red\n")
    found = evaluate_folder(str(photos), model=str(classifier), classes=tmp_path / "names.csv")
    assert found.report.metrics["accuracy"].value == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "somewhere"], "go with --data FOLDER"),
        (["--data", "somewhere", "--prefer", "cheapest"], "leave them out with --data"),
        (["somewhere", "--data", "photos", "--model", "other"], "Name one model"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(evaluate, arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.95, 0.99, "holds"), (0.9, 0.94, "does not hold"), (0.9, 0.97, "cannot be told")],
)
def test_the_interval_decides_whether_a_threshold_holds(
    low: float, high: float, verdict: str
) -> None:
    chosen = ChosenThreshold(wanted_precision=0.95, value=0.5, precision=0.96, coverage=0.9)
    threshold = Threshold(
        wanted_precision=chosen.wanted_precision,
        value=chosen.value,
        validation_precision=chosen.precision,
        validation_coverage=chosen.coverage,
        precision=Interval(value=(low + high) / 2, low=low, high=high),
        coverage=Interval(value=0.9, low=0.8, high=0.95),
    )
    assert judge_threshold(threshold) == verdict
    assert judge_threshold(None) is None
