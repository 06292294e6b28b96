"""Workers elsewhere: files travel to them and back, on a Ray that only plays several machines."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from visiontuner.data.arrays import Shard, commit_folder
from visiontuner.data.dataset import Sample
from visiontuner.diagnostics.history import RECORDING_FILE
from visiontuner.experiment.schema import Experiment, Model
from visiontuner.model.features import ShardRows
from visiontuner.search import remote as hosts
from visiontuner.search.plan import CHECKPOINT_FOLDER, HEAD_FILE, DriverNode, TrialTask
from visiontuner.search.remote import (
    CheckpointUpload,
    FeatureWorkers,
    _FeatureWorker,
    driver_node,
    local_copy,
    upload_to_driver,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray")]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrialTask]:
    """What the driver of a search hands to a worker on another machine."""
    features = tmp_path / "home/cache/features/KEY"
    features.mkdir(parents=True)
    (features / "meta.json").write_text("{}")
    (features / "train.features.npy").write_bytes(bytes(range(256)) * 4)
    (features / ".half.tmp").write_text("being written")
    search = tmp_path / "home/search"
    (search / "trials/t0001").mkdir(parents=True)
    (search / "trials/t0001" / HEAD_FILE).write_text("weights")
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "away"))
    monkeypatch.setattr(hosts, "_FETCHED", {})
    monkeypatch.setattr(hosts, "_CHUNK_BYTES", 100)
    files: Any = ray.remote(hosts._Files).remote(search, [features])
    yield TrialTask(
        experiment=Experiment.parse({"name": "x"}),
        search_folder=search,
        threads=1,
        features_folder=features,
        start_heads={"t0002": search / "trials/t0001" / HEAD_FILE},
        driver=DriverNode(node_id="another", files=files, search="1"),
    )
    ray.kill(files)


def test_one_machine_needs_no_home(tmp_path: Path) -> None:
    with driver_node(tmp_path, []) as driver:
        assert driver is None


def test_a_worker_elsewhere_fetches_what_it_lacks_and_sends_what_it_wrote(
    task: TrialTask,
) -> None:
    with local_copy(task, "t0002") as here:
        # Files at the same path are used as they are: the machines share a disk.
        assert here.features_folder == task.features_folder
        assert here.search_folder != task.search_folder
        assert here.start_heads["t0002"].read_text() == "weights"
        folder = here.trial_folder("t0002")
        folder.mkdir(parents=True)
        (folder / HEAD_FILE).write_text("new weights")
        (folder / "logits.part").write_text("half")
        upload_to_driver(here, "t0002")
        # An epoch that is not the best one leaves the best one's files alone.
        (folder / HEAD_FILE).write_text("worse weights")
        (folder / RECORDING_FILE).write_text("recorded")
        upload_to_driver(here, "t0002", only=RECORDING_FILE)
    driver = task.trial_folder("t0002")
    assert {path.name for path in driver.iterdir()} == {HEAD_FILE, RECORDING_FILE}
    assert (driver / HEAD_FILE).read_text() == "new weights"
    assert not folder.exists()


def test_a_worker_elsewhere_fetches_the_features_of_its_trials_network(
    task: TrialTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task.features_folder is not None
    folder, name = task.features_folder, "timm:test_vit"
    several = replace(task, features_folder=tmp_path / "another", features_of={name: folder})
    monkeypatch.setattr(hosts, "_lacks", _never_shared(folder))
    with local_copy(several.for_trial({"backbone": name}), "t0001") as here:
        assert here.features_folder == tmp_path / "away/features/KEY"
        assert here.experiment.model.backbone == name
        assert (here.features_folder / "train.features.npy").is_file()


def _elsewhere(task: TrialTask) -> DriverNode:
    assert task.driver is not None
    return task.driver


def test_a_checkpoint_goes_home_now_and_then_and_to_the_next_machine(task: TrialTask) -> None:
    task = replace(task, checkpoints=True)
    # At the start; before and after the first journey; before one that is too early; the third.
    times = iter([0.0, 0.0, 2.0, 39.0, 41.0, 42.0])
    with local_copy(task, "t0002") as here:
        checkpoint = here.trial_folder("t0002") / CHECKPOINT_FOLDER / "checkpoint.safetensors"
        assert not checkpoint.exists()  # none is uploaded yet
        checkpoint.parent.mkdir(parents=True)
        at_home = task.trial_folder("t0002") / CHECKPOINT_FOLDER / "checkpoint.safetensors"
        sender = CheckpointUpload(here, "t0002", clock=lambda: next(times))
        # A journey of 2 s is worth it every 40 s; one file takes three chunks.
        for state, kept in ((b"1" * 250, b"1"), (b"2" * 20, b"1"), (b"3" * 20, b"3")):
            checkpoint.write_bytes(state)
            checkpoint.with_suffix(".part").write_bytes(b"half")
            sender.send()
            assert at_home.read_bytes()[:1] == kept
        assert [path.name for path in at_home.parent.iterdir()] == [at_home.name]
    with local_copy(task, "t0002") as there:
        found = there.trial_folder("t0002") / CHECKPOINT_FOLDER / "checkpoint.safetensors"
        assert found.read_bytes() == b"3" * 20


def test_a_copy_is_whole_and_is_fetched_once(
    task: TrialTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task.features_folder is not None
    folder, driver = task.features_folder, _elsewhere(task)
    monkeypatch.setattr(hosts, "_lacks", _never_shared(folder))
    copy = hosts.fetch_folder(driver, folder, tmp_path / "away")
    assert copy == tmp_path / "away/features/KEY"
    names = ("meta.json", "train.features.npy")
    assert sorted(path.name for path in copy.iterdir()) == sorted(names)
    assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in names)

    (copy / "meta.json").unlink()
    times = (copy / "train.features.npy").stat().st_mtime_ns
    hosts._FETCHED.clear()
    hosts.fetch_folder(driver, folder, tmp_path / "away")
    assert (copy / "meta.json").is_file()
    assert (copy / "train.features.npy").stat().st_mtime_ns == times


def test_a_copy_that_is_damaged_is_fetched_again_by_the_first_worker_of_a_search(
    task: TrialTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task.features_folder is not None
    folder, driver = task.features_folder, _elsewhere(task)
    commit_folder(folder, {}, ["train.features.npy"])
    monkeypatch.setattr(hosts, "_lacks", _never_shared(folder))
    copy = hosts.fetch_folder(driver, folder, tmp_path / "away") / "train.features.npy"
    whole = copy.read_bytes()
    for search, content in {"1": bytes(len(whole)), "2": whole}.items():
        copy.write_bytes(bytes(len(whole)))
        hosts._FETCHED.clear()
        hosts.fetch_folder(replace(driver, search=search), folder, tmp_path / "away")
        assert copy.read_bytes() == content


def _never_shared(folder: Path) -> Any:
    """This machine cannot see the driver's disk."""
    original = hosts._lacks
    return lambda where, sizes: list(sizes) if where == folder else original(where, sizes)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "trials/../../outside"])
