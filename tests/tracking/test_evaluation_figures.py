import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from numpy.typing import NDArray
from PIL import Image

from visiontuner.evaluation.calibration import (
    ChosenThreshold,
    probabilities_of,
    reliability,
    risk_coverage,
)
from visiontuner.evaluation.report import EvaluationReport, evaluate_predictions
from visiontuner.tracking.figures import parts
from visiontuner.tracking.figures.evaluation import (
    confusion_matrix,
    contact_sheet,
    evaluation_figures,
    most_confused,
    per_class,
)
from visiontuner.tracking.figures.parts import readable, to_png

THRESHOLD = ChosenThreshold(wanted_precision=0.95, value=0.6, precision=0.96, coverage=0.8)


def drawn(figure: Figure) -> Image.Image:
    image = Image.open(io.BytesIO(to_png(figure)))
    low, high = image.convert("L").getextrema()
    assert low < 128 < high, "the figure is blank"
    return image


def evaluated(
    classes: int,
    images: int = 200,
    *,
    names: list[str] | None = None,
    logits: np.ndarray | None = None,
    threshold: ChosenThreshold | None = THRESHOLD,
) -> tuple[EvaluationReport, dict[str, Figure]]:
    """Answers that are mostly right, their report and its figures."""
    generator = np.random.default_rng(7)
    labels = np.arange(images) % classes
    if logits is None:
        logits = generator.normal(size=(images, classes))
        logits[np.arange(images), labels] += 3
    report = evaluate_predictions(
        logits=logits,
        labels=labels,
        class_names=names or [f"class {i}" for i in range(classes)],
        temperature=1.3,
        threshold=threshold,
        resamples=50,
    )
    probabilities = probabilities_of(logits, 1.3)
    return report, evaluation_figures(
        report,
        reliability(probabilities_of(logits), labels),
        reliability(probabilities, labels),
        risk_coverage(probabilities, labels),
    )


def words(figure: Figure) -> str:
    return " ".join(t.get_text() for t in figure.findobj(mpl.text.Text))  # type: ignore[attr-defined]


@pytest.mark.parametrize("classes", [2, 7, 30])
def test_up_to_30_classes_have_a_confusion_matrix(classes: int) -> None:
    _, found = evaluated(classes)
    assert set(found) == {"reliability", "risk_coverage", "per_class", "confusion"}
    for figure in found.values():
        drawn(figure)


def test_more_classes_have_their_most_confused_pairs() -> None:
    report, found = evaluated(133, 532)
    assert set(found) == {"reliability", "risk_coverage", "per_class", "confused_pairs"}
    for figure in found.values():
        drawn(figure)
    axes = found["per_class"].axes[0]
    assert len(axes.get_yticklabels()) == 30
    weakest = min(report.classes, key=lambda score: (score.f1, score.name))
    assert axes.get_yticklabels()[0].get_text().startswith(weakest.name)


