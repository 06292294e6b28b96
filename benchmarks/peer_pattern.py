"""The documented Ray Tune + MLflow pattern: each trial runs the frozen network in every epoch.

    python peer_pattern.py IMAGES CONFIGURATIONS.json EPOCHS TRACKING_URI LIMIT

As Ray's and MLflow's guides have it: a function trainable with `setup_mlflow`, a torchvision
ImageFolder in a DataLoader, the network in torch, `mlflow.log_metrics` and `tune.report` once an
epoch. Network, weights, transforms, optimizer and schedule are those of visiontuner's search.
LIMIT is how many images of each class are used, 0 for all.
Prints JSON: the best validation accuracy of each trial.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import mlflow
import ray
import torch
from ray import tune
from ray.air.integrations.mlflow import setup_mlflow
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from visiontuner.model.backbones import load_backbone

NETWORK = "efficientnet_lite0"


def main() -> None:
    images, configurations, epochs, uri, limit = sys.argv[1:6]
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("pattern")
    space = {
        "configuration": tune.grid_search(json.loads(Path(configurations).read_text())),
        "images": images,
        "epochs": int(epochs),
        "limit_per_class": int(limit),
        "tracking_uri": uri,
        "cache": os.environ["VISIONTUNER_CACHE"],
    }
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(metric="validation_accuracy", mode="max"),
        run_config=tune.RunConfig(storage_path=str(Path.cwd() / "ray"), verbose=0),
    ).fit()
    accuracies = [float(r.metrics_dataframe["validation_accuracy"].max()) for r in results]
    ray.shutdown()
    print(json.dumps({"best": max(accuracies), "accuracies": accuracies}))


def train(config: dict[str, Any]) -> None:
    """One trial, on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    chosen, epochs = config["configuration"], config["epochs"]
    setup_mlflow(chosen, tracking_uri=config["tracking_uri"], experiment_name="pattern")
    backbone = load_backbone(NETWORK, cache=Path(config["cache"]))
    network = backbone.module.to(memory_format=torch.channels_last)
    training, validation = loaders(config, backbone.preprocessing, int(chosen["batch_size"]))
    head = torch.nn.Linear(backbone.feature_dim, len(training.dataset.dataset.classes))
    optimizer = torch.optim.AdamW(head.parameters(), lr=chosen["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(training))
    for epoch in range(1, epochs + 1):
        for images, labels in training:
            with torch.no_grad():
                features = network(images.to(memory_format=torch.channels_last))
            loss = functional.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracy = evaluate(network, head, validation)
        metrics = {"train_loss": float(loss), "validation_accuracy": accuracy}
        mlflow.log_metrics(metrics, step=epoch)
        tune.report(metrics)


def loaders(config: dict[str, Any], preprocessing: Any, batch_size: int) -> list[DataLoader]:
    """Training, shuffled, and validation images."""
    transform = transforms.Compose(
        [
            transforms.Resize(
                preprocessing.resize, transforms.InterpolationMode(preprocessing.interpolation)
            ),
            transforms.CenterCrop(preprocessing.size),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    found = []
    for split in ("train", "valid"):
        folder = datasets.ImageFolder(Path(config["images"]) / split, transform)
        subset = Subset(folder, first_of_each_class(folder.targets, config["limit_per_class"]))
        found.append(DataLoader(subset, batch_size=batch_size, shuffle=split == "train"))
    return found


def first_of_each_class(targets: list[int], limit: int) -> list[int]:
    """Indices of the first `limit` images of each class; all of them if it is 0."""
    seen: dict[int, int] = {}
    kept = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        if not limit or seen[target] <= limit:
            kept.append(index)
    return kept


def evaluate(network: torch.nn.Module, head: torch.nn.Module, loader: DataLoader) -> float:
    correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            logits = head(network(images.to(memory_format=torch.channels_last)))
            correct += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    return correct / total


if __name__ == "__main__":
    # Ray's workers import the trainable by its module's name, which `__main__` is not.
    import peer_pattern

    peer_pattern.main()
