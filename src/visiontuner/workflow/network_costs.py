"""What an answer of each network of a search costs here: time, memory, size, price."""

from __future__ import annotations

from collections.abc import Sequence

from visiontuner.io.files import temporary_folder
from visiontuner.serving.cost import NetworkCost, measure_costs
from visiontuner.workflow.inputs import Inputs

_MEASURED_IMAGES = 20


def measure_networks(inputs: Inputs, names: Sequence[str]) -> dict[str, NetworkCost]:
    """Time, memory, size and price of an answer of each network, measured on this machine.

    A head changes none of it, so that nothing has to be trained.

    Args:
        names: networks that are searched; or the experiment's own alone.

    Raises:
        DataError: there are no validation images.
        ServingError: a network cannot be loaded.
    """
    from visiontuner.model.package import package_untrained

    samples = inputs.readable("validation")
    step = max(1, len(samples) // _MEASURED_IMAGES)
    images = [
        (inputs.dataset.root / sample.path).read_bytes()
        for sample in samples[::step][:_MEASURED_IMAGES]
    ]
    searched = inputs.experiment.search.backbones
    with temporary_folder() as temporary:
        folders = {}
        for number, name in enumerate(names):
            own = inputs.of_network(name if name in searched else None)
            folders[name] = package_untrained(
                temporary / str(number),
                own.backbone,
                inputs.dataset.class_names,
                cache=own.cache,
            )
            own.release()
        return measure_costs(folders, images)
