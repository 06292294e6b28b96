"""A search that is judged by folds, from images to a registered model: what it keeps, and why."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from visiontuner.errors import DiskError
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord, read_events
from visiontuner.model.classifier import Classifier
from visiontuner.workflow import tune
from visiontuner.workflow.evaluate import evaluate_search
from visiontuner.workflow.run import SearchResult
from visiontuner.workflow.train import find_origin
from visiontuner.workflow.tune import resume_search, run_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray")]

FOLDS = 4


@pytest.fixture(scope="module")
def judged_by_folds(
    tmp_path_factory: pytest.TempPathFactory,
    shared_cache: Path,
    images: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
) -> SearchResult:
    home = tmp_path_factory.mktemp("folds")
    raw = {**small_search, "data": {"source": str(images), "validation": "folds", "folds": FOLDS}}
    raw["search"] = {**raw["search"], "baselines": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", new_database(home / "mlflow.db"))
        return run_search(Experiment.parse(raw), output=home / "search")


@pytest.fixture
def folder(
    judged_by_folds: SearchResult,
    tmp_path: Path,
    shared_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of the search that a test may change, beside a copy of its store."""
    home = judged_by_folds.folder.parent
    shutil.copytree(judged_by_folds.folder, tmp_path / "search")
    shutil.copyfile(home / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path / "search"


def test_every_image_is_judged_once_by_a_head_that_did_not_learn_from_it(
    judged_by_folds: SearchResult,
) -> None:
    folder, record = judged_by_folds.folder, judged_by_folds.record
    counts = record.started["data"]["counts"]
    images = counts["train"] + counts["validation"]
    folds = np.load(folder / "folds.npy")
    assert len(folds) == images
    assert set(folds) == set(range(FOLDS))
    assert record.folds == FOLDS
    for trial_id, trial in record.trials.items():
        own = folder / "trials" / trial_id
        assert len(np.load(own / "validation_logits.npy")) == images
        assert not (own / "head.safetensors").exists()
        last = trial.epochs[-1]
        assert (trial.best_epoch, trial.state) == (last.step, "completed")
        assert last.metrics["validation_accuracy_spread"] >= 0


def test_baselines_are_judged_alike_and_are_no_trials(judged_by_folds: SearchResult) -> None:
    record = judged_by_folds.record
    assert set(record.baselines) == {"logistic_regression", "nearest_neighbours"}
    assert set(record.trials) == {"t0001", "t0002", "t0003"}
    store = f"sqlite:///{judged_by_folds.folder.parent}/mlflow.db"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("colours")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    kinds = [run.data.tags["visiontuner.kind"] for run in runs]
    assert sorted(kinds) == ["baseline"] * 2 + ["search"] + ["trial"] * 3
    (parent,) = [run for run in runs if run.data.tags["visiontuner.kind"] == "search"]
    assert parent.data.metrics["estimated_accuracy_low"] >= 0
    assert parent.data.metrics["estimated_accuracy"] <= 1
    assert "Expected accuracy on new images" in parent.data.tags["mlflow.note.content"]
    version = client.get_model_version_by_alias("colours", "challenger")
    assert version.description.startswith("Expected on new images: ")
    assert version.tags["visiontuner.trial_id"] == record.kept.trial_id  # type: ignore[union-attr]


def test_what_is_kept_learnt_from_all_images_and_says_so(judged_by_folds: SearchResult) -> None:
    folder, kept = judged_by_folds.folder, judged_by_folds.record.kept
    assert kept is not None
    classifier = Classifier.load(folder / "classifier")
    assert classifier.metadata["trial_id"] == kept.trial_id
    assert classifier.metadata["trained_on"] == "train+validation"
    own = load_file(folder / "trials" / kept.trial_id / "refit.safetensors")
    packaged = load_file(folder / "classifier" / "weights.safetensors")
    assert any(np.array_equal(own["weight"], tensor) for tensor in packaged.values())


def test_the_choice_is_in_the_journal_and_evaluation_comes_to_the_same(folder: Path) -> None:
    (choice,) = [e for e in read_events(folder).events if e["event"] == "choice_made"]
    assert choice["chosen"] in choice["tied"]
    assert choice["gain"].startswith("Search ")
    estimate = choice["estimate"]
    assert estimate["low"] <= estimate["value"] <= estimate["high"]
    evaluated = evaluate_search(folder)
    assert (evaluated.choice.chosen, evaluated.choice.tied) == (
        choice["chosen"],
        tuple(choice["tied"]),
    )


def test_resumed_after_its_end_a_search_changes_nothing(folder: Path) -> None:
    before = SearchRecord.load(folder)
    resume_search(folder)
    after = SearchRecord.load(folder)
    assert sum(e["event"] == "choice_made" for e in read_events(folder).events) == 1
    assert (after.trials, after.baselines) == (before.trials, before.baselines)
    assert after.kept == before.kept
    assert json.loads((folder / "classifier/classifier.json").read_text())["metadata"]


def cut_before_the_choice(folder: Path) -> None:
    """As a kill after the last trial leaves a search."""
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    later = ("choice_made", "search_ended", "baseline_ended")
    kept = [line for line in lines if json.loads(line)["event"] not in later]
    (folder / "journal.jsonl").write_bytes(b"".join(kept))
    shutil.rmtree(folder / "classifier")


@pytest.mark.parametrize("event", ["killed", "stopped", "disk full"])
def test_a_bad_moment_before_the_choice_loses_nothing(
    folder: Path, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SearchRecord.load(folder)
    cut_before_the_choice(folder)
    error = KeyboardInterrupt() if event == "stopped" else OSError(errno.ENOSPC, "No space left")

    def fail(*_: object) -> None:
        raise error

    if event != "killed":
        with monkeypatch.context() as patch:
            patch.setattr(tune, "choose_and_record", fail)
            if event == "stopped":
                assert resume_search(folder).state == "interrupted"
            else:
                with pytest.raises(DiskError, match=r"nothing is lost.*--resume"):
                    resume_search(folder)
    after = resume_search(folder).record
    assert set(after.baselines) == set(before.baselines)
    assert after.kept is not None
    assert before.kept is not None
    assert after.kept.trial_id == before.kept.trial_id
    assert Classifier.load(folder / "classifier").metadata["trial_id"] == after.kept.trial_id


@pytest.mark.parametrize("lost", ["validation_logits.npy", "refit.safetensors"])
def test_what_is_lost_of_the_kept_one_is_computed_again(folder: Path, lost: str) -> None:
    kept = SearchRecord.load(folder).kept
    assert kept is not None
    before = evaluate_search(folder).report.metrics
    (folder / "trials" / kept.trial_id / lost).unlink()
    shutil.rmtree(folder / "classifier")
    assert evaluate_search(folder).report.metrics == before


def test_a_network_begins_with_a_head_that_has_not_seen_the_validation_images(folder: Path) -> None:
    origin = find_origin(str(folder))
    head = origin.head()
    assert head is not None
    best = SearchRecord.load(folder).best
    assert best is not None
    assert head == folder.resolve() / "trials" / best.trial_id / "head.safetensors"
    refitted = folder / "trials" / best.trial_id / "refit.safetensors"
    if refitted.is_file():
        assert not np.array_equal(load_file(head)["weight"], load_file(refitted)["weight"])
