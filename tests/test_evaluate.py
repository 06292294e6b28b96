"""Choosing, calibrating and testing the model of a search that ended."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image

from visiontuner.cli.judge import evaluate as command
from visiontuner.cli.main import main
from visiontuner.errors import DataError, SearchFailed, UserMistake, VisiontunerError
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter, SearchRecord
from visiontuner.model.classifier import Classifier
from visiontuner.model.classifier_files import recalibrate
from visiontuner.model.novelty import Novelty
from visiontuner.workflow.evaluate import (
    EvaluationResult,
    evaluate_search,
    num_test_evaluations,
)
from visiontuner.workflow.evaluate_folder import evaluate_folder
from visiontuner.workflow.image_checks import novelty_finder
from visiontuner.workflow.inputs import Inputs, Silent
from visiontuner.workflow.sync import sync_search
from visiontuner.workflow.tune import resume_search, run_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray")]

# Near enough for a network without pretrained weights to take one for another.
SHADES = {"brick": (190, 60, 50), "rust": (176, 74, 50), "sky": (60, 110, 200)}
COUNTS = {"train": 12, "valid": 10, "test": 12}
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
MODEL = "shades"


def draw(root: Path, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    for split, count in counts.items():
        for name, colour in SHADES.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 55, (32, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
        (root / split / "rust" / "0.png").rename(root / split / "rust" / NOT_UTF8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], str]) -> Path:
    folder = tmp_path_factory.mktemp("home")
    new_database(folder / "mlflow.db")
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, home: Path, shared_cache: Path) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")


@pytest.fixture(scope="module")
def search(home: Path, shared_cache: Path, small_search: dict[str, Any]) -> Path:
    """A search with test images; one of its configurations is hopeless."""
    draw(home / "images", COUNTS)
    raw = {**small_search, "name": MODEL, "data": {"source": str(home / "images")}}
    raw["search"] = {
        **raw["search"],
        "trials": 4,
        "algorithm": "grid",
        "baselines": True,
        "space": {"learning_rate": {"values": [1e-6, 0.02, 0.03, 0.04]}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        return run_search(Experiment.parse(raw), output=home / "search").folder


@pytest.fixture(scope="module")
def evaluated(home: Path, search: Path, shared_cache: Path) -> EvaluationResult:
    """The search's first evaluation; tests look, and may evaluate once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        return evaluate_search(search, precision=0.9)


