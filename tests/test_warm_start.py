"""`tune --from SEARCH`: a search that begins with what an earlier one found."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

import visiontuner as vt
from visiontuner.cli.main import main
from visiontuner.cli.search import choose_search
from visiontuner.data.manifest import read_manifest, write_manifest
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.plan import settle
from visiontuner.workflow.inputs import Inputs, Silent
from visiontuner.workflow.lineage import trace_folder
from visiontuner.workflow.tune import find_search, resume_search, run_search, take_over_search


def write_search(
    folder: Path,
    raw: dict[str, Any],
    *,
    counts: dict[str, int],
    class_names: Sequence[str] = ("a", "b"),
    **facts: Any,
) -> Path:
    """The folder of a search with one trial, as a search leaves it."""
    folder.mkdir()
    experiment = Experiment.parse(raw)
    (folder / "experiment.yaml").write_text(experiment.to_yaml())
    head = {"schema_version": 1, "search_id": "s", "time": 1.0}
    trial = {**head, "trial_id": "t0001", "attempt": 1}
    data = {"digest": "d", "class_names": [*class_names], "counts": counts}
    events = [
        {
            **head, "event": "search_started", "name": folder.name, "data": data,
            "experiment": experiment.model_dump(mode="json"), **facts,
        },
        {**trial, "event": "trial_started", "configuration": {"learning_rate": 0.02}},
        {**trial, "event": "epoch", "step": 1, "metrics": {"validation_accuracy": 0.5}},
        {**trial, "event": "trial_ended", "state": "completed", "best_epoch": 1, "best_value": 0.5},
    ]  # fmt: skip
    (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


COUNTS = {"train": 48, "validation": 6, "test": 6}


def test_without_a_file_the_experiment_is_the_earlier_searchs_and_flags_override_it(tmp_path):
    raw = {"name": "dogs", "data": {"source": "/photos"}, "training": {"epochs": 5}}
    folder = write_search(tmp_path / "a", raw, counts=COUNTS)
    chosen, earlier = choose_search(None, None, ["search.trials=3"], folder)
    assert (chosen.name, chosen.data.source, chosen.training.epochs) == ("dogs", "/photos", 5)
    assert chosen.search.trials == 3
    assert earlier is not None
    assert earlier.folder == folder
    others, _ = choose_search(None, "/others", [], folder)
    assert (others.name, others.data.source, others.training.epochs) == ("others", "/others", 5)
    own = tmp_path / "own.yaml"
    own.write_text("{name: wolves, data: {source: /wolves}}")
    of_file, _ = choose_search(str(own), None, [], folder)
    assert (of_file.name, of_file.training.epochs) == ("wolves", 20)


@pytest.mark.parametrize(
    ("said", "validation", "sizes"),
    [
        ({}, "auto", [32, 64, 128, 256]),
        ({"search": {"space": {"batch_size": {"values": [16]}}}}, "auto", [16]),
        ({"data": {"validation": "folds", "folds": 3}}, "folds", [32]),
    ],
)  # fmt: skip
def test_values_that_the_number_of_images_decided_are_open_again(tmp_path, said, validation, sizes):
    settled = settle(Experiment.parse({"name": "x", **said}), images=54, own_validation=False)
    settled = settled.for_images(48)
    assert settled.data.folds
    folder = write_search(tmp_path / "a", settled.model_dump(mode="json"), counts=COUNTS)
    chosen, _ = choose_search(None, None, [], folder)
    assert chosen.data.validation == validation
    assert list(chosen.search.space["batch_size"].values) == sizes


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder.mkdir(), "is no search to begin with: it has no journal.jsonl."),
        (
            lambda folder: write_search(folder, {"name": "x"}, counts=COUNTS, trained_on="train"),
            "holds one training, and a search begins with a search. Train with its values: "
            "visiontuner train --from",
        ),
        (
            lambda folder: _cut(write_search(folder, {"name": "x"}, counts=COUNTS)),
            "has no usable trial to begin with. Go on with it: visiontuner tune --resume",
        ),
    ],
)
def test_what_is_no_search_to_begin_with_is_said_in_one_line(tmp_path, make, told):
    make(tmp_path / "a")
    result = CliRunner().invoke(main, ["tune", "--from", str(tmp_path / "a")])
    assert result.exit_code == 2
    assert told in result.output
    assert result.output.count("\n") == 1


def _cut(folder: Path) -> None:
    journal = folder / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))


@pytest.mark.parametrize("other", [["--resume", "b"], ["--on", "sagemaker"]])
def test_from_goes_with_neither_a_resumed_search_nor_a_job(tmp_path, other):
    write_search(tmp_path / "a", {"name": "x"}, counts=COUNTS)
    result = CliRunner().invoke(main, ["tune", "--from", str(tmp_path / "a"), *other])
    assert result.exit_code == 2
    assert other[0] in result.output


def test_python_begins_with_a_search_as_the_command_does(tmp_path):
    """As far as no trial runs: the experiment is the earlier search's, whose images are gone."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(vt.VisiontunerError, match="is no search to begin with"):
        vt.tune(start=tmp_path / "empty")
    raw = {"name": "x", "data": {"source": str(tmp_path / "gone")}}
    folder = write_search(tmp_path / "a", raw, counts=COUNTS)
    with pytest.raises(vt.VisiontunerError, match="gone"):
        vt.tune(start=folder, trials=2, progress=False)
    with pytest.raises(vt.VisiontunerError, match="others"):
        vt.tune(tmp_path / "others", start=folder, progress=False)


