"""Which pretrained networks to try, and what a pass of each over the images takes here."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from visiontuner.errors import BackboneError
from visiontuner.experiment.schema import Experiment
from visiontuner.io.files import temporary_folder
from visiontuner.model.catalogue import RECOMMENDED, KnownNetwork
from visiontuner.workflow.inputs import Inputs, Observer, Silent


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A network of the catalogue.

    Args:
        pass_seconds: to compute the features of `images`; None if that was not asked, or the
            network cannot be run here.
        images: of training and validation.
    """

    network: KnownNetwork
    pass_seconds: float | None = None
    images: int = 0


def recommend(
    experiment: Experiment | None = None, *, observer: Observer | None = None
) -> list[Recommendation]:
    """The networks of the catalogue, in its order.

    Args:
        experiment: whose images a pass is measured on; the speed of a network does not depend on
            its weights, so that nothing is downloaded.

    Raises:
        DataError: the images cannot be read.
    """
    if experiment is None:
        return [Recommendation(network=network) for network in RECOMMENDED]
    observer = observer or Silent()
    with closing(Inputs(experiment, observer)) as inputs:
        samples = [s for name in ("train", "validation") for s in inputs.dataset.splits[name]]
        found = []
        for number, network in enumerate(RECOMMENDED):
            observer.progress("Measuring", number, len(RECOMMENDED), "networks")
            seconds = _pass_seconds(network, inputs, len(samples))
            found.append(
                Recommendation(network=network, pass_seconds=seconds, images=len(samples))
            )
        observer.progress("Measuring", len(RECOMMENDED), len(RECOMMENDED), "networks")
    return found


def _pass_seconds(network: KnownNetwork, inputs: Inputs, images: int) -> float | None:
    """What a pass takes without the export, which comes once; with random weights."""
    model = {"backbone": network.name, "weights": "none", "image_size": None}
    experiment = inputs.experiment
    changed = experiment.model_copy(
        update={"model": experiment.model.model_copy(update=model)}
    )
    with temporary_folder() as cache:  # an export of random weights is of no use later
        try:
            return images / inputs.of(changed, cache=cache).pace()
        except BackboneError as error:
            inputs.observer.note(f"warning: {network.name} is not measured: {error}")
            return None
