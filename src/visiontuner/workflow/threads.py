"""How many threads one training in this process gets."""

from __future__ import annotations

from visiontuner.experiment import Experiment


def training_threads(experiment: Experiment) -> int:
    """All cores for a network; for a head as many as a trial of a search has.

    The number of threads decides the order of sums, and with it the last digits: a head that is
    trained alone is then the same as the one that a search trained.
    """
    from visiontuner.data.cores import available_cpus

    if experiment.trains_on_pictures:
        return available_cpus()
    return int(experiment.search.cpus_per_trial) or 1
