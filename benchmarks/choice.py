"""Is the model that a search keeps the best to have, and is what is said of it true?

On photographs: images of a class are pooled over train, valid and test; each repetition draws its
own training, validation and test images, runs 32 random trials from the default search space on
cached features, and lets every strategy choose by the same trials. What it chose is judged on the
test images. All that is compared is compared on the same draws.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads_together import (
    Heads,
    Points,
    Trained,
    largest_difference,
    out_of_fold,
    train_heads,
)
from measuring import Row, features_of, photographs, report, scratch
from numpy.typing import NDArray
from scipy import stats

from visiontuner.data.folds import assign_folds, folds_for
from visiontuner.evaluation.baselines import REGRESSION
from visiontuner.evaluation.baselines import logistic_regression as logistic_regression_baseline
from visiontuner.evaluation.calibration import fit_temperature, image_losses
from visiontuner.evaluation.choice import Candidate, choose, estimate_accuracy
from visiontuner.experiment.schema import Experiment, Training
from visiontuner.search.plan import settings_of
from visiontuner.search.space import draw_beforehand

TARGETS = (
    "accuracy, one-sided 95 %: no row worse than a baseline by more than 1 point",
    "accuracy, one-sided 95 %: all rows pooled worse by no more than 0.3 points",
    "accuracy against the first best epoch of the best trial, one-sided 95 %: better",
    "calibrated test NLL: at most 1.10 x the better baseline's in each row, 1.03 x pooled",
    "printed estimate minus test accuracy: within 1 point from 100 images on, within 3 below",
)
SMALL = {"repetitions": 2, "rows": ("flowers5 at 12",), "trials": 3}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the repetitions of one row draw.

    Args:
        images: of a class: 80 % of them train, 10 % validation, as the product shares out a folder
            without splits. The others, and all that are not drawn, are test images.
        classes: so many, drawn anew in each repetition; None for all.
        better: whether the old rule has to be beaten here.
    """

    name: str
    dataset: str
    images: int
    classes: int | None = None
    better: bool = False


SIZES = (
    Size(name="flowers5 at 12", dataset="flowers5", images=12, better=True),
    Size(name="flowers5 at 30", dataset="flowers5", images=30, better=True),
    Size(name="flowers5 at 60", dataset="flowers5", images=60, better=True),
    Size(name="flowers5 at 100", dataset="flowers5", images=100),
    Size(name="dogs24 at 10", dataset="dogs24", images=10),
    Size(name="dogs24 at 20", dataset="dogs24", images=20, better=True),
    Size(name="dogs24 at 60", dataset="dogs24", images=60),
    Size(name="two flowers at 60", dataset="flowers5", images=60, classes=2),
)
_TRAIN, _VALIDATION = 0.8, 0.9  # where the shares of a class end


