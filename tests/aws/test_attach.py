"""Coming home: jobs that a test directs, searches whose journals are written by hand."""

import itertools
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from visiontuner.aws import job as home
from visiontuner.cli.main import main
from visiontuner.errors import ServingError, UserMistake
from visiontuner.io import aws as aws_module
from visiontuner.io import s3 as s3_module
from visiontuner.io import s3 as transfer
from visiontuner.paths import JOURNAL_FILE
from visiontuner.text import next_command
from visiontuner.tracking import store as tracked_runs
from visiontuner.workflow import jobs as following
from visiontuner.workflow.inputs import Silent
from visiontuner.workflow.jobs import attach


@pytest.fixture
def jobs(
    directed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_database: Callable[[Path], str],
) -> Any:
    """The jobs of an account; MLflow is a database of this test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    monkeypatch.chdir(tmp_path)
    return directed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


# Bringing home


def journal(*folders: Any) -> list[bytes]:
    return [(Path(folder) / JOURNAL_FILE).read_bytes() for folder in folders]


def test_a_search_that_went_on_here_is_not_replaced_by_one_that_went_on_in_the_job(
    jobs: Any, new_search: Callable[..., Any], tmp_path: Path
) -> None:
    begun = new_search("begun")
    begun.begin()
    begun.trial(1)
    here = shutil.copytree(begun.folder, tmp_path / "searches/colours-1")
    begun.start(2)
    (here / JOURNAL_FILE).write_bytes(begun.journal.path.read_bytes())
    begun.journal.close()
    there = new_search("there")
    there.begin()
    there.trial(1)
    there.trial(3)
    there.trial(4)
    there.finish()
    mine, jobs_own = journal(here, there.folder)
    assert len(mine) < len(jobs_own)
    job = jobs.place()
    jobs.keep_checkpoints(there.folder)
    jobs.direct(job, status="Stopped", seconds=1800)
    came = run("attach", job)
    assert journal(here) == [mine]
    assert f"{job}: Stopped. 3 trials were there; 1 x ml.g5.xlarge ran 30 min" in came.stdout
    assert "searches/colours-1 went on here, and the job went on without that" in came.stdout
    assert f"What the job did is in s3://{jobs.root}/checkpoints/search" in came.stdout
    apart = run("attach", job, "--output", "apart")
    assert apart.exit_code == 0, apart.output
    assert journal("apart") == [jobs_own]


def test_a_search_that_only_went_on_here_is_kept_and_that_is_said(
    jobs: Any, new_search: Callable[..., Any], tmp_path: Path
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    job = jobs.place()
    jobs.keep_checkpoints(search.folder)
    jobs.direct(job, status="Stopped", seconds=60)
    assert run("attach", job).exit_code == 130
    search.trial(2)
    search.finish()
    here = tmp_path / "searches/colours-1"
    shutil.copy(search.journal.path, here / JOURNAL_FILE)
    kept = run("attach", job)
    assert kept.exit_code == 0, kept.output
    assert "searches/colours-1 went on here after that, and is kept as it is." in kept.stdout
    assert "Go on there" not in kept.stdout
    assert journal(here) == journal(search.folder)


def test_a_line_that_was_torn_on_its_way_home_does_not_keep_the_rest_out(
    jobs: Any, new_search: Callable[..., Any], tmp_path: Path
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    job = jobs.place()
    jobs.keep_checkpoints(search.folder)
    jobs.direct(job, status="Stopped", seconds=60)
    run("attach", job)
    with (tmp_path / "searches/colours-1" / JOURNAL_FILE).open("ab") as file:
        file.write(b'{"event": "trial_st')
    search.trial(2)
    search.finish()
    jobs.keep_checkpoints(search.folder)
    assert run("attach", job).exit_code == 0
    assert journal("searches/colours-1") == journal(search.folder)


@pytest.mark.parametrize("newer", ["archive", "checkpoints"])
def test_a_stopped_search_comes_home_from_its_archive_unless_its_checkpoints_went_on(
    jobs: Any, new_search: Callable[..., Any], newer: str
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    job = jobs.place()
    if newer == "archive":
        jobs.keep_checkpoints(search.folder)
    else:
        jobs.keep_archive(job, search.folder)
    search.trial(2)
    if newer == "archive":  # SageMaker uploaded no checkpoints after SIGTERM
        jobs.keep_archive(job, search.folder)
    else:  # the next job went on
        jobs.keep_checkpoints(search.folder)
    jobs.direct(job, status="Stopped", seconds=60)
    came = run("attach", job)
    assert came.exit_code == 130, came.output
    assert "2 trials are in searches/colours-1" in came.stdout
    assert journal("searches/colours-1") == journal(search.folder)


def test_ctrl_c_while_an_ended_search_comes_home_says_how_to_go_on(
    jobs: Any, new_search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    jobs.keep_checkpoints(search.folder)
    job = jobs.place()
    jobs.direct(job, status="Stopped", seconds=60)

    def press(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(home, "download_folder", press)
        left = run("attach", job)
    assert left.exit_code == 130
    assert f"go on with: {next_command('attach', job, flags=' --region eu-west-1')}" in left.stderr
    assert "runs on" not in left.stderr
    assert not list(Path("searches").iterdir())
    assert "1 trials are in searches/colours-1" in run("attach", job).stdout


# Why a job ended


def test_a_job_that_ran_out_of_time_says_so_and_how_to_allow_more(
    jobs: Any, new_search: Callable[..., Any]
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    jobs.keep_checkpoints(search.folder)
    job = jobs.place(StoppingCondition={"MaxRuntimeInSeconds": 5400})
    jobs.direct(job, status="Stopped", secondary="MaxRuntimeExceeded", seconds=5400)
    came = run("attach", job)
    assert came.exit_code == 130
    why = "Why: MaxRuntimeExceeded: its 1.5 h were over. Allow more with --max-run."
    resumed = ("--on", "sagemaker", "--resume", job, "--max-run", "180m")
    again = next_command("tune", *resumed, flags=" --region eu-west-1")
    assert why in came.stdout.splitlines()
    assert f"Go on there: {again}" in came.stdout.splitlines()


def test_a_spot_job_that_never_got_machines_says_so_and_how_to_get_some(jobs: Any) -> None:
    limits = {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 21600}
    job = jobs.place(EnableManagedSpotTraining=True, StoppingCondition=limits)
    jobs.direct(job, status="Stopped", secondary="MaxWaitTimeExceeded")
    told = said(run("attach", job))
    assert "before its search began: MaxWaitTimeExceeded: AWS did not have enough spot " in told
    assert "machines for it within 6 h. Leave spot machines out (--spot off), choose " in told
    assert f"--resume {job} --spot off --region eu-west-1` tries again." in told


# Following


def operation(headers: Any) -> str:
    """`SageMaker.DescribeTrainingJob`, `Logs_20140328.GetLogEvents`, or the service alone."""
    return str(headers.get("X-Amz-Target") or headers["Authorization"].split("/")[3])


@pytest.fixture
def proxied(
    jobs: Any,
    proxy_before: Callable[[tuple[str, int]], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """A proxy between this process and AWS; the jobs' own client does not go through it."""
    host, port = jobs.aws.url.removeprefix("http://").split(":")
    proxy = proxy_before((host, int(port)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return proxy


@pytest.fixture
def bad_days(proxied: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, without the seconds that are waited between two tries."""
    monkeypatch.setattr(transfer, "_LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(aws_module, "ATTEMPTS", 1)
    monkeypatch.setattr(s3_module, "ATTEMPTS", 1)
    return proxied


def refuse(*operations: str, with_: Any, times: int = 10_000) -> Any:
    """A rule: so many requests of these operations are refused, or lost with "close"."""
    left = [times]

    def rule(_method: str, _path: str, headers: Any) -> Any:
        if not operation(headers).endswith(operations) or left[0] <= 0:
            return None
        left[0] -= 1
        return with_

    return rule


class Watching(Silent):
    """Remembers what it was shown, and ends the job once it has seen enough."""

    def __init__(self, enough: Callable[[list[str]], bool], end: Callable[[], None]) -> None:
        self.notes: list[str] = []
        self._enough, self._end = enough, end

    def note(self, text: str) -> None:
        self.notes.append(text)
        if self._enough(self.notes):
            self._end()


@pytest.fixture
def followed(
    jobs: Any, new_search: Callable[..., Any]
) -> Callable[[Callable[[list[str]], bool]], list[str]]:
    """Follows a job that ends when its notes are enough; returns them all."""
    search = new_search()
    search.begin()
    search.trial(1)
    search.finish()
    jobs.keep_checkpoints(search.folder)
    job = jobs.place()
    jobs.log(job, "All 1 hosts are there.")

    def follow(enough: Callable[[list[str]], bool]) -> list[str]:
        watching = Watching(enough, lambda: jobs.direct(job, status="Completed", seconds=60))
        came = attach(job, logs="all", observer=watching, poll_seconds=0.05)
        assert came.result is not None
        assert came.result.state == "completed"
        return watching.notes

    return follow


LINE = "algo-1  All 1 hosts are there."


@pytest.mark.parametrize(
    ("where", "answer"),
    [
        ("DescribeTrainingJob", "close"),
        ("DescribeTrainingJob", (503, "ServiceUnavailable")),
        ("DescribeTrainingJob", (500, "InternalFailure")),
        ("GetLogEvents", "close"),
        ("DescribeLogStreams", (503, "ServiceUnavailable")),
    ],
)
def test_an_aws_that_is_away_or_ill_is_waited_for(
    bad_days: Any, followed: Any, where: str, answer: Any
) -> None:
    bad_days.rule = refuse(where, with_=answer, times=4)
    assert LINE in followed(lambda notes: LINE in notes)


# S3 has a patience of its own below, and logs are not worth a word.
@pytest.mark.parametrize("where", ["ListTags", "GetLogEvents", "s3"])
def test_an_aws_that_is_busy_is_waited_for_and_that_is_said_once(
    bad_days: Any, followed: Any, where: str
) -> None:
    code = "SlowDown" if where == "s3" else "ThrottlingException"
    bad_days.rule = refuse(where, with_=(503 if where == "s3" else 400, code), times=4)
    notes = followed(lambda notes: LINE in notes)
    assert LINE in notes
    said_so = [note for note in notes if note.endswith("Asking again for 10 minutes.")]
    assert len(said_so) == (1 if where == "ListTags" else 0)


@pytest.mark.parametrize("where", ["DescribeLogStreams", "GetLogEvents"])
def test_who_may_not_read_logs_follows_without_them(
    bad_days: Any, followed: Any, where: str
) -> None:
    bad_days.rule = refuse(where, with_=(400, "AccessDeniedException"))
    notes = followed(lambda notes: "without log lines" in notes[-1])
    (told,) = [note for note in notes if "log" in note]
    assert "(AccessDeniedException)" in told
    assert told.endswith("Following goes on without log lines.")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((400, "AccessDeniedException"), "AWS refuses to describe training job"),
        ("close", "Cannot describe training job"),
    ],
)
def test_a_following_that_ends_says_that_the_job_runs_on(
    jobs: Any, bad_days: Any, monkeypatch: pytest.MonkeyPatch, answer: Any, says: str
) -> None:
    monkeypatch.setattr(following, "PATIENCE_SECONDS", 0.5)
    job, looks = jobs.place(), []

    def rule(_method: str, _path: str, headers: Any) -> Any:
        looks.append(operation(headers))
        return answer if looks.count("SageMaker.DescribeTrainingJob") > 2 else None

    bad_days.rule = rule
    with pytest.raises(ServingError, match=says) as caught:
        attach(job, logs="none", poll_seconds=0.05)
    assert str(caught.value).endswith(
        f"{job} runs on, and nothing is lost: "
        f"`{next_command('attach', job, flags=' --region eu-west-1')}` goes on here."
    )


# S3 that is away


def away_for(seconds: float, service: str) -> Any:
    """A rule: from its first request on a service is not there for so long."""
    ends: list[float] = []

    def rule(_method: str, _path: str, headers: Any) -> Any:
        if operation(headers) != service:
            return None
        ends.append(time.monotonic() + seconds)
        return "close" if time.monotonic() < ends[0] else None

    return rule


@pytest.fixture
def at_home(jobs: Any, new_search: Callable[..., Any]) -> Callable[[str], None]:
    """Brings a job home that has ended so, and looks at what came."""
    search = new_search()
    search.begin()
    search.trial(1)
    search.finish()

    def bring(status: str) -> None:
        job = jobs.place()
        jobs.keep_checkpoints(search.folder)
        jobs.direct(job, status=status, seconds=60)
        came = run("attach", job)
        assert came.exit_code == 0, came.output
        assert journal("searches/colours-1") == journal(search.folder)
        assert "S3 does not answer; asking again for" in came.output

    return bring


@pytest.mark.parametrize("status", ["Completed", "Stopped"])
def test_a_search_comes_home_though_s3_is_away_for_a_while(
    bad_days: Any, at_home: Any, status: str
) -> None:
    bad_days.rule = away_for(1, "s3")
    at_home(status)


@pytest.mark.slow
def test_a_search_comes_home_though_s3_is_away_for_longer_than_a_few_tries(
    proxied: Any, at_home: Any
) -> None:
    assert transfer.FIRST_PATIENCE_SECONDS > 30  # so long it may be away
    proxied.rule = away_for(4, "s3")
    at_home("Completed")


def test_a_job_is_followed_though_s3_is_away_for_a_while(bad_days: Any, followed: Any) -> None:
    bad_days.rule = away_for(1, "s3")
    assert LINE in followed(lambda notes: LINE in notes)


# Credentials


class ShortRoles:
    """Whoever takes on a role is known for so many seconds only."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.taken: dict[str, float] = {}  # when, by access key
        self.refused = 0

    def change(self, _method: str, _path: str, body: bytes) -> bytes:
        """The role's keys on their way to who takes it on."""
        if b"<AssumeRoleResponse" not in body:
            return body
        key = re.search(rb"<AccessKeyId>(\w+)</AccessKeyId>", body)
        assert key is not None
        self.taken[key[1].decode()] = time.monotonic()
        ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + self.seconds))
        return re.sub(rb"(?<=<Expiration>).{19}", ends.encode(), body)

    def rule(self, _method: str, _path: str, headers: Any) -> Any:
        key = headers["Authorization"].partition("Credential=")[2].split("/")[0]
        if time.monotonic() - self.taken.get(key, math.inf) < self.seconds:
            return None
        self.refused += key in self.taken
        return (403, "ExpiredTokenException") if key in self.taken else None


def test_a_following_as_a_role_outlives_the_roles_keys(
    jobs: Any, bad_days: Any, new_search: Callable[..., Any]
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    search.finish()
    jobs.keep_checkpoints(search.folder)
    job, role = jobs.place(), jobs.aws.put_role("abroad")
    short = ShortRoles(2)
    bad_days.rule, bad_days.change = short.rule, short.change
    threading.Timer(4.5, lambda: jobs.direct(job, status="Completed", seconds=60)).start()
    came = attach(job, assume_role=role, logs="none", poll_seconds=0.2)
    assert came.result is not None
    assert len(short.taken) > 2
    assert short.refused == 0


@pytest.mark.parametrize(
    ("from_", "advice"),
    [
        ("environment", "set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN."),
        ("profile", "Renew them: `aws configure --profile lab`."),
    ],
)
def test_credentials_that_expire_meanwhile_are_said_with_how_to_renew_them(
    jobs: Any,
    bad_days: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    from_: str,
    advice: str,
) -> None:
    job, looks = jobs.place(), itertools.count()
    if from_ == "profile":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        keys = "aws_access_key_id = testing\naws_secret_access_key = testing\n"
        (tmp_path / "credentials").write_text(f"[lab]\n{keys}")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_PROFILE", "lab")

    def rule(_method: str, _path: str, headers: Any) -> Any:
        is_look = operation(headers).endswith("DescribeTrainingJob")
        return (400, "ExpiredTokenException") if is_look and next(looks) > 2 else None

    bad_days.rule = rule
    with pytest.raises(UserMistake, match="AWS does not take these credentials") as caught:
        attach(job, logs="none", poll_seconds=0.05)
    assert advice in str(caught.value)
    again = next_command("attach", job, flags=" --region")
    assert f"{job} runs on, and nothing is lost: `{again}" in str(caught.value)


# Stopping


def test_a_job_of_others_is_not_stopped(jobs: Any) -> None:
    jobs.place("their-language-model", Tags=[{"Key": "team", "Value": "language"}])
    refused = run("stop", "their-language-model")
    assert refused.exit_code == 2
    assert "their-language-model was not submitted by visiontuner, and is left alone" in said(
        refused
    )
    assert jobs.describe("their-language-model")["TrainingJobStatus"] == "InProgress"


# Next steps


def test_next_steps_can_be_pasted_where_another_region_is_the_default(
    jobs: Any, new_search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    job, role = jobs.place(), jobs.aws.put_role("abroad")
    here = f"--region eu-west-1 --assume-role {role}"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    flags = ("--region", "eu-west-1", "--assume-role", role)

    def steps(*command: str) -> list[str]:
        """What a command says next, in words that can be pasted."""
        text = run(*command, *flags).output.replace("`", "\n")
        found = re.findall(r"visiontuner (?:attach|tune|stop|jobs).*", text)
        return [step for step in found if "tune --resume" not in step]

    def press(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(following.interrupts, "sleep", press)
        left = steps("attach", job)
    assert left == [f"visiontuner attach {job} {here}", f"visiontuner stop {job} {here}"]
    stopped = steps("stop", job)
    resume = f"visiontuner tune --on sagemaker --resume {job} {here}"
    assert stopped == [f"visiontuner attach {job} {here}", resume]
    assert steps("stop", job) == [f"visiontuner attach {job} {here}"]
    assert steps("stop", "nothing") == [f"visiontuner jobs {here}"]
    assert steps("attach", job) == [f"visiontuner attach {job} --logs all {here}", resume]
    jobs.keep_checkpoints(search.folder)
    assert steps("attach", job) == [resume]


@pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker")
def test_a_job_that_a_role_submits_is_followed_as_that_role(jobs: Any) -> None:
    role = jobs.aws.put_role("abroad")
    jobs.aws.put_role("training")
    image = jobs.aws.put_image(tag="1", repository="directed")
    done = run(
        *("tune", "--on", "sagemaker", "--data", "digits", "--image", image, "--price", "2"),
        *("--bucket", "jobs", "--role", "training", "--assume-role", role, "--yes", "--no-wait"),
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    (job,) = [line.split()[-1].rstrip(".") for line in lines if line.startswith("Submitted ")]
    follow = next_command("attach", job, flags=f" --region eu-west-1 --assume-role {role}")
    assert f"Follow it:     {follow}" in lines
    assert "assumed-role/abroad/visiontuner" in done.stderr


# Classic tuning jobs


@pytest.fixture
def tune(jobs: Any) -> Callable[..., None]:
    """A tuning job `birds` with what its training jobs are told; by default one objective."""

    def make(
        trained: dict[str, Any], aim: dict[str, str] | None = None, **definitions: Any
    ) -> None:
        config = {"Strategy": "Bayesian", "ResourceLimits": {"MaxParallelTrainingJobs": 1}}
        jobs.aws.client("sagemaker").create_hyper_parameter_tuning_job(
            HyperParameterTuningJobName="birds",
            HyperParameterTuningJobConfig=config
            | ({"HyperParameterTuningJobObjective": aim} if aim else {}),
            **definitions,
        )
        for name in trained:
            jobs.place(name, Tags=[])
        told = {n: {"status": "Completed", "seconds": 300, **one} for n, one in trained.items()}
        jobs.direct("birds", **told)

    return make


def runs_of(tmp_path: Path) -> dict[str, Any]:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("birds")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_metrics_and_parameters_that_mlflow_does_not_take_get_names_that_it_takes(
    tune: Any, tmp_path: Path
) -> None:
    metrics = {"mAP@0.5": 0.4, "mAP#0.5": 0.3, "acc (%)": 81.0, "a//b": 1.0, "seconds": 7.0}
    parameters = {"lr*weird(x)": "0.1", "lr_weird_x": "0.2", "../etc": "x", "plain": "y"}
    aim = {"MetricName": "mAP@0.5", "Type": "Maximize"}
    one = {"metrics": metrics, "tuned": parameters, "objective": 0.4, "aim": aim}
    tune({"birds-001": one, "birds-002": one | {"objective": 0.2}}, aim)
    done = run("attach", "birds")
    assert done.exit_code == 0, done.output
    assert "Best: birds-001 with mAP@0.5 0.4000." in done.stdout
    held = runs_of(tmp_path)
    assert {each.info.status for each in held.values()} == {"FINISHED"}
    data = held["birds-001"].data
    told = {
        kind: {
            data.tags.get(f"visiontuner.{kind}_name.{name}", name): value
            for name, value in values.items()
            if not name.startswith("best_")
        }
        for kind, values in (("metric", data.metrics), ("parameter", data.params))
    }
    # Of the job itself: 300 seconds.
    assert data.metrics["seconds"] == 300
    assert told["metric"] == metrics | {"seconds": told["metric"]["seconds"]}
    assert 7.0 in data.metrics.values()
    assert told["parameter"] == parameters
    assert data.metrics["acc"] == 81.0
    assert data.params["lr_weird_x"] == "0.2"
    objective = held["birds"].data.tags["visiontuner.objective"]
    assert objective.startswith("mAP_0.5-")
    assert held["birds"].data.metrics[f"best_{objective}"] == 0.4
    table = json.loads(run("compare", "birds", "--format", "json").stdout)
    assert table[0]["run"] == "birds-001"


def test_an_import_that_broke_off_leaves_no_run_running_and_is_completed_by_the_next(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune({f"birds-00{n}": {"tuned": {"lr": str(n)}, "objective": n / 10} for n in (1, 2, 3)})
    with monkeypatch.context() as patch:
        write, calls = tracked_runs.log_batch, iter(range(100))

        def interrupted(*arguments: Any) -> None:
            if next(calls) == 1:
                raise KeyboardInterrupt
            write(*arguments)

        patch.setattr(tracked_runs, "log_batch", interrupted)
        assert run("attach", "birds").exit_code == 130
    assert {name: each.info.status for name, each in runs_of(tmp_path).items()} == {
        "birds": "KILLED",
        "birds-001": "FINISHED",
        "birds-002": "KILLED",
    }
    assert run("attach", "birds").exit_code == 0
    held = runs_of(tmp_path)
    assert {each.info.status for each in held.values()} == {"FINISHED"}
    assert {name: each.data.params.get("lr") for name, each in held.items()} == {
        "birds": None,
        "birds-001": "1",
        "birds-002": "2",
        "birds-003": "3",
    }


def test_each_definition_of_a_tuning_job_keeps_its_objective(tune: Any, tmp_path: Path) -> None:
    loss = {"MetricName": "loss", "Type": "Minimize"}
    definition = {
        "DefinitionName": "small",
        "TuningObjective": loss,
        "AlgorithmSpecification": {"TrainingInputMode": "File"},
        "RoleArn": "arn:aws:iam::123456789012:role/jobs",
        "OutputDataConfig": {"S3OutputPath": "s3://jobs/out"},
        "StoppingCondition": {"MaxRuntimeInSeconds": 600},
    }
    values = {"birds-001": 0.9, "birds-002": 0.2, "birds-003": 0.5}
    trained: dict[str, Any] = {
        name: {"definition": "small", "objective": value, "aim": {"MetricName": "loss"}}
        for name, value in values.items()
    }
    trained["birds-004"] = {"definition": "small", "status": "Failed", "reason": "AlgorithmError"}
    tune(trained, TrainingJobDefinitions=[definition])
    done = run("attach", "birds")
    assert "Best: birds-002 with loss 0.2000." in done.stdout
    held = runs_of(tmp_path)
    assert held["birds"].data.metrics["best_loss"] == 0.2
    assert held["birds"].data.tags["visiontuner.best_trial"] == "birds-002"


def test_what_a_job_itself_was_tuned_for_comes_before_what_was_planned(tune: Any) -> None:
    def one(value: float, name: str, kind: str) -> dict[str, Any]:
        return {"objective": value, "aim": {"MetricName": name, "Type": kind}}

    tune(
        {
            "birds-001": one(0.9, "error", "Minimize"),
            "birds-002": one(0.1, "error", "Minimize"),
            "birds-003": one(0.1, "accuracy", "Maximize"),
            "birds-004": one(0.7, "accuracy", "Maximize"),
        }
    )
    lines = run("attach", "birds").stdout.splitlines()
    assert "Best: birds-002 with error 0.1000." in lines
    assert "Best: birds-004 with accuracy 0.7000." in lines
