"""What an endpoint is made of: configurations, models and uploaded archives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from visiontuner.aws import Aws, AwsRefused
from visiontuner.serving.deployment import MODEL_TAG


@dataclass(frozen=True)
class Parts:
    """What deployments of one endpoint's name made; archives are `s3://…/model.tar.gz`."""

    configs: frozenset[str] = field(default=frozenset())
    models: frozenset[str] = field(default=frozenset())
    archives: frozenset[str] = field(default=frozenset())

    @classmethod
    def find(cls, aws: Aws, name: str, bucket: str) -> Parts:
        """All that MLflow named after an endpoint, whoever deployed it."""
        return cls(
            frozenset(_named_configs(aws, name)),
            frozenset(entry["ModelName"] for entry in _named_models(aws, name)),
            frozenset(_named_archives(aws, name, bucket)),
        )

    @classmethod
    def in_use(cls, aws: Aws, name: str) -> Parts:
        """What the endpoint of this name serves; nothing if there is none."""
        described = find_endpoint(aws, name)
        return cls.of_config(aws, described["EndpointConfigName"]) if described else cls()

    @classmethod
    def of_config(cls, aws: Aws, config: str) -> Parts:
        """A configuration with its models, as far as they are there."""
        described = if_there(aws, "describe_endpoint_config", EndpointConfigName=config)
        if described is None:
            return cls()
        models = [variant["ModelName"] for variant in described["ProductionVariants"]]
        return cls(frozenset([config]), frozenset(models), frozenset(_archives(aws, models)))

    @classmethod
    def ours(cls, aws: Aws, name: str) -> Parts:
        """What visiontuner made for an endpoint of this name, by the tags of its models."""
        models = [
            entry["ModelName"]
            for entry in _named_models(aws, name)
            if MODEL_TAG in tags_of(aws, entry["ModelArn"])
        ]
        own = cls(frozenset(), frozenset(models), frozenset(_archives(aws, models)))
        for config in _named_configs(aws, name):
            parts = cls.of_config(aws, config)
            if parts.models and parts.models <= own.models:
                own = own.with_(parts)
        return own

    def __bool__(self) -> bool:
        return bool(self.configs or self.models or self.archives)

    def with_(self, other: Parts) -> Parts:
        return Parts(
            self.configs | other.configs, self.models | other.models, self.archives | other.archives
        )

    def without(self, other: Parts) -> Parts:
        return Parts(
            self.configs - other.configs, self.models - other.models, self.archives - other.archives
        )

    def named_after(self, name: str) -> Parts:
        """Without what MLflow did not make for an endpoint of this name."""
        return Parts(
            frozenset(config for config in self.configs if _is_named(config, name, "config")),
            frozenset(model for model in self.models if _is_named(model, name, "model")),
            frozenset(url for url in self.archives if _is_named(_model_of(url), name, "model")),
        )

    def delete(self, aws: Aws) -> None:
        """What is gone already is no mistake.

        Models last: they lead the next attempt to the rest.
        """
        for config in self.configs:
            if_there(aws, "delete_endpoint_config", EndpointConfigName=config)
        for archive in self.archives:
            _delete_archive(aws, archive)
        for model in self.models:
            if_there(aws, "delete_model", ModelName=model)

    def delete_unused(self, aws: Aws, name: str) -> None:
        """All but what the endpoint of this name serves: it may be another deployment's."""
        self.without(Parts.in_use(aws, name)).delete(aws)


def find_endpoint(aws: Aws, name: str) -> dict[str, Any] | None:
    """What SageMaker says of an endpoint, if it is there."""
    return if_there(aws, "describe_endpoint", EndpointName=name)


def endpoint_tags(aws: Aws, name: str) -> dict[str, str]:
    """Empty if there is no such endpoint."""
    described = find_endpoint(aws, name)
    return tags_of(aws, described["EndpointArn"]) if described else {}


def tags_of(aws: Aws, arn: str) -> dict[str, str]:
    """Empty if the resource has gone meanwhile."""
    try:
        pages = aws.pages("sagemaker", "list_tags", "Tags", ResourceArn=arn)
        return {tag["Key"]: tag["Value"] for tag in pages}
    except AwsRefused as error:
        if error.is_missing:
            return {}
        raise


def _named_archives(aws: Aws, name: str, bucket: str) -> Iterator[str]:
    try:
        for entry in aws.pages(
            "s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=f"{name}-model-"
        ):
            model, _, file = entry["Key"].partition("/")
            if file == "model.tar.gz" and _is_named(model, name, "model"):
                yield f"s3://{bucket}/{entry['Key']}"
    except AwsRefused as error:
        if not error.is_missing:
            raise


def if_there(aws: Aws, method: str, **kwargs: str) -> dict[str, Any] | None:
    """SageMaker's answer; None if what was asked for is not there."""
    try:
        return aws.call("sagemaker", method, **kwargs)
    except AwsRefused as error:
        if error.is_missing:
            return None
        raise


def _is_named(text: str, name: str, kind: str) -> bool:
    return re.fullmatch(rf"{re.escape(name)}-{kind}-[0-9a-f]{{20}}", text) is not None


def _named_configs(aws: Aws, name: str) -> Iterator[str]:
    entries = aws.pages(
        "sagemaker", "list_endpoint_configs", "EndpointConfigs", NameContains=f"{name}-config-"
    )
    configs = (entry["EndpointConfigName"] for entry in entries)
    return (config for config in configs if _is_named(config, name, "config"))


def _named_models(aws: Aws, name: str) -> Iterator[dict[str, Any]]:
    entries = aws.pages("sagemaker", "list_models", "Models", NameContains=f"{name}-model-")
    return (entry for entry in entries if _is_named(entry["ModelName"], name, "model"))


def _archives(aws: Aws, models: Iterable[str]) -> Iterator[str]:
    for model in models:
        described = if_there(aws, "describe_model", ModelName=model)
        archive = ((described or {}).get("PrimaryContainer") or {}).get("ModelDataUrl")
        if archive:
            yield str(archive)


def _delete_archive(aws: Aws, archive: str) -> None:
    bucket, key = archive.removeprefix("s3://").split("/", 1)
    try:
        aws.call("s3", "delete_object", Bucket=bucket, Key=key)
    except AwsRefused as error:  # the bucket may be gone
        if not error.is_missing:
            raise


def _model_of(archive: str) -> str:
    """MLflow uploads to `s3://BUCKET/MODEL/model.tar.gz`."""
    return archive.removesuffix("/model.tar.gz").rpartition("/")[2]
