"""`visiontuner drift`: whether images are still like those that a model was made with."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from scipy import stats

import visiontuner as vt
from visiontuner.cli import judge
from visiontuner.cli.main import main
from visiontuner.evaluation.drift import (
    FoldJudges,
    Observations,
    adjust_by_holm,
    compare_classes,
    compare_features,
    compare_observations,
)
from visiontuner.model.novelty import scores_among
from visiontuner.workflow.drift import MEASURES

# The tests.


def test_p_values_are_adjusted_by_holm() -> None:
    """By hand: 3 x .01, 2 x .03, and .04, which may not be below the one before it."""
    equal = np.ones(3)
    assert adjust_by_holm(np.array([0.01, 0.04, 0.03]), equal) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_by_holm(np.array([0.9, 0.6]), equal[:2]).tolist() == [1, 1]
    # Half of the level is the first one's: 4 / 2 x .02, 2 x .015 (not below .04), and .05.
    weighted = adjust_by_holm(np.array([0.02, 0.015, 0.05]), np.array([2.0, 1.0, 1.0]))
    assert weighted == pytest.approx([0.04, 0.04, 0.05])


def test_the_features_test_is_hotellings() -> None:
    """Of few dimensions and normal values the permutations give what the F distribution does."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=(120, 3)).astype(np.float32)
    after = rng.normal([0.3, 0, 0.2], 1, (60, 3)).astype(np.float32)
    difference = before.mean(axis=0) - after.mean(axis=0)
    pooled = (119 * np.cov(before.T) + 59 * np.cov(after.T)) / 178
    squared = 120 * 60 / 180 * difference @ np.linalg.solve(pooled, difference)
    expected = stats.f.sf(squared * (178 - 2) / (178 * 3), 3, 178 - 2)
    assert 0.001 < expected < 0.3
    assert compare_features(before, after) == pytest.approx(expected, rel=0.15, abs=0.002)


def test_the_classes_test_is_chi_square() -> None:
    before, after = np.repeat([0, 1, 2], [60, 80, 60]), np.repeat([0, 1, 2], [40, 32, 28])
    table = [np.bincount(side) for side in (before, after)]
    expected = stats.chi2_contingency(table, correction=False).pvalue
    assert compare_classes(before, after) == pytest.approx(expected, abs=0.02)


def test_a_shift_in_a_direction_in_which_images_hardly_differ_is_found() -> None:
    """A hundredth of what the widest direction has; the same images give the same."""
    rng = np.random.default_rng(1)
    widths = np.r_[10.0, np.full(19, 1.0), np.full(60, 0.1)]
    before, after = (rng.normal(0, widths, (n, 80)).astype(np.float32) for n in (300, 100))
    assert compare_features(before, after) > 0.05
    after[:, 20:] += 0.1
    found = compare_features(before, after)
    assert found < 0.005
    assert compare_features(before, after) == found


def test_where_nothing_differs_five_of_a_hundred_checks_say_so() -> None:
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        shared = rng.normal(size=(200, 1))  # measures of one image have to do with each other
        values = shared + rng.normal(size=(200, 5))
        before, after = (
            Observations(values={str(k): part[:, k] for k in range(5)})
            for part in (values[:120], values[120:])
        )
        alarms += any(measure.moved for measure in compare_observations(before, after))
    assert alarms <= stats.binom.ppf(0.999, 200, 0.05)


def test_of_few_images_a_measure_says_nothing() -> None:
    ramp = np.arange(20.0)
    before = Observations(values={"brightness": ramp, "side": ramp[:19]})
    after = Observations(values={"brightness": ramp + 100, "side": ramp, "contrast": ramp})
    (only,) = compare_observations(before, after)
    assert (only.name, only.moved, only.reference, only.images) == ("brightness", True, 9.5, 109.5)
    assert only.reference_images == 20
    with pytest.raises(ValueError, match="no measure"):
        compare_observations(before, after, without=["brightness"])


