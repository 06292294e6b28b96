"""Inside a training job: every host runs this, and together they are one Ray cluster.

    python -m visiontuner.aws.container

The first host by number is the head. It starts Ray, waits until every other host has joined, runs
`visiontuner tune --on auto`, and tells the others how that ended. Every host ends with the head's
exit code, and with its reason in /opt/ml/output/failure if there is one. SIGTERM, two minutes
before a spot machine goes, ends the search in order; a job that finds a search among its
checkpoints goes on with it.

Beside it, in the folder where it is started, lie `experiment.yaml` and `job.json`:

    checkpoints   /opt/ml/checkpoints: what SageMaker keeps on S3, for the next job on this search
    token         a random value, the same on every host and made for this job alone
    tracking_uri  where MLflow is, or null: the journal travels instead

Standard library only: it runs before anything else is known to work.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from visiontuner.aws.rendezvous import Gathering, Outcome, Rendezvous, RendezvousError

# A program that a host runs: its last lines kept, and all of it gone at the end.


_LINES_KEPT = 50
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Child:
    """A process in a group of its own; leaving the context kills the group.

    Args:
        echo: pass its lines on to our own output as they come.

    `tail` holds its last lines.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, echo: bool = False
    ) -> None:
        self.tail: deque[str] = deque(maxlen=_LINES_KEPT)
        self._echo = echo
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)  # a grandchild may keep the pipe open

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def code(self) -> int:
        """Its exit code as a shell gives it: 128 and the number of a signal that ended it."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """SIGTERM to the process itself; its children are its own affair."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if self._echo:
                    print(line, end="", flush=True)
                self.tail.append(_COLOURS.sub("", line).strip())


def last_line(lines: Sequence[str] | deque[str]) -> str:
    """The line that says most: the last that is an error, else the last that is not empty."""
    told = [line for line in list(lines) if line]
    errors = [line for line in told if line.startswith("Error: ")]
    return (errors or told or ["it said nothing"])[-1].removeprefix("Error: ")


