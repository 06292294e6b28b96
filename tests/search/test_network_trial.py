"""Trials that run the network, without a Ray: what they leave on the disk, and how they go on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from visiontuner.data.arrays import prepare_images
from visiontuner.data.dataset import load_dataset
from visiontuner.diagnostics.history import RECORDING_FILE
from visiontuner.errors import CheckpointError, TrialFailed, VisiontunerError
from visiontuner.experiment.schema import Experiment
from visiontuner.model.backbones import load_backbone
from visiontuner.model.features import compute_features
from visiontuner.model.onnx import make_engine
from visiontuner.search.plan import (
    CHECKPOINT_FOLDER,
    HEAD_FILE,
    LOGITS_FILE,
    NETWORK_FILE,
    SCORES_FILE,
    TrialTask,
)
from visiontuner.search.trial import train_again, train_head_epochs, train_network_epochs

# A tenth of a million parameters, with batch normalisation and stages.
BACKBONE = {"backbone": "timm:test_efficientnet.r160_in1k", "weights": "none", "image_size": 32}
CONFIG = {"trial_id": "t0001", "configuration": {"learning_rate": 0.02}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def task(tmp_path: Path, cache: Path, images: Path) -> Callable[..., TrialTask]:
    """Makes what a trial of `model.train` on the coloured images is handed."""
    dataset = load_dataset(images, cache=cache)

    def make(train: str, **training: Any) -> TrialTask:
        settings = {"epochs": 3, "batch_size": 8, "augmentation": "none", "workers": 0, **training}
        experiment = Experiment.parse(
            {"name": "x", "model": {**BACKBONE, "train": train}, "training": settings}
        )
        backbone = load_backbone(
            str(BACKBONE["backbone"]), weights="none", image_size=32, cache=cache
        )
        store = prepare_images(
            dataset,
            preprocessing=backbone.preprocessing,
            cache=cache,
            augmented=not experiment.augmentation.is_off,
        )
        features = compute_features(
            dataset,
            backbone=backbone,
            engine=lambda: make_engine(backbone, precision="fp32", cache=cache),
            precision="fp32",
            cache=cache,
        )
        return TrialTask(
            experiment=experiment,
            search_folder=tmp_path,
            threads=1,
            features_folder=features.folder,
            images_folder=store.folder,
            cache=cache,
        )

    return make


def numbers(results: Any) -> list[dict[str, float]]:
    timed = ("epoch_seconds", "images_per_second")
    rows = [result.metrics.to_dict() for result in results]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


@pytest.mark.parametrize("train", ["last_stage", "all"])
def test_the_kept_epochs_network_and_answers_are_on_the_disk_when_it_is_told(task, train):
    given = task(train, schedule="constant")
    folder, best = given.trial_folder("t0001"), 0.0
    for result in train_network_epochs(CONFIG, given):
        kept = {path.name for path in folder.iterdir()} - {RECORDING_FILE}
        assert kept == {NETWORK_FILE, LOGITS_FILE, SCORES_FILE}
        kept = np.load(folder / LOGITS_FILE, allow_pickle=False)
        weights = load_file(folder / NETWORK_FILE)["head.weight"]
        is_kept = torch.equal(weights, result.network.head[1].weight)
        assert is_kept == result.is_kept
        assert np.array_equal(kept, result.validation_logits.numpy()) == result.is_kept
        best = max(best, result.metrics.validation_accuracy)
    assert best > 0.5
    # What is not trained is what it was: the network's first layer.
    before = load_backbone(
        str(BACKBONE["backbone"]), weights="none", image_size=32, cache=given.cache
    )
    after = load_file(folder / NETWORK_FILE)["backbone.conv_stem.weight"]
    assert torch.equal(after, before.module.conv_stem.weight) == (train == "last_stage")


def test_the_head_on_images_gives_the_curves_of_the_head_on_features(task):
    """Without augmentation the frozen network answers the same in every epoch."""
    given = task("head")
    on_features = numbers(train_head_epochs(CONFIG, given))
    on_images = numbers(train_network_epochs(CONFIG, given))
    for row, other in zip(on_features, on_images, strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    # The backbone is the cached one: the head alone is kept.
    assert not (given.trial_folder("t0001") / NETWORK_FILE).exists()
    assert (given.trial_folder("t0001") / HEAD_FILE).is_file()


def test_a_head_that_sees_changed_images_learns_on_them(task):
    given = task("head", augmentation="light", epochs=1)
    assert given.experiment.trains_on_images
    (result,) = train_network_epochs(CONFIG, given)
    assert np.isfinite(result.metrics.train_loss)


def test_a_network_begins_with_the_head_that_was_trained(task):
    given = task("last_stage", epochs=8)
    *_, last = train_head_epochs(CONFIG, given)
    head = given.trial_folder("t0001") / HEAD_FILE
    # A rate of next to nothing: what comes out is what it began with.
    still = {"trial_id": "t0002", "configuration": {"learning_rate": 1e-12}}
    first = next(
        train_network_epochs(
            still, replace(given, start_heads={"t0002": head, "t0001": Path("/not/there")})
        )
    )
    assert torch.allclose(first.network.head[1].weight, load_file(head)["weight"], atol=1e-6)
    assert not torch.allclose(
        next(train_network_epochs(still, given)).network.head[1].weight,
        last.network[1].weight,
        atol=1e-3,
    )


def test_a_trial_goes_on_from_its_checkpoint_with_the_same_numbers(task):
    given = replace(task("all", augmentation="strong", ema_decay=0.9), checkpoints=True)
    whole = numbers(train_network_epochs({**CONFIG, "trial_id": "t0009"}, given))
    checkpoint = given.trial_folder("t0001") / CHECKPOINT_FOLDER
    seen = []
    for _ in range(3):
        epochs = train_network_epochs(CONFIG, given)
        seen.append(next(epochs))  # told, and killed before it asks for more
        epochs.close()
        assert seen[-1].epoch == 1
    assert not checkpoint.exists()
    epochs = train_network_epochs(CONFIG, given)
    next(epochs)
    second = next(epochs)
    epochs.close()
    rest = list(train_network_epochs(CONFIG, given))
    assert [result.epoch for result in rest] == [2, 3]
    assert numbers([seen[0], second, rest[-1]]) == whole
    # After the last epoch there is nothing to go on with: it can be told once more.
    assert [result.epoch for result in train_network_epochs(CONFIG, given)] == [3]


def test_a_checkpoint_of_another_training_is_one_clear_line(task):
    given = replace(task("all"), checkpoints=True)
    epochs = train_network_epochs(CONFIG, given)
    next(epochs)
    next(epochs)
    epochs.close()
    other = replace(task("last_stage"), checkpoints=True)
    with pytest.raises(CheckpointError, match=r"^[^\n]*model\.train[^\n]*$"):
        next(train_network_epochs(CONFIG, other))


def test_trained_again_a_trial_leaves_the_files_of_its_kept_epoch(task):
    given = task("last_stage", augmentation="light")
    results = [r.is_kept for r in train_network_epochs(CONFIG, given)]
    kept = max(number for number, is_kept in enumerate(results, start=1) if is_kept)
    folder = given.trial_folder("t0001")
    network, logits = load_file(folder / NETWORK_FILE), (folder / LOGITS_FILE).read_bytes()
    recording = (folder / RECORDING_FILE).read_bytes()
    (folder / NETWORK_FILE).unlink()
    (folder / LOGITS_FILE).unlink()
    train_again(CONFIG, given, kept_epoch=kept)
    again = load_file(folder / NETWORK_FILE)
    assert sorted(again) == sorted(network)
    assert all(torch.equal(again[name], network[name]) for name in network)
    assert (folder / LOGITS_FILE).read_bytes() == logits
    assert (folder / RECORDING_FILE).read_bytes() == recording


@pytest.mark.parametrize("train", [train_head_epochs, train_network_epochs])
@pytest.mark.parametrize("name", [HEAD_FILE, LOGITS_FILE])
def test_a_file_that_cannot_be_written_is_one_line(task, train, name):
    given = task("head", epochs=1)
    path = given.trial_folder("t0001") / name
    path.mkdir(parents=True)  # a folder cannot be replaced
    with pytest.raises(VisiontunerError, match=rf"^Cannot write {path} [^\n]*room there\.$"):
        list(train(CONFIG, given))
    assert not list(path.parent.glob(".*"))


def test_a_loss_that_is_no_number_is_one_line(task):
    wild = {"trial_id": "t0001", "configuration": {"learning_rate": 1e30}}
    with pytest.raises(TrialFailed, match=r"in epoch 1 at learning rate 1e\+30"):
        list(train_network_epochs(wild, task("all", optimizer="sgd")))
