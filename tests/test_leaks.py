"""`data.on_leak`: images that show the same in two splits are named, or one of them is left out."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageEnhance

import visiontuner as vt
from visiontuner.cli.main import main
from visiontuner.data.arrays import FeatureSet
from visiontuner.errors import DataError
from visiontuner.experiment.schema import Experiment
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.inputs import Inputs, Silent
from visiontuner.workflow.prepare import prepare

pytestmark = pytest.mark.slow  # a network over some sixty images in each

# Darkened and cropped: (the copy that goes, the image that stays).
LEAKS = {
    ("train/a/3.png", "test/a/copy.png"),
    ("train/b/2.png", "valid/b/copy.png"),
    ("valid/b/0.png", "test/b/copy.png"),
}


def photograph(seed):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((96, 96))
    fine = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    return Image.blend(coarse, fine.resize((96, 96), Image.Resampling.BICUBIC), 0.4)


def change(image):
    return ImageEnhance.Brightness(image.crop((4, 0, 96, 92))).enhance(0.9)


@pytest.fixture
def photos(tmp_path, monkeypatch, shared_cache, request):
    """Other images in each test, so that none finds the features of another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    seed = 1000 * sum(map(ord, request.node.name))
    for split, number in (("train", 6), ("valid", 3), ("test", 3)):
        for name in ("a", "b"):
            folder = Path("photos") / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                seed += 1
                photograph(seed).save(folder / f"{index}.png")
    for source, copy in LEAKS:
        with Image.open(Path("photos") / source) as image:
            change(image).save(Path("photos") / copy)
    return Path("photos")


def inputs(photos, on_leak, **data):
    model = {"backbone": "resnet18", "weights": "none", "image_size": 32}
    data = {"source": str(photos), "on_leak": on_leak, **data}
    return Inputs(Experiment.parse({"data": data, "model": model}), Silent())


def paths(dataset):
    return {name: {sample.path for sample in samples} for name, samples in dataset.splits.items()}


def test_the_copy_in_the_split_that_less_depends_on_is_left_out(photos):
    warned, dropped = inputs(photos, "warn"), inputs(photos, "drop")
    assert {(leak.path, leak.other) for leak in dropped.leaks.across_splits} == LEAKS
    before, after = paths(warned.dataset), paths(dropped.dataset)
    gone = {path for path, _ in LEAKS}
    assert after["test"] == before["test"]
    assert {name: before[name] - gone for name in before} == after
    assert dropped.dataset.digest != warned.dataset.digest
    assert "without 3, which another split shows as well" in dropped.dataset.described
    (finding,) = [f for f in dropped.dataset.findings if f.rule == "leaks_left_out"]
    assert set(finding.items) == {" ~ ".join(pair) for pair in LEAKS}


def test_an_evaluation_says_what_accuracy_is_without_the_images_that_leaked(photos, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    small = ["model.backbone=resnet18", "model.weights=none", "model.image_size=32"]
    search = vt.train(photos, settings=small, epochs=2, output="search", progress=False)
    report = evaluate_search(search.folder).report
    (note,) = [note for note in report.notes if "show the same" in note]
    assert note.startswith("2 of 8 test images show the same as a training or validation image")
    assert "without them it is" in note
    assert "visiontuner prepare --all --data " in note


def test_features_of_what_is_left_are_not_computed_again(photos):
    (photos / "train/a/broken.png").write_bytes(b"no image")
    dropped = inputs(photos, "drop")
    every = dropped.features_of(dropped.loaded, ("train", "validation"))
    assert dropped.leaks.across_splits
    dropped._engine = lambda: pytest.fail("the network is run again")
    left, _ = dropped.features()
    assert isinstance(left, FeatureSet)
    for split in ("train", "validation"):
        rows = [every.split(split).paths.index(path) for path in left.split(split).paths]
        np.testing.assert_array_equal(left.split(split).features, every.split(split).features[rows])
    assert [finding.evidence for finding in left.findings] == [every.findings[0].evidence]


def test_prepare_names_leaks_once_the_features_are_there(photos):
    warned = inputs(photos, "warn")
    assert "leaks" not in {f.rule for f in prepare(warned.experiment).findings}
    warned.features()
    (finding,) = [f for f in prepare(warned.experiment).findings if f.rule == "leaks"]
    assert set(finding.items) == {" ~ ".join(pair) for pair in LEAKS}
    # Each pair once, though a hash finds some of them as well.
    found = prepare(warned.experiment).findings
    named = [item for f in found for item in getattr(f, "items", ()) if " ~ " in item]
    assert len(named) == len({frozenset(item.split(" ~ ")) for item in named})


def test_one_scene_in_two_groups_is_named(photos):
    for path in list(photos.rglob("*.png")):  # groups go by the names of files
        path.rename(path.with_name(f"{path.parts[1]}-{path.parts[2]}-{path.name}"))
    with Image.open(photos / "train/a/train-a-0.png") as image:
        change(image).save(photos / "train/a/train-a-100.png")
    grouped = inputs(photos, "warn", group=r"(.*)\.png")
    grouped.features()
    found = {f.rule: f for f in prepare(grouped.experiment).findings}
    assert found["leaks_between_groups"].items == (
        "train/a/train-a-0.png ~ train/a/train-a-100.png",
    )


def test_prepare_says_what_a_search_leaves_out(photos):
    settings = ["data.on_leak=drop", "model.backbone=resnet18", "model.weights=none"]
    settings += ["model.image_size=32"]
    flags = [word for setting in settings for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["prepare", "--all", "--data", str(photos), *flags])
    assert done.exit_code == 0, done.output
    assert "the 3 images before the ~ are left out" in done.output


def test_a_split_that_consists_of_copies_cannot_be_trained_on(photos):
    for path in (photos / "valid").rglob("*.png"):
        path.unlink()
    for name in ("a", "b"):
        with Image.open(photos / "test" / name / "0.png") as image:
            change(image).save(photos / "valid" / name / "0.png")
    with pytest.raises(DataError, match=r"no images left for validation: all 2 are left out"):
        inputs(photos, "drop").dataset  # noqa: B018
