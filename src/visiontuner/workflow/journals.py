"""Open the journal of a search folder, a new one or one that an earlier process left."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontuner import provenance
from visiontuner.commands import next_command
from visiontuner.data.dataset import ImageDataset
from visiontuner.data.files import write_whole
from visiontuner.errors import UserMistake
from visiontuner.experiment import Experiment
from visiontuner.journal import FILE_NAME, Finding, JournalWriter, SearchRecord
from visiontuner.layout import EXPERIMENT_FILE
from visiontuner.text import has_secrets
from visiontuner.workflow.observing import Observer, note_findings
from visiontuner.workflow.pictures import describe_data, require_same_data

if TYPE_CHECKING:
    from visiontuner.search.recorder import Recorder


def read_record(folder: Path, dataset: ImageDataset) -> SearchRecord:
    """What an earlier process of this search left; empty for a new one.

    Raises:
        UserMistake: the pictures are not those the search began with.
    """
    if not (folder / FILE_NAME).exists():
        return SearchRecord()
    record = SearchRecord.load(folder)
    if record.started:
        require_same_data(record, dataset)
    return record


def open_journal(
    folder: Path,
    experiment: Experiment,
    dataset: ImageDataset,
    record: SearchRecord,
    observer: Observer,
    **facts: Any,
) -> Recorder:
    """The folder with its experiment file, and its journal with one more line; close it at the end.

    Args:
        facts: more of what a new journal's first line says.

    Raises:
        UserMistake: the folder cannot be written.
        JournalError: another process is writing this journal.
    """
    from visiontuner.search.recorder import Recorder

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / EXPERIMENT_FILE).exists():
            write_experiment(folder, experiment)
    except OSError as error:
        raise UserMistake(
            f"Cannot write the search folder {folder}: {error.strerror}. "
            "Name another one with --output."
        ) from None
    journal = JournalWriter(folder, record.search_id or uuid.uuid4().hex)
    recorder = Recorder(journal, record, [observer.event])
    described = {
        "code": provenance.describe_code(),
        "machine": provenance.describe_machine(),
    }
    if record.started:
        recorder.append("search_resumed", **described)
    else:
        recorder.append(
            "search_started",
            name=folder.resolve().name,
            experiment=experiment.model_dump(mode="json"),
            data=describe_data(experiment, dataset),
            **described,
            **facts,
        )
        for finding in _serious_findings(dataset):
            recorder.append("finding", **finding.to_dict())
    observer.note(f"Search folder: {folder}")
    _note_findings(folder, experiment, dataset, observer)
    _note_rules_without_recording(experiment, observer)
    return recorder


def _serious_findings(dataset: ImageDataset) -> list[Finding]:
    """What will spoil the result, as far as no picture has to be decoded; errors first."""
    from visiontuner.data.findings import find_without_decoding

    found = [*dataset.findings, *find_without_decoding(dataset)]
    serious = [finding for finding in found if finding.severity != "info"]
    return sorted(serious, key=lambda finding: finding.severity != "error")


def _note_findings(
    folder: Path, experiment: Experiment, dataset: ImageDataset, observer: Observer
) -> None:
    found = _serious_findings(dataset)
    note_findings(observer, found)
    if found:
        source = experiment.data.source
        subject = ("--data", source)
        if has_secrets(source):
            subject = ("--experiment", str(folder / EXPERIMENT_FILE))
        observer.note(f"All of it, and what to do: {next_command('prepare', *subject)}")


def _note_rules_without_recording(experiment: Experiment, observer: Observer) -> None:
    """Which rules are to stop trials and will have nothing to look at."""
    from visiontuner.training.rules import RECORDED_RULES

    blind = [rule for rule in experiment.rules.stop_on if rule in RECORDED_RULES]
    if blind and not experiment.record_every_steps:
        observer.note(
            f"warning: rules.stop_on: {', '.join(blind)} will stop no trial, since nothing is "
            "recorded; set training.record_every_steps, 50 for example."
        )


def write_experiment(folder: Path, experiment: Experiment) -> None:
    """The experiment file of a search folder, with every secret that its data's address needs.

    It is its owner's alone then: a search is resumed from it.

    Raises:
        OSError: the folder cannot be written.
    """
    private = has_secrets(experiment.model_dump(mode="json"))
    content = experiment.to_yaml().encode()
    write_whole(folder / EXPERIMENT_FILE, lambda file: file.write(content), private=private)