@pytest.fixture
def copied(
    evaluated: EvaluationResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_database: Callable[[Path], str],
) -> Path:
    """The evaluated search, unknown to the MLflow of this test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    folder = tmp_path / "search"
    shutil.copytree(evaluated.folder, folder)
    (folder / "mlflow.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def untracked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The evaluated search, where no MLflow is written."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    return copied


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")


def run_of(client: MlflowClient, trial_id: str) -> Any:
    experiment = client.get_experiment_by_name(MODEL)
    assert experiment is not None
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`visiontuner.trial_id` = '{trial_id}'"
    )
    return run


def test_an_evaluation_becomes_part_of_the_model_and_of_mlflow(
    search: Path, evaluated: EvaluationResult
) -> None:
    result = evaluated
    assert result.tracking_problem is None
    report, choice = result.report, result.choice
    assert report.num_images == COUNTS["test"] * len(SHADES)
    assert int(report.confusion.sum()) == report.num_images
    assert report.confusion.sum(axis=1).tolist() == [COUNTS["test"]] * len(SHADES)
    accuracy = report.metrics["accuracy"]
    assert accuracy.value == pytest.approx(np.trace(report.confusion) / report.num_images)
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert choice.best == choice.chosen
    hopeless = [
        t.trial_id
        for t in SearchRecord.load(search).trials.values()
        if t.configuration["learning_rate"] == 1e-6
    ]
    assert not set(hopeless) & set(choice.tied)

    classifier = Classifier.load(search / "classifier")
    assert classifier.temperature == report.temperature
    assert report.threshold is not None
    # A precision that validation cannot show: every answer abstains.
    assert classifier.threshold == report.threshold.value
    assert classifier.abstains == (report.threshold.value is None)
    assert classifier.verify_reference() < 1e-6
    predictions = np.load(search / "evaluation" / "predictions.npz", allow_pickle=False)
    images = [search.parent / "images" / path for path in predictions["paths"]]
    assert np.allclose(classifier.probabilities(images), predictions["probabilities"], atol=1e-5)
    assert f"test/rust/{NOT_UTF8}" in predictions["paths"]

    drawn = json.loads((search / "image_map.json").read_text(encoding="utf-8"))
    assert len(drawn["paths"]) == drawn["images"] == sum(COUNTS.values()) * len(SHADES)
    wrong = predictions["probabilities"].argmax(axis=1) != predictions["labels"]
    for mark, rows in (("mistake", wrong), ("novel", ~predictions["known"])):
        marked = {drawn["paths"][int(row)] for row, said in drawn["said"].items() if mark in said}
        assert marked == set(predictions["paths"][rows].tolist())
    assert "Map of the images" in (search / "report.html").read_text(encoding="utf-8")

    client = client_of(search)
    run = run_of(client, choice.chosen)
    assert run.data.metrics["test_accuracy"] == accuracy.value
    assert run.data.metrics["test_accuracy_low"] == accuracy.low
    assert run.data.tags["visiontuner.test_looks"] == "1"
    version = client.get_model_version_by_alias(MODEL, "challenger")
    right = round(accuracy.value * report.num_images)
    assert version.description.startswith(f"{right} of {report.num_images} test images right (")
    logged = {item.path for item in client.list_artifacts(run.info.run_id, "evaluation")}
    assert {f"evaluation/{path.name}" for path in (search / "evaluation").iterdir()} == logged
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert "report.html" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    name, version = result.model.removeprefix("models:/").split("/")
    registered = client.get_model_version(name, version)
    assert registered.tags["visiontuner.evaluated"] == "true"
    assert registered.tags["visiontuner.test_accuracy"] == f"{accuracy.value:.4f}"
    assert str(client.get_model_version_by_alias(name, "challenger").version) == version


def test_a_second_look_is_counted_and_changes_no_model(
    search: Path, evaluated: EvaluationResult
) -> None:
    before = evaluated
    after = evaluate_search(search, precision=0.9)
    assert after.looks == before.looks + 1
    assert after.model == before.model
    assert after.report.to_dict() == before.report.to_dict()
    client = client_of(search)
    run = run_of(client, after.choice.chosen)
    assert run.data.tags["visiontuner.test_looks"] == str(after.looks)
    name, version = after.model.removeprefix("models:/").split("/")
    assert client.get_model_version(name, version).tags["visiontuner.test_looks"] == str(
        after.looks
    )
    history = client.get_metric_history(run.info.run_id, "test_accuracy")
    sync_search(search)
    assert client.get_metric_history(run.info.run_id, "test_accuracy") == history


def test_a_look_counts_though_its_evaluation_fails(
    untracked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visiontuner.workflow import evaluate

    def fail(*_: Any, **__: Any) -> None:
        raise VisiontunerError("the disk is full")

    before = json.loads((untracked / "evaluation" / "report.json").read_text())["looks"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_evaluation", fail)
        with pytest.raises(VisiontunerError, match="disk is full"):
            evaluate_search(untracked)
    assert evaluate_search(untracked).looks == before + 2


def test_a_folder_that_holds_test_images_is_another_look(untracked: Path, home: Path) -> None:
    before = num_test_evaluations(untracked)
    (untracked.parent / "elsewhere").mkdir()
    shutil.copytree(home / "images" / "test" / "sky", untracked.parent / "elsewhere" / "sky")
    found = evaluate_folder(str(untracked.parent / "elsewhere"), model=str(untracked))
    assert (found.test_images, found.looks) == (COUNTS["test"], before + 1)
    assert num_test_evaluations(untracked) == before + 1
    assert found.training_statistics is not None
    assert found.training_statistics.side == (32, 32, 32)
    assert found.classes[0].name == "sky"
    assert found.classes[0].here == 1
    assert found.classes[0].training == pytest.approx(1 / 3)
    elsewhere = evaluate_folder(str(home / "images" / "valid"), model=str(untracked))
    assert (elsewhere.test_images, elsewhere.looks) == (0, None)


def test_another_search_on_the_same_images_is_another_look(
    home: Path, copied: Path, small_search: dict[str, Any]
) -> None:
    sync_search(copied)
    first = json.loads((copied / "evaluation" / "report.json").read_text())
    raw = {**small_search, "name": MODEL, "data": {"source": str(home / "images")}, "seed": 8}
    raw["search"] = {**raw["search"], "trials": 2}
    second = evaluate_search(run_search(Experiment.parse(raw), output=copied.parent / "b").folder)
    assert second.looks == first["looks"] + 1
    client = client_of(copied)
    versions = client.search_model_versions(f"name = '{MODEL}'")
    looks = [v.tags["visiontuner.test_looks"] for v in versions if "visiontuner.test_set" in v.tags]
    assert sorted(looks) == sorted([str(first["looks"]), str(second.looks)])
    assert {v.tags.get("visiontuner.test_set", first["test_set"]) for v in versions} == {
        first["test_set"]
    }
    again = evaluate_search(copied)
    assert again.looks == second.looks + 1


def test_out_of_reach_of_the_wanted_precision_every_answer_abstains(untracked: Path) -> None:
    result = evaluate_search(untracked, precision=0.99)
    assert result.report.threshold is not None
    assert result.report.threshold.coverage.value == 0
    assert any("every answer abstains" in note for note in result.report.notes)
    # So sure of everything that the probabilities are 1.0.
    folder = untracked / "classifier"
    found = Classifier.load(folder)
    limits: dict[str, Any] = {"threshold": found.threshold, "abstains": found.abstains}
    recalibrate(folder, temperature=1e-4, **limits, metadata={})
    images = sorted(Path("images/test").glob("*/*.png"))
    answers = Classifier.load(folder).predict(images)
    assert max(answer.probability for answer in answers) == 1.0
    assert not any(answer.confident for answer in answers)
    asked = ["query", "--model", str(folder), str(images[0]), "--format", "json"]
    done = CliRunner().invoke(main, asked)
    assert json.loads(done.stdout)["confident"] is False
    sure = CliRunner().invoke(main, [*asked, "--threshold", "0.5"])
    assert json.loads(sure.stdout)["confident"] is True


def test_the_cheapest_of_the_tied_is_packaged_though_its_answers_are_gone(
    copied: Path, evaluated: EvaluationResult
) -> None:
    """By the command. Its training is repeated from the seed: the same validation logits."""
    record, tied = SearchRecord.load(copied), evaluated.choice.tied
    assert len(tied) > 1
    kept = {t: np.load(copied / "trials" / t / "validation_logits.npy") for t in tied}
    for path in copied.glob("trials/t*/validation_logits.npy"):
        path.unlink()
        (path.parent / "refit.safetensors").unlink(missing_ok=True)
    done = CliRunner().invoke(command, [str(copied), "--prefer", "cheapest"])
    assert done.exit_code == 0, done.output
    named = {t: record.named(t) for t in tied}
    seconds = {
        t: sum(e.metrics["epoch_seconds"] for e in trial.epochs)
        for t, trial in named.items()
        if trial is not None and t in record.trials
    }
    chosen = min(seconds, key=lambda t: (seconds[t], tied.index(t)))
    for words in (f"Chosen: {chosen}", "accuracy", "models:/shades/"):
        assert words in done.output
    # Not whatever is newest when it is typed, and not in another store.
    version = client_of(copied).get_model_version_by_alias(MODEL, "challenger").version
    store = f"MLFLOW_TRACKING_URI=sqlite:///{copied.parent}/mlflow.db"
    next_step = f"{store} visiontuner promote models:/{MODEL}/{version}"
    assert done.output.splitlines()[-1].endswith(f"if it is better: {next_step}")
    assert Classifier.load(copied / "classifier").metadata["trial_id"] == chosen
    again = np.load(copied / "trials" / chosen / "validation_logits.npy")
    assert np.allclose(again, kept[chosen], atol=1e-4)
    registered = client_of(copied).get_model_version_by_alias(MODEL, "challenger")
    assert registered.tags["visiontuner.trial_id"] == chosen
    assert registered.run_id == run_of(client_of(copied), chosen).info.run_id


def test_what_is_known_is_fitted_to_the_images_of_the_search(
    untracked: Path, shared_cache: Path
) -> None:
    experiment = Experiment.load(untracked / "experiment.yaml")
    inputs, record = Inputs(experiment, Silent()), SearchRecord.load(untracked)
    assert record.kept is not None
    classifier = Classifier.load(untracked / "classifier")
    assert classifier.novelty is not None

    def find(inputs: Inputs, record: SearchRecord) -> Novelty | None:
        trial = record.trials["t0002"]
        finder = novelty_finder(inputs, untracked, record, trial)
        return None if finder is None else finder(classifier)

    cached = find(inputs, record)
    assert cached is not None
    np.testing.assert_array_equal(cached.images, classifier.novelty.images)
    assert cached.threshold == pytest.approx(classifier.novelty.threshold, abs=1e-6)
    assert len(cached.images) == sum(COUNTS[split] for split in ("train", "valid")) * len(SHADES)

    # Gone from the cache: the artifact itself answers, without a pass over all images.
    journal = untracked / "journal.jsonl"
    journal.write_text(journal.read_text("utf-8").replace(str(shared_cache), "/gone"), "utf-8")
    computed = find(inputs, record)
    assert computed is not None
    np.testing.assert_allclose(computed.images, cached.images, atol=2e-3)
    assert computed.threshold == pytest.approx(cached.threshold, abs=1e-3)

    # A network's own features: its training images are the sample, validation images judge.
    raw = experiment.model_dump()
    raw["model"] |= {"train": "last_stage"}
    tuned = Inputs(Experiment.parse(raw), Silent())
    of_network = find(tuned, record)
    assert of_network is not None
    assert len(of_network.images) == COUNTS["train"] * len(SHADES)
    record.started["trained_on"] = "train+validation"
    assert find(tuned, record) is None


def test_logits_that_are_not_those_that_were_scored_are_computed_again(untracked: Path) -> None:
    before = evaluate_search(untracked)
    logits = untracked / "trials" / before.choice.chosen / "validation_logits.npy"
    kept = np.load(logits)
    np.save(logits, np.concatenate([kept[: len(kept) // 2], 0 * kept[len(kept) // 2 :]]))
    after = evaluate_search(untracked)
    assert (after.report.temperature, after.report.metrics) == (
        before.report.temperature,
        before.report.metrics,
    )
    assert np.allclose(np.load(logits), kept, atol=1e-4)


def test_an_evaluation_needs_neither_the_cache_nor_the_answers_of_every_trial(
    untracked: Path,
    evaluated: EvaluationResult,
    tmp_path: Path,
    shared_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features are computed again only where a head has to be trained again."""
    tied = evaluated.choice.tied
    hopeless = set(SearchRecord.load(untracked).trials) - set(tied)
    shutil.rmtree(untracked / "trials" / hopeless.pop())
    _name_other_features(untracked, tmp_path / "gone")
    again = evaluate_search(untracked)
    assert again.report.to_dict() == evaluate_search(untracked).report.to_dict()
    assert again.choice.tied == tied
    assert "answers are gone: t0001" in again.choice.reason

    for head in untracked.glob("trials/*/head.safetensors"):
        head.unlink()
    shutil.rmtree(untracked / "classifier")
    cache = tmp_path / "new cache"
    cache.mkdir()
    (cache / "exports").symlink_to(shared_cache / "exports")  # an export takes seconds
    monkeypatch.setenv("VISIONTUNER_CACHE", str(cache))
    assert evaluate_search(untracked).report.num_images == COUNTS["test"] * len(SHADES)