def test_no_regression_answers_an_image_that_it_was_fitted_to() -> None:
    """Labels drawn at random can be learned by heart, and not be guessed."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(200, 300)).astype(np.float32)
    labels = rng.integers(2, size=200)
    judges = FoldJudges.fit(features, labels, num_classes=2)
    unseen = judges.answers(features).argmax(axis=1) == labels
    seen = judges.answers(np.roll(features, 1, axis=0)).argmax(axis=1) == np.roll(labels, 1)
    assert 0.35 < unseen.mean() < 0.65
    assert seen.all()


def test_the_novelty_of_an_image_among_others_leaves_itself_out() -> None:
    """Five of six directions are the same: for them 1 - (4 x 1 + 0) / 5; for the sixth 1."""
    features = np.array([[1.0, 0]] * 5 + [[0, 1.0]])
    assert scores_among(features) == pytest.approx([0.2] * 5 + [1.0])


def test_the_command_offers_the_measures_that_there_are() -> None:
    (option,) = (p for p in judge.drift.params if p.name == "without")
    assert tuple(option.type.choices) == MEASURES


# A trained model, and images that it is asked about.


COLOURS = {"blue": (60, 60, 170), "green": (60, 170, 60)}
SMALL = ("model.backbone=resnet18", "model.weights=none", "model.image_size=32")


def draw(folder: Path, colour: tuple[int, int, int], number: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(number):
        shade = rng.normal(colour, 12)
        pixels = np.clip(rng.normal(shade, 25, (32, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """A folder with images, a training on them, and others of the same kind."""
    folder = tmp_path_factory.mktemp("home")
    for seed, (name, colour) in enumerate(COLOURS.items()):
        draw(folder / "photos" / name, colour, 70, seed)
        draw(folder / "june" / name, colour, 30, 10 + seed)
    settings = [*SMALL, "training.epochs=3", f"data.source={folder / 'photos'}", "name=colours"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", "none")
        vt.train(settings=settings, output=folder / "search", progress=False)
    return folder


@pytest.fixture
def search(home: Path, tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the training, with no MLflow to write to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    shutil.copytree(home / "search", tmp_path / "search")
    shutil.copytree(home / "june", tmp_path / "june")
    return tmp_path / "search"


def darken(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray((0.6 * pixels).astype(np.uint8)).save(path)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def drift(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["drift", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.slow
def test_images_of_the_same_kind_have_not_drifted_and_twice_say_the_same(search: Path) -> None:
    shutil.copy(search.parent / "june/blue/0.png", search.parent / "june/copy.png")
    (search.parent / "june/broken.jpg").write_bytes(b"no image")
    before = contents(Path("june"))
    output = drift("june", "search", "--exit-code")
    assert "Drift: none." in output
    assert "left out: 1 that cannot be read (broken.jpg)" in output
    told = json.loads(Path("search/drift/june/drift.json").read_text())
    assert (told["images"], told["found"], told["known"]) == (60, 61, 0)
    assert {row["name"] for row in told["measures"]} == set(MEASURES)
    first = contents(Path("search/drift/june"))
    drift("june", "search")
    assert contents(Path("search/drift/june")) == first
    assert contents(Path("june")) == before


@pytest.mark.slow
def test_darker_images_are_named_drawn_and_tracked(
    search: Path, new_database: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_database(search.parent / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    darken(Path("june"))
    found = vt.drift("june", search, progress=False)
    table = found.table.set_index("name")
    assert found.drifted
    assert table.loc["brightness", "moved"]
    assert table.loc["brightness", "images"] == pytest.approx(
        0.6 * table.loc["brightness", "reference"], rel=0.05
    )
    assert not table.loc["side", "moved"]
    with (found.folder / "drift.csv").open(encoding="utf-8", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(table.index)
    with Image.open(found.folder / "drift.png") as figure:
        assert figure.width > 600
    # Those that the model does not know, ready for `suggest`: second names of the same files.
    assert found.share_new is not None
    assert found.share_new.value > 0.5
    linked = sorted((found.folder / "new").iterdir())
    assert len(linked) == len(found.new) > 20
    for path, one in zip(linked, found.new, strict=True):
        assert path.samefile(Path("june") / one.path)
    assert found.new[0].novelty == max(one.novelty for one in found.new)

    assert found.run_id is not None
    client = MlflowClient(uri)
    run = client.get_run(found.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["visiontuner.kind"] == "drift"
    assert "brightness" in run.data.tags["visiontuner.drift"]
    assert run.data.metrics["drifted"] == 1
    assert run.data.metrics["brightness.p_value"] == table.loc["brightness", "p_value"]
    assert client.get_experiment(run.info.experiment_id).name == "colours drift"
    logged = {item.path for item in client.list_artifacts(found.run_id)}
    assert logged == {"drift.json", "drift.csv", "drift.png", "new.png"}

    output = drift("june", "search", "--without", "brightness", "--exit-code", code=1)
    assert "  brightness " not in output
    assert "visiontuner suggest" in output


@pytest.mark.slow
def test_images_that_were_trained_on_are_left_out_and_too_few_refused(
    search: Path, home: Path
) -> None:
    output = drift(home / "photos", "search", code=2)
    assert "At least 20 are needed" in output
    assert "more are training or validation images" in output
    shutil.copytree(home / "photos" / "blue", "june/old")
    assert "that are training or validation images" in drift("june", "search")
    for path in Path("june").rglob("*.png"):
        path.write_bytes(b"no image " + bytes(str(path), "utf-8"))
    assert "None of the" in drift("june", "search", code=2)
    with pytest.raises(vt.VisiontunerError, match="no measure 'hue'"):
        vt.drift("june", search, without=["hue"], progress=False)
    assert "photos/ is neither a folder nor" in drift("photos/", "search", code=2)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    shutil.copytree(home / "june", "july")
    assert "mine already exists" in drift("july", "search", "--output", "mine", code=2)
    assert Path("mine/notes.txt").exists()


@pytest.mark.slow
def test_folders_of_one_name_are_two_checks(search: Path) -> None:
    shutil.copytree("june", "other/june")
    darken(Path("other/june"))
    drift("june", "search")
    before = contents(search / "drift/june")
    for _ in range(2):
        drift("other/june", "search")
        first, second = sorted((search / "drift").iterdir())
        assert contents(first) == before
        assert json.loads((second / "drift.json").read_text())["source"].endswith("other/june")


def test_what_is_no_folder_may_be_an_endpoint_and_both_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    Path("search").mkdir()
    output = drift("photos-of-june", "search", code=2)
    assert "There is no folder photos-of-june" in output
    assert "No AWS region" in output
    with pytest.raises(vt.VisiontunerError, match="> 0 and < 1, got 2"):
        vt.drift("june", "search", false_alarms=2, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("search")
def test_what_an_endpoint_was_asked_is_fetched_and_compared(
    moto: tuple[str, int], use_aws: Callable[[str], None], home: Path
) -> None:
    """And where it names other classes than the search's model, that is said."""
    use_aws(f"http://{moto[0]}:{moto[1]}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="kept")
    lines = []
    for number, path in enumerate(sorted((home / "june").rglob("*.png"))):
        image = base64.b64encode(path.read_bytes()).decode()
        lines.append(_captured(f"e{number}", image, _RED))
    key = "all/colours/AllTraffic/2026/11/30/10/00-00-000-x.jsonl"
    client.put_object(Bucket="kept", Key=key, Body="\n".join(lines).encode())
    output = drift("s3://kept/all/colours", "search")
    assert "60 images" in output
    assert "The endpoint has named another class for 60 of 60 images" in output
    assert len(list(Path("search/captured/colours/images").iterdir())) == 60
    assert Path("search/drift/colours/drift.png").exists()


_RED = {"label": "red", "probability": 0.9, "confident": True, "top_k": []}


def _captured(event: str, image: str, answer: dict[str, Any]) -> str:
    data = {
        "endpointInput": {"data": json.dumps({"instances": [{"image": image}]})},
        "endpointOutput": {"data": json.dumps({"predictions": [answer]})},
    }
    about = {"eventId": event, "inferenceTime": "2026-11-30T10:00:00Z"}
    return json.dumps({"captureData": data, "eventMetadata": about})
