"""The learning rate range test of an experiment: where its search for a learning rate belongs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from visiontuner.errors import SearchInterrupted, UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.model.network import parameter_groups
from visiontuner.paths import RANGE_TEST_FILE, RANGE_TESTS_FOLDER
from visiontuner.search.trial import (
    prepare_worker,
    start_head,
    start_network,
    train_batches,
    training_device,
)
from visiontuner.tracking.figures.parts import to_png
from visiontuner.tracking.figures.searches import range_test_curve
from visiontuner.training.batches import Batches
from visiontuner.training.lr_range import HIGHEST, LOWEST, RangeTest, range_test
from visiontuner.training.optimisation import ParameterGroup
from visiontuner.workflow.inputs import Inputs, Observer, Silent, training_threads
from visiontuner.workflow.run import write_experiment
from visiontuner.workflow.train import Origin, starting_head

FOLDER = Path(RANGE_TESTS_FOLDER)
FIGURE_FILE = "range_test.png"

# Enough for a smooth curve: steps on features take milliseconds, on images a second or so.
STEPS_ON_FEATURES = 200
STEPS_ON_IMAGES = 100

OnStep = Callable[[int, int, float, float], None]


@dataclass(frozen=True, kw_only=True)
class FoundLearningRate:
    """What a range test said, and the folder that holds its curve and its numbers.

    Attributes:
        subject: what was trained, in a few words.
    """

    folder: Path
    subject: str
    curve: RangeTest

    @property
    def figure(self) -> Path:
        return self.folder / FIGURE_FILE


def find_learning_rate(
    experiment: Experiment,
    *,
    origin: Origin | None = None,
    output: Path | None = None,
    low: float | None = None,
    high: float | None = None,
    steps: int | None = None,
    observer: Observer | None = None,
    on_step: OnStep | None = None,
) -> FoundLearningRate:
    """Train once with a learning rate that only grows, and say from the loss where to search.

    Nothing of the training is kept but its curve: `range_test.png` and `range_test.json`.

    Args:
        origin: a network begins with its trained head, as `train` would.
        output: a new folder; default: `lr-find/NAME-TIME` here.
        low, high: learning rates to go from and to; default: 1e-6 to 10.
        steps: of the optimizer, 20 at least; default: 200 on features, 100 on images.
        on_step: called with (step from 1, of how many, learning rate, smoothed loss).

    Raises:
        UserMistake: the folder is taken, or a value is wrong.
        TrialFailed: the loss is not finite at the first step.
    """

    observer = observer or Silent()
    folder = output or FOLDER / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    low, high = low or LOWEST, high or HIGHEST
    steps = steps or (STEPS_ON_IMAGES if experiment.trains_on_images else STEPS_ON_FEATURES)
    _check(folder, low, high, steps)
    inputs = Inputs(experiment, observer)
    with ExitStack() as stack:
        start = _start(inputs, stack, origin)
        observer.note(f"The learning rate grows from {low:g} to {high:g} in {steps} steps.")
        curve = _range_test(inputs, start, low, high, steps, on_step)
        for note in (*curve.notes, *start.take_notes()):
            observer.note(f"warning: {note}.")
    subject = _subject(experiment) + (", begun with a trained head" if start.from_head else "")
    found = FoundLearningRate(folder=folder, subject=subject, curve=curve)
    _write(found, experiment)
    return found


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A network before its first step, and what it is trained on.

    Attributes:
        from_head: it begins with a trained head.
        take_notes: what of the batches is other than asked for, a line each.
    """

    network: nn.Module
    train: Batches
    groups: Sequence[ParameterGroup] | None = None
    from_head: bool = False
    take_notes: Callable[[], list[str]] = list


def _start(inputs: Inputs, stack: ExitStack, origin: Origin | None) -> _Start:
    """As a trial begins; `stack` ends the processes that decode."""

    prepare_worker(training_threads(inputs.experiment))
    if not inputs.experiment.trains_on_images:
        return _start_on_features(inputs)
    head = None if origin is None else starting_head(origin, inputs)
    return _start_on_images(inputs, stack, head)


def _start_on_features(inputs: Inputs) -> _Start:
    features, _ = inputs.features()
    start = start_head(features.folder, inputs.experiment.training, seed=inputs.experiment.seed)
    return _Start(network=start.head, train=start.train)


def _start_on_images(inputs: Inputs, stack: ExitStack, head: Path | None) -> _Start:
    experiment, device = inputs.experiment, training_device()
    settings = experiment.training
    images, _ = inputs.images()
    network = start_network(
        experiment, settings, num_classes=len(images.class_names), cache=inputs.cache, head=head
    ).to(device)
    train = train_batches(images, experiment, settings, device)
    stack.enter_context(closing(train))
    return _Start(
        network=network,
        train=train,
        groups=parameter_groups(network, settings),
        from_head=head is not None,
        take_notes=train.take_notes,
    )


def _range_test(
    inputs: Inputs, start: _Start, low: float, high: float, steps: int, on_step: OnStep | None
) -> RangeTest:
    done = 0

    def step_done(step: int, rate: float, loss: float) -> None:
        nonlocal done
        done = step
        if on_step is not None:
            on_step(step, steps, rate, loss)

    try:
        return range_test(
            start.network,
            start.train,
            inputs.experiment.training,
            num_classes=len(inputs.dataset.class_names),
            seed=inputs.experiment.seed,
            low=low,
            high=high,
            steps=steps,
            parameter_groups=start.groups,
            on_step=step_done,
        )
    except KeyboardInterrupt:
        raise SearchInterrupted(f"Stopped at step {done} of {steps}; nothing is kept.") from None


def _write(found: FoundLearningRate, experiment: Experiment) -> None:
    curve, suggestion = found.curve, found.curve.suggestion
    figure = range_test_curve(
        f"Learning rate range test: {found.subject}",
        curve.learning_rates,
        curve.losses,
        curve.smoothed,
        suggested=None
        if suggestion is None
        else (suggestion.low, suggestion.learning_rate, suggestion.high),
    )
    numbers: dict[str, Any] = {
        "learning_rates": curve.learning_rates,
        "losses": curve.losses,
        "smoothed": curve.smoothed,
        "stopped": curve.stopped,
        "suggestion": None if suggestion is None else asdict(suggestion),
    }
    try:
        found.folder.mkdir(parents=True, exist_ok=True)
        found.figure.write_bytes(to_png(figure))
        (found.folder / RANGE_TEST_FILE).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        write_experiment(found.folder, experiment)
    except OSError as error:
        raise UserMistake(
            f"Cannot write {found.folder}: {error.strerror}. Name another one with --output."
        ) from None


def _check(folder: Path, low: float, high: float, steps: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserMistake(f"{folder} already exists. Choose another --output.")
    if not 0 < low < high:
        raise UserMistake(f"--low must be > 0 and < --high, got {low:g} and {high:g}.")
    if steps < 20:
        raise UserMistake(f"--steps must be >= 20, got {steps}: fewer show no curve.")


def _subject(experiment: Experiment) -> str:
    model, training = experiment.model, experiment.training
    what = {"head": "the head", "last_stage": "the last stage", "all": "all"}[model.train]
    return f"{what} of {model.backbone}, {training.optimizer}, batch size {training.batch_size}"
