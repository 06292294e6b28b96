"""The experiment of one training: a file's, or all of the trial's that it begins from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visiontuner.cli.options import NOT_GIVEN, given_values, read_raw

if TYPE_CHECKING:
    from visiontuner.experiment import Experiment
    from visiontuner.workflow.train_from import Origin


def choose_training(
    experiment: str, data: str, overrides: Sequence[str], origin: str
) -> tuple[Experiment, Origin | None]:
    """What `experiment_options` and `--from` say together, checked.

    With both, the file says which pictures and which network, and the origin only its values.
    Without a file all is the origin's; other pictures make another model of it, with their name.
    """
    from visiontuner.experiment import Experiment
    from visiontuner.workflow.train_from import find_origin, one_training

    raw, where = read_raw(experiment, data)
    own, other_pictures = experiment not in NOT_GIVEN, data not in NOT_GIVEN
    found = None
    if origin not in NOT_GIVEN:
        named = own or other_pictures
        found = find_origin(origin, name=Experiment.parse(raw, where=where).name if named else None)
        if not own:
            pictures = {"data": raw["data"], "name": None} if other_pictures else {}
            raw, where = {**found.experiment, **pictures}, origin
    return one_training(raw, given_values(overrides), found, where=where), found