def test_the_matrix_shows_counts_and_the_names_of_both_sides() -> None:
    confusion = np.array([[5, 2], [0, 7]])
    figure = confusion_matrix(confusion, ["cat", "dog"])
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["5", "2", "7"]  # an empty cell stays empty
    assert "12 of 14 images right" in words(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["cat", "dog"]
    shares = figure.axes[0].images[0].get_array()
    assert np.allclose(np.asarray(shares), [[5 / 7, 2 / 7], [0, 1]])


def test_the_most_confused_pair_comes_first() -> None:
    confusion = np.array([[5, 1, 0], [4, 6, 0], [0, 2, 8]])
    figure = most_confused(confusion, ["cat", "dog", "owl"])
    assert figure is not None
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["dog → cat", "owl → dog"]
    assert "4 (40%)" in words(figure)
    low, high = figure.axes[0].get_ylim()
    assert low > high  # the first row is on top


def test_without_a_mistake_there_are_no_confused_pairs() -> None:
    assert most_confused(np.diag([3, 4]), ["cat", "dog"]) is None
    logits = 9 * np.eye(40)[np.arange(80) % 40]
    _, found = evaluated(40, 80, logits=logits)
    assert "confused_pairs" not in found
    for figure in found.values():
        drawn(figure)


def test_the_threshold_is_marked_where_test_puts_it() -> None:
    report, found = evaluated(7)
    assert report.threshold is not None
    assert report.threshold.precision is not None
    axes = found["risk_coverage"].axes[0]
    (bar,) = axes.containers
    x, y = bar[0].get_xydata()[0]  # type: ignore[index]
    assert x == pytest.approx(report.threshold.coverage.value)
    assert y == pytest.approx(1 - report.threshold.precision.value)
    assert "Wanted: at most 5.0% wrong" in words(found["risk_coverage"])


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (None, "area"),
        (
            ChosenThreshold(wanted_precision=0.99, value=None, precision=np.nan, coverage=0.0),
            "No confidence was enough",
        ),
        (
            ChosenThreshold(wanted_precision=0.99, value=1.0, precision=0.99, coverage=0.1),
            "No answer on test reached",
        ),
    ],
)
def test_a_threshold_that_nothing_reaches_has_no_mark(
    threshold: ChosenThreshold | None, said: str
) -> None:
    _, found = evaluated(4, threshold=threshold)
    assert found["risk_coverage"].axes[0].containers == []
    assert said in words(found["risk_coverage"])
    drawn(found["risk_coverage"])


@pytest.mark.parametrize(
    ("classes", "images"), [(1, 1), (2, 1), (3, 3)], ids=["one class", "one image", "three"]
)
@pytest.mark.parametrize("right", [True, False])
def test_hardly_any_images_still_give_figures(classes: int, images: int, right: bool) -> None:
    labels = np.arange(images) % classes
    logits = 1e4 * np.eye(classes)[labels if right else (labels + 1) % classes]
    _, found = evaluated(classes, images, logits=logits)
    for figure in found.values():
        drawn(figure)


def test_classes_without_test_images_are_left_out_of_the_scores() -> None:
    names = ["cat", "dog", "owl"]
    report = evaluate_predictions(
        logits=np.array([[3.0, 0, 0], [0, 3.0, 0]]),
        labels=np.array([0, 1]),
        class_names=names,
        temperature=1.0,
        threshold=None,
        resamples=20,
    )
    figure = per_class(report)
    assert figure is not None
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["cat  (1)", "dog  (1)"]


HOSTILE = ["$\\frac{1}{", "a$b$c", "two\nlines\tof it", "<b>", "🐶🐶🐶", "犬", "x" * 300, " "]


@pytest.fixture
def other_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`other_fonts(*names)`: those that are looked for beside matplotlib's own."""

    def look_for(*names: str) -> None:
        monkeypatch.setattr(parts, "_OTHER_FONTS", names)
        for cached in (parts.fonts, parts._letters):
            cached.cache_clear()

    look_for()
    yield look_for
    monkeypatch.undo()
    for cached in (parts.fonts, parts._letters):
        cached.cache_clear()