def _name_other_features(search: Path, folder: Path) -> None:
    """As if the features that the search was trained on had been deleted."""
    journal = search / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    changed = [line | {"folder": str(folder)} if "engine" in line else line for line in lines]
    journal.write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_resuming_a_finished_search_keeps_the_calibrated_model(copied: Path) -> None:
    content = (copied / "classifier" / "classifier.json").read_bytes()
    resumed = resume_search(copied)
    assert resumed.tracking_problem is None
    assert (copied / "classifier" / "classifier.json").read_bytes() == content


def test_another_temperature_is_answered_for_in_the_reference(copied: Path, home: Path) -> None:
    before = Classifier.load(copied / "classifier")
    image = home / "images" / "test" / "sky" / "0.png"
    recalibrate(copied / "classifier", temperature=2.5, threshold=0.7, metadata={"note": "é"})
    after = Classifier.load(copied / "classifier")
    assert (after.temperature, after.threshold) == (2.5, 0.7)
    assert after.metadata == {**before.metadata, "note": "é"}
    assert after.verify_reference() < 1e-6
    logits = np.log(before.probabilities([image])) * before.temperature / 2.5
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.allclose(after.probabilities([image]), expected)


def test_without_test_images_the_model_is_calibrated_and_the_report_says_so(
    home: Path, tmp_path: Path, small_search: dict[str, Any]
) -> None:
    draw(tmp_path / "images", {"train": 12, "valid": 10})
    raw = {**small_search, "name": "untested", "data": {"source": str(tmp_path / "images")}}
    raw["search"] = {**raw["search"], "trials": 1}
    folder = run_search(Experiment.parse(raw), output=tmp_path / "search").folder
    result = evaluate_search(folder, precision=0.97)
    assert result.report.metrics == {}
    assert "no test images" in result.report.notes[0]
    # 30 validation images cannot show that 97 % of the confident answers are right.
    assert Classifier.load(folder / "classifier").abstains
    assert any("every answer abstains" in note for note in result.report.notes)
    assert result.looks == 0
    assert Classifier.load(folder / "classifier").temperature == result.report.temperature
    name, version = result.model.removeprefix("models:/").split("/")
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert "visiontuner.evaluated" not in client.get_model_version(name, version).tags
    assert "no test images" in (folder / "report.html").read_text(encoding="utf-8")


