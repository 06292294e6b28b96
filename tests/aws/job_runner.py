"""One CreateTrainingJob request, really run: what SageMaker does around the containers.

S3 channels and checkpoints down, one host in a network namespace for each instance with the
request's own entry point as process 1, checkpoints up to S3 while it runs, the model at the end.

With checkpoints it is as unkind as SageMaker: every host gets all of them; each host's go to the
one place in S3, and what a host deletes is deleted there; marker files appear beside each
(FILE.sagemaker-uploading, then FILE.sagemaker-uploaded, whose file may have gone); and once a
container has ended nothing of it is uploaded any more.

    python job_runner.py FOLDER     FOLDER/request.json in; FOLDER/outcome.json out

FOLDER/HOST/pid is the process that is a host: SIGKILL ends the host, and the job goes on without
it. SIGTERM to this program stops the job as `StopTrainingJob` and a spot interruption do: SIGTERM
to every container, SIGKILL 120 seconds later. Settings are in the environment:

    STAND_IN_PATH       PATH inside the hosts
    STAND_IN_GRACE      seconds between the two signals

A file FOLDER/../disk-bytes makes the head's disk as large as the number in it and what is there
when its container starts, checkpoints and channels.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import boto3
from namespaces import Hosts, first_process

TREE = ("input/config", "input/data", "model", "output/data", "checkpoints", "tmp", "scratch")
MARKERS = (".sagemaker-uploading", ".sagemaker-uploaded")
SYNC_SECONDS = 1.0
QUICK = Path(__file__).with_name("quick_hosts")  # the job's wait for uploads follows SYNC_SECONDS
TRANSFERS = 8  # side by side
REASON_LENGTH = 1024


@dataclass
class Host:
    """One container and its /opt/ml."""

    name: str
    ml: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    uploaded: dict[str, tuple[int, int]] = field(default_factory=dict)


class Job:
    """One training job from its request to its outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.request: dict[str, Any] = json.loads((folder / "request.json").read_text())
        self.name: str = self.request["TrainingJobName"]
        self.count: int = self.request["ResourceConfig"]["InstanceCount"]
        self.s3 = boto3.client("s3")
        self.stopping: str | None = None
        self._asked_to_stop = threading.Event()
        self.hosts = [
            Host(f"algo-{n}", folder / f"algo-{n}" / "ml", folder / f"algo-{n}" / "log")
            for n in range(1, self.count + 1)
        ]

    def run(self) -> dict[str, str]:
        for host in self.hosts:
            self._prepare(host)
        with ExitStack() as disks, Hosts(self.count) as network:
            room = self.folder.parent / "disk-bytes"
            if room.exists():
                disks.enter_context(_small_disk(self.hosts[0].ml, int(room.read_text())))
            for number, host in enumerate(self.hosts):
                self._start(network, host, cpu=number % (os.cpu_count() or 1))
            try:
                self._wait()
            finally:
                for host in self.hosts:
                    _kill(host)
            status = self._status()
            if status["status"] != "Failed":
                self._upload_archive("model", "model.tar.gz")
            self._upload_archive("output/data", "output.tar.gz")
        return status

    def stop(self, reason: str) -> None:
        self.stopping = reason
        self._asked_to_stop.set()

    def _prepare(self, host: Host) -> None:
        for part in TREE:
            (host.ml / part).mkdir(parents=True, exist_ok=True)
        for channel in self.request.get("InputDataConfig", []):
            uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
            self._download(uri, host.ml / "input/data" / channel["ChannelName"], kept=True)
        checkpoints = self.request.get("CheckpointConfig")
        if checkpoints:
            self._download(checkpoints["S3Uri"], host.ml / "checkpoints")
            host.uploaded = {name: stamp for name, _, stamp in _files(host.ml / "checkpoints")}
        for name, value in self._configuration(host).items():
            (host.ml / "input/config" / f"{name}.json").write_text(json.dumps(value))

    def _configuration(self, host: Host) -> dict[str, Any]:
        kind = self.request["ResourceConfig"]["InstanceType"]
        names = [each.name for each in self.hosts]
        group = {"instance_group_name": "homogeneousCluster", "instance_type": kind, "hosts": names}
        channel = {
            "TrainingInputMode": "File",
            "S3DistributionType": "FullyReplicated",
            "RecordWrapperType": "None",
        }
        return {
            "hyperparameters": self.request.get("HyperParameters", {}),
            "inputdataconfig": {
                each["ChannelName"]: channel for each in self.request.get("InputDataConfig", [])
            },
            "resourceconfig": {
                "current_host": host.name,
                "current_instance_type": kind,
                "current_group_name": "homogeneousCluster",
                "hosts": names,
                "instance_groups": [group],
                "network_interface_name": "eth0",
            },
        }

    def _start(self, network: Hosts, host: Host, cpu: int) -> None:
        container = self.request["AlgorithmSpecification"]
        region = os.environ["AWS_DEFAULT_REGION"]
        with host.log.open("wb") as log:
            host.process = network.start(
                host.name,
                [*container["ContainerEntrypoint"], *container.get("ContainerArguments", [])],
                ml=host.ml,
                environment={
                    "PATH": os.environ["STAND_IN_PATH"],
                    "PYTHONPATH": str(QUICK),
                    "HOME": "/opt/ml/tmp",
                    "AWS_REGION": region,
                    "TRAINING_JOB_NAME": self.name,
                    "TRAINING_JOB_ARN": (
                        f"arn:aws:sagemaker:{region}:123456789012:training-job/{self.name}"
                    ),
                    **self.request.get("Environment", {}),
                },
                log=log,
                cpu=cpu,
            )
        (self.folder / host.name / "pid").write_text(str(host.process.pid))

    def _wait(self) -> None:
        """Until all have ended, one has failed, or the job is stopped or out of time."""
        limit = self.request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds", 86400)
        deadline, told = time.monotonic() + limit, False
        while any(host.process and host.process.poll() is None for host in self.hosts):
            if self._one_failed():
                return
            if not told and time.monotonic() > deadline:
                self.stop("MaxRuntimeExceeded")
            if self.stopping and not told:
                told = True
                deadline = time.monotonic() + float(os.environ.get("STAND_IN_GRACE", 120))
                for host in self.hosts:
                    _terminate(host)
            if told and time.monotonic() > deadline:
                return
            self._upload_checkpoints()
            if told:
                time.sleep(0.2)
            else:
                self._asked_to_stop.wait(SYNC_SECONDS)

    def _one_failed(self) -> bool:
        """A host that was killed from outside only falls silent."""
        codes = [host.process.returncode for host in self.hosts if host.process]
        return any(code not in (None, 0, -signal.SIGKILL) for code in codes) or (
            codes[0] == -signal.SIGKILL
        )

    def _status(self) -> dict[str, str]:
        if self.stopping:
            return {"status": "Stopped", "secondary": self.stopping, "reason": ""}
        codes = {host.name: host.process.returncode for host in self.hosts if host.process}
        if not self._one_failed() and codes[self.hosts[0].name] == 0:
            return {"status": "Completed", "secondary": "Completed", "reason": ""}
        if codes[self.hosts[0].name] == -signal.SIGKILL:  # the machine has gone: it says nothing
            reason = "InternalServerError: We encountered an internal error. Please try again."
            return {"status": "Failed", "secondary": "Failed", "reason": reason}
        told = [
            path.read_text(errors="replace")
            for path in (host.ml / "output/failure" for host in self.hosts)
            if path.is_file()
        ]
        reason = f"AlgorithmError: {told[0] if told else ''}, exit code: {max(codes.values())}"
        return {"status": "Failed", "secondary": "Failed", "reason": reason[:REASON_LENGTH]}

    def _download(self, uri: str, folder: Path, *, kept: bool = False) -> None:
        """Put the objects below a prefix into a folder.

        Args:
            kept: the files are only read, so that other hosts and later jobs get links to them.
        """
        bucket, prefix = _split(uri)
        folder.mkdir(parents=True, exist_ok=True)
        work = []
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                name = entry["Key"][len(prefix) :].lstrip("/") or Path(entry["Key"]).name
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                fetch = self._link if kept else self._fetch
                work.append(partial(fetch, bucket, entry, path))
        _side_by_side(work)

    def _fetch(self, bucket: str, entry: dict[str, Any], path: Path) -> None:
        self.s3.download_file(bucket, entry["Key"], str(path))

    def _link(self, bucket: str, entry: dict[str, Any], path: Path) -> None:
        content = self.folder.parent / "objects" / entry["ETag"].strip('"')
        if not content.exists():
            content.parent.mkdir(exist_ok=True)
            part = content.with_name(f"{content.name}-{secrets.token_hex(4)}")
            self._fetch(bucket, entry, part)
            part.replace(content)
        path.hardlink_to(content)

    def _upload_checkpoints(self) -> None:
        """What has changed on a host that runs goes to the one place in S3, deletions as well."""
        if "CheckpointConfig" not in self.request:
            return
        for host in self.hosts:
            if host.process is None or host.process.poll() is not None:
                continue
            found = {
                name: (path, stamp)
                for name, path, stamp in _files(host.ml / "checkpoints")
                if not name.endswith(MARKERS)
            }
            work = [
                partial(self._upload_checkpoint, host, name, path, stamp)
                for name, (path, stamp) in found.items()
                if host.uploaded.get(name) != stamp
            ]
            gone = host.uploaded.keys() - found.keys()
            _side_by_side(work + [partial(self._delete_checkpoint, host, name) for name in gone])

    def _upload_checkpoint(self, host: Host, name: str, path: Path, stamp: tuple[int, int]) -> None:
        uploading, uploaded = (path.with_name(path.name + marker) for marker in MARKERS)
        with suppress(OSError):  # it has gone meanwhile, or there is no room for a marker
            uploading.touch()
            self.s3.put_object(**self._checkpoint(name), Body=path.read_bytes())
            host.uploaded[name] = stamp
            uploading.replace(uploaded)

    def _delete_checkpoint(self, host: Host, name: str) -> None:
        self.s3.delete_object(**self._checkpoint(name))
        del host.uploaded[name]

    def _checkpoint(self, name: str) -> dict[str, str]:
        bucket, prefix = _split(self.request["CheckpointConfig"]["S3Uri"])
        return {"Bucket": bucket, "Key": f"{prefix.rstrip('/')}/{name}"}

    def _upload_archive(self, part: str, name: str) -> None:
        """One archive of what all hosts left there."""
        archive = self.folder / name
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for host in self.hosts:
                for entry in sorted((host.ml / part).iterdir()):
                    tar.add(entry, arcname=entry.name)
        bucket, prefix = _split(self.request["OutputDataConfig"]["S3OutputPath"])
        key = "/".join(filter(None, [prefix.strip("/"), self.name, "output", name]))
        self.s3.upload_file(str(archive), bucket, key)


