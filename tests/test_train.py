"""One training: from anywhere, on anything, killed and gone on with, and what a person is told."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from PIL import Image
from safetensors.numpy import load_file

from visiontuner.cli.console import TrainingConsole
from visiontuner.cli.main import main
from visiontuner.errors import (
    CheckpointError,
    JournalError,
    SearchFailed,
    SearchInterrupted,
    UserMistake,
)
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord, read_events
from visiontuner.model.classifier import Classifier
from visiontuner.text import next_command
from visiontuner.workflow.train import (
    SilentTraining,
    find_origin,
    one_training,
    resume_training,
    train,
)
from visiontuner.workflow.tune import resume_search

pytestmark = pytest.mark.slow

CLOCK = ("epoch_seconds", "images_per_second")
TRIAL = Path("trials/t0001")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_cache: Path) -> None:
    """Without MLflow, whose process would take seconds of each training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")


@pytest.fixture
def store(
    _here: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    new_database: Callable[[Path], str],
) -> MlflowClient:
    uri = new_database(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


@pytest.fixture
def raw(images: Path, small_search: dict[str, Any]) -> dict[str, Any]:
    """An experiment file's keys: a head on three colours, four epochs of two steps."""
    copied: dict[str, Any] = json.loads(json.dumps(small_search))
    copied["data"] = {"source": str(images)}
    copied["training"]["epochs"] = 4
    return copied


def one(raw: dict[str, Any], *overrides: str) -> Experiment:
    return one_training(raw, overrides, None, where="test")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", *arguments])


def epochs(folder: Path) -> list[dict[str, float]]:
    """Every epoch's numbers, without how long it took."""
    trial = SearchRecord.load(folder).trials["t0001"]
    return [{k: v for k, v in e.metrics.items() if k not in CLOCK} for e in trial.epochs]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    shared_cache: Path,
    images: Path,
    small_search: dict[str, Any],
    new_database: Callable[[Path], str],
) -> tuple[Path, Result]:
    """A head that was trained at the command line; tests look, none changes it."""
    home = tmp_path_factory.mktemp("trained")
    experiment = {**small_search, "data": {"source": str(images)}}
    (home / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", new_database(home / "mlflow.db"))
        result = call("--experiment", "experiment.yaml", "--epochs", "4", "--output", "searches/a")
    return home, result


def test_a_training_is_a_search_folder_with_one_trial(trained):
    home, result = trained
    assert result.exit_code == 0, result.stderr
    record = SearchRecord.load(home / "searches/a")
    assert list(record.trials) == ["t0001"]
    assert record.best.configuration == {"learning_rate": 0.03, "batch_size": 16}
    assert len(record.best.epochs) == 4
    assert record.ended["state"] == "completed"
    classifier = Classifier.load(home / "searches/a/classifier")
    assert classifier.class_names == ("blue", "green", "red")
    assert not (home / "searches/a" / TRIAL / "checkpoint").exists()


def test_a_person_sees_a_line_for_each_epoch_and_what_comes_next(trained):
    lines = trained[1].output.splitlines()
    shown = [line for line in lines if line.startswith("epoch ")]
    assert [line.split()[1] for line in shown] == ["1/4", "2/4", "3/4", "4/4"]
    assert "validation_accuracy" in shown[0]
    assert lines[-1].endswith("visiontuner evaluate searches/a")


def test_mlflow_holds_it_like_a_search(trained):
    client = MlflowClient(f"sqlite:///{trained[0] / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("colours").experiment_id])
    kinds = sorted(run.data.tags["visiontuner.kind"] for run in runs)
    assert kinds == ["search", "trial"]
    (version,) = client.search_model_versions("name = 'colours'")
    trial = next(r for r in runs if r.data.tags["visiontuner.kind"] == "trial")
    assert version.run_id == trial.info.run_id
    assert len(client.get_metric_history(trial.info.run_id, "train_loss")) == 4


# --from


def test_the_same_values_give_the_same_numbers(trained):
    home, _ = trained
    origin = find_origin(str(home / "searches/a"))
    again = one_training(origin.experiment, (), origin, where="test")
    train_unpackaged(again, output=Path("again"))
    assert epochs(Path("again")) == epochs(home / "searches/a")


class StopAtFirstStep(SilentTraining):
    """Remembers what a person reads before the training begins."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
        raise KeyboardInterrupt


def notes_before(experiment: Experiment, **options: Any) -> list[str]:
    """What is said of a training that begins in a new folder."""
    told = StopAtFirstStep()
    with pytest.raises(SearchInterrupted):
        train(experiment, output=Path("begun"), observer=told, **options)
    shutil.rmtree("begun")
    return told.notes


def test_a_training_that_repeats_its_origin_says_so_and_what_would_differ(trained, monkeypatch):
    home, _ = trained
    for text in (str(home / "searches/a"), "models:/colours/1"):
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
            origin = find_origin(text)
        same = one_training(origin.experiment, ["training.workers=0"], origin, where="test")
        (said,) = [n for n in notes_before(same, origin=origin) if "the same model" in n]
        assert f"nothing differs from {origin.description}" in said
        assert "registers it as a new version" in said
        for words in ("--epochs", "--on train+validation", "--set model.train=last_stage"):
            assert words in said


@pytest.mark.parametrize(
    ("override", "trained_on"),
    [
        ("training.epochs=5", "train"),
        ("training.learning_rate=0.02", "train"),
        ("seed=8", "train"),
        ("data.limit_per_class=3", "train"),
        ("training.workers=0", "train+validation"),
    ],
)
def test_a_training_that_differs_from_its_origin_says_no_such_thing(trained, override, trained_on):
    origin = find_origin(str(trained[0] / "searches/a"))
    other = one_training(origin.experiment, [override], origin, where="test")
    said = notes_before(other, origin=origin, trained_on=trained_on)
    assert not [note for note in said if "the same model" in note]


class StopAt(SilentTraining):
    """Raises at a step, counted through all epochs that this process trains."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class StopBeforePackaging(SilentTraining):
    """All epochs, and Ctrl-C before the classifier is made: that takes longer than the rest."""

    def note(self, text: str) -> None:
        if text.startswith("Packaging"):
            raise KeyboardInterrupt


def train_unpackaged(experiment: Experiment, *, output: Path, **options: Any) -> None:
    with pytest.raises(SearchInterrupted, match="--resume"):
        train(experiment, output=output, observer=StopBeforePackaging(), **options)


def test_a_runs_and_a_models_hyperparameters_are_those_of_the_folder(trained, monkeypatch):
    home, _ = trained
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    client = MlflowClient()
    version = client.get_model_version("colours", "1")
    origins = [
        find_origin(text)
        for text in (str(home / "searches/a"), version.run_id, "colours/1", "models:/colours/1")
    ]
    for origin in origins:
        assert origin.configuration == {"learning_rate": 0.03, "batch_size": 16}
        assert origin.experiment["training"]["epochs"] == 4
        assert origin.class_names == ("blue", "green", "red")
    assert origins[0].head() is not None


def test_values_of_the_origin_give_way_to_those_that_are_set(trained):
    origin = find_origin(str(trained[0] / "searches/a"))
    changed = one_training(
        origin.experiment, ["training.batch_size=8", "model.train=all"], origin, where="test"
    )
    assert changed.training.learning_rate == 0.03
    assert changed.search.first == ({"learning_rate": 0.03, "batch_size": 8},)
    assert changed.model.train == "all"


def test_a_network_begins_with_the_origins_trained_head(trained):
    home, _ = trained
    origin = find_origin(str(home / "searches/a"))
    experiment = one_training(
        origin.experiment,
        ["model.train=last_stage", "training.learning_rate=1e-12", "training.epochs=1"],
        origin,
        where="test",
    )
    train_unpackaged(experiment, output=Path("tuned"), origin=origin)
    tuned = load_file(Path("tuned") / TRIAL / "network.safetensors")
    head = load_file(home / "searches/a" / TRIAL / "head.safetensors")
    np.testing.assert_allclose(tuned["head.weight"], head["weight"], atol=1e-6)


def test_the_learning_rate_for_a_network_that_begins_with_a_trained_head_is_found(trained):
    home, _ = trained
    network = ["--set", "model.train=last_stage", "--steps", "20", "--high", "1e-5"]
    found = {}
    for name, origin in {
        "anew": ["--experiment", str(home / "experiment.yaml")],
        "from a head": ["--from", str(home / "searches/a")],
    }.items():
        found[name] = CliRunner().invoke(main, ["lr-find", *origin, *network, "--output", name])
        assert found[name].exit_code == 0, found[name].stderr
    assert "begun with a trained head" in found["from a head"].stdout
    assert "begun with a trained head" not in found["anew"].stdout
    first = {
        name: json.loads(Path(name, "range_test.json").read_text())["losses"][0] for name in found
    }
    assert first["from a head"] != first["anew"]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere", "no model 'nowhere'"),
        ("champion", "Whose champion"),
        ("0" * 32, "no run"),
    ],
)
def test_an_origin_that_is_not_there(text, told):
    with pytest.raises(UserMistake, match=told):
        find_origin(text)