def test_mlflow_away_loses_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{copied.parent}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    away = evaluate_search(copied)
    assert away.model is None
    assert "127.0.0.1:9" in away.tracking_problem
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = sync_search(copied).model
    run = run_of(client_of(copied), away.choice.chosen)
    assert run.data.metrics["test_accuracy"] == away.report.metrics["accuracy"].value
    name, version = model.removeprefix("models:/").split("/")
    assert client_of(copied).get_model_version(name, version).tags["visiontuner.evaluated"]


def test_an_unreadable_test_image_is_left_out_and_named(
    untracked: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It became unreadable after the data set was read: its digest is still the old one."""
    from visiontuner.workflow import inputs

    broken = home / "images" / "test" / "sky" / "3.png"
    content = broken.read_bytes()
    load = inputs.load_data

    def load_then_break(*arguments: Any) -> Any:
        dataset = load(*arguments)
        broken.write_bytes(content[:100])
        return dataset

    monkeypatch.setattr(inputs, "load_data", load_then_break)
    try:
        result = evaluate_search(untracked)
    finally:
        broken.write_bytes(content)
    assert list(result.unreadable) == ["test/sky/3.png"]
    assert result.report.num_images == COUNTS["test"] * len(SHADES) - 1


def test_where_no_test_image_can_be_read_it_says_so_and_recommends_no_promotion(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visiontuner.workflow import inputs

    load = inputs.load_data

    def load_then_miss(*arguments: Any) -> Any:
        """The test images, gone after the data set was read."""
        dataset = load(*arguments)
        gone = tuple(replace(s, path=f"gone/{s.path}") for s in dataset.splits["test"])
        return replace(dataset, splits={**dataset.splits, "test": gone})

    monkeypatch.setattr(inputs, "load_data", load_then_miss)
    done = CliRunner().invoke(command, [str(copied)])
    assert done.exit_code == 0, done.output
    assert "None of the 36 test images can be read" in done.output
    assert "There are no test images" not in done.output
    assert "… and 31 more" in done.output
    assert "visiontuner promote" not in done.output


def test_what_cannot_be_evaluated_says_why(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="--precision must be between 0 and 1"):
        evaluate_search(copied, precision=97)
    journal = JournalWriter(copied, SearchRecord.load(copied).search_id)
    with pytest.raises(UserMistake, match="still running"):
        evaluate_search(copied)
    journal.close()
    best = SearchRecord.load(copied).best.trial_id
    for answers in (copied / "trials" / best).glob("validation_*"):
        answers.write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"validation_logits\.npy"):
        evaluate_search(copied)
    empty = tmp_path / "empty"
    writer = JournalWriter(empty, "s")
    writer.append("search_started", experiment={}, data={}, code={}, machine={})
    writer.append("search_ended", state="failed", best_trial=None)
    writer.close()
    with pytest.raises(SearchFailed, match="no trial that could be evaluated"):
        evaluate_search(empty)


def test_a_fresh_process_elsewhere_gives_the_same_probabilities(
    search: Path, evaluated: EvaluationResult, tmp_path: Path
) -> None:
    """Fifty images of every kind, loaded by a process in another folder."""
    assert evaluated.model
    folder = tmp_path / "kinds"
    folder.mkdir()
    images = _fifty_images(folder)
    here = Classifier.load(search / "classifier").probabilities(images)
    program = f"""
import json
from pathlib import Path
from visiontuner.model.classifier import Classifier
classifier = Classifier.load(Path({str(search / "classifier")!r}))
images = [Path(path) for path in {json.dumps([str(path) for path in images])}]
print(json.dumps(classifier.probabilities(images).tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert np.abs(here - np.array(json.loads(done.stdout))).max() < 1e-5


def _fifty_images(folder: Path) -> list[Path]:
    rng = np.random.default_rng(5)
    paths = []
    for number in range(50):
        pixels = rng.integers(0, 256, (24 + number, 40, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        kind = number % 5
        path = folder / f"{number}.{'png' if kind in (1, 4) else 'jpg'}"
        exif = Image.Exif()
        if kind == 0:
            image = image.convert("CMYK")
        elif kind == 1:
            image = image.quantize(32)
        elif kind == 2:
            exif[0x0112] = 1 + number % 8
        elif kind == 3:
            image = image.convert("L")
        else:
            image.putalpha(Image.fromarray(pixels[..., 0]))
        image.save(path, **({"exif": exif} if kind == 2 else {}))
        paths.append(path)
    return paths
