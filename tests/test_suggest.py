"""`visiontuner suggest`: from unlabelled images to a list and folders to sort them in."""

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import visiontuner as vt
from visiontuner.cli.main import main
from visiontuner.evaluation.suggestions import choose_images

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40)}
SMALL = ("model.backbone=resnet18", "model.weights=none", "model.image_size=32")


def test_images_between_two_classes_are_chosen_and_not_one_kind_of_them_alone():
    """200 sure ones, 40 unsure ones of one kind and 8 of each of four others."""
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 2, 3, 4, 5], [200, 40, 8, 8, 8, 8])
    features = np.eye(6, 16, dtype=np.float32)[kinds]
    features += 0.05 * rng.standard_normal(features.shape, dtype=np.float32)
    sure = np.where(kinds == 0, 0.99, 0.5 + 0.02 * rng.random(len(kinds)))
    probabilities = np.stack([sure, 1 - sure], axis=1)
    chosen = choose_images(features, probabilities, 18)
    assert len(set(chosen.tolist())) == 18
    assert set(kinds[chosen]) == {1, 2, 3, 4, 5}
    margins = np.abs(2 * sure - 1)[chosen]
    assert (np.diff(margins) >= 0).all()
    assert choose_images(features, probabilities, 18).tolist() == chosen.tolist()


def test_equal_images_and_too_few_of_them_are_all_chosen_once():
    features, probabilities = np.ones((30, 4), np.float32), np.full((30, 2), 0.5)
    assert len(set(choose_images(features, probabilities, 7).tolist())) == 7
    assert sorted(choose_images(features, probabilities, 99).tolist()) == list(range(30))


def draw(folder, colour, number, seed):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(number):
        pixels = np.clip(rng.normal(colour, 30, (32, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture
def photos(tmp_path, monkeypatch, shared_cache):
    """Labelled images, and a folder of others with a copy, a broken file and one that is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    for seed, (name, colour) in enumerate(COLOURS.items()):
        draw(Path("photos") / name, colour, 20, seed)
        draw(Path("unsorted") / f"day {seed}", colour, 6, 10 + seed)
    Path("unsorted/broken.jpg").write_bytes(b"no image")
    Path("unsorted/known.png").write_bytes(Path("photos/blue/3.png").read_bytes())
    Path("unsorted/twice.png").write_bytes(Path("unsorted/day 0/1.png").read_bytes())
    return Path("photos")


def suggest(*arguments, code=0):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = ["suggest", "unsorted", "--data", "photos", *settings, *map(str, arguments)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == code, done.output
    return done.output


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_images_are_listed_sorted_by_guess_and_still_where_they_were(photos):
    before = contents("unsorted")
    output = suggest("--budget", 5)
    assert "To label next: 5 of 12 images." in output
    assert "1 that are among the data set's images already" in output
    assert "1 that cannot be read" in output
    with Path("suggestions/suggest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    for row in rows:
        place = Path("suggestions/sort") / row["guess"]
        linked = place / f"{int(row['rank']):05d}-{Path(row['path']).name}"
        assert linked.read_bytes() == before[Path("unsorted") / row["path"]]
        assert row["guess"] == (
            "blue" if "day 0" in row["path"] or "twice" in row["path"] else "green"
        )
    with Image.open("suggestions/suggest.png") as sheet:
        assert sheet.width > 100
    assert contents("unsorted") == before
    # Sorted by hand, they are images of the data set, and no longer suggested.
    assert "suggestions already exists" in suggest(code=2)
    for path in Path("suggestions/sort").rglob("*.png"):
        path.replace(photos / path.parent.name / path.name)
    assert contents("unsorted") == before
    assert "To label next: 7 of 7 images." in suggest("--output", "more")


@pytest.mark.slow
@pytest.mark.usefixtures("photos")
def test_a_full_disk_leaves_no_half_folder_that_the_next_call_refuses(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("visiontuner.workflow.suggest.write_contact_sheet", full)
        assert "Make room" in suggest("--budget", 5, code=1)
    assert "To label next: 5" in suggest("--budget", 5)


@pytest.mark.slow
def test_suggestions_in_python_are_the_same_each_time(photos):
    found = vt.suggest("unsorted", photos, budget=4, settings=SMALL, progress=False)
    again = vt.suggest("unsorted", photos, budget=4, settings=SMALL, output="2", progress=False)
    assert list(found.table.columns) == ["rank", "path", "guess", "probability"]
    assert found.table.equals(again.table)


def test_a_folder_without_new_images_is_refused_in_one_line(photos):
    Path("empty").mkdir()
    for folder, said in (("empty", "holds no images"), (str(photos), "are labelled already")):
        done = CliRunner().invoke(main, ["suggest", folder, "--data", "photos"])
        assert done.exit_code == 2
        assert said in done.output
    assert "no folder" in CliRunner().invoke(main, ["suggest", "gone", "--data", "photos"]).output


@pytest.mark.slow
def test_a_class_called_like_another_folder_is_sorted_below_the_output(photos, tmp_path):
    names = {"blue": "../../outside", "green": f"{tmp_path}/absolute"}
    rows = [
        (f"{name}/{path.name}", label)
        for name, label in names.items()
        for path in sorted((photos / name).iterdir())
    ]
    with (photos / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    before = set(tmp_path.rglob("*"))
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = ["suggest", "unsorted", "--data", "photos/labels.csv", "--budget", "5", *settings]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    made = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert made == {"suggestions"}
    assert len(list(Path("suggestions/sort").glob("*/*.png"))) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("photos")
def test_a_folder_of_broken_images_is_named_in_one_line():
    Path("broken").mkdir()
    Path("broken/a.jpg").write_bytes(b"no image")
    settings = [word for setting in SMALL for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["suggest", "broken", "--data", "photos", *settings])
    assert done.exit_code == 2
    assert "None of the 1 images in broken can be read: Cannot read a.jpg" in done.output
