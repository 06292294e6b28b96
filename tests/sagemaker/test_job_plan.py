"""What a job is going to be, and what it may cost, without AWS."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from visiontuner.aws.account import has_own_disk
from visiontuner.aws.job import advice_on, paid_seconds
from visiontuner.aws.request import (
    JobPlan,
    Price,
    S3Images,
    as_channel,
    limit_seconds,
    reachable_tracking,
    requirements,
    shares,
    words_for,
)
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.io.download import ARCHIVE_SUFFIXES
from visiontuner.paths import at_hand, split_uri
from visiontuner.workflow.inputs import Silent, load_data
from visiontuner.workflow.submit import JobOptions, plan_job


def make_plan(**changes: Any) -> JobPlan:
    plan = JobPlan(
        search="dogs-1",
        experiment=Experiment.parse({"name": "dogs"}),
        region="eu-west-1",
        account="123456789012",
        caller="arn:aws:iam::123456789012:user/me",
        role="arn:aws:iam::123456789012:role/jobs",
        bucket="bucket",
        bucket_exists=True,
        container_image="image",
        instance_type="ml.g5.xlarge",
        instances=2,
        max_run_seconds=3600,
        price=Price(per_hour=1.5, instances=2),
        tracking_uri=None,
        tracking="later",
    )
    return replace(plan, **changes)


# Money


@pytest.mark.parametrize(
    ("max_cost", "warm_pool", "seconds"),
    [
        (None, 0, 7200),
        (100.0, 0, 7200),  # more than two hours cost
        (6.0, 0, 5100),  # $4 an hour: an hour and a half, of which 5 minutes are the job's end
        (6.0, 1800, 3300),  # and half an hour is the warm pool's
    ],
)
def test_a_job_runs_no_longer_than_its_money_lasts(
    max_cost: float | None, warm_pool: float, seconds: int
) -> None:
    price = Price(per_hour=2.0, instances=2)
    found = limit_seconds(
        price, max_run_seconds=7200, warm_pool_seconds=warm_pool, max_cost=max_cost
    )
    assert found == seconds
    if max_cost is not None:
        most = price.of(found + 300 + warm_pool)
        assert most is not None
        assert most <= max_cost


def test_a_limit_in_money_needs_a_price() -> None:
    with pytest.raises(UserMistake, match="tell it with --price"):
        limit_seconds(
            Price(per_hour=None, instances=1),
            max_run_seconds=3600,
            warm_pool_seconds=0,
            max_cost=5,
        )


def test_a_plan_costs_at_most_all_machines_for_all_the_time() -> None:
    # 2 machines, an hour and half an hour of warm pool, $1.50 an hour each.
    assert make_plan(warm_pool_seconds=1800).most_it_can_cost == pytest.approx(4.75)
    assert make_plan(price=Price(per_hour=None, instances=2)).most_it_can_cost is None


def test_trials_share_the_whole_cost_by_their_seconds() -> None:
    assert shares({"a": 30.0, "b": 10.0}, 8.0) == {"a": 6.0, "b": 2.0}
    assert shares({"a": 0.0}, 8.0) == {"a": 0.0}


def test_a_job_is_paid_by_what_is_billed_and_before_by_its_running_time() -> None:
    began = datetime(2026, 11, 22, 12, tzinfo=UTC)
    now = began + timedelta(minutes=10)
    assert paid_seconds({"TrainingJobStatus": "InProgress"}, now=now) == 0
    running = {"TrainingJobStatus": "InProgress", "TrainingStartTime": began}
    assert paid_seconds(running, now=now) == 600
    ended = {
        "TrainingJobStatus": "Completed",
        "TrainingStartTime": began,
        "TrainingEndTime": began + timedelta(minutes=5),
    }
    assert paid_seconds(ended, now=now) == 300
    assert paid_seconds(ended | {"BillableTimeInSeconds": 90}, now=now) == 90  # spot


# The plan


def test_a_plan_says_everything_that_will_happen() -> None:
    plan = make_plan(
        spot=True,
        images=S3Images(uri="s3://photos/dogs/", size=2 * 10**9),
        subnets=("subnet-1",),
        security_groups=("sg-1",),
    )
    text = "\n".join(plan.lines())
    for words in (
        "2 x ml.g5.xlarge, spot; at most 1 h",
        "$1.5 an hour each; at most about $3.25",
        "s3://photos/dogs/ (2,000 MB)",
        "tracking   later",
        "subnet-1 (sg-1)",
        "s3://bucket/visiontuner/dogs-1",
    ):
        assert words in text
    assert replace(plan, instance_type="ml.m5.xlarge").volume_gb == 52
    assert plan.max_wait_seconds == 5 * 3600


@pytest.mark.parametrize(
    ("instance_type", "own"),
    [
        ("ml.g5.xlarge", True),
        ("ml.g4dn.xlarge", True),
        ("ml.g6e.2xlarge", True),
        ("ml.p4de.24xlarge", True),
        ("ml.p5.48xlarge", True),
        ("ml.p6-b200.48xlarge", True),
        ("ml.r5d.large", True),
        ("ml.m6id.large", True),
        ("ml.m5.xlarge", False),
        ("ml.c7i-flex.large", False),
        ("ml.p3.2xlarge", False),
    ],
)
def test_a_machines_own_disk_is_not_made_to_measure(instance_type: str, own: bool) -> None:
    plan = make_plan(instance_type=instance_type, kms_key="key-1")
    text = "\n".join(plan.lines())
    assert plan.volume_gb == (None if own else 50)
    assert ("of a fixed size" in text) == own
    assert ("the disks with key-1" in text) == (not own)
    assert ("disks with keys of their own" in text) == own
    assert "the checkpoints by the bucket's own setting" in text


def test_the_sdk_knows_no_own_disk_that_is_not_known_here() -> None:
    from botocore.session import get_session
    from sagemaker.core.common_utils import volume_size_supported

    model = get_session().get_service_model("sagemaker")
    kinds = model.shape_for("TrainingInstanceType").enum
    assert len(kinds) > 100
    unknown = [kind for kind in kinds if not volume_size_supported(kind) and not has_own_disk(kind)]
    assert not unknown


def test_a_resumed_search_keeps_its_checkpoints() -> None:
    first, second = make_plan(), make_plan(resumed="visiontuner-dogs-1", instances=4)
    assert first.checkpoints == second.checkpoints == "s3://bucket/visiontuner/dogs-1/checkpoints"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"disk_gb": 80}, "leave --volume out, or choose a larger --instance-type"),
        ({"instance_type": "p3"}, "--instance-type takes a name such as"),
        ({"subnets": ("subnet-1",)}, "--subnets and --security-groups"),
        ({"warm_pool_seconds": 7200}, "an hour at most"),
        ({"max_run_seconds": 29 * 86400}, "28 days at most"),
        ({"tags": {str(n): "x" for n in range(49)}}, "48 tags"),
        ({"tags": {"k" * 129: "x"}}, "a key has 1 to 128 characters, got 129"),
        ({"tags": {"": "x"}}, "a key has 1 to 128 characters, got 0"),
        ({"tags": {"k": "x" * 257}}, "a value has 256 characters at most, got 257"),
        ({"tags": {"AWS:team": "x"}}, "keys that begin with aws: or visiontuner. are taken"),
        ({"tags": {"visiontuner.search": "x"}}, "are taken"),
        ({"tags": {"team": "vision;sound"}}, "in a tag, not ';'"),
        ({"tags": {"team\n": "vision"}}, "in a tag, not '.n'"),
        ({"images": S3Images(uri="s3://photos/it's/")}, "has an apostrophe"),
    ],
)
def test_a_plan_that_sagemaker_refuses_is_refused_first(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserMistake, match=message):
        make_plan(**changes)


def test_the_tags_that_aws_takes_are_taken() -> None:
    tags = {"Kosten stelle/ü": "a b_c.d:e/f=g+h-i@j", "k" * 128: "v" * 256, "empty": ""}
    assert make_plan(tags=tags).all_tags.items() >= tags.items()
    assert "Kosten stelle/ü=a b_c.d:e/f=g+h-i@j" in "\n".join(make_plan(tags=tags).lines())


def test_a_long_name_is_cut_and_plain() -> None:
    plan = make_plan(experiment=Experiment.parse({"name": "My dogs_and.cats " + "x" * 80}))
    assert len(plan.base_name) + len("-20261122223012") <= 63
    assert plan.base_name.startswith("visiontuner-My-dogs-and-cats-x")


@pytest.mark.parametrize(
    ("seconds", "words"), [(60, "1 min"), (3600, "1 h"), (5400, "1 h 30 min"), (0, "0 min")]
)
def test_times_are_said_in_words(seconds: float, words: str) -> None:
    assert words_for(seconds) == words


# Surroundings


def test_the_experiments_source_is_where_the_channel_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_plan(images=S3Images(uri="s3://photos/a=b/"))
    archive = make_plan(images=S3Images(uri="s3://photos/dogs.zip"))
    monkeypatch.setenv("VISIONTUNER_CHANNEL", folder.environment["VISIONTUNER_CHANNEL"])
    assert at_hand("s3://photos/a=b/") == "/opt/ml/input/data/images"
    assert at_hand("s3://photos/other/") == "s3://photos/other/"
    monkeypatch.setenv("VISIONTUNER_CHANNEL", archive.environment["VISIONTUNER_CHANNEL"])
    assert at_hand("s3://photos/dogs.zip") == "/opt/ml/input/data/images/dogs.zip"
    monkeypatch.delenv("VISIONTUNER_CHANNEL")
    assert at_hand("s3://photos/dogs.zip") == "s3://photos/dogs.zip"


def test_a_channels_archive_is_not_unpacked_into_what_goes_to_s3(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = shutil.make_archive(str(tmp_path / "dogs"), "zip", images)
    monkeypatch.setenv("VISIONTUNER_CHANNEL", f"s3://photos/dogs.zip={archive}")
    monkeypatch.setenv("VISIONTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    experiment = Experiment.parse({"data": {"source": "s3://photos/dogs.zip"}})
    dataset = load_data(experiment, Silent())
    assert dataset.root.is_relative_to(tmp_path / "scratch")
    assert not list((tmp_path / "cache").rglob("*.png"))


@pytest.mark.parametrize(
    ("uri", "channel"),
    [
        ("s3://b/dogs", "s3://b/dogs/"),
        ("s3://b/dogs/", "s3://b/dogs/"),
        ("s3://b/dogs/labels.csv", "s3://b/dogs/"),
        *((f"s3://b/d{suffix}",) * 2 for suffix in ARCHIVE_SUFFIXES),
        ("s3://b/D.TAR.XZ",) * 2,
    ],
)
def test_a_folder_does_not_bring_its_namesakes(uri: str, channel: str) -> None:
    assert as_channel(uri) == channel


@pytest.mark.parametrize("uri", ["photos", "s3:/b/x", "s3:///x", "https://b/x"])
def test_what_is_no_place_on_s3_is_refused(uri: str) -> None:
    with pytest.raises(UserMistake, match="write s3://BUCKET/FOLDER"):
        split_uri(uri)


@pytest.mark.parametrize(
    ("uri", "variables", "reaches"),
    [
        ("sqlite:///mlflow.db", {}, False),
        ("postgresql://me:secret@db.example.org/mlflow", {}, False),
        ("http://localhost:5000", {}, False),
        ("http://127.0.0.1:5000", {}, False),
        ("http://[::1]:5000", {}, False),
        ("http://0.0.0.0:5000", {}, False),
        ("http://mlflow:5000", {}, False),
        ("http://10.0.3.7:5000", {}, False),
        ("http://172.16.0.1", {}, False),
        ("http://192.168.1.2:5000", {}, False),
        ("http://169.254.1.1", {}, False),
        ("http://[fd00::1]:5000", {}, False),
        ("http://studio.local:5000", {}, False),
        ("http://ip-10-0-3-7.eu-west-1.compute.internal:5000", {}, False),
        ("none", {}, False),
        ("databricks", {}, False),
        ("databricks://mine", {}, False),
        ("https://me:secret@mlflow.example.org", {}, False),
        ("https://me@mlflow.example.org", {}, False),
        ("http://8.8.8.8:5000", {}, True),
        ("https://mlflow.example.org", {"MLFLOW_TRACKING_TOKEN": "secret"}, False),
        ("https://mlflow.example.org", {}, True),
        ("arn:aws:sagemaker:eu-west-1:1:mlflow-tracking-server/x", {}, True),
    ],
)
def test_only_an_mlflow_in_reach_is_written_live(
    uri: str, variables: dict[str, str], reaches: bool
) -> None:
    found, words = reachable_tracking(uri, variables)
    assert found == (uri if reaches else None)
    assert words.startswith("live, into") == reaches
    assert "secret" not in words


@pytest.mark.parametrize(
    ("uri", "reaches"),
    [
        ("http://10.0.3.7:5000", True),
        ("http://mlflow.internal:5000", True),
        ("http://127.0.0.1:5000", False),
        ("http://0.0.0.0:5000", False),
    ],
)
def test_in_a_vpc_private_addresses_are_in_reach(uri: str, reaches: bool) -> None:
    assert (reachable_tracking(uri, {}, in_vpc=True)[0] == uri) == reaches


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:///mlflow.db", "is a database"),
        ("file:///data/mlruns", "is a folder"),
        ("mlruns", "is a folder"),
        ("none", "none is wanted"),
        ("databricks", "wants credentials"),
        ("http://10.0.3.7:5000", "out of reach of a job without a VPC"),
        ("http://0.0.0.0:5000", "is this machine's own"),
    ],
)
def test_why_the_journal_travels_is_said(uri: str, words: str) -> None:
    told = reachable_tracking(uri, {})[1]
    assert words in told
    assert told.endswith("the journal travels instead, and `visiontuner attach JOB` writes it")


def test_an_address_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(UserMistake, match="no address") as refused:
        reachable_tracking("http://me:secret@[::1", {})
    assert "secret" not in str(refused.value)


def test_the_jobs_packages_are_all_that_visiontuner_needs_but_torch() -> None:
    pinned = dict(line.split("==") for line in requirements() if "==" in line)
    assert {"ray", "mlflow", "timm", "optuna", "onnxruntime", "boto3"} <= pinned.keys()
    assert not {"torch", "torchvision", "sagemaker", "pytest", "moto"} & pinned.keys()
    assert "sagemaker-mlflow" in dict(
        line.split("==") for line in requirements(also=("sagemaker-mlflow",))
    )


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("CapacityError: Unable to provision requested ML compute capacity.", "--instance-type"),
        ("AlgorithmError: [Errno 28] No space left on device", "A disk was full"),
        ("AlgorithmError: No matching distribution found for ray==9", "--image"),
        ("ClientError: anything else", ""),
    ],
)
def test_a_reason_without_a_next_step_gets_one(reason: str, advice: str) -> None:
    assert advice in advice_on(reason)
    assert bool(advice_on(reason)) == bool(advice)


def test_images_of_this_machine_are_refused_before_aws_is_asked(tmp_path: Any) -> None:
    experiment = Experiment.parse({"data": {"source": str(tmp_path)}})
    with pytest.raises(UserMistake, match="Add --upload s3://BUCKET/"):
        plan_job(experiment, JobOptions())
