"""How far a probability can be trusted: temperature, calibration error, threshold, risk.

Temperature and threshold are chosen on validation images. What they are worth is seen on test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
MIN_CONFIDENT_IMAGES = 10
# Half the 95 % quantile of chi-squared with one degree of freedom, nats.
_MIN_GAIN = 1.92


def probabilities_of(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of the logits divided by the temperature, float64, shape (N, C)."""
    shares: NDArray[np.float64] = softmax(
        np.asarray(logits, dtype=np.float64) / temperature, axis=1
    )
    return shares


def image_losses(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float = 1.0
) -> NDArray[np.float64]:
    """Negative log-likelihood of each image's label in nats, shape (N,)."""
    logs = log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    losses: NDArray[np.float64] = -logs[np.arange(len(labels)), labels]
    return losses


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The temperature under which the labels are most likely.

    It minimises the sum of the images' losses plus ln(T)^2 nats, which weighs as much as one
    image: without a mistake among the images the likeliest temperature would be 0, and every
    later mistake would cost without bound. It stays 1 unless that gains 1.92 nats, the likelihood
    ratio test at 5 %: less is noise, and other images pay for it. The loss of the given images
    never rises.

    Args:
        logits: float, shape (N, C), of validation images; finite.
        labels: int, shape (N,), values in [0, C).

    Returns:
        In [0.05, 20]; above 1 the network was too sure of itself. 1.0 also where there is nothing
        to fit: no images, one class, or logits that are not finite.

    Source: Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599; Wilks 1938
    """
    logits = np.asarray(logits, dtype=np.float64)
    if not len(labels) or logits.shape[1] < 2 or not np.isfinite(logits).all():
        return 1.0

    def cost(log_temperature: float) -> float:
        losses = image_losses(logits, labels, math.exp(log_temperature))
        return float(losses.sum()) + log_temperature**2

    # The extra term can leave two valleys: a coarse walk finds the deeper one.
    grid = np.linspace(math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE), 25)
    deepest = int(np.argmin([cost(point) for point in grid]))
    around = (grid[max(deepest - 1, 0)], grid[min(deepest + 1, len(grid) - 1)])
    found = float(minimize_scalar(cost, bounds=around, method="bounded").x)
    best = min((float(grid[deepest]), found), key=cost)
    return _within_bounds(math.exp(best)) if cost(0.0) - cost(best) >= _MIN_GAIN else 1.0


def match_temperature(logits: NDArray[np.floating], probabilities: NDArray[np.floating]) -> float:
    """The temperature under which a network's probabilities are nearest to those of another.

    For a changed network, such as one in int8, where the labels cannot say: on images that it was
    trained on. It minimises the cross-entropy to the other's probabilities.

    Args:
        logits: float, shape (N, C), N > 0; finite.
        probabilities: of the other network on the same images, float, shape (N, C).

    Returns:
        In [0.05, 20].

    Source: Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531, with one parameter
    """
    logits = np.asarray(logits, dtype=np.float64)

    def cost(log_temperature: float) -> float:
        logs = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -float((probabilities * logs).sum())

    ends = (math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE))
    return math.exp(float(minimize_scalar(cost, bounds=ends, method="bounded").x))


def calibration_notes(
    logits: NDArray[np.floating], labels: NDArray[np.integer], temperature: float
) -> list[str]:
    """What a reader must know about a temperature that was fitted on these images."""
    notes = []
    classes = len(np.unique(labels))
    if classes < 2:
        notes.append(
            f"{'One class' if classes else 'No images'} in validation: temperature and threshold "
            "say little about the others."
        )
    elif temperature != 1 and (np.argmax(logits, axis=1) == labels).all():
        notes.append(
            f"All {len(labels):,} validation images are right: with no mistake to fit it to, the "
            f"temperature {temperature:.2f} is a cautious guess."
        )
    if temperature == 1 and classes >= 2:
        notes.append(
            f"No temperature fits the {len(labels):,} validation images better than 1: "
            "probabilities stay as they are."
        )
    if temperature in (LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE):
        notes.append(
            f"The temperature {temperature:g} lies at the end of the range allowed for it."
        )
    return notes


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Confidence against accuracy in equal-width bins of confidence, lowest first.

    Args:
        confidence, accuracy: float64, shape (bins,), means over a bin's images; NaN where none.
        count: int64, shape (bins,).
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]


def reliability(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], bins: int = 15
) -> Reliability:
    """The numbers of a reliability diagram; bin b holds confidences in (b / bins, (b + 1) / bins].

    Args:
        probabilities: float, shape (N, C); rows sum to 1.
        labels: int, shape (N,), values in [0, C).
    """
    confidence, correct = _top(probabilities, labels)
    place = bin_of(confidence, bins)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            confidence=np.bincount(place, weights=confidence, minlength=bins) / count,
            accuracy=np.bincount(place, weights=correct, minlength=bins) / count,
            count=count.astype(np.int64),
        )


def bin_of(confidence: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """The number of each confidence's bin, in [0, bins)."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def expected_calibration_error(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], bins: int = 15
) -> float:
    """Gap between confidence and accuracy, averaged over the images of equal-width bins.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: no images.

    Source: Guo et al. 2017, section 2
    """
    if not len(labels):
        raise ValueError("cannot score an empty split")
    table = reliability(probabilities, labels, bins)
    gaps = np.nan_to_num(np.abs(table.accuracy - table.confidence))
    return float((gaps * table.count).sum() / table.count.sum())


