"""Autoscaling of endpoints: as many instances as requests need, within two limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from visiontuner.errors import UserMistake
from visiontuner.io.aws import Aws, AwsRefused

_SERVICE = "application-autoscaling"
_NAMESPACE = "sagemaker"
_DIMENSION = "sagemaker:variant:DesiredInstanceCount"
_RESOURCE = re.compile(r"endpoint/([^/]+)/variant/([^/]+)")
_POLICY = "visiontuner"
_RANGE = re.compile(r"(\d{1,4}):(\d{1,4})(?::(\d+(?:\.\d+)?))?")
# SageMaker scales no burstable instances.
_BURSTABLE = re.compile(r"ml\.t\d")
# AWS's own rule for the target is requests per second at most, times 60 s, times a safety factor,
# and it begins with 0.5: docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling-loadtest.html
_SAFETY = 0.5
# AWS's example of a backlog: docs.aws.amazon.com/sagemaker/latest/dg/async-inference-autoscale.html
_BACKLOG = 5.0
# What AWS says of a policy beside what it takes.
_POLICY_KEYS = (
    "PolicyName", "PolicyType", "StepScalingPolicyConfiguration",
    "TargetTrackingScalingPolicyConfiguration",
)  # fmt: skip
_ACTION_KEYS = (
    "ScheduledActionName", "Schedule", "Timezone", "StartTime", "EndTime", "ScalableTargetAction",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Between how many instances an endpoint scales.

    Args:
        least, most: instances.
        target: requests to an instance in a minute; of an asynchronous endpoint requests that wait
            for an instance. None: not known.
    """

    least: int
    most: int
    target: float | None = None

    @classmethod
    def parse(cls, text: str) -> Scaling:
        """`MIN:MAX` or `MIN:MAX:TARGET`.

        Raises:
            UserMistake: it is neither.
        """
        match = _RANGE.fullmatch(text)
        least, most = (int(match[1]), int(match[2])) if match else (0, 0)
        target = float(match[3]) if match and match[3] else None
        if not 1 <= least <= most or target == 0:
            raise UserMistake(
                "--autoscale takes MIN:MAX instances, as 1:4, or MIN:MAX:TARGET with the requests "
                f"to an instance in a minute, as 1:4:300; at least 1 instance; got {text!r}."
            )
        return cls(least=least, most=most, target=target)

    def aimed(self, *, milliseconds: float | None, is_async: bool) -> Scaling:
        """With a target: half of what an instance can answer one after the other.

        Args:
            milliseconds: of a request with one image; None: not measured.

        Raises:
            UserMistake: there is no target, and nothing to find one by.
        """
        if self.target is not None:
            return self
        if is_async:
            return replace(self, target=_BACKLOG)
        if milliseconds is None:
            raise UserMistake(
                "Without a preflight nothing says how many requests an instance can answer: add "
                f"them, as --autoscale {self.least}:{self.most}:300 (in a minute), or leave "
                "--no-preflight out."
            )
        return replace(self, target=float(max(1, round(60_000 / milliseconds * _SAFETY))))

    def words(self, *, is_async: bool = False) -> str:
        """For a person."""
        instances = f"{self.least} to {self.most} instances"
        if is_async:
            return f"{instances}, {self.target or _BACKLOG:g} waiting requests an instance"
        if self.target is None:
            return f"{instances}, by the preflight's half of what an instance can answer"
        return f"{instances}, {self.target:g} requests a minute to an instance"


def check_scales(scaling: Scaling, instance_type: str | None, instances: int | None) -> None:
    """Refuse what AWS refuses, before anything is made.

    Args:
        instance_type: None for a serverless endpoint.
        instances: how many there are at first; None: as few as possible.

    Raises:
        UserMistake: naming the flag to change.
    """
    if instance_type is None:
        raise UserMistake(
            "A serverless endpoint scales by itself: leave --autoscale or --serverless out."
        )
    if _BURSTABLE.match(instance_type):
        raise UserMistake(
            f"SageMaker scales no burstable instances such as {instance_type}: choose another "
            "--instance-type, as ml.m5.large, or leave --autoscale out."
        )
    if instances is not None and not scaling.least <= instances <= scaling.most:
        raise UserMistake(
            f"--autoscale {scaling.least}:{scaling.most} and --instances {instances}: begin with "
            "a number within the range, or leave --instances out."
        )


