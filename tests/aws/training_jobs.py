"""Training jobs for the stand-in: `CreateTrainingJob` runs the request on hosts in namespaces.

`job_runner.py` does it; here are its status, its logs in CloudWatch, and what moto lacks: stopping.
STAND_IN_JOBS is the folder where tests find a job's hosts (JOB/algo-1/pid). Without it, or where
namespaces are not allowed, a job fails with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from moto.core.responses import ActionResult
from moto.core.utils import unix_time_millis, utcnow
from moto.logs.models import logs_backends
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.responses import SageMakerResponse
from namespaces import reason_against

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
RUNNERS: dict[str, subprocess.Popen[bytes]] = {}

_create = SageMakerResponse.create_training_job


def create_training_job(self: Any) -> Any:
    name = self._get_param("TrainingJobName")
    backend = self.sagemaker_backend
    if name in backend.training_jobs:
        raise ValidationError(f"Training job names must be unique: {name} is there already.")
    result = _create(self)
    job, request = backend.training_jobs[name], json.loads(self.body)
    job.algorithm_specification = request["AlgorithmSpecification"]
    job.environment = request.get("Environment", {})
    job.final_metric_data_list = []
    job.training_start_time = job.training_end_time = None
    _set(job, "InProgress", "Starting")
    url = f"http://{self.headers['Host']}"
    run = threading.Thread(
        target=_run, args=(job, request, url, self.region, self.current_account), daemon=True
    )
    run.start()
    return result


def stop_training_job(self: Any) -> Any:
    name = self._get_param("TrainingJobName")
    self.sagemaker_backend.describe_training_job(name)
    job = self.sagemaker_backend.training_jobs[name]
    if job.training_job_status != "InProgress":
        raise ValidationError(
            f"The request was rejected because the training job is in status "
            f"{job.training_job_status}."
        )
    _set(job, "Stopping", "Stopping")
    runner = RUNNERS.get(name)
    if runner is not None:
        runner.terminate()
    return ActionResult({})


def stop_all() -> None:
    """End every job's program; hosts end with theirs."""
    for runner in RUNNERS.values():
        if runner.poll() is None:
            runner.send_signal(signal.SIGINT)
    for runner in RUNNERS.values():
        try:
            runner.wait(20)
        except subprocess.TimeoutExpired:
            runner.kill()


def _run(job: Any, request: dict[str, Any], url: str, region: str, account: str) -> None:
    name = job.training_job_name
    reason = "STAND_IN_JOBS is not set" if "STAND_IN_JOBS" not in os.environ else reason_against()
    if reason:
        job.failure_reason = f"InternalError: {reason}"
        _set(job, "Failed", "Failed")
        return
    folder = Path(os.environ["STAND_IN_JOBS"]) / name
    folder.mkdir(parents=True)
    (folder / "request.json").write_text(json.dumps(request))
    with (folder / "runner.log").open("wb") as log:
        runner = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("job_runner.py")), str(folder)],
            env={
                **os.environ,
                "AWS_ENDPOINT_URL": url,
                "AWS_DEFAULT_REGION": region,
                "AWS_ACCESS_KEY_ID": "job-role",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_EC2_METADATA_DISABLED": "true",
                "NO_PROXY": "127.0.0.1",
                "STAND_IN_PATH": os.pathsep.join(
                    [str(Path(sys.executable).parent), os.environ["PATH"]]
                ),
            },
            stdout=log,
            stderr=log,
        )
    RUNNERS[name] = runner
    if job.training_job_status == "Stopping":  # before there was a program to tell
        runner.terminate()
    job.training_start_time = utcnow()
    if job.training_job_status == "InProgress":
        _set(job, "InProgress", "Training")
    logs = [_Log(path, name, region, account) for path in _log_files(folder, request)]
    while runner.poll() is None:
        time.sleep(0.5)
        for each in logs:
            each.pass_on()
    for each in logs:
        each.pass_on(last=True)
    _end(job, folder)


def _end(job: Any, folder: Path) -> None:
    try:
        outcome = json.loads((folder / "outcome.json").read_text())
    except OSError:
        outcome = {"status": "Failed", "secondary": "Failed", "reason": "InternalError"}
    job.training_end_time = utcnow()
    started = job.training_start_time
    seconds = max(1, round((job.training_end_time - started).total_seconds()))
    job.training_time_in_seconds = job.billable_time_in_seconds = seconds
    if outcome["status"] == "Failed":
        job.failure_reason = outcome["reason"]
    _set(job, outcome["status"], outcome["secondary"])


def _set(job: Any, status: str, secondary: str) -> None:
    now = utcnow()
    job.training_job_status, job.secondary_status = status, secondary
    job.last_modified_time = now
    if job.secondary_status_transitions[-1]["Status"] != secondary:
        job.secondary_status_transitions[-1]["EndTime"] = now
        job.secondary_status_transitions.append({"Status": secondary, "StartTime": now})


def _log_files(folder: Path, request: dict[str, Any]) -> list[Path]:
    count = request["ResourceConfig"]["InstanceCount"]
    return [folder / f"algo-{number}" / "log" for number in range(1, count + 1)]


class _Log:
    """A host's output on its way to CloudWatch."""

    def __init__(self, path: Path, job: str, region: str, account: str) -> None:
        self._path = path
        self._offset = 0
        self._stream = f"{job}/{path.parent.name}-{int(time.time())}"
        self._logs = logs_backends[account][region]

    def pass_on(self, *, last: bool = False) -> None:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        whole = len(new) if last else new.rfind(b"\n") + 1
        self._offset += whole
        lines = [line for line in new[:whole].decode(errors="replace").splitlines() if line]
        if not lines:
            return
        if LOG_GROUP not in self._logs.groups:
            self._logs.create_log_group(LOG_GROUP, {})
        if self._stream not in self._logs.groups[LOG_GROUP].streams:
            self._logs.create_log_stream(LOG_GROUP, self._stream)
        now = int(unix_time_millis())
        events = [{"timestamp": now, "message": line} for line in lines]
        self._logs.put_log_events(LOG_GROUP, self._stream, events)


def install() -> None:
    """Put these in moto's place."""
    SageMakerResponse.create_training_job = create_training_job  # type: ignore[method-assign]
    SageMakerResponse.stop_training_job = stop_training_job  # type: ignore[attr-defined]
