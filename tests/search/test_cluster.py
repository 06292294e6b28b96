"""What a trial gets of the machines."""

from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ray._private.node import Node

from visiontuner.errors import ExperimentError, SearchFailed
from visiontuner.experiment import Search
from visiontuner.search.cluster import RayForSearch, share_out

LAPTOP = {"CPU": 4.0}
GPU_MACHINE = {"CPU": 16.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("machines", "settings", "trials", "threads"),
    [
        ([LAPTOP], {}, 4, 1),
        ([LAPTOP], {"cpus_per_trial": 2}, 2, 2),
        ([LAPTOP], {"cpus_per_trial": 0.5}, 8, 1),
        ([LAPTOP, {"CPU": 2.0}], {}, 6, 1),
        # Four trials share the GPU, and with it all cores.
        ([GPU_MACHINE], {}, 4, 4),
        ([GPU_MACHINE], {"gpus_per_trial": 1}, 1, 16),
        ([GPU_MACHINE], {"gpus_per_trial": 1, "cpus_per_trial": 2}, 1, 16),
        ([{"CPU": 8.0, "GPU": 8.0}], {"gpus_per_trial": 1}, 8, 1),
        # A machine without a GPU runs no trial then, and the weakest of the others decides.
        ([GPU_MACHINE, LAPTOP], {}, 4, 4),
        ([GPU_MACHINE, {"CPU": 8.0, "GPU": 1.0}], {}, 8, 2),
    ],
)
def test_trials_share_cores_and_gpus(machines, settings, trials, threads):
    resources = share_out(machines, Search(**settings))
    assert resources.concurrent_trials == trials
    assert resources.threads == threads
    assert resources.to_ray()["cpu"] == settings.get("cpus_per_trial", 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cpus_per_trial": 17}, "cpus_per_trial is 17, but the machine has 16"),
        ({"gpus_per_trial": 2}, "gpus_per_trial is 2, but the machine has 1"),
    ],
)
def test_more_than_the_largest_machine_has_is_refused(settings, told):
    with pytest.raises(ExperimentError, match=told):
        share_out([GPU_MACHINE, LAPTOP], Search(**settings))


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:9", "no Ray cluster at RAY_ADDRESS=127.0.0.1:9 (.*refused"),
        ("no-such-host.invalid:6379", "no Ray cluster at RAY_ADDRESS=no-such-host.invalid:6379"),
        ("head", "it is not HOST:PORT"),
        ("ray://head:10001", "a way in from outside.*ray job submit"),
        ("http://head:8265", "a way in from outside.*ray job submit"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_said_at_once(address, told, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        RayForSearch("auto") as cluster,
        pytest.raises(SearchFailed, match=told.replace("(", r"\(")),
    ):
        cluster.start()


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_on_one_machine_ray_starts_no_autoscaler_and_nothing_that_reads_logs():
    commands = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # other tests' processes end, and stay zombies
            commands.append(process.cmdline())
    assert any("raylet" in command[0] for command in commands if command)
    started = {Path(word).name for command in commands for word in command}
    assert not {"monitor.py", "log_monitor.py"} & started
    assert "start_monitor" in vars(Node), "Ray's own name has changed: it is started again"
    assert "start_log_monitor" in vars(Node)