def test_a_folder_without_a_search_is_no_origin(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserMistake, match="no search folder"):
        find_origin("empty")


@pytest.mark.parametrize("override", ["search.trials=4", "search.space.dropout={low: 0, high: 1}"])
def test_one_training_has_no_space(raw, override):
    with pytest.raises(UserMistake, match="one training has no space"):
        one(raw, override)


def test_a_run_left_over_in_the_environment_gets_no_training(raw, store, monkeypatch):
    Path("experiment.yaml").write_text(yaml.safe_dump(raw))
    left = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", left)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    result = call("--experiment", "experiment.yaml", "--epochs", "1", "--output", "a")
    assert result.exit_code == 0, result.stderr
    assert "`mlflow run` did not open it" in result.output
    assert not store.get_run(left).data.params
    runs = store.search_runs([store.get_experiment_by_name("colours").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}


# --on train+validation


@pytest.fixture(scope="module")
def unvalidated(trained, shared_cache) -> Path:
    home = trained[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(shared_cache))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
        result = call("--from", "searches/a", "--on", "train+validation", "--output", "searches/b")
    assert result.exit_code == 0, result.stderr
    return home / "searches/b"


def test_nothing_is_reported_of_images_that_were_trained_on(unvalidated):
    trial = SearchRecord.load(unvalidated).best
    assert trial.best_epoch == 4
    assert trial.best_value is None
    assert not [n for e in trial.epochs for n in e.metrics if n.startswith("validation_")]
    assert not list((unvalidated / TRIAL).glob("validation_*"))


def test_the_validation_images_are_trained_on(trained, unvalidated):
    # The first epoch's mean loss is over other images, so it is another.
    alone = epochs(trained[0] / "searches/a")[0]["train_loss"]
    assert epochs(unvalidated)[0]["train_loss"] != alone
    # 42 images, of which k are right: the share is no share of 30.
    right = epochs(unvalidated)[-1]["train_accuracy"] * 42
    assert right == pytest.approx(round(right), abs=1e-4)


def test_temperature_and_threshold_are_those_of_the_origin(trained, unvalidated):
    expected = find_origin(str(trained[0] / "searches/a")).calibration()
    classifier = Classifier.load(unvalidated / "classifier")
    assert classifier.temperature == pytest.approx(expected.temperature)
    assert (classifier.threshold, classifier.abstains) == (expected.threshold, expected.abstains)
    # Twelve validation images carry no precision of 95 %.
    assert classifier.abstains
    assert classifier.metadata["calibration"]["fitted_on"] == "t0001 of a"


def test_without_an_origin_nothing_is_calibrated(raw):
    train_unpackaged(one(raw), output=Path("b"), trained_on="train+validation")
    assert SearchRecord.load(Path("b")).started.get("calibration") is None


# --resume


KILLED = """
import json, os, random, signal, sys
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from visiontuner.errors import SearchInterrupted
from visiontuner.experiment.schema import Experiment
from visiontuner.search import trial as head_trial, live as live_rules, trial as network_trial
from visiontuner.tracking import writer as follow, writer as mlflow_writer
from visiontuner.workflow.tune import resume_search
from visiontuner.workflow.train import SilentTraining, resume_training, train
from visiontuner.workflow.train import one_training

class Killed(SilentTraining):
    def __init__(self, step): self.left = step
    def step(self, epoch, step, steps, loss):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def note(self, text):
        if text.startswith("Packaging"):
            raise KeyboardInterrupt

raw, steps = json.loads(sys.argv[1]), json.loads(sys.argv[2])
# One thread: quicker here, and no wait for a core that another process has.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for name, step in [("whole", 0), *(("killed", step) for step in [*steps, 0])]:
    folder = Path(name)
    child = os.fork()
    if child == 0:  # a process of its own, without the seconds that importing takes
        watcher = Killed(step)
        try:
            if (folder / "journal.jsonl").exists():
                resume_training(folder, observer=watcher)
            else:
                train(one_training(raw, (), None, where="test"), output=folder, observer=watcher)
        except SearchInterrupted:
            os._exit(7)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    want = signal.SIGKILL if step else 7
    got = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    assert got == want, (step, got)
"""

ON_IMAGES = {"model": {"train": "last_stage"}, "training": {"augmentation": "light"}}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [None, 2], ids=["features", "2 workers"])
def test_killed_twice_and_gone_on_with_it_ends_with_the_same_numbers(raw, workers):
    if workers is not None:
        for section, values in ON_IMAGES.items():
            raw[section] |= values
        raw["training"] |= {"workers": workers, "ema_decay": 0.9, "micro_batch_size": 5}
        raw["training"]["augmentation"] = {"policy": "trivial", "erasing": 0.2, "mixup": 0.2}
    raw["training"] |= {"dropout": 0.2, "batch_size": 8, "epochs": 4}
    raw["training"] |= {"gradient_clip": 1.0, "label_smoothing": 0.1, "warmup_fraction": 0.1}
    # 4 steps an epoch: each process dies after at most one whole epoch, so two are left.
    dice = random.Random(workers)
    steps = [dice.randint(1, 6) for _ in range(2)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, json.dumps(raw), str(steps)],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert epochs(Path("killed")) == epochs(Path("whole"))
    assert SearchRecord.load(Path("killed")).trials["t0001"].attempt == 3
    for name in ("head.safetensors", "network.safetensors"):
        whole, killed = Path("whole") / TRIAL / name, Path("killed") / TRIAL / name
        assert whole.exists() == killed.exists()
        if whole.exists():
            expected, got = load_file(whole), load_file(killed)
            assert expected.keys() == got.keys()
            assert all(np.array_equal(expected[name], got[name]) for name in expected)