RAY_PORT = 6379
RENDEZVOUS_PORT = 6380
JOIN_SECONDS = 900.0
"""Hosts install their requirements at their own pace; then one that is missing stays away."""
INTERRUPTED = 130
WORK = "visiontuner-job"
"""Below /tmp, which AWS documents as scratch space on the job's disk."""
KEPT = ("search", "cache/features")
"""Below the folder of work: what the next job goes on with. Decoded images are made again."""
UPLOAD_SECONDS = 10.0
"""SageMaker uploads checkpoints while the container runs, and does not promise it afterwards."""
_MARKERS = ("*.sagemaker-uploading", "*.sagemaker-uploaded")
_UNFINISHED = ("*.part", ".*.tmp")
# SageMaker shows so much of the failure file as the job's FailureReason.
_REASON_LENGTH = 1024
_RAY_IS_UP = "Ray runtime started"
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a host knows of the job before it has talked to any other.

    Args:
        host: this one's name; `hosts` are all of them, the head first.
        token: what every host of this job knows and nobody else.
        checkpoints: what SageMaker keeps on S3; see `Checkpoints`.
        work: this host's own folder: the head's search, and the cache.
        base: /opt/ml.
        code: the folder with `experiment.yaml`, `job.json` and the package.
    """

    host: str
    hosts: tuple[str, ...]
    name: str
    token: str
    checkpoints: Path
    work: Path
    tracking_uri: str | None
    base: Path
    code: Path

    @property
    def head(self) -> str:
        return self.hosts[0]

    @property
    def search(self) -> Path:
        return self.work / "search"

    @classmethod
    def read(cls, base: Path, code: Path, environment: Mapping[str, str]) -> Job:
        """From the files that SageMaker and the submitter wrote.

        Raises:
            RendezvousError: one is missing, or a value in it.
        """
        resources = _read_json(base / "input/config/resourceconfig.json")
        job = _read_json(code / "job.json")
        try:
            return cls(
                host=resources["current_host"],
                hosts=tuple(sorted(resources["hosts"], key=by_number)),
                name=environment.get("TRAINING_JOB_NAME", ""),
                token=job["token"],
                checkpoints=Path(job["checkpoints"]),
                work=Path(environment.get("TMPDIR") or "/tmp") / WORK,
                tracking_uri=job["tracking_uri"],
                base=base,
                code=code,
            )
        except (KeyError, TypeError) as error:
            raise RendezvousError(
                f"job.json or resourceconfig.json lacks {error}. Submit the job again with "
                "`visiontuner tune --on sagemaker`."
            ) from None

    def key(self, purpose: str) -> str:
        """A secret for one purpose, 64 hex digits, that all hosts derive alike."""
        message = f"{purpose} {self.name}".encode()
        return hmac.new(self.token.encode(), message, hashlib.sha256).hexdigest()


def by_number(host: str) -> tuple[str, int]:
    """Sorts algo-2 before algo-10."""
    match = re.fullmatch(r"(.*?)(\d+)", host)
    return (match[1], int(match[2])) if match else (host, 0)


def main() -> int:
    base = Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))
    try:
        job = Job.read(base, Path.cwd(), os.environ)
        shutil.rmtree(job.work, ignore_errors=True)
        with _terminations() as terminated:
            outcome = (lead if job.host == job.head else follow)(job, terminated)
    except RendezvousError as error:
        outcome = Outcome(1, str(error))
    _say_outcome(outcome, base)
    return outcome.code


def lead(job: Job, terminated: threading.Event) -> Outcome:
    """Gather the hosts, run the search, tell all how it ended."""
    address = socket.gethostbyname(job.host)
    _say(f"{job.host} is the head of {len(job.hosts)} host(s).")
    arguments = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
    with (
        Gathering(job.hosts[1:], (address, RENDEZVOUS_PORT), job.key("rendezvous")) as gathering,
        _ray(job, address, arguments) as ray,
    ):
        outcome = Outcome(1, f"{job.host} ended before the search began.")
        try:
            check_gpus(job)
            _wait_until_up(ray, job, terminated)
            gathering.wait(JOIN_SECONDS, terminated)
            _say(f"All {len(job.hosts)} hosts are there.")
            outcome = _search(job, f"{address}:{RAY_PORT}", terminated)
        except RendezvousError as error:
            outcome = Outcome(INTERRUPTED if terminated.is_set() else 1, str(error))
        finally:
            gathering.tell(outcome)
    return outcome


def follow(job: Job, terminated: threading.Event) -> Outcome:
    """Join the head's Ray and stay until the head says how the search ended.

    A SIGTERM changes nothing at first: the head got one too, and its search ends in order sooner
    if its trials here do.
    """
    with Rendezvous(
        job.host, (job.head, RENDEZVOUS_PORT), job.key("rendezvous"), JOIN_SECONDS, terminated
    ) as rendezvous:
        try:
            check_gpus(job)
            with _ray(job, rendezvous.own_address, [f"--address={job.head}:{RAY_PORT}"]) as ray:
                _wait_until_up(ray, job, terminated)
                rendezvous.joined()
                _say(f"{job.host} has joined {job.head}.")
                return rendezvous.wait_for_outcome(lambda: ray.ended)
        except RendezvousError as error:
            rendezvous.failed(str(error))
            raise


def check_gpus(job: Job) -> None:
    """Ray would count this host's GPUs, and a torch that cannot use them train on the CPU.

    Raises:
        RendezvousError: the host has GPUs that its torch cannot use.
    """
    count = os.environ.get("SM_NUM_GPUS") or "0"  # by SageMaker's start script, from nvidia-smi
    if count == "0":
        return
    code = "import torch; torch.cuda.init()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RendezvousError(
            f"{job.host} has {count} GPU(s) that the image's torch cannot use: "
            f"{last_line(done.stderr.splitlines()).rstrip('.')}. Name an --image whose torch is "
            "built for GPUs, or an --instance-type without them."
        )


def tune_arguments(job: Job) -> list[str]:
    """The search's command line: a new search, or on with the one among the checkpoints."""
    if (job.search / "experiment.yaml").is_file():
        return ["tune", "--on", "auto", "--resume", str(job.search)]
    experiment = str(job.code / "experiment.yaml")
    return ["tune", "--on", "auto", "--experiment", experiment, "--output", str(job.search)]


