"""Autoscaling of endpoints, against a stand-in that refuses what AWS refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.aws.scaling import Scaling
from visiontuner.cli.main import main
from visiontuner.errors import UserMistake
from visiontuner.serving.preflight import PreflightReport


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def targets(account: Any) -> list[tuple[str, int, int]]:
    """What AWS scales: resource, fewest and most."""
    found = account.client("application-autoscaling").describe_scalable_targets(
        ServiceNamespace="sagemaker"
    )["ScalableTargets"]
    return [(one["ResourceId"], one["MinCapacity"], one["MaxCapacity"]) for one in found]


def policies(account: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = account.client(
        "application-autoscaling"
    ).describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    return found


def instance_type(account: Any) -> str:
    sagemaker = account.client("sagemaker")
    config = sagemaker.describe_endpoint(EndpointName="c")["EndpointConfigName"]
    described = sagemaker.describe_endpoint_config(EndpointConfigName=config)
    return str(described["ProductionVariants"][0]["InstanceType"])


VARIANT = "endpoint/c/variant/AllTraffic"


@pytest.mark.parametrize("text", ["1", "0:4", "4:1", "1:4:0", "1-4", "1:4:x", "a:b"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UserMistake, match="--autoscale takes MIN:MAX instances, as 1:4"):
        Scaling.parse(text)


def test_the_target_is_half_of_what_an_instance_answers_in_a_minute() -> None:
    # 40 ms a request: 1,500 in a minute, one after the other.
    plain = Scaling.parse("1:4")
    assert plain.aimed(milliseconds=40.0, is_async=False).target == 750
    assert Scaling.parse("1:4:300").aimed(milliseconds=40.0, is_async=False).target == 300
    with pytest.raises(UserMistake, match="as --autoscale 1:4:300"):
        plain.aimed(milliseconds=None, is_async=False)


def test_an_endpoint_scales_until_it_is_taken_away(account: Any, model: str) -> None:
    made = run("deploy", model, "--no-preflight", "--name", "c", "--autoscale", "2:4:300",
               "--price", "0.1")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "2 x ml.m5.large; $0.2 to $0.4 an hour, $144 to $288 a month" in made.stderr
    assert "scales     2 to 4 instances, 300 requests a minute to an instance" in made.stderr
    assert targets(account) == [(VARIANT, 2, 4)]
    (policy,) = policies(account)
    aim = policy["TargetTrackingScalingPolicyConfiguration"]
    assert aim == {
        "TargetValue": 300.0,
        "PredefinedMetricSpecification": {
            "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"
        },
    }
    (row,) = [line for line in run("endpoints").stdout.splitlines() if line.startswith("c ")]
    assert row.split()[-3:] == ["2", "to", "4"]
    (listed,) = json.loads(run("endpoints", "--format", "json").stdout)
    assert listed["scales"] == "2 to 4"
    assert run("undeploy", "c", "--artifacts").exit_code == 0
    assert targets(account) == []
    assert policies(account) == []


def test_the_preflight_says_how_many_requests_an_instance_gets(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = PreflightReport(
        model=model, checks=(), p50_ms=60, p95_ms=80, p99_ms=90, images_per_second=30,
        memory_mb=300, recommendation="ml.m5.large.",
    )  # fmt: skip
    monkeypatch.setattr("visiontuner.workflow.deploy.run_preflight", lambda *_, **__: report)
    planned = run("deploy", model, "--name", "c", "--autoscale", "1:4", "--dry-run")
    assert "by the preflight's half of what an instance can answer" in planned.stderr
    assert "# MLflow's command has no words for --autoscale." in planned.stdout
    made = run("deploy", model, "--name", "c", "--autoscale", "1:4")
    assert made.exit_code == 0, made.output
    (policy,) = policies(account)
    # 60 ms: 1,000 a minute.
    assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--autoscale", "1:4", "--no-preflight"], "add them, as --autoscale 1:4:300"),
        (["--autoscale", "1:4", "--serverless", "2048"], "A serverless endpoint scales by itself"),
        (["--autoscale", "1:4", "--instance-type", "ml.t2.large"], "scales no burstable instances"),
        (["--autoscale", "1:4", "--instances", "5"], "begin with a number within the range"),
    ],
)
def test_what_cannot_scale_is_said_before_anything_is_made(
    account: Any, model: str, arguments: list[str], message: str
) -> None:
    done = run("deploy", model, *arguments)
    assert done.exit_code == 2
    assert message in said(done)
    assert not any(account.holds().values())


def test_another_instance_type_stops_the_scaling_only_for_the_length_of_the_update(
    account: Any, model: str
) -> None:
    made = run("deploy", model, "--no-preflight", "--name", "c", "--autoscale", "1:4:300")
    assert made.exit_code == 0, made.output
    scaling = account.client("application-autoscaling")
    scaling.put_scheduled_action(
        ServiceNamespace="sagemaker", ResourceId=VARIANT, Schedule="cron(0 6 * * ? *)",
        ScalableDimension="sagemaker:variant:DesiredInstanceCount", ScheduledActionName="mornings",
        ScalableTargetAction={"MinCapacity": 2},
    )  # fmt: skip
    hangs = ["--env", "STAND_IN_HANG=0.1"]
    failed = run("update", "c", model, "--no-preflight", "--instance-type", "ml.c5.large", *hangs)
    assert failed.exit_code == 1
    assert "SageMaker rolled back" in said(failed)
    assert instance_type(account) == "ml.m5.large"
    assert targets(account) == [(VARIANT, 1, 4)]
    assert len(policies(account)) == 1

    done = run("update", "c", model, "--no-preflight", "--instance-type", "ml.c5.large")
    assert done.exit_code == 0, done.output
    assert "c does not scale for the length of the update." in done.stderr
    assert instance_type(account) == "ml.c5.large"
    assert targets(account) == [(VARIANT, 1, 4)]
    (policy,) = policies(account)
    assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 300
    (action,) = scaling.describe_scheduled_actions(ServiceNamespace="sagemaker")["ScheduledActions"]
    assert action["ScheduledActionName"] == "mornings"

    wider = run("update", "c", model, "--no-preflight", "--autoscale", "2:8:100")
    assert wider.exit_code == 0, wider.output
    assert targets(account) == [(VARIANT, 2, 8)]
    (policy,) = policies(account)
    assert policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"] == 100

    off = run("update", "c", model, "--no-preflight", "--autoscale", "off")
    assert off.exit_code == 0, off.output
    assert targets(account) == []


def test_an_endpoint_that_cannot_be_scaled_is_not_left_behind(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visiontuner.aws import scaling

    def refuse(*_: object, **__: object) -> dict[str, Any]:
        raise scaling.AwsRefused("No: not authorized.", "AccessDeniedException")

    monkeypatch.setattr(scaling, "_metric", refuse)  # between the target and its policy
    done = run("deploy", model, "--no-preflight", "--name", "c", "--autoscale", "1:4:300")
    assert done.exit_code == 1
    assert "not authorized" in said(done)
    assert not any(account.holds().values())
    assert targets(account) == []


def test_an_endpoint_is_taken_away_without_the_permission_to_look_at_scaling(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visiontuner.aws import scaling

    def refuse(*_: object) -> Callable[..., Any]:
        raise scaling.AwsRefused("No: not authorized.", "AccessDeniedException")

    assert run("deploy", model, "--no-preflight", "--name", "c").exit_code == 0
    monkeypatch.setattr(scaling, "_targets", refuse)
    assert run("endpoints").exit_code == 0
    assert run("undeploy", "c", "--artifacts").exit_code == 0
    assert not any(account.holds().values())