def test_ctrl_c_in_an_epoch_is_one_line_with_the_command_that_goes_on(raw, store, monkeypatch):
    Path("experiment.yaml").write_text(yaml.safe_dump(raw))
    watcher = StopAt(3)  # the first step of the second epoch
    monkeypatch.setattr(TrainingConsole, "step", lambda _, *step: watcher.step(*step))
    result = call("--experiment", "experiment.yaml", "--output", "a")
    assert result.exit_code == 130
    (line,) = result.stderr.strip().splitlines()
    assert line == (
        "Error: Stopped in epoch 2 of 4; nothing is lost. "
        f"Go on with: {next_command('train', '--resume', 'a')}"
    )
    record = SearchRecord.load(Path("a"))
    assert record.trials["t0001"].state == "interrupted"
    assert [e.step for e in record.trials["t0001"].epochs] == [1]
    (parent,) = [
        run for run in store.search_runs(["1"]) if run.data.tags["visiontuner.kind"] == "search"
    ]
    assert parent.info.status == "KILLED"


def interrupted(raw: dict[str, Any], folder: str = "a") -> Path:
    """A training that stopped in its second epoch."""
    with pytest.raises(SearchInterrupted):
        train(one(raw), output=Path(folder), observer=StopAt(3))
    return Path(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    experiment = yaml.safe_load((folder / "experiment.yaml").read_text())
    change(experiment)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))


