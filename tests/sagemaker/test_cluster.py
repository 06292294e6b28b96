"""What a job's hosts do before and after the search, with a stand-in for Ray and the search."""

import json
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from visiontuner.aws import container as cluster
from visiontuner.aws.container import (
    Child,
    Job,
    by_number,
    environment_of,
    last_line,
    tune_arguments,
)
from visiontuner.aws.rendezvous import Gathering, Outcome, Rendezvous, RendezvousError

# Two addresses of this machine, so that both hosts can listen.
HEAD, WORKER = "127.0.0.1", "127.0.0.2"

# In Python's place: `-m ray…` starts until it is killed, `-m visiontuner` is the search.
PYTHON = """#!/bin/sh
if [ "$2" = ray.scripts.scripts ]; then
    case "$*" in *--address*) if [ -e {folder}/broken ]; then echo "no room"; exit 1; fi;; esac
    echo "Ray runtime started."
    exec sleep 60
fi
if [ "$1" = -c ]; then
    [ -e {folder}/torch-for-cpu ] || exit 0
    printf 'Traceback …\nAssertionError: Torch not compiled with CUDA enabled\n' >&2; exit 1
fi
echo "$@" >> {folder}/searches
mkdir -p {folder}/work/search && echo whole > {folder}/work/search/journal.jsonl
{search}
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HEAD, 0))
        return int(found.getsockname()[1])


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    def make(host: str = HEAD, **changes: Any) -> Job:
        values: dict[str, Any] = {
            "host": host,
            "hosts": (HEAD, WORKER),
            "name": "job",
            "token": "secret",
            "checkpoints": tmp_path / host / "checkpoints",
            "work": tmp_path / "work",
            "tracking_uri": None,
            "base": tmp_path / host,
            "code": tmp_path,
        }
        (tmp_path / host / "model").mkdir(parents=True, exist_ok=True)
        return Job(**values | changes)

    return make


@pytest.fixture
def run(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Outcome | str]]:
    """Both hosts of a job whose search is a line of shell; their outcomes, or why they gave up."""
    monkeypatch.setattr(cluster, "RENDEZVOUS_PORT", free_port())
    monkeypatch.setattr(cluster, "JOIN_SECONDS", 20.0)
    monkeypatch.setattr(cluster, "UPLOAD_SECONDS", 0.0)

    def run(search: str, *, stop: bool = False) -> list[Outcome | str]:
        python = tmp_path / "python"
        python.write_text(PYTHON.format(folder=tmp_path, search=search))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(python))
        terminated = threading.Event()

        def one(part: Callable[..., Outcome], host: str) -> Outcome | str:
            try:
                return part(make_job(host), terminated)
            except RendezvousError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            hosts = [pool.submit(one, cluster.lead, HEAD), pool.submit(one, cluster.follow, WORKER)]
            if stop:
                while not (tmp_path / "ready").exists():
                    time.sleep(0.02)
                terminated.set()
            return [host.result() for host in hosts]

    return run


def test_hosts_sort_by_number() -> None:
    hosts = [f"algo-{number}" for number in range(1, 13)]
    shuffled = random.Random(0).sample(hosts, len(hosts))
    assert sorted(shuffled, key=by_number) == hosts


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """/opt/ml of the second of eleven hosts, with the code in it."""
    configuration = tmp_path / "input/config"
    configuration.mkdir(parents=True)
    hosts = sorted(f"algo-{number}" for number in range(1, 12))  # as SageMaker sorts them
    resources = {"current_host": "algo-2", "hosts": hosts}
    (configuration / "resourceconfig.json").write_text(json.dumps(resources))
    orders = {
        "checkpoints": "/opt/ml/checkpoints",
        "token": "secret",
        "tracking_uri": None,
    }
    (tmp_path / "job.json").write_text(json.dumps(orders))
    return tmp_path


def test_a_job_is_read_from_the_files_of_its_container(container: Path) -> None:
    job = Job.read(container, container, {"TRAINING_JOB_NAME": "j"})
    assert job.head == "algo-1"
    assert job.hosts[-1] == "algo-11"
    assert not job.work.is_relative_to(job.checkpoints)


def test_what_job_json_lacks_is_named(container: Path) -> None:
    (container / "job.json").write_text('{"checkpoints": "/x"}')
    with pytest.raises(RendezvousError, match=r"lacks 'token'"):
        Job.read(container, container, {})
    (container / "job.json").write_text("{")
    with pytest.raises(RendezvousError, match=r"Cannot read .*job\.json"):
        Job.read(container, container, {})


def test_hosts_of_one_job_share_secrets_and_others_do_not(make_job: Callable[..., Job]) -> None:
    assert make_job(HEAD).key("ray") == make_job(WORKER).key("ray")
    others = [make_job(name="other"), make_job(token="other")]
    secrets = {
        job.key(purpose) for job in [make_job(), *others] for purpose in ("ray", "rendezvous")
    }
    assert len(secrets) == 6
    assert all(len(secret) == 64 for secret in secrets)


def test_no_host_works_among_the_checkpoints(make_job: Callable[..., Job]) -> None:
    for host in (HEAD, WORKER):
        job = make_job(host)
        cache = Path(environment_of(job, {})["VISIONTUNER_CACHE"])
        assert not cache.is_relative_to(job.checkpoints)
        assert not job.search.is_relative_to(job.checkpoints)


def test_markers_and_half_files_are_no_part_of_a_search(make_job: Callable[..., Job]) -> None:
    job = make_job()
    kept, shards = job.checkpoints / "search", job.checkpoints / "cache/features/1/shards"
    for folder in (kept / "trials", shards):
        folder.mkdir(parents=True)
        for name in ("a", "a.sagemaker-uploading", "b.sagemaker-uploaded", ".c.tmp", "d.part"):
            (folder / name).write_text(name)
    checkpoints = cluster.Checkpoints(job)
    checkpoints.restore()
    here = {p.relative_to(job.work).as_posix() for p in job.work.rglob("*") if p.is_file()}
    assert here == {"search/trials/a", "cache/features/1/shards/a"}

    (job.search / "trials/a").unlink()
    (job.search / "journal.jsonl").write_text("one\n")
    (job.search / "x.part").write_text("half")
    checkpoints.update()
    names = {path.name for path in kept.rglob("*") if path.is_file()}
    assert "journal.jsonl" in names
    assert not names & {"a", "x.part"}  # what has gone here has gone there
    with (job.search / "journal.jsonl").open("a") as journal:
        journal.write("two\n")
    checkpoints.update()
    assert (kept / "journal.jsonl").read_text() == "one\ntwo\n"


def test_a_host_that_copies_nothing_deletes_nothing_of_the_others(
    make_job: Callable[..., Job],
) -> None:
    job = make_job()
    (job.checkpoints / "search").mkdir(parents=True)
    (job.checkpoints / "search/journal.jsonl").write_text("one\n")
    cluster.Checkpoints(job).update()
    assert (job.checkpoints / "search/journal.jsonl").exists()


def test_a_search_among_the_checkpoints_goes_on(make_job: Callable[..., Job]) -> None:
    job = make_job()
    assert "--experiment" in tune_arguments(job)
    job.search.mkdir(parents=True)
    (job.search / "experiment.yaml").touch()
    assert tune_arguments(job) == ["tune", "--on", "auto", "--resume", str(job.search)]


def test_all_hosts_end_well_and_the_head_keeps_the_search(run: Any, tmp_path: Path) -> None:
    assert run(f"touch {tmp_path}/work/search/half.part") == [Outcome(0), Outcome(0)]
    kept = tmp_path / HEAD / "model/search"
    assert [path.name for path in kept.iterdir()] == ["journal.jsonl"]
    assert not (tmp_path / WORKER / "model/search").exists()
    assert len((tmp_path / "searches").read_text().splitlines()) == 1


def test_all_hosts_end_with_the_code_and_the_reason_of_the_search(run: Any, tmp_path: Path) -> None:
    failed = Outcome(3, "No space left. Make room.")
    assert run('echo "Error: No space left. Make room."; echo more; exit 3') == [failed, failed]
    assert not (tmp_path / HEAD / "model/search").exists()


def test_a_search_that_is_killed_ends_all_hosts(run: Any) -> None:
    head, worker = run("kill -9 $$")
    assert head == worker
    assert head.code == 128 + signal.SIGKILL


def test_sigterm_ends_the_search_in_order_on_all_hosts(run: Any, tmp_path: Path) -> None:
    search = f"trap 'kill $!; exit 130' TERM; sleep 60 & touch {tmp_path}/ready; wait"
    head, worker = run(search, stop=True)
    assert (head.code, worker.code) == (130, 130)
    for place in ("model", "checkpoints"):  # SageMaker promises to upload the first
        assert (tmp_path / HEAD / place / "search/journal.jsonl").read_text() == "whole\n"


def test_a_worker_whose_ray_does_not_start_is_named_by_all(run: Any, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    head, worker = run("true")
    assert head == Outcome(1, f"Ray does not start on {WORKER}: no room")
    assert worker == head.reason
    assert not (tmp_path / "searches").exists()


@pytest.mark.parametrize("gpus", ["0", "4"])
def test_gpus_that_torch_cannot_use_end_the_job_at_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str
) -> None:
    monkeypatch.setenv("SM_NUM_GPUS", gpus)
    (tmp_path / "torch-for-cpu").touch()
    head, worker = run("true")
    if gpus == "0":
        assert (head, worker) == (Outcome(0), Outcome(0))
        return
    told = r"127.0.0.\d has 4 GPU\(s\) that the image's torch cannot use: .*not compiled with CUDA"
    assert head.code == 1
    assert re.match(told, head.reason)
    assert not (tmp_path / "searches").exists()


def test_gpus_that_torch_can_use_are_no_reason_to_end(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SM_NUM_GPUS", "4")
    assert run("true") == [Outcome(0), Outcome(0)]


@pytest.fixture
def gathering() -> Any:
    with Gathering(["a", "b"], (HEAD, 0), "key") as gathering:
        yield gathering


def meet(gathering: Gathering, host: str, key: str = "key", seconds: float = 5.0) -> Rendezvous:
    return Rendezvous(host, (HEAD, gathering.port), key, seconds, threading.Event())


def test_a_host_that_stays_away_is_named(gathering: Gathering) -> None:
    with meet(gathering, "a") as a:
        a.joined()
        with pytest.raises(RendezvousError, match=r"^b did not join within 1 s"):
            gathering.wait(0.6, threading.Event())


@pytest.mark.parametrize(("host", "key"), [("a", "wrong"), ("stranger", "key")])
def test_strangers_do_not_get_in(gathering: Gathering, host: str, key: str) -> None:
    with pytest.raises(RendezvousError, match="cannot reach the head"):
        meet(gathering, host, key, seconds=0.1).__enter__()


@pytest.mark.parametrize("said", [b"", b"\n", b"{}\n", b"[1]\n", b'{"host": 1}\n', b"x" * 70000])
def test_nonsense_does_not_hurt_the_head(gathering: Gathering, said: bytes) -> None:
    with socket.create_connection((HEAD, gathering.port)) as connection:
        connection.sendall(said)
    with meet(gathering, "a") as a, meet(gathering, "b") as b:
        a.joined()
        b.joined()
        gathering.wait(5, threading.Event())
        gathering.tell(Outcome(0))
        assert b.wait_for_outcome(lambda: False) == Outcome(0)


def test_a_head_that_is_gone_ends_the_workers() -> None:
    with Gathering(["a"], (HEAD, 0), "key") as gathering:
        worker = meet(gathering, "a").__enter__()
        worker.joined()
        gathering.wait(5, threading.Event())
    with pytest.raises(RendezvousError, match=r"ended without a word"):
        worker.wait_for_outcome(lambda: False)
    worker.__exit__()


def test_a_child_leaves_nothing_running(tmp_path: Path) -> None:
    script = f"sleep 60 & echo $! > {tmp_path}/pid; echo '\033[31mError: red\033[0m'; wait"
    with Child(["sh", "-c", script], {"PATH": "/usr/bin:/bin"}) as child:
        while not child.tail:
            time.sleep(0.02)
        assert last_line(child.tail) == "red"
    pid = int((tmp_path / "pid").read_text())
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    assert listed.stdout.strip()[:1] in ("", "Z")


def test_the_program_fails_with_a_reason_that_sagemaker_shows(
    container: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container / "job.json").unlink()
    monkeypatch.chdir(container)
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(container))
    assert cluster.main() == 1
    assert "job.json" in (container / "output/failure").read_text()


def test_hosts_need_nothing_but_the_standard_library() -> None:
    """It says why requirements are missing only if it needs none itself."""
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p];"
    code += f"sys.path.insert(0, {str(Path(cluster.__file__).parents[2])!r});"
    code += "import visiontuner.aws.container"
    subprocess.run([sys.executable, "-c", code], check=True)