def test_nothing_is_written_outside_the_search(task: TrialTask, name: str) -> None:
    with pytest.raises(RayTaskError, match="PermissionError"):
        ray.get(_elsewhere(task).files.write.remote(name, b""))
    with pytest.raises(RayTaskError, match="PermissionError"):
        ray.get(_elsewhere(task).files.read.remote(task.search_folder / name, 0, 1))


@ray.remote
class Machine:
    """Computes shards until it has done as many as it lives for."""

    def __init__(self, lives: int) -> None:
        self._lives = lives

    def compute(self, shard: Shard) -> ShardRows:
        if self._lives == 0:
            raise OSError("gone")
        self._lives -= 1
        return ShardRows(shard, np.full((1, 2), shard.number, np.float32), {})


def shards(tmp_path: Path, count: int) -> list[Shard]:
    sample = (Sample(path="a.png", label=0, digest="d"),)
    return [Shard("train", number, sample, tmp_path) for number in range(count)]


def test_shards_of_a_machine_that_dies_go_to_the_others(tmp_path: Path) -> None:
    machines = {Machine.remote(1): "torch", Machine.remote(100): "torch"}  # type: ignore[attr-defined]
    workers = FeatureWorkers(machines)
    computed = list(workers.compute(shards(tmp_path, 8)))
    assert sorted(each.shard.number for each in computed) == list(range(8))
    assert all((each.rows == each.shard.number).all() for each in computed)
    assert workers.description == "2 machines or GPUs, each by torch"


def test_what_no_machine_can_compute_is_left_to_the_driver(tmp_path: Path) -> None:
    machines = {Machine.remote(2): "torch", Machine.remote(1): "torch"}  # type: ignore[attr-defined]
    assert len(list(FeatureWorkers(machines).compute(shards(tmp_path, 8)))) == 3


def test_a_machine_without_the_images_takes_no_part(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _FeatureWorker(tmp_path / "nowhere", Model().model_dump(), "fp32")