def test_a_checkpoint_of_another_network_is_refused(raw):
    folder = interrupted(raw)
    rewrite(folder, lambda e: e["model"].update(backbone="resnet34"))
    with pytest.raises(CheckpointError, match=r"made with model.backbone resnet18.*resnet34"):
        resume_training(folder)


def test_a_checkpoint_of_other_classes_is_refused(raw, images, tmp_path):
    folder = interrupted(raw)
    others = tmp_path / "others"
    shutil.copytree(images, others)
    for split in ("train", "valid"):
        (others / split / "red").rename(others / split / "rouge")
    other = interrupted(raw | {"data": {"source": str(others)}}, "b")
    checkpoint = TRIAL / "checkpoint"
    shutil.rmtree(other / checkpoint)
    shutil.copytree(folder / checkpoint, other / checkpoint)
    with pytest.raises(CheckpointError, match="made with class_names"):
        resume_training(other)


def test_other_images_are_refused(raw, images, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    folder = interrupted(raw | {"data": {"source": str(mine)}})
    (mine / "train" / "red" / "0.png").unlink()
    with pytest.raises(UserMistake, match="not those this search began with"):
        resume_training(folder)


def test_a_damaged_checkpoint_is_one_line(raw):
    folder = interrupted(raw)
    path = folder / TRIAL / "checkpoint" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        resume_training(folder)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--resume", "nowhere"], "holds no training"),
        (["--resume", "a", "--epochs", "9"], "leave the other flags out"),
        (["--resume", "a", "--on", "train+validation"], "leave the other flags out"),
        (["--data", "nowhere"], "nowhere"),
        (["--set", "training.epoch=5"], "did you mean epochs?"),
        (["--from", "nowhere"], "no model 'nowhere'"),
        (["--on", "test"], "is not one of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, told):
    result = call(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not Path("searches").exists()


def test_a_search_does_not_go_on_with_a_training(raw):
    folder = interrupted(raw)
    with pytest.raises(JournalError, match="visiontuner train --resume"):
        resume_search(folder)


def test_only_what_leaves_the_numbers_alone_can_be_set_on_resume(raw):
    folder = interrupted(raw)
    with pytest.raises(UserMistake, match="another training"):
        resume_training(folder, overrides=["training.epochs=9"])


# Bad input and bad days


def test_a_batch_larger_than_the_data_set_is_told(raw):
    told = Told()
    train_until_packaged(one(raw, "training.batch_size=64"), told)
    assert any("batch_size 64 is more than the 30 training images" in n for n in told.notes)
    assert len(epochs(Path("a"))) == 4


class Told(StopBeforePackaging):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        super().note(text)


def train_until_packaged(experiment: Experiment, observer: SilentTraining) -> None:
    with pytest.raises(SearchInterrupted):
        train(experiment, output=Path("a"), observer=observer)


def test_a_class_with_one_image_is_told_and_trained(raw, images, tmp_path):
    shutil.copytree(images, tmp_path / "few")
    for number in range(1, 10):
        (tmp_path / "few/train/red" / f"{number}.png").unlink()
    told = Told()
    train_until_packaged(one(raw | {"data": {"source": str(tmp_path / "few")}}), told)
    assert any("one image is too few" in note for note in told.notes)
    assert len(epochs(Path("a"))) == 4


def test_one_image_a_step_with_batch_normalisation_is_one_line(raw):
    raw["model"] |= {"train": "all", "image_size": 32}
    raw["training"] |= {"batch_size": 1, "augmentation": "none", "workers": 0}
    with pytest.raises(SearchFailed, match=r"failed: Batch normalisation .*freeze_batch_norm"):
        train(one(raw), output=Path("a"))
    assert SearchRecord.load(Path("a")).trials["t0001"].state == "failed"


def test_a_last_batch_of_one_image_joins_the_one_before_it(raw):
    raw["model"] |= {"train": "all"}
    raw["training"] |= {"batch_size": 29, "augmentation": "none", "workers": 0, "epochs": 1}
    train_unpackaged(one(raw), output=Path("a"))
    assert len(epochs(Path("a"))) == 1


def test_a_loss_that_explodes_is_one_line_and_stays_a_failure(raw):
    raw["training"] |= {"learning_rate": 1e30, "optimizer": "sgd"}
    with pytest.raises(SearchFailed, match=r"The training failed: .* try a smaller learning rate"):
        train(one(raw), output=Path("a"))
    record = SearchRecord.load(Path("a"))
    assert record.trials["t0001"].state == "failed"
    rules = {e["rule"] for e in read_events(Path("a")).events if e["event"] == "finding"}
    assert "not_a_number" in rules


def test_a_loss_that_explodes_after_whole_epochs_is_nothing_to_go_on_with(raw):
    # Epoch 1 ends with weights of about 1e20; its decay makes the next ones infinite.
    raw["training"] |= {"learning_rate": 1e20, "optimizer": "sgd", "momentum": 0.0}
    raw["training"] |= {"weight_decay": 1.0, "batch_size": 64, "schedule": "constant"}
    with pytest.raises(SearchFailed, match=r"in epoch \d+ at .* try a smaller learning rate"):
        train(one(raw), output=Path("a"))
    trial = SearchRecord.load(Path("a")).trials["t0001"]
    assert trial.state == "failed"
    assert trial.epochs


class KillsAWorker(SilentTraining):
    """In a certain epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
        if epoch == self.epoch:
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # those of the step before are dead by now
                    if child.name() == "pt_data_worker":  # and no server of other tests
                        child.kill()


@pytest.mark.parametrize(("epoch", "attempts"), [(1, [2, 2]), (2, [1, 2])])
def test_a_worker_that_is_killed_costs_one_epoch_at_most(raw, epoch, attempts):
    for section, values in ON_IMAGES.items():
        raw[section] |= values
    raw["training"] |= {"workers": 2, "epochs": 2}
    with pytest.raises(SearchFailed, match=r"process .* died.*visiontuner train --resume a"):
        train(one(raw, "training.batch_size=2"), output=Path("a"), observer=KillsAWorker(epoch))
    assert SearchRecord.load(Path("a")).trials["t0001"].state == "interrupted"
    with pytest.raises(SearchInterrupted):
        resume_training(Path("a"), overrides=["training.workers=0"], observer=StopBeforePackaging())
    trial = SearchRecord.load(Path("a")).trials["t0001"]
    assert [(e.step, e.attempt) for e in trial.epochs] == [*enumerate(attempts, start=1)]


def test_a_full_disk_is_one_line_with_the_command_that_goes_on(raw):
    part = Path("a") / TRIAL / ".validation_logits.npy.part"

    class FillsTheDisk(SilentTraining):
        def step(self, epoch: int, step: int, steps: int, loss: Callable[[], float]) -> None:
            if epoch == 1:
                part.unlink(missing_ok=True)
                part.symlink_to("/dev/full")

    with pytest.raises(SearchFailed, match=r"No space left.*visiontuner train --resume a"):
        train(one(raw), output=Path("a"), observer=FillsTheDisk())
    with pytest.raises(SearchInterrupted):
        resume_training(Path("a"), observer=StopBeforePackaging())
    assert len(epochs(Path("a"))) == 4


def test_an_image_that_cannot_be_read_is_left_out_and_named(raw, images, tmp_path):
    shutil.copytree(images, tmp_path / "broken")
    (tmp_path / "broken/train/red/0.png").write_bytes(b"no image")
    Image.new("RGB", (3, 3)).save(tmp_path / "broken/train/red/tiny.png")
    train_unpackaged(one(raw | {"data": {"source": str(tmp_path / "broken")}}), output=Path("a"))
    rules = [e["evidence"] for e in read_events(Path("a")).events if e["event"] == "finding"]
    assert any("0.png" in evidence for evidence in rules)


@pytest.mark.parametrize("train", ["head", "last_stage"])
def test_a_class_without_a_readable_image_is_told_before_the_images(raw, images, tmp_path, train):
    shutil.copytree(images, tmp_path / "broken")
    for path in (tmp_path / "broken/train/red").iterdir():
        path.write_bytes(b"no image")
    raw["model"] |= {"train": train}
    raw["training"] |= {"epochs": 1, "workers": 0}
    told = Told()
    train_until_packaged(one(raw | {"data": {"source": str(tmp_path / "broken")}}), told)
    said = "error: 1 (red): none of their train images can be read."
    unreadable = next(i for i, note in enumerate(told.notes) if "Cannot read" in note)
    assert said in told.notes[:unreadable]
