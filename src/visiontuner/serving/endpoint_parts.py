"""What an endpoint is made of: configurations, models and uploaded archives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from visiontuner.aws import Aws, AwsRefused
from visiontuner.serving.deployment import DeploymentPlan


@dataclass(frozen=True)
class Parts:
    """What deployments of one endpoint's name made; MLflow names them after it."""

    configs: frozenset[str]
    models: frozenset[str]
    objects: frozenset[str]

    @classmethod
    def find(cls, aws: Aws, plan: DeploymentPlan) -> Parts:
        def named(kind: str, texts: Iterator[str]) -> frozenset[str]:
            ours = re.compile(rf"{re.escape(plan.name)}-{kind}-[0-9a-f]{{20}}(/model\.tar\.gz)?")
            return frozenset(text for text in texts if ours.fullmatch(text))

        configs = aws.pages(
            "sagemaker", "list_endpoint_configs", "EndpointConfigs",
            NameContains=f"{plan.name}-config-",
        )  # fmt: skip
        models = aws.pages("sagemaker", "list_models", "Models", NameContains=f"{plan.name}-model-")
        return cls(
            named("config", (entry["EndpointConfigName"] for entry in configs)),
            named("model", (entry["ModelName"] for entry in models)),
            named("model", _keys(aws, plan.bucket, f"{plan.name}-model-")),
        )

    def without(self, other: Parts) -> Parts:
        return Parts(
            self.configs - other.configs, self.models - other.models, self.objects - other.objects
        )

    def of_config(self, aws: Aws, config: str) -> Parts:
        """Those of one configuration."""
        described = aws.call("sagemaker", "describe_endpoint_config", EndpointConfigName=config)
        models = {variant["ModelName"] for variant in described["ProductionVariants"]}
        objects = {key for key in self.objects if key.split("/")[0] in models}
        return Parts(frozenset([config]), frozenset(models), frozenset(objects))

    def delete(self, aws: Aws, plan: DeploymentPlan) -> None:
        """All but what an endpoint of this name uses: it may be another deployment's."""
        used: set[str] = set()
        try:
            used = {
                aws.call("sagemaker", "describe_endpoint", EndpointName=plan.name)[
                    "EndpointConfigName"
                ],
                *models_of(aws, plan.name),
            }
        except AwsRefused as error:
            if not error.is_missing:
                raise
        for config in self.configs - used:
            delete_if_there(aws, "delete_endpoint_config", EndpointConfigName=config)
        for model in self.models - used:
            delete_if_there(aws, "delete_model", ModelName=model)
        for key in self.objects:
            if key.split("/")[0] not in used:
                aws.call("s3", "delete_object", Bucket=plan.bucket, Key=key)


def tags_of(aws: Aws, name: str) -> dict[str, str]:
    """Empty if there is no such endpoint."""
    try:
        arn = aws.call("sagemaker", "describe_endpoint", EndpointName=name)["EndpointArn"]
    except AwsRefused as error:
        if error.is_missing:
            return {}
        raise
    return {
        tag["Key"]: tag["Value"]
        for tag in aws.pages("sagemaker", "list_tags", "Tags", ResourceArn=arn)
    }


def models_of(aws: Aws, name: str) -> list[str]:
    config = aws.call("sagemaker", "describe_endpoint", EndpointName=name)["EndpointConfigName"]
    described = aws.call("sagemaker", "describe_endpoint_config", EndpointConfigName=config)
    return [variant["ModelName"] for variant in described["ProductionVariants"]]


def archive_of(aws: Aws, model: str) -> str | None:
    try:
        described = aws.call("sagemaker", "describe_model", ModelName=model)
    except AwsRefused as error:
        if error.is_missing:
            return None
        raise
    return str(described["PrimaryContainer"]["ModelDataUrl"])


def _keys(aws: Aws, bucket: str, prefix: str) -> Iterator[str]:
    try:
        for entry in aws.pages("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=prefix):
            yield entry["Key"]
    except AwsRefused as error:
        if not error.is_missing:
            raise


def delete_if_there(aws: Aws, method: str, **kwargs: str) -> None:
    """Delete what may be gone already."""
    try:
        aws.call("sagemaker", method, **kwargs)
    except AwsRefused as error:
        if not error.is_missing:
            raise
