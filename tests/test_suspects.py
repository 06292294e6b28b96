"""`visiontuner suspects`: from images with a wrong label to a table that `data.labels` reads."""

import csv
import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import visiontuner as vt
from visiontuner.cli.main import main
from visiontuner.data.dataset import load_dataset
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter
from visiontuner.workflow.inputs import Silent, load_data
from visiontuner.workflow.run import write_experiment

COLOURS = {"blue": (40, 40, 200), "-green": (40, 200, 40), "red": (200, 40, 40)}
SMALL = ("model.backbone=resnet18", "model.weights=none", "model.image_size=32")
# Both are blue; the first beginning of a path and of a class is a spreadsheet's formula.
WRONG = {"-green/9.png", "red/9.png"}


@pytest.fixture
def photos(tmp_path, monkeypatch, shared_cache):
    """Thirty images of each colour, two of which are in the wrong folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = Path("photos") / name
        folder.mkdir(parents=True)
        for number in range(30):
            shown = COLOURS["blue"] if f"{name}/{number}.png" in WRONG else colour
            pixels = np.clip(rng.normal(shown, 30, (32, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return Path("photos")


def run(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


def suspects(*arguments, code=0):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return run("suspects", "--data", "photos", *settings, *arguments, code=code)


def rows(file="suspects/suspects.csv"):
    with Path(file).open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def write(rows, file="suspects/suspects.csv"):
    with Path(file).open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def load(photos, cache, labels=None):
    return load_dataset(photos, labels=labels and Path(labels), cache=cache)


def label_of(dataset, path):
    return {
        sample.path: dataset.class_names[sample.label]
        for samples in dataset.splits.values()
        for sample in samples
    }.get(path)


def test_a_wrong_label_is_named_relabelled_and_left_out(photos, tmp_path):
    output = suspects()
    found = rows()
    assert list(found[0]) == ["path", "label", "suggested", "score"]
    assert {row["path"].removeprefix("'") for row in found} == WRONG
    assert {row["suggested"] for row in found} == {"blue"}
    assert all(0.95 <= float(row["score"]) <= 1 for row in found)
    assert "Suspect labels: 2 of 81 training and validation images" in output
    assert "--set data.labels=suspects/suspects.csv" in output
    with Image.open("suspects/suspects.png") as sheet:
        assert sheet.width > 2 * 168

    before = load(photos, tmp_path)
    as_written = load(photos, tmp_path, "suspects/suspects.csv")
    assert as_written.digest == before.digest  # nothing is changed before somebody has looked
    assert not [f for f in as_written.findings if f.rule == "labels_without_image"]

    for row in found:
        row["label"] = row["suggested"] if row["path"] == "red/9.png" else ""
    write(found)
    corrected = load(photos, tmp_path, "suspects/suspects.csv")
    assert label_of(corrected, "red/9.png") == "blue"
    assert label_of(corrected, "-green/9.png") is None
    assert corrected.digest != before.digest
    assert "suspects.csv changes 1 labels and drops 1 images" in corrected.described

    assert "perhaps with your corrections" in suspects(code=2)
    assert rows()[0]["label"] in ("", "blue")


@pytest.mark.usefixtures("photos")
def test_a_full_disk_leaves_no_half_table_that_looks_like_one_with_corrections(monkeypatch):
    replace = Path.replace

    def full(path, target):
        if Path(target).name == "suspects.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert "Make room" in suspects(code=1)
    assert "corrections" not in suspects()


def test_all_suggestions_are_taken_by_renaming_two_columns(photos, tmp_path):
    suspects("--output", "elsewhere")
    file = Path("elsewhere/suspects.csv")
    header, rest = file.read_text("utf-8").split("\n", 1)
    assert header == "path,label,suggested,score"
    file.write_text(f"path,given,label,score\n{rest}", "utf-8")
    taken = load(photos, tmp_path, file)
    assert {label_of(taken, path) for path in WRONG} == {"blue"}


def test_odd_images_have_a_table_of_their_own_and_prepare_counts_them(photos):
    for name in COLOURS:
        for split, numbers in (("train", range(3, 30)), ("valid", range(3))):
            (photos / split / name).mkdir(parents=True)
            for number in numbers:
                file = f"{name}/{number}.png"
                (photos / file).rename(photos / split / file)
        (photos / name).rmdir()
    red = photos / "train" / "red"
    noise = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise // 8).save(red / "dark.png")
    Image.fromarray(noise[:8]).resize((320, 40)).save(red / "long.png")
    Image.new("RGB", (40, 32), "black").save(red / "black.png")
    output = suspects()
    assert "Odd images: 1 blank, 1 dark, 1 odd-shaped" in output
    odd = {(row["path"], row["reason"], row["value"]) for row in rows("suspects/odd.csv")}
    assert {one for one in odd if one[1] != "outlier"} == {
        ("train/red/black.png", "blank", "0"),
        ("train/red/dark.png", "dark", "31"),
        ("train/red/long.png", "odd-shaped", "8.0"),
    }
    settings = [word for setting in SMALL for word in ("--set", setting)]
    prepared = run("prepare", "--data", photos, *settings)
    assert re.search(r"validation images have a label .*visiontuner suspects --data", prepared)
    assert "1 (train/red/dark.png): 95 % of the pixels are darker" in prepared
    assert "1 (train/red/long.png): more than 3 times as long as wide" in prepared


def test_earlier_corrections_stay_in_the_table(photos, tmp_path):
    Path("fix.csv").write_text("path,label\nred/9.png,blue\nblue/3.png,\n", "utf-8")
    output = suspects("--set", "data.labels=fix.csv")
    assert "2 rows of the data.labels of before" in output
    both = {row["path"].removeprefix("'"): row["label"] for row in rows()}
    assert both["red/9.png"] == "blue"
    assert both["blue/3.png"] == ""
    again = load(photos, tmp_path, "suspects/suspects.csv")
    assert label_of(again, "red/9.png") == "blue"
    assert label_of(again, "blue/3.png") is None


def test_a_search_has_its_suspects_in_its_folder(photos):
    folder = Path("searches/photos-1")
    experiment = Experiment.parse({"data": {"source": str(photos)}}, SMALL)
    digest = load_data(experiment, Silent()).digest
    folder.mkdir(parents=True)
    write_experiment(folder, experiment)
    writer = JournalWriter(folder, "s1")
    raw = experiment.model_dump(mode="json")
    writer.append("search_started", name="photos-1", experiment=raw, data={"digest": digest})
    writer.close()
    output = run("suspects")
    assert len(rows(folder / "suspects" / "suspects.csv")) == len(WRONG)
    assert "tune --experiment searches/photos-1/experiment.yaml" in output
    page = (folder / "report.html").read_text("utf-8")
    assert "2 of the training and validation images have a label that" in page
    assert "All 81 images that the search has seen" in page  # not those of test
    result = vt.suspects(folder, progress=False)  # again, and the same
    assert set(result.table["path"]) == WRONG
    assert list(result.table.columns) == ["path", "label", "suggested", "score"]
    assert "suspect labels: 2 of 81 images" in repr(result)
    assert len(repr(result).splitlines()) == 3

    (photos / "red" / "0.png").unlink()
    assert "not those this search began with" in run("suspects", folder, code=2)
    with pytest.raises(vt.VisiontunerError, match="a search has its own"):
        vt.suspects(folder, settings={"seed": 1})


def test_what_was_written_beside_class_folders_is_no_class(photos, tmp_path):
    suspects("--output", photos / "suspects")
    assert (photos / "suspects" / "suspects.png").exists()
    assert load(photos, tmp_path).class_names == tuple(sorted(COLOURS))


@pytest.mark.usefixtures("photos")
def test_too_many_images_are_refused_before_any_is_looked_at(monkeypatch):
    monkeypatch.setattr("visiontuner.workflow.suspects.is_affordable", lambda *_: False)
    assert "data.limit_per_class" in suspects(code=2)
    assert not Path("suspects").exists()


def test_without_a_search_or_images_it_is_one_line(photos):
    assert run("suspects", code=2).count("\n") == 1
    assert "not both" in suspects("searches/a", code=2)
    for name in ("-green", "red"):
        for file in (photos / name).iterdir():
            file.unlink()
        (photos / name).rmdir()
    assert "only one class, blue" in suspects(code=2)
