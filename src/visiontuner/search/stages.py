"""The stages of a search: one, or heads on features first and the best of them as networks then.

Both stages share one journal and one row of trial ids. What the second one runs follows from the
first one's trials alone, so that a search that is resumed goes on with the same list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visiontuner.experiment import Configuration, Experiment, Stages
from visiontuner.journal import SearchRecord, StageName, TrialRecord
from visiontuner.search.labels import Stores
from visiontuner.search.plan import (
    Plan,
    PlannedTrial,
    highest_number,
    make_plan,
    trial_name,
)
from visiontuner.search.space import clean
from visiontuner.search.trial import HEAD_FILE, TrialTask


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a search.

    Args:
        name: None where there is only one.
        experiment: what its trials run.
        search: the experiment of the whole search.
    """

    name: StageName | None
    experiment: Experiment
    search: Experiment

    @property
    def on_pictures(self) -> bool:
        """Whether its trials run the network; otherwise they train heads on features."""
        return self.experiment.trains_on_pictures


def stages_of(experiment: Experiment) -> tuple[Stage, ...]:
    """The stages of a search in their order."""
    if experiment.search.stages is None:
        return (Stage(name=None, experiment=experiment, search=experiment),)
    return (
        Stage(name="head", experiment=experiment.head_stage(), search=experiment),
        Stage(name="network", experiment=experiment.network_stage(), search=experiment),
    )


def stage_of(experiment: Experiment, trial: TrialRecord) -> Stage:
    """The stage that a trial belongs to."""
    return stage_named(experiment, trial.stage)


def stage_named(experiment: Experiment, name: str | None) -> Stage:
    """The stage of a search that a trial says it is of; the first if it says nothing."""
    stages = stages_of(experiment)
    return next((stage for stage in stages if stage.name == name), stages[0])


def plan_stage(stage: Stage, record: SearchRecord) -> Plan:
    """What of a stage has not finished; the second one is known when the first one has ended."""
    if stage.name == "network":
        return _plan_networks(stage.search, record)
    return make_plan(stage.experiment, record.searching(), stage=stage.name)


def remaining_trials(experiment: Experiment, record: SearchRecord) -> int:
    """How many trials are still to run, all stages together.

    As long as the first of two stages runs, the second one counts with the most that it may have.
    """
    stages = stages_of(experiment)
    first = plan_stage(stages[0], record).remaining
    if len(stages) == 1:
        return first
    if first:
        return first + _settings(experiment).best + len(experiment.first_trials())
    return plan_stage(stages[1], record).remaining


def make_task(
    folder: Path,
    stage: Stage,
    *,
    stores: Stores,
    cache: Path,
    threads: int,
    starts: Mapping[str, str] | None = None,
    checkpoints: bool = False,
) -> TrialTask:
    """What the trials of a stage are handed.

    Args:
        starts: by trial id the trial of the first stage whose head it begins with.
    """
    search_folder = folder.resolve()
    pictures = stores.pictures if stage.on_pictures else None
    features = None if stage.on_pictures else stores.features
    return TrialTask(
        experiment=stage.experiment,
        search_folder=search_folder,
        threads=threads,
        features_folder=features and features.resolve(),
        pictures_folder=pictures and pictures.resolve(),
        cache=cache.resolve(),
        start_heads={
            trial_id: search_folder / "trials" / head / HEAD_FILE
            for trial_id, head in (starts or {}).items()
        },
        checkpoints=checkpoints,
    )


def starting_heads(experiment: Experiment, record: SearchRecord) -> list[TrialRecord]:
    """The head trials that the second stage goes on with: the best, then those of `first`."""
    if experiment.search.stages is None:
        return []
    heads = [trial for trial in record.ranking() if trial.stage == "head"]
    space = experiment.search.space
    first = [clean(c, space) for c in experiment.first_trials()]
    best = heads[: _settings(experiment).best]
    return [*best, *(t for t in heads if t not in best and t.configuration in first)]


def _plan_networks(experiment: Experiment, record: SearchRecord) -> Plan:
    heads = starting_heads(experiment, record)
    offset = highest_number(record.searching().trials)
    planned = [
        PlannedTrial(
            trial_id=trial_name(offset + position),
            attempt=_attempts(record, trial_name(offset + position)) + 1,
            configuration=_network_configuration(experiment, head.configuration),
            stage="network",
            starts_from=head.trial_id,
        )
        for position, head in enumerate(heads, start=1)
    ]
    waiting = [p for p in planned if not _is_finished(record, p.trial_id)]
    begun = [p for p in waiting if p.attempt > 1]
    return Plan(
        known=(*begun, *(p for p in waiting if p.attempt == 1)),
        suggestions=0,
        next_number=offset + len(heads) + 1,
        stage="network",
    )


def _network_configuration(experiment: Experiment, head: Configuration) -> Configuration:
    """The head's values; epochs and, if it has one, the learning rate are the stage's own."""
    stages = _settings(experiment)
    configuration = dict(head)
    if "epochs" in configuration:
        configuration["epochs"] = stages.epochs
    if stages.learning_rate is not None:
        configuration["learning_rate"] = stages.learning_rate
    return configuration


def _settings(experiment: Experiment) -> Stages:
    return experiment.search.stages or Stages()


def _attempts(record: SearchRecord, trial_id: str) -> int:
    return record.trials[trial_id].attempt if trial_id in record.trials else 0


def _is_finished(record: SearchRecord, trial_id: str) -> bool:
    return trial_id in record.trials and record.trials[trial_id].finished
