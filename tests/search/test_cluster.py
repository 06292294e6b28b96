"""The Ray of a search, and what a trial gets of the machines."""

import ipaddress
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.node import Node

from visiontuner import interrupts
from visiontuner.errors import ExperimentError, SearchFailed
from visiontuner.experiment.schema import Search
from visiontuner.search.ray_cluster import RayForSearch, folder_for_sockets, share_out

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
@pytest.mark.usefixtures("no_ray")
def test_a_cluster_that_cannot_be_joined_is_said_at_once(address, told, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        RayForSearch("auto") as cluster,
        pytest.raises(SearchFailed, match=told.replace("(", r"\(")),
    ):
        cluster.start()


def test_rays_folder_is_elsewhere_where_the_path_for_temporary_files_is_too_long(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert folder_for_sockets() == Path("/var/tmp")
    long = tmp_path / ("x" * 51)
    long.mkdir()
    for unusable in (str(long), "/no/such/folder", "/dev/null"):
        monkeypatch.setenv("TMPDIR", unusable)
        assert folder_for_sockets() == Path("/tmp")


@pytest.mark.slow
@pytest.mark.usefixtures("no_ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")
def test_sigterm_is_taken_back_from_ray_when_it_has_started_and_when_it_has_ended():
    """In C++ Ray sets a handler of its own, and in the end none: the process would die of it."""
    with interrupts.handled():
        with RayForSearch("local") as ray:
            ray.start()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


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
    assert "start_api_server" in vars(Node)


def processes_of_ray() -> list[psutil.Process]:
    """This process and those that it has started."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_on_one_machine_ray_listens_on_the_loopback_interface_alone():
    listening = set()
    for process in processes_of_ray():
        with suppress(psutil.Error):
            listening |= {
                ipaddress.ip_address(each.laddr.ip)
                for each in process.net_connections("inet")
                if each.status == psutil.CONN_LISTEN
            }
    assert listening
    mapped = [getattr(address, "ipv4_mapped", None) or address for address in listening]
    assert [str(address) for address in mapped if not address.is_loopback] == []


@pytest.mark.slow
@pytest.mark.usefixtures("running_ray")
def test_no_other_user_opens_rays_folder_and_no_file_tells_its_token():
    folder = Path(ray.get_runtime_context().get_temp_dir())
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    (token,) = {
        process.environ()["RAY_AUTH_TOKEN"]
        for process in processes_of_ray()[1:]
        if process.name() in ("raylet", "gcs_server")
    }
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("raylet") for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    remembered = Path.home() / ".ray/auth_token"
    assert not remembered.is_file() or token not in remembered.read_text()


TWO_SEARCHES = """
import json, os
from pathlib import Path
from visiontuner.search.ray_cluster import RayForSearch

import ray  # as the part of a search that runs trials does, before Ray starts

before, seen = dict(os.environ), []
for _ in range(2):
    with RayForSearch("local") as ray_of_search:
        ray_of_search.start()
        folder = Path(ray.get_runtime_context().get_temp_dir()).parent
        seen.append([os.environ["RAY_AUTH_TOKEN"], folder.is_dir(), str(folder)])
        packed = dict(ray.get_runtime_context().runtime_env)
left = [folder for *_, folder in seen if os.path.exists(folder)]
changed = sorted(n for n in before.keys() | os.environ if before.get(n) != os.environ.get(n))
print("\\n" + json.dumps({"seen": seen, "left": left, "changed": changed, "packed": packed}))
"""


@pytest.mark.slow
def test_each_search_of_a_process_has_a_token_and_a_folder_of_its_own(tmp_path):
    """Below `uv run` too, where Ray would pack the working folder and start workers with uv."""
    (tmp_path / "run").write_text('"$@"; exit $?')
    uv_run = ["bash", "-c", 'exec -a uv bash run "$@"', "bash"]
    done = subprocess.run(
        [*uv_run, sys.executable, "-c", TWO_SEARCHES],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    (token, there, folder), (other_token, other_there, other_folder) = told["seen"]
    assert there
    assert other_there
    assert token != other_token
    assert folder != other_folder
    assert told["left"] == []
    assert told["packed"] == {}
    assert set(told["changed"]) <= {"RAY_CLIENT_MODE"}  # Ray's own
    assert not (tmp_path / ".ray").exists()