def small_font(path: Path, letters: str) -> None:
    """A font that draws each letter as a square."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square" for letter in letters})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_a_font_of_this_system_draws_what_matplotlibs_lacks(
    tmp_path: Path, other_fonts: Callable[..., None]
) -> None:
    small_font(tmp_path / "Squares.ttf", "犬猫")
    fontManager.addfont(tmp_path / "Squares.ttf")
    other_fonts("None Such", "Squares")
    assert readable(["犬", "猫 cat", "🐶🐶"]) == ["犬", "猫 cat", "class 2"]
    _, found = evaluated(3, names=["犬", "猫 cat", "🐶🐶"])
    for figure in found.values():
        drawn(figure)  # a missing letter is a warning, and warnings are errors


@pytest.mark.usefixtures("other_fonts")
def test_names_are_cut_in_the_middle_and_never_alike() -> None:
    names = ["German shorthaired pointer, young", "German shorthaired pointer, old"]
    assert readable(names) == ["German short…nter, young", "German short…ointer, old"]
    long = ["a" * 40 + middle + "b" * 40 for middle in ("x", "y")]
    assert readable(long) == ["aaaaaaaaa…bbbbbbbb (0)", "aaaaaaaaa…bbbbbbbb (1)"]


def columns(text: str) -> NDArray[np.bool_]:
    """What a text is drawn as, large, from its first column of ink to its last."""
    figure = Figure(figsize=(4, 1), dpi=100)
    figure.text(0.05, 0.4, text, fontsize=30)
    ink = np.asarray(drawn(figure).convert("L")) < 128
    there = np.flatnonzero(ink.any(axis=0))
    return ink[:, there[0] : there[-1] + 1]


@pytest.mark.usefixtures("other_fonts")
def test_a_name_from_right_to_left_is_drawn_as_it_is_read() -> None:
    hebrew, cat = readable(["אבג", "cat"])
    assert (hebrew.strip("\u200e"), cat) == ("אבג", "cat")
    assert hebrew != hebrew.strip("\u200e")
    alef, gimel, name = columns("א"), columns("ג"), columns(hebrew)
    assert (name[:, -alef.shape[1] :] == alef).all()  # the first letter is the rightmost
    assert (name[:, : gimel.shape[1]] == gimel).all()
    # Between two of them an arrow still leads from the left one to the right one.
    pair = columns(f"{hebrew} → {readable(['ד'])[0]}")
    dalet = columns("ד")
    assert (pair[:, : name.shape[1]] == name).all()
    assert (pair[:, -dalet.shape[1] :] == dalet).all()


@pytest.mark.usefixtures("other_fonts")
def test_names_of_folders_are_shown_as_they_are() -> None:
    shown = readable(HOSTILE)
    assert shown[:4] == ["$\\frac{1}{", "a$b$c", "two lines of it", "<b>"]
    assert shown[4:6] == ["class 4", "class 5"]  # the font has no such letters
    assert shown[6] == "x" * 12 + "…" + "x" * 11
    assert shown[7] == "class 7"
    _, found = evaluated(len(HOSTILE), names=HOSTILE)
    for figure in found.values():
        drawn(figure)
    confusion = np.ones((len(HOSTILE), len(HOSTILE)), dtype=np.int64)
    pairs = most_confused(confusion, HOSTILE)
    assert pairs is not None
    drawn(pairs)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 24])
def test_a_contact_sheet_shows_every_image_whole(count: int) -> None:
    colours: list[Any] = [(250, 0, 0), (0, 120, 0)]
    images = [Image.new("RGB", (40 + 50 * (i % 2), 60), colours[i % 2]) for i in range(count)]
    captions = [("true $1", "犬" if i % 2 else "wrong", 0.987) for i in range(count)]
    figure = contact_sheet(images, captions, ["true $1", "wrong", "犬"])
    image = drawn(figure).convert("RGB")
    rows = -(-count // 6)
    assert image.size == (12 + 180 * min(6, count), 12 + 220 * rows)
    # In the middle of the first tile is the first image's colour: one pixel is one pixel.
    assert image.getpixel((12 + 84, 12 + 84)) == colours[0]
    assert "→ wrong 99%" in words(figure)
    assert ("→ class 2 99%" in words(figure)) == (count > 1)  # no font here has it


def test_arrays_and_odd_modes_can_be_on_a_contact_sheet() -> None:
    images: list[Any] = [
        np.full((9, 300, 3), 60, dtype=np.uint8),
        Image.new("CMYK", (1, 500)),
        Image.new("P", (3, 3)),
        Image.new("RGBA", (3, 3)),
    ]
    drawn(contact_sheet(images, [("a", "b", 1.0)] * 4, ["a", "b"]))


def test_a_contact_sheet_needs_a_caption_for_each_image() -> None:
    with pytest.raises(ValueError, match="1 images and 0 captions"):
        contact_sheet([Image.new("L", (2, 2))], [], [])
    with pytest.raises(ValueError, match="0 images"):
        contact_sheet([], [], [])


def test_drawing_leaves_no_global_state() -> None:
    before = dict(mpl.rcParams)
    evaluated(4)
    assert dict(mpl.rcParams) == before