class Notes:
    """Keeps what a search says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, label: str, done: int, total: int, unit: str) -> None: ...
    def trials_begin(self, record: SearchRecord, total: int) -> None: ...
    def event(self, event: Any) -> None: ...
    def trials_end(self) -> None: ...


@pytest.mark.usefixtures("running_ray")
def test_a_search_begins_with_anothers_best_and_goes_on_without_its_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: Path,
    small_search: dict[str, Any],
    shared_cache: Path,
    new_database: Callable[[Path], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    photos = tmp_path / "photos"
    shutil.copytree(images, photos)
    search = {**small_search["search"], "trials": 2, "algorithm": "optuna", "baselines": False}
    raw = {**small_search, "data": {"source": str(photos)}, "search": search}
    dataset = Inputs(Experiment.parse(raw), Silent(), cache=shared_cache).dataset
    folder = write_search(Path("a"), raw, counts=COUNTS, class_names=dataset.class_names)
    write_manifest(folder, dataset)
    (image, *_) = sorted((photos / "train").rglob("*.png"))
    image.rename(image.with_name("renamed.png"))  # the same image
    others = [p for p in sorted((photos / "train").rglob("*.png")) if p.parent != image.parent]
    others[0].rename(image.with_name("relabelled.png"))
    others[-1].unlink()
    chosen, earlier = choose_search(None, None, ["search.trials=3"], folder)
    notes = Notes()
    result = run_search(chosen, output=Path("b"), start=earlier, observer=notes)
    assert "Begins with a. 0 new images, 1 relabelled since, 1 gone." in notes.notes
    assert "Tried first: the defaults, then the configuration of t0001." in notes.notes
    assert "Optuna is told its 1 trial." in notes.notes
    began = result.record.started["from"]
    assert began["told"] == [
        {"trial_id": "t0001", "configuration": {"learning_rate": 0.02}, "value": 0.5}
    ]
    trials = result.record.trials
    assert trials["t0001"].configuration == {"learning_rate": 0.03}  # the default
    assert trials["t0002"].configuration == {"learning_rate": 0.02}
    listed = read_manifest(Path("b"))
    assert listed is not None
    assert sum(i.class_name == image.parent.name and "relabelled" in i.path for i in listed) == 1
    client = MlflowClient()
    (parent,) = client.search_runs(
        [client.get_experiment_by_name("colours").experiment_id],
        "tags.`visiontuner.from` = 'a'",
    )
    assert parent.data.tags["visiontuner.kind"] == "search"
    assert trace_folder(Path("b")).search["from"] == "a"
    # Its last trial is lost, and the earlier folder with it.
    shutil.rmtree("a")
    journal = Path("b/journal.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    cut = next(n for n, line in enumerate(lines) if '"t0003"' in line)
    journal.write_text("".join(lines[:cut]))
    again = resume_search(Path("b"))
    assert sorted(again.record.trials) == ["t0001", "t0002", "t0003"]
    assert again.record.started["from"] == began


def test_a_search_of_before_manifests_says_how_many_images_there_were(tmp_path, images):
    raw = {"name": "x", "data": {"source": str(images)}}
    folder = write_search(tmp_path / "a", raw, counts=COUNTS)
    experiment = Experiment.parse(raw)
    dataset = Inputs(experiment, Silent(), cache=tmp_path / "cache").dataset
    facts, said = take_over_search(find_search(folder), experiment, dataset)
    count = sum(map(len, dataset.splits.values()))
    assert facts["images"] == f"The images have changed: {count}, then 60."
    assert said[0].endswith(facts["images"])
    assert said[1] == "Other classes: 3 new (blue, green, red), 2 gone (a, b)."
    assert facts["told"] == []