# One repetition: images, trials, and what each strategy makes of them.


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """One repetition's images, and the trials of its search.

    Args:
        settings: of every trial; the first has the defaults.
        seed: of the trials.
    """

    train: Points
    validation: Points
    test: Points
    num_classes: int
    settings: tuple[Training, ...]
    seed: int

    @cached_property
    def trials(self) -> Trained:
        """Trained on the training images, with curves on validation."""
        return train_heads(
            self.train,
            self.validation,
            self.settings,
            num_classes=self.num_classes,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What a strategy keeps.

    Args:
        logits: float64, (num_test, num_classes), of the test images.
        estimate: the accuracy that would be printed on the first page; None if it gives none.
        images: validation or out-of-fold images behind the estimate and the temperature.
        name: of the trial or the baseline.
    """

    logits: NDArray[np.float64]
    temperature: float
    estimate: float | None
    images: int
    name: str = ""


Strategy = Callable[[Draw], Kept]


def product(draw: Draw) -> Kept:
    """What the product does: folds, baselines, a choice, a refit, a corrected estimate."""
    both = Points.join(draw.train, draw.validation)
    labels = both.labels.numpy()
    folds = assign_folds(labels, [f"{row:06}" for row in range(len(both))],
                         folds=folds_for(len(both)) or 5)  # fmt: skip
    answers = out_of_fold(
        both, folds, draw.settings, num_classes=draw.num_classes, seed=draw.seed
    ).double().numpy()  # fmt: skip
    regression = logistic_regression_baseline(
        both.features.numpy(), labels, folds, num_classes=draw.num_classes
    )
    logits = {f"t{n:04}": one for n, one in enumerate(answers, start=1)}
    logits[REGRESSION] = regression.logits
    candidates = [
        Candidate(
            name=name,
            value=float((of.argmax(axis=1) == labels).mean()),
            correct=of.argmax(axis=1) == labels,
            losses=image_losses(of, labels),
        )
        for name, of in logits.items()
    ]
    choice = choose(
        candidates,
        labels,
        objective="validation_accuracy",
        mode="max",
        simplest=(REGRESSION, "t0001"),
    )
    correct = np.stack([c.correct for c in candidates], axis=1)
    losses = np.stack([c.losses for c in candidates], axis=1)
    estimate = estimate_accuracy(
        np.concatenate([correct, np.asarray(regression.path_correct)], axis=1),
        np.concatenate([losses, np.asarray(regression.path_losses)], axis=1),
    )
    if choice.chosen == REGRESSION:
        head = Heads(
            weights=torch.from_numpy(np.asarray(regression.weights))[None],
            biases=torch.from_numpy(np.asarray(regression.biases))[None],
        )
    else:
        kept = draw.settings[int(choice.chosen[1:]) - 1]
        head = train_heads(both, None, [kept], num_classes=draw.num_classes, seed=draw.seed).last
    return Kept(
        logits=_logits(head, draw.test),
        temperature=fit_temperature(logits[choice.chosen], labels),
        estimate=estimate.value,
        images=len(labels),
        name=choice.chosen,
    )


def first_best_epoch(draw: Draw) -> Kept:
    """The rule at commit c16cea8: the first best epoch of the first best trial, by accuracy."""
    best = int(draw.trials.accuracy.max(axis=1).argmax())
    return _on_hold_out(draw, _one(draw.trials.best, best))


def defaults_last_epoch(draw: Draw) -> Kept:
    """No search: the defaults, trained to their end."""
    return _on_hold_out(draw, _one(draw.trials.last, 0))


def logistic_regression(draw: Draw) -> Kept:
    """scikit-learn's, with C by the loss on the same validation images."""
    path = regression_path(draw.train, draw.num_classes)
    losses = [
        float(image_losses(_logits(head, draw.validation), draw.validation.labels.numpy()).mean())
        for head in path
    ]
    return _on_hold_out(draw, path[int(np.argmin(losses))])


STRATEGIES: Mapping[str, Strategy] = {
    "product": product,
    "first best epoch": first_best_epoch,
    "defaults": defaults_last_epoch,
    "logistic regression": logistic_regression,
}
BASELINES = ("defaults", "logistic regression")
OLD_RULE = "first best epoch"

# From almost no weights to almost no penalty, on features of about unit size.
PENALTIES = tuple(float(c) for c in np.logspace(-3, 2, 11))


def regression_path(points: Points, num_classes: int) -> list[Heads]:
    """Logistic regressions with each C of `PENALTIES`, as heads; each begins where the last ended.

    A penalised regression's weights lie in the span of its images, so fewer images than features
    are first written in a basis of that span: the same answer from a smaller problem.
    """
    from sklearn.linear_model import LogisticRegression

    features = points.features.numpy().astype(np.float64)
    labels = points.labels.numpy()
    basis = None
    if features.shape[0] < features.shape[1]:
        basis = np.linalg.qr(features.T)[0]  # (D, N)
        features = features @ basis
    model = LogisticRegression(max_iter=500, tol=1e-3, warm_start=True)
    heads = []
    for penalty in PENALTIES:
        model.set_params(C=penalty).fit(features, labels)
        weights, biases = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # one score: the second class against the first
            weights, biases = np.concatenate([0 * weights, weights]), np.array([0, biases[0]])
        weights = weights if basis is None else weights @ basis.T
        all_weights = np.zeros((num_classes, points.features.shape[1]))
        all_biases = np.full(num_classes, -1e3)  # of classes without an image: never answered
        all_weights[model.classes_], all_biases[model.classes_] = weights, biases
        heads.append(
            Heads(
                weights=torch.from_numpy(all_weights).float()[None],
                biases=torch.from_numpy(all_biases).float()[None],
            )
        )
    return heads


def _one(heads: Heads, place: int) -> Heads:
    return Heads(weights=heads.weights[[place]], biases=heads.biases[[place]])


def _logits(head: Heads, points: Points) -> NDArray[np.float64]:
    return head.logits(points.features)[0].double().numpy()


def _on_hold_out(draw: Draw, head: Heads) -> Kept:
    """Temperature and estimate from the validation images."""
    logits, labels = _logits(head, draw.validation), draw.validation.labels.numpy()
    return Kept(
        logits=_logits(head, draw.test),
        temperature=fit_temperature(logits, labels),
        estimate=float((logits.argmax(axis=1) == labels).mean()),
        images=len(labels),
    )


# The images and what is drawn of them.


def pooled(name: str, cache: Path) -> Points:
    """The features of all images of a data set, each content once, by the product's functions."""
    _, store = features_of(photographs(name), cache=cache)
    parts = [store.split(split) for split in store.splits]
    features = np.concatenate([part.features for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    kept = np.sort(np.unique(features, axis=0, return_index=True)[1])
    return Points(features=torch.from_numpy(features[kept]), labels=torch.from_numpy(labels[kept]))


def draw_images(pool: Points, size: Size, repetition: int, trials: int = 32) -> Draw:
    """The same images and trials for the same row and repetition, whatever else is measured."""
    place = [s.name for s in SIZES].index(size.name)
    generator = np.random.default_rng([place, repetition])
    labels = pool.labels.numpy()
    every = np.unique(labels)
    classes = every if size.classes is None else generator.permutation(every)[: size.classes]
    while True:
        rows: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": [], "test": []}
        for label in classes:
            own = generator.permutation(np.flatnonzero(labels == label))
            drawn, rest = own[: size.images], own[size.images :]
            share = generator.random(len(drawn))
            rows["train"].append(drawn[share < _TRAIN])
            rows["validation"].append(drawn[(share >= _TRAIN) & (share < _VALIDATION)])
            rows["test"].append(np.concatenate([drawn[share >= _VALIDATION], rest]))
        if all(len(part) for part in rows["train"]) and any(len(p) for p in rows["validation"]):
            break
    renamed = {int(label): new for new, label in enumerate(sorted(classes))}
    parts = {
        name: _renamed(pool.rows(np.sort(np.concatenate(of))), renamed) for name, of in rows.items()
    }
    experiment = Experiment.parse(
        {"seed": repetition, "search": {"algorithm": "random", "trials": trials}}
    )
    return Draw(
        **parts,
        num_classes=len(classes),
        settings=tuple(settings_of(experiment.training, c) for c in draw_beforehand(experiment)),
        seed=repetition,
    )


def _renamed(points: Points, names: Mapping[int, int]) -> Points:
    labels = torch.tensor([names[int(label)] for label in points.labels])
    return Points(features=points.features, labels=labels)


# Repetitions, one process a core with one thread each.


def measure(
    *,
    repetitions: int = 100,
    rows: Sequence[str] | None = None,
    trials: int = 32,
    processes: int | None = None,
) -> dict[str, Any]:
    """Args:
    rows: names of `SIZES`; all if None.
    processes: at a time; one for each core if None.
    """
    sizes = [size for size in SIZES if rows is None or size.name in rows]
    if unknown := set(rows or ()) - {size.name for size in sizes}:
        raise ValueError(f"no row {sorted(unknown)}; rows: {', '.join(s.name for s in SIZES)}")
    for size in sizes:
        photographs(size.dataset)  # before anything is computed
    with scratch() as folder:
        before = os.environ.get("VISIONTUNER_CACHE")
        os.environ["VISIONTUNER_CACHE"] = str(folder if before is None else before)
        try:
            for name in {size.dataset for size in sizes}:
                pool = pooled(name, Path(os.environ["VISIONTUNER_CACHE"]))
                np.savez(folder / f"{name}.npz", features=pool.features, labels=pool.labels)
            measured = _repeat(sizes, folder, repetitions, trials, processes)
        finally:
            if before is None:
                del os.environ["VISIONTUNER_CACHE"]
    return report(list(_rows(sizes, measured)), sizes=measured)


def _repeat(
    sizes: Sequence[Size], folder: Path, repetitions: int, trials: int, processes: int | None
) -> dict[str, Any]:
    """By row: seconds, the largest difference from `Fit`, and each strategy's numbers."""
    measured: dict[str, Any] = {}
    for library in ("OMP", "OPENBLAS", "MKL"):  # read when the processes import numpy
        os.environ[f"{library}_NUM_THREADS"] = "1"
    context = get_context("spawn")
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        for size in sizes:
            began = time.monotonic()
            jobs = [(folder, size, repetition, trials) for repetition in range(repetitions)]
            scores = list(pool.map(_measure_one, jobs))
            measured[size.name] = {
                "seconds": round(time.monotonic() - began, 1),
                "differs_from_fit": max(s.pop("differs_from_fit") for s in scores),
                "repetitions": scores,
            }
    return measured


@lru_cache(maxsize=2)
def _load(path: Path) -> Points:
    with np.load(path, allow_pickle=False) as held:
        return Points(
            features=torch.from_numpy(held["features"]), labels=torch.from_numpy(held["labels"])
        )


def _measure_one(job: tuple[Path, Size, int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder, size, repetition, trials = job
    draw = draw_images(_load(folder / f"{size.dataset}.npz"), size, repetition, trials)
    differs = 0.0
    if repetition == 0:  # the defaults, and the trial that was drawn last
        differs = largest_difference(
            draw.trials,
            draw.train,
            draw.validation,
            draw.settings,
            (0, trials - 1),
            num_classes=draw.num_classes,
            seed=draw.seed,
        )
    return {
        "differs_from_fit": differs,
        **{name: _judge(strategy(draw), draw) for name, strategy in STRATEGIES.items()},
    }


def _judge(kept: Kept, draw: Draw) -> dict[str, float]:
    labels = draw.test.labels.numpy()
    accuracy = float((kept.logits.argmax(axis=1) == labels).mean())
    scores = {
        "accuracy": accuracy,
        "nll": float(image_losses(kept.logits, labels, kept.temperature).mean()),
        "images": kept.images,
        "is_regression": float(kept.name == REGRESSION),
    }
    if kept.estimate is not None:
        scores["estimate"] = kept.estimate
    return scores


# Numbers of the repetitions -> rows of the table.


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The mean of paired differences, and the bound that it lies above with 95 % confidence."""

    mean: float
    bound: float

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> Gain:
        return cls.pooled([differences])

    @classmethod
    def pooled(cls, parts: Sequence[NDArray[np.float64]]) -> Gain:
        """Of rows that all weigh the same, by Student's t."""
        mean = float(np.mean([part.mean() for part in parts]))
        error = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))) / len(parts)
        freedom = sum(len(part) - 1 for part in parts)
        return cls(mean=mean, bound=mean - float(stats.t.ppf(0.95, freedom)) * error)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.2f} ({100 * self.bound:+.2f})"


def _column(row: Mapping[str, Any], strategy: str, score: str) -> NDArray[np.float64]:
    return np.array([repetition[strategy][score] for repetition in row["repetitions"]])


def _rows(sizes: Sequence[Size], measured: Mapping[str, Any]) -> Iterable[Row]:
    for size in sizes:
        row = measured[size.name]
        yield _accuracy(size, row)
        yield _likelihood(size, row)
        yield _truth(size, row)
    yield from _pooled(measured)


def _accuracy(size: Size, row: Mapping[str, Any]) -> Row:
    ours = _column(row, "product", "accuracy")
    gains = {n: Gain.of(ours - _column(row, n, "accuracy")) for n in (*BASELINES, OLD_RULE)}
    met = all(gains[name].bound > -0.01 for name in BASELINES)
    if size.better:
        met = met and gains[OLD_RULE].bound > 0
    against = ", ".join(f"{gain} against {name}" for name, gain in gains.items())
    return Row(
        what=f"{size.name}: test accuracy, {len(ours)} repetitions; {row['seconds']} s",
        target="bounds above -1 point" + (f", above 0 against {OLD_RULE}" if size.better else ""),
        result=f"{ours.mean():.4f}: points {against}",
        met=bool(met),
    )


def _likelihood(size: Size, row: Mapping[str, Any]) -> Row:
    means = {name: float(_column(row, name, "nll").mean()) for name in STRATEGIES}
    ratio = means["product"] / min(means[name] for name in BASELINES)
    others = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if name != "product")
    return Row(
        what=f"{size.name}: calibrated test NLL",
        target="at most 1.10 x the better baseline's",
        result=f"{ratio:.3f} x: {means['product']:.3f}; {others}",
        met=ratio <= 1.10,
    )


