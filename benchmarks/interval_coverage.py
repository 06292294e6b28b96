"""How often the intervals of an evaluation hold the truth: simulation with a known truth.

A population of made-up answers has a true accuracy, loss, macro F1 and so on. Many sets of test
images are drawn from it, and each is evaluated as `visiontuner evaluate` does. The network is sure
of too much, and is given the temperature that mends it, so that both losses are looked at.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
from measuring import Row, report
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar

from visiontuner.evaluation.calibration import ChosenThreshold, image_losses
from visiontuner.evaluation.intervals import Interval
from visiontuner.evaluation.report import EvaluationReport, evaluate_predictions

TARGETS = (
    "intervals of shares hold the truth in at least 93 %",
    "those of losses and macro F1 in at least 92 %, from 100 images on",
)
SMALL = {"draws": 20, "images": (30,), "accuracies": (0.9,)}
CLASSES = 24
POPULATION = 100_000
TOO_SURE = 1.6  # by which logits are too large
THRESHOLD = 0.9
SHARES = ("accuracy", "top5_accuracy", "recall", "precision", "coverage", "precision above")
MEANS = ("nll", "nll_uncalibrated", "macro_f1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Answers to 100,000 images, and the true scores by name; those of classes are arrays (C,)."""

    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    temperature: float
    truth: Mapping[str, Any]


def measure(
    *,
    draws: int = 2000,
    images: Sequence[int] = (30, 100, 500),
    accuracies: Sequence[float] = (0.5, 0.9, 0.98),
    processes: int | None = None,
) -> dict[str, Any]:
    """Args:
    draws: sets of test images, for each size and accuracy.
    processes: at a time; one for each core if None.
    """
    for library in ("OMP", "OPENBLAS", "MKL"):  # read when the processes import numpy
        os.environ[f"{library}_NUM_THREADS"] = "1"
    jobs = [
        (accuracy, count, range(begin, min(begin + 100, draws)))
        for accuracy in accuracies
        for count in images
        for begin in range(0, draws, 100)
    ]
    held: dict[tuple[float, int], dict[str, list[bool]]] = {}
    with ProcessPoolExecutor(
        processes or os.cpu_count(), mp_context=get_context("spawn")
    ) as executor:
        for (accuracy, count, _), part in zip(jobs, executor.map(_held, jobs), strict=True):
            found = held.setdefault((accuracy, count), defaultdict(list))
            for name, truths in part.items():
                found[name] += truths
    covered = {
        f"accuracy {accuracy:g}, {count} images": {n: float(np.mean(t)) for n, t in names.items()}
        for (accuracy, count), names in held.items()
    }
    return report(list(_rows(covered, draws)), covered=covered)


def _held(job: tuple[float, int, range]) -> dict[str, list[bool]]:
    """By score: whether its interval held the truth, draw by draw."""
    accuracy, count, draws = job
    population = make_population(accuracy)
    held: dict[str, list[bool]] = defaultdict(list)
    for draw in draws:
        rows = np.random.default_rng([count, draw]).integers(POPULATION, size=count)
        found = evaluate_predictions(
            logits=population.logits[rows],
            labels=population.labels[rows],
            class_names=[str(c) for c in range(CLASSES)],
            temperature=population.temperature,
            threshold=ChosenThreshold(
                wanted_precision=0.97, value=THRESHOLD, precision=math.nan, coverage=1.0
            ),
            seed=draw,
        )
        for name, interval, truth in _intervals(found, population.truth):
            held[name].append(bool(interval.low <= truth <= interval.high))
    return held


def _intervals(
    found: EvaluationReport, truth: Mapping[str, Any]
) -> Iterator[tuple[str, Interval, float]]:
    for name in ("accuracy", "top5_accuracy", *MEANS):
        yield name, found.metrics[name], truth[name]
    for c, score in enumerate(found.classes):
        if score.recall_interval is not None:
            yield "recall", score.recall_interval, truth["recall"][c]
        if score.precision_interval is not None:
            yield "precision", score.precision_interval, truth["precision"][c]
    assert found.threshold is not None
    yield "coverage", found.threshold.coverage, truth["coverage"]
    if found.threshold.precision is not None:
        yield "precision above", found.threshold.precision, truth["precision above"]


@lru_cache(maxsize=1)
def make_population(accuracy: float) -> Population:
    """Right logits stand out by an amount that differs from image to image, in Gumbel noise."""
    generator = np.random.default_rng(0)
    labels = generator.integers(CLASSES, size=POPULATION)
    noise = 0.8 * generator.gumbel(size=(POPULATION, CLASSES))
    clearness = np.exp(0.5 * generator.standard_normal(POPULATION))
    everyone = np.arange(POPULATION)

    def answers(margin: float) -> NDArray[np.float64]:
        logits = noise.copy()
        logits[everyone, labels] += margin * clearness
        return logits

    def right(margin: float) -> float:
        return float((answers(margin).argmax(axis=1) == labels).mean())

    logits = answers(brentq(lambda margin: right(margin) - accuracy, 0.0, 60.0, xtol=1e-3))
    best = minimize_scalar(
        lambda t: image_losses(logits, labels, math.exp(t)).mean(),
        bounds=(-3, 3),
        method="bounded",
    )
    logits = TOO_SURE * logits / math.exp(best.x)
    scores = evaluate_predictions(
        logits=logits,
        labels=labels,
        class_names=[str(c) for c in range(CLASSES)],
        temperature=TOO_SURE,
        threshold=ChosenThreshold(
            wanted_precision=0.97, value=THRESHOLD, precision=math.nan, coverage=1.0
        ),
        resamples=2,
    )
    assert scores.threshold is not None
    assert scores.threshold.precision is not None
    truth = {name: interval.value for name, interval in scores.metrics.items()} | {
        "recall": [score.recall for score in scores.classes],
        "precision": [score.precision for score in scores.classes],
        "coverage": scores.threshold.coverage.value,
        "precision above": scores.threshold.precision.value,
    }
    return Population(logits=logits, labels=labels, temperature=TOO_SURE, truth=truth)


def _rows(covered: Mapping[str, Mapping[str, float]], draws: int) -> Iterator[Row]:
    for place, names in covered.items():
        few = int(place.split()[-2]) < 100
        shares = min(names[name] for name in SHARES if name in names)
        means = min(names[name] for name in MEANS)
        said = ", ".join(f"{name} {names[name]:.3f}" for name in (*SHARES, *MEANS) if name in names)
        yield Row(
            what=f"{place}: share of {draws} draws whose interval holds the truth",
            target="shares 0.93" + ("" if few else ", losses and macro F1 0.92"),
            result=said,
            met=shares >= 0.93 and (few or means >= 0.92),
        )