def scale(aws: Aws, endpoint: str, variant: str, scaling: Scaling, *, is_async: bool) -> None:
    """Let AWS add and remove instances of an endpoint that is in service.

    Raises:
        AwsRefused: AWS says no.
    """
    where = _where(endpoint, variant)
    aws.call(
        _SERVICE, "register_scalable_target", **where,
        MinCapacity=scaling.least, MaxCapacity=scaling.most,
    )  # fmt: skip
    aws.call(
        _SERVICE, "put_scaling_policy", **where, PolicyName=_POLICY,
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": scaling.target or _BACKLOG,
            **_metric(endpoint, is_async=is_async),
        },
    )  # fmt: skip


def _metric(endpoint: str, *, is_async: bool) -> dict[str, Any]:
    """What is held at the target. Of an asynchronous endpoint it is its queue: what is invoked
    there has been waiting already."""
    if not is_async:
        name = "SageMakerVariantInvocationsPerInstance"
        return {"PredefinedMetricSpecification": {"PredefinedMetricType": name}}
    return {
        "CustomizedMetricSpecification": {
            "MetricName": "ApproximateBacklogSizePerInstance",
            "Namespace": "AWS/SageMaker",
            "Dimensions": [{"Name": "EndpointName", "Value": endpoint}],
            "Statistic": "Average",
        }
    }


@dataclass(frozen=True)
class Registered:
    """One variant that AWS scales, whoever registered it, with its policies and its schedule."""

    endpoint: str
    variant: str
    least: int
    most: int
    policies: tuple[Mapping[str, Any], ...] = ()
    actions: tuple[Mapping[str, Any], ...] = ()


def registered(aws: Aws, endpoint: str) -> list[Registered]:
    """What of an endpoint is scaled."""
    found = []
    for one in _targets(aws, endpoint):
        where = _where(one.endpoint, one.variant)
        parts = [
            tuple(
                {key: entry[key] for key in keys if key in entry}
                for entry in aws.pages(_SERVICE, method, kind, **where)
            )
            for method, kind, keys in (
                ("describe_scaling_policies", "ScalingPolicies", _POLICY_KEYS),
                ("describe_scheduled_actions", "ScheduledActions", _ACTION_KEYS),
            )
        ]
        found.append(replace(one, policies=parts[0], actions=parts[1]))
    return found


def ranges(aws: Aws) -> dict[str, str]:
    """`1 to 4` by the name of each endpoint that is scaled; empty for who may not look."""
    try:
        return {one.endpoint: f"{one.least} to {one.most}" for one in _targets(aws)}
    except AwsRefused as error:
        if error.is_passing or not error.is_denied:
            raise
        return {}


def _targets(aws: Aws, endpoint: str | None = None) -> list[Registered]:
    found = []
    for entry in aws.pages(
        _SERVICE, "describe_scalable_targets", "ScalableTargets",
        ServiceNamespace=_NAMESPACE, ScalableDimension=_DIMENSION,
    ):  # fmt: skip
        match = _RESOURCE.fullmatch(entry["ResourceId"])
        if match and endpoint in (None, match[1]):
            least, most = entry["MinCapacity"], entry["MaxCapacity"]
            found.append(Registered(match[1], match[2], least, most))
    return found


def take_away(aws: Aws, endpoint: str) -> list[Registered]:
    """Let AWS scale nothing of an endpoint any more; what `put_back` makes anew.

    Who may not look at scaling has not registered any.
    """
    try:
        found = registered(aws, endpoint)
    except AwsRefused as error:
        if not error.is_denied:
            raise
        return []
    for one in found:
        try:
            where = _where(one.endpoint, one.variant)
            aws.call(_SERVICE, "deregister_scalable_target", **where)
        except AwsRefused as error:  # someone was faster
            if not error.is_missing:
                raise
    return found


def put_back(aws: Aws, taken: list[Registered]) -> None:
    """Register again what `take_away` has taken, with its policies and its schedule."""
    for one in taken:
        where = _where(one.endpoint, one.variant)
        aws.call(
            _SERVICE, "register_scalable_target", **where,
            MinCapacity=one.least, MaxCapacity=one.most,
        )  # fmt: skip
        for policy in one.policies:
            aws.call(_SERVICE, "put_scaling_policy", **where, **policy)
        for action in one.actions:
            aws.call(_SERVICE, "put_scheduled_action", **where, **action)


def _where(endpoint: str, variant: str) -> dict[str, str]:
    return {
        "ServiceNamespace": _NAMESPACE,
        "ResourceId": f"endpoint/{endpoint}/variant/{variant}",
        "ScalableDimension": _DIMENSION,
    }