@dataclass(frozen=True, kw_only=True)
class ChosenThreshold:
    """The confidence from which on an answer counts, and what that gave on validation.

    Args:
        value: answers with at least this probability count; None: no confidence was enough, so
            every answer abstains.
        precision: the fraction of counted answers that is right; NaN without any.
        coverage: the fraction of images whose answer counts.
    """

    wanted_precision: float
    value: float | None
    precision: float
    coverage: float


def choose_threshold(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], wanted_precision: float
) -> ChosenThreshold:
    """The lowest confidence at or above which answers are right often enough.

    One confident image proves nothing. The precision must hold with one wrong answer added, which
    takes at least p / (1 - p) images (33 for 0.97), and never fewer than ten.

    Args:
        probabilities: float, shape (N, C), calibrated, of validation images.
        labels: int, shape (N,).
        wanted_precision: a fraction in (0, 1).

    Raises:
        ValueError: the wanted precision is not in (0, 1).

    Source: selective classification, Geifman and El-Yaniv 2017, https://arxiv.org/abs/1705.08500
    """
    if not 0 < wanted_precision < 1:
        raise ValueError(f"wanted_precision must be > 0 and < 1, got {wanted_precision}")
    confidence, answered, right = _by_confidence(probabilities, labels)
    enough = (right / (answered + 1) >= wanted_precision) & (answered >= MIN_CONFIDENT_IMAGES)
    if not enough.any():
        return ChosenThreshold(
            wanted_precision=wanted_precision, value=None, precision=math.nan, coverage=0.0
        )
    last = int(np.flatnonzero(enough)[-1])
    return ChosenThreshold(
        wanted_precision=wanted_precision,
        value=float(confidence[last]),
        precision=float(right[last] / answered[last]),
        coverage=float(answered[last] / len(labels)),
    )


@dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """What share of the answers is wrong if only the most confident are given.

    Args:
        coverage: float64, shape (K,), rising to 1: one point for each distinct confidence.
        risk: float64, shape (K,), the fraction of wrong answers among those.
        area: under the curve, in [0, 1]; lower is better.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float


def risk_coverage(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> RiskCoverage:
    """The risk-coverage curve.

    Raises:
        ValueError: no images.

    Source: El-Yaniv and Wiener 2010; the area as in Geifman et al. 2019,
        https://arxiv.org/abs/1805.08206
    """
    if not len(labels):
        raise ValueError("cannot score an empty split")
    _, answered, right = _by_confidence(probabilities, labels)
    risk = 1 - right / answered
    shares = np.diff(answered, prepend=0) / len(labels)
    return RiskCoverage(
        coverage=answered / len(labels), risk=risk, area=float((risk * shares).sum())
    )


def _by_confidence(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct confidences, highest first; how many answers reach each; how many rightly."""
    confidence, correct = _top(probabilities, labels)
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    # Equal confidences go together: no threshold can part them.
    last_of_equals = np.flatnonzero(np.append(np.diff(confidence) != 0, len(confidence) > 0))
    right = np.cumsum(correct[order])[last_of_equals]
    return confidence[last_of_equals], last_of_equals + 1, right.astype(np.int64)


def _top(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    probabilities = np.asarray(probabilities, dtype=np.float64)
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def _within_bounds(temperature: float) -> float:
    """Free of the rounding of exp(log(bound)), so that an end can be told."""
    ends = (LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
    return next((end for end in ends if math.isclose(temperature, end)), temperature)