def environment_of(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What Ray, its workers and the search find in their environment.

    Workers take theirs from the Ray that started them, so it has to be complete before that.
    """
    path = os.pathsep.join(filter(None, [str(job.code), environment.get("PYTHONPATH")]))
    own = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "VISIONTUNER_CACHE": str(job.work / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": job.key("ray"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "MALLOC_ARENA_MAX": "2",
        # A machine that has gone is noticed after 10 s, not 30.
        "RAY_health_check_period_ms": "2000",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "4",
    }
    return {**environment, **own}


def _search(job: Job, ray_address: str, terminated: threading.Event) -> Outcome:
    """Run the search and keep what it made."""
    checkpoints = Checkpoints(job)
    checkpoints.restore()
    environment = {
        **environment_of(job, os.environ),
        "RAY_ADDRESS": ray_address,
        "MLFLOW_TRACKING_URI": job.tracking_uri or "none",
    }
    command = [sys.executable, "-m", "visiontuner", *tune_arguments(job)]
    with Child(command, environment, echo=True) as search:
        while not (search.ended or terminated.wait(_POLL_SECONDS)):
            checkpoints.update()
        if not search.ended:
            _say("SIGTERM: the search ends in order.")
            search.terminate()
        while not search.ended:
            checkpoints.update()
            time.sleep(_POLL_SECONDS)
    if search.code == 0 or terminated.is_set():
        _keep(job)
    checkpoints.update()
    time.sleep(UPLOAD_SECONDS)
    return Outcome(search.code, last_line(search.tail) if search.code else "")


def _keep(job: Job) -> None:
    """The search becomes the job's model, which SageMaker uploads of a stopped job too."""
    target = job.base / "model" / "search"
    shutil.rmtree(target, ignore_errors=True)
    if job.search.is_dir():
        shutil.copytree(job.search, target, ignore=shutil.ignore_patterns(*_UNFINISHED))


class Checkpoints:
    """The search and its features among the checkpoints, for the next job on the same search.

    SageMaker puts marker files beside every checkpoint, gives every host all checkpoints of the
    last job, and deletes on S3 what any host deletes among them. The search therefore works
    elsewhere, and the head alone writes here.
    """

    def __init__(self, job: Job) -> None:
        self._work = job.work
        self._kept = job.checkpoints
        self._stamps: dict[str, tuple[int, int]] = {}
        self._failed = False

    def restore(self) -> None:
        """Take over what an earlier job left.

        Raises:
            RendezvousError: it cannot be copied: the disk is full, say.
        """
        ignored = shutil.ignore_patterns(*_UNFINISHED, *_MARKERS)
        try:
            for part in KEPT:
                if (self._kept / part).is_dir():
                    shutil.copytree(self._kept / part, self._work / part, ignore=ignored)
        except OSError as error:
            several = isinstance(error, shutil.Error)
            why = error.args[0][0][2] if several else error
            for part in KEPT:  # half a copy fills the disk, and the reason has to be written to it
                shutil.rmtree(self._work / part, ignore_errors=True)
            raise RendezvousError(f"The checkpoints cannot be copied: {why}") from None
        self._stamps = self._find()

    def update(self) -> None:
        """Copy what has changed since the last call, and delete what has gone."""
        found = self._find()
        try:
            for name, stamp in found.items():
                if self._stamps.get(name) != stamp:
                    self._copy(name)
                    self._stamps[name] = stamp
            for name in self._stamps.keys() - found.keys():
                (self._kept / name).unlink(missing_ok=True)
                del self._stamps[name]
        except OSError as error:
            if not self._failed:
                _say(f"The checkpoints cannot be brought up to date: {error}")
            self._failed = True

    def _find(self) -> dict[str, tuple[int, int]]:
        """Time and size of each finished file by its path below the folder of work."""
        found = {}
        ignored = shutil.ignore_patterns(*_UNFINISHED)
        for part in KEPT:
            for folder, _, names in os.walk(self._work / part):
                for name in {*names} - ignored(folder, names):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):  # it has gone meanwhile
                        status = path.stat()
                        key = path.relative_to(self._work).as_posix()
                        found[key] = (status.st_mtime_ns, status.st_size)
        return found

    def _copy(self, name: str) -> None:
        """A whole file: SageMaker may take it at any time."""
        target = self._kept / name
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.tmp")
        with suppress(FileNotFoundError):  # it has gone meanwhile
            shutil.copyfile(self._work / name, half)
            half.replace(target)


@contextmanager
def _ray(job: Job, address: str, arguments: Sequence[str]) -> Iterator[Child]:
    """This host's part of Ray, with its cores and GPUs; gone afterwards, without draining."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", *arguments),
        f"--node-ip-address={address}",
        f"--num-cpus={len(os.sched_getaffinity(0))}",
        f"--object-store-memory={_object_store_bytes()}",
        "--disable-usage-stats",
        "--block",
    ]
    with Child(command, environment_of(job, os.environ)) as ray:
        yield ray


def _object_store_bytes() -> int:
    """Features and heads pass through. Ray wants at least 75 MB, all of it in shared memory."""
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return max(80 * 1024**2, min(1024**3, int(free * 0.5)))


def _wait_until_up(ray: Child, job: Job, terminated: threading.Event) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not any(_RAY_IS_UP in line for line in ray.tail):
        if terminated.wait(0.1):
            raise RendezvousError(f"{job.host} was stopped while Ray started.")
        if ray.ended or time.monotonic() > deadline:
            raise RendezvousError(f"Ray does not start on {job.host}: {last_line(ray.tail)}")


@contextmanager
def _terminations() -> Iterator[threading.Event]:
    """Set by SIGTERM; by a thread, as the handler may interrupt whoever holds the event's lock."""
    terminated, signals = threading.Event(), SimpleQueue[int]()

    def wait_for_signal() -> None:
        signals.get()
        terminated.set()

    threading.Thread(target=wait_for_signal, daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.put(number))
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_outcome(outcome: Outcome, base: Path) -> None:
    if outcome.code == 0:
        return
    _say(outcome.reason or f"The search ended with {outcome.code}.")
    if outcome.reason:
        path = base / "output" / "failure"
        with suppress(OSError):  # on a full disk: the log has it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(outcome.reason[:_REASON_LENGTH] + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, flush=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RendezvousError(f"Cannot read {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