def _truth(size: Size, row: Mapping[str, Any]) -> Row:
    gap = _column(row, "product", "estimate") - _column(row, "product", "accuracy")
    images = int(np.median(_column(row, "product", "images")))
    allowed = 0.01 if images >= 100 else 0.03
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    return Row(
        what=f"{size.name}: printed estimate minus test accuracy, {images} images",
        target=f"within {100 * allowed:.0f} point{'s' if allowed > 0.01 else ''}",
        result=f"{100 * gap.mean():+.2f} points, standard error {100 * error:.2f}",
        met=bool(abs(gap.mean()) <= allowed),
    )


def _pooled(measured: Mapping[str, Any]) -> Iterable[Row]:
    for baseline in BASELINES:
        gain = Gain.pooled(
            [
                _column(row, "product", "accuracy") - _column(row, baseline, "accuracy")
                for row in measured.values()
            ]
        )
        yield Row(
            what=f"all rows: test accuracy against {baseline}",
            target="bound above -0.3 points",
            result=f"{gain} points",
            met=gain.bound > -0.003,
        )
    means = {
        name: float(np.mean([_column(row, name, "nll").mean() for row in measured.values()]))
        for name in STRATEGIES
    }
    ratio = means["product"] / min(means[name] for name in BASELINES)
    yield Row(
        what="all rows: calibrated test NLL",
        target="at most 1.03 x the better baseline's",
        result=f"{ratio:.3f} x: {means['product']:.3f}",
        met=ratio <= 1.03,
    )
    differs = max(row["differs_from_fit"] for row in measured.values())
    yield Row(
        what="logits of heads trained side by side against `Fit`, largest difference",
        target="below 0.001",
        result=f"{differs:.1e}",
        met=differs < 1e-3,
    )