def _side_by_side(work: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()


@contextmanager
def _small_disk(folder: Path, room: int) -> Iterator[None]:
    """What lies in a folder on a file system of its own, with so many bytes left."""
    page = 4096
    pages = sum(-(-path.stat().st_size // page) + 1 for path in folder.rglob("*"))
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.mkdir()
    size = f"size={pages * page + room}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True, copy_function=shutil.copy2)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _files(folder: Path) -> Iterator[tuple[str, Path, tuple[int, int]]]:
    for path in sorted(folder.rglob("*")):
        with suppress(OSError):
            if path.is_file():
                status = path.stat()
                yield str(path.relative_to(folder)), path, (status.st_mtime_ns, status.st_size)


def _terminate(host: Host) -> None:
    first = first_process(host.process) if host.process else None
    if first is not None:
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGTERM)


def _kill(host: Host) -> None:
    if host.process is not None and host.process.poll() is None:
        host.process.kill()
        host.process.wait()
        host.process.returncode = -signal.SIGTERM  # by us: the job had ended


def main() -> None:
    folder = Path(sys.argv[1])
    job = Job(folder)
    outcome = {"status": "Failed", "secondary": "Failed", "reason": "InternalError: ended"}
    signal.signal(signal.SIGTERM, lambda *_: job.stop("Stopped"))
    try:
        outcome = job.run()
    except Exception as error:
        outcome = {"status": "Failed", "secondary": "Failed", "reason": f"InternalError: {error}"}
        raise
    finally:
        part = folder / "outcome.part"
        part.write_text(json.dumps(outcome))
        part.replace(folder / "outcome.json")
        for host in job.hosts:
            shutil.rmtree(host.ml, ignore_errors=True)


if __name__ == "__main__":
    main()
