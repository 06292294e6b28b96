"""Which diagnostic rules fire on trainings made to fail, and on healthy ones?

Real trainings on the quickstart's features. Each failing one has to raise its error; none of the
healthy ones (learning rate within three times of the best) may raise any. With photographs the same
is done on dogs24.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from measuring import PHOTOS, Row, report

TARGETS = (
    "at least 6 of the trainings made to fail raise their error",
    "no error on 20 healthy trainings",
    "all rules on one trial in under 1 ms",
)
SMALL = {"epochs": 6, "healthy": 3, "long": 70}

RATES = (0.001, 0.002, 0.003, 0.006, 0.01, 0.02, 0.03)
BATCHES = (32, 64, 128, 256)


class Split(NamedTuple):
    """Features float32 (N, D) and labels int64 (N,)."""

    features: np.ndarray
    labels: np.ndarray

    def only(self, rows: np.ndarray) -> Split:
        return Split(self.features[rows], self.labels[rows])


@dataclass(frozen=True)
class Case:
    """One training that goes wrong in one way, and the rules of which one has to say so."""

    name: str
    rules: tuple[str, ...]
    train: Split
    settings: Mapping[str, Any] = field(default_factory=dict)


def measure(*, epochs: int = 20, healthy: int = 20, long: int = 200) -> dict[str, Any]:
    outcomes = [
        _measure_set(*loaded, epochs=epochs, healthy=healthy, long=long) for loaded in _sets()
    ]
    rows = [Row(**row) for outcome in outcomes for row in outcome.pop("rows")]
    return report(rows, sets=outcomes)


def _measure_set(
    name: str, train: Split, valid: Split, classes: tuple[str, ...], **sizes: int
) -> dict[str, Any]:
    epochs = sizes["epochs"]
    failing = {}
    for case in failing_cases(train, long=sizes["long"]):
        findings, _ = diagnose(case.train, valid, classes, {"epochs": epochs, **case.settings})
        errors = sorted(f.rule for f in findings if f.severity == "error")
        failing[case.name] = {"errors": errors, "found": bool({*errors} & {*case.rules})}
    best = _best_rate(train, valid, classes, epochs)
    runs = [
        diagnose(train, valid, classes, {"epochs": epochs, **settings})
        for settings in healthy_settings(best, sizes["healthy"])
    ]
    false = [f.rule for findings, _ in runs for f in findings if f.severity == "error"]
    warnings = [f.rule for findings, _ in runs for f in findings if f.severity == "warning"]
    found = sum(case["found"] for case in failing.values())
    cost = median(seconds for _, seconds in runs) * 1000
    missed = [case for case, outcome in failing.items() if not outcome["found"]]
    rows = [
        {
            "what": f"{name}: trainings made to fail that raise their error",
            "target": TARGETS[0],
            "result": f"{found} of {len(failing)}" + (f", not {missed}" if missed else ""),
            "met": found >= 6,
        },
        {
            "what": f"{name}: errors on {len(runs)} healthy trainings (best rate {best:g})",
            "target": TARGETS[1],
            "result": f"{len(false)}, and {len(warnings)} warnings {sorted({*warnings})}",
            "met": not false,
        },
        {
            "what": f"{name}: all rules on one trial, median",
            "target": TARGETS[2],
            "result": f"{cost:.2f} ms",
            "met": cost < 1,
        },
    ]
    return {"rows": rows, "set": name, "failing": failing, "best_rate": best, "false": false}


def failing_cases(train: Split, *, long: int) -> Iterator[Case]:
    """The ways in which a training is made to fail."""
    rng = np.random.default_rng(7)
    shuffled = Split(train.features, rng.permutation(train.labels))
    few = train.only(rng.permutation(len(train.labels))[:50])
    one = np.flatnonzero(train.labels == 0)
    others = rng.permutation(np.flatnonzero(train.labels != 0))[: max(2, len(one) // 9)]
    yield Case("learning rate x 1000", ("learning_rate_too_high",), train, {"learning_rate": 3.0})
    yield Case("learning rate / 1000", ("learning_rate_too_low",), train, {"learning_rate": 3e-6})
    yield Case("learning rate 1e-9", ("loss_not_decreasing",), train, {"learning_rate": 1e-9})
    yield Case("learning rate 1e30", ("not_a_number",), train, {"learning_rate": 1e30})
    yield Case("labels shuffled", ("label_noise",), shuffled)
    yield Case("one class missing", ("class_not_predicted",), train.only(train.labels != 0))
    yield Case("90 % one class", ("class_imbalance",), train.only(np.concatenate([one, others])))
    yield Case(f"{long} epochs on 50 images", ("overfit", "overtraining"), few, {"epochs": long})


def healthy_settings(best: float, count: int) -> list[dict[str, Any]]:
    """Learning rates from a third of the best to three times it, with all batch sizes."""
    rates = best * 3 ** np.linspace(-1, 1, max(2, count))
    return [
        {"learning_rate": float(rate), "batch_size": BATCHES[number % len(BATCHES)]}
        for number, rate in enumerate(rates)
    ]


def diagnose(
    train: Split, valid: Split, classes: tuple[str, ...], settings: Mapping[str, Any]
) -> tuple[list[Any], float]:
    """Train a head for real; its findings, and the seconds that the rules took."""
    import torch

    from visiontuner.diagnostics.history import Curve, Predictions, TrainingHistory
    from visiontuner.diagnostics.rules import diagnose_history
    from visiontuner.errors import TrialFailed
    from visiontuner.experiment.schema import Training
    from visiontuner.training.batches import FeatureBatches
    from visiontuner.training.loop import fit, linear_head

    training = Training(**settings)
    batches = [
        FeatureBatches(*map(torch.from_numpy, split), batch_size=training.batch_size)
        for split in (train, valid)
    ]
    head = linear_head(train.features.shape[1], len(classes), dropout=training.dropout, seed=7)
    epochs, logits, error = [], None, None
    try:
        for result in fit(head, *batches, training, num_classes=len(classes), seed=7):
            epochs.append(result.metrics.to_dict())
            logits = result.validation_logits.numpy() if result.is_kept else logits
    except TrialFailed as failure:
        error = str(failure)
    steps = tuple(range(1, len(epochs) + 1))
    history = TrainingHistory(
        metrics={n: Curve(steps, tuple(e[n] for e in epochs)) for n in (epochs or [{}])[0]},
        configuration=training.model_dump(),
        num_classes=len(classes),
        class_names=classes,
        class_counts=tuple(np.bincount(train.labels, minlength=len(classes)).tolist()),
        predictions=None
        if logits is None
        else Predictions.from_logits(logits, valid.labels, classes),
        error=error,
    )
    began = time.perf_counter()
    findings = diagnose_history(history)
    return findings, time.perf_counter() - began


def _best_rate(train: Split, valid: Split, classes: tuple[str, ...], epochs: int) -> float:
    """The rate with the highest validation accuracy of any epoch, as a search would rank it."""
    import torch

    from visiontuner.experiment.schema import Training
    from visiontuner.training.batches import FeatureBatches
    from visiontuner.training.loop import fit, linear_head

    best: dict[float, float] = {}
    for rate in RATES:
        training = Training(learning_rate=rate, epochs=epochs)
        batches = [
            FeatureBatches(*map(torch.from_numpy, s), batch_size=128) for s in (train, valid)
        ]
        head = linear_head(train.features.shape[1], len(classes), dropout=0.0, seed=7)
        results = fit(head, *batches, training, num_classes=len(classes), seed=7)
        best[rate] = max(result.metrics.validation_accuracy for result in results)
    return max(best, key=lambda rate: best[rate])


def _sets() -> Iterator[tuple[str, Split, Split, tuple[str, ...]]]:
    from visiontuner.experiment.schema import QUICKSTART, Experiment

    yield "quickstart", *_features(Experiment.parse(QUICKSTART))
    folder = Path(os.environ.get(PHOTOS, "")) / "dogs24"
    if os.environ.get(PHOTOS) and folder.is_dir():
        yield "dogs24", *_features(Experiment.parse({"data": {"source": str(folder.resolve())}}))


def _features(experiment: Any) -> tuple[Split, Split, tuple[str, ...]]:
    """Computed once by the package's own code, and kept in its cache."""
    from visiontuner.model.backbones import load_backbone
    from visiontuner.model.features import compute_features
    from visiontuner.model.onnx import make_engine
    from visiontuner.paths import writable_cache_folder
    from visiontuner.workflow.inputs import Silent, load_data

    cache, model = writable_cache_folder(), experiment.model
    backbone = load_backbone(
        model.backbone, weights=model.weights, image_size=model.image_size, cache=cache
    )
    store = compute_features(
        load_data(experiment, Silent()),
        backbone=backbone,
        engine=lambda: make_engine(backbone, precision="fp32", cache=cache),
        precision="fp32",
        cache=cache,
    )
    train, valid = (store.split(name) for name in ("train", "validation"))
    return (
        Split(train.features, train.labels),
        Split(valid.features, valid.labels),
        store.class_names,
    )
