"""What is read back of a search over the network: labels, and which trial can be taken."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from visiontuner.data.arrays import DecodedImages, prepare_images
from visiontuner.data.dataset import load_dataset
from visiontuner.data.images import Preprocessing
from visiontuner.errors import DataError
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter, SearchRecord, read_events
from visiontuner.search.plan import LOGITS_FILE, NETWORK_FILE, SCORES_FILE, Stores
from visiontuner.workflow.diagnose import diagnose_search
from visiontuner.workflow.inputs import Inputs, Silent
from visiontuner.workflow.selection import ValidationAnswers

SECONDS = {"t0001": 3.0, "t0002": 2.0, "t0003": 1.0}


@pytest.fixture
def store(images: Path, tmp_path: Path) -> DecodedImages:
    preprocessing = Preprocessing(
        resize=20, size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear"
    )
    return prepare_images(
        load_dataset(images, cache=tmp_path),
        preprocessing=preprocessing,
        cache=tmp_path,
        augmented=True,
    )


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def search(tmp_path: Path, store: DecodedImages) -> Path:
    """Three networks with the same right answers, of which two are kept; the third was quickest."""
    folder = tmp_path / "search"
    journal = JournalWriter(folder, "s")
    experiment = Experiment.parse(
        {"name": "x", "model": {"train": "all"}, "training": {"epochs": 1}}
    )
    journal.append("search_started", experiment=experiment.model_dump(mode="json"))
    journal.append("images_ready", folder=str(store.folder))
    logits = np.eye(3, dtype=np.float32)[store.split("validation").labels]
    for trial_id, seconds in SECONDS.items():
        who: dict[str, Any] = {"trial_id": trial_id, "attempt": 1}
        metrics = {"train_loss": 1.0, "validation_accuracy": 1.0, "epoch_seconds": seconds}
        journal.append("trial_started", **who, configuration={})
        journal.append("epoch", **who, step=1, metrics=metrics)
        journal.append("trial_ended", **who, state="completed", best_epoch=1, best_value=1.0)
        trial = folder / "trials" / trial_id
        trial.mkdir(parents=True)
        np.save(trial / LOGITS_FILE, logits)
        if trial_id != "t0003":
            save_file({"bias": np.zeros(3)}, trial / NETWORK_FILE)
    journal.close()
    return folder


def answers_of(search: Path) -> ValidationAnswers:
    record = SearchRecord.load(search)
    return ValidationAnswers(search, record, Experiment.parse(record.started["experiment"]))


def test_labels_come_from_the_decoded_images_where_there_are_no_features(search, store):
    stores = Stores.of(read_events(search).events)
    assert stores == Stores(features=None, images=store.folder)
    labels, names = stores.read_labels()
    assert labels.tolist() == store.split("validation").labels.tolist()
    assert names == ("blue", "green", "red")
    # Features that are gone are no reason to have none.
    both = Stores(features=search / "gone", images=store.folder)
    assert both.read_labels().labels.tolist() == labels.tolist()


def test_the_cheapest_is_chosen_among_the_networks_that_were_kept(search):
    choice = answers_of(search).choose("cheapest")
    assert choice.tied == ("t0003", "t0001", "t0002")
    assert choice.chosen == "t0002"
    assert "2 whose networks were kept" in choice.reason
    (search / "trials" / "t0003" / NETWORK_FILE).write_bytes(b"")
    assert answers_of(search).choose("cheapest").chosen == "t0003"


def test_a_trial_whose_answers_are_gone_is_not_compared(search):
    (search / "trials" / "t0002" / LOGITS_FILE).unlink()
    choice = answers_of(search).choose("best")
    assert choice.tied == ("t0003", "t0001")
    assert choice.reason.endswith("Not compared, since their validation answers are gone: t0002.")
    (search / "trials" / "t0003" / LOGITS_FILE).unlink()  # the best one's must be there
    with pytest.raises(DataError, match="t0003"):
        answers_of(search).choose("best")


def test_trials_are_compared_by_their_scores_and_by_their_logits_alike(search, store):
    by_logits = answers_of(search).choose("best")
    labels = store.split("validation").labels
    for trial_id in SECONDS:
        logits = search / "trials" / trial_id / LOGITS_FILE
        losses = np.full(len(labels), -np.log(np.e / (np.e + 2)), dtype=np.float32)
        assert answers_of(search).scores(trial_id).log_loss == pytest.approx(losses)
        np.savez(logits.with_name(SCORES_FILE), correct=np.ones(len(labels)), log_loss=losses)
        logits.unlink()
    assert answers_of(search).choose("best") == by_logits
    scores = search / "trials" / "t0002" / SCORES_FILE
    content = scores.read_bytes()
    scores.write_bytes(content[:80] + bytes(20) + content[100:])  # zip's checksums tell
    assert answers_of(search).choose("best").tied == ("t0003", "t0001")


def test_labels_come_from_the_images_where_the_cache_is_gone(search, store, images):
    labels = store.split("validation").labels.tolist()
    store.folder.rename(store.folder.with_name("moved"))
    record = SearchRecord.load(search)
    experiment = Experiment.parse({"name": "x", "data": {"source": str(images)}})
    inputs = Inputs(experiment, Silent())
    assert ValidationAnswers(search, record, experiment, inputs=inputs).labels.tolist() == labels


def test_of_the_images_only_the_readable_ones_count(search, store, images, tmp_path):
    """One was broken before the search began: the trials' answers have no row for it."""
    root = tmp_path / "photos"
    shutil.copytree(images, root)
    (root / "valid" / "blue" / "00.png").write_bytes(b"no image")
    labels = store.split("validation").labels.tolist()
    store.folder.rename(store.folder.with_name("moved"))
    experiment = Experiment.parse({"name": "x", "data": {"source": str(root)}})
    inputs = Inputs(experiment, Silent())
    answers = ValidationAnswers(search, SearchRecord.load(search), experiment, inputs=inputs)
    assert answers.labels.tolist() == labels


def test_a_network_that_was_kept_is_not_trained_again(search):
    answers = answers_of(search)
    assert answers.restore(answers.record.trials["t0001"]) is None


def test_without_the_images_the_message_says_where_they_were(search, store):
    store.folder.rename(store.folder.with_name("moved"))
    with pytest.raises(DataError, match=str(store.folder)):
        _ = answers_of(search).labels
    (note,) = diagnose_search(search).notes
    assert "decoded images" in note


def test_the_rules_on_predictions_read_the_images_labels(search):
    labels_wrong = np.zeros((12, 3), dtype=np.float32)
    labels_wrong[:, 0] = 5  # every image is taken for the first class
    for trial_id in SECONDS:
        np.save(search / "trials" / trial_id / LOGITS_FILE, labels_wrong)
    found = {run.name: [f.rule for f in run.findings] for run in diagnose_search(search).runs}
    assert "class_not_predicted" in found["t0001"]
