"""What an endpoint runs on, which an update keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visiontuner.aws import Aws
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake
from visiontuner.serving.deployment import CAPTURE
from visiontuner.serving.endpoint_parts import if_there
from visiontuner.serving.endpoint_states import IN_PROGRESS, check_ours, describe

# What MLflow puts into a container's environment by itself.
_MLFLOWS_OWN = (
    "MLFLOW_DEPLOYMENT_FLAVOR_NAME",
    "SERVING_ENVIRONMENT",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


@dataclass(frozen=True, kw_only=True)
class Running:
    """What an endpoint runs on: MLflow's update would fall back to its own defaults."""

    role: str
    image: str
    bucket: str | None
    instance_type: str | None
    instances: int
    serverless_mb: int | None
    serverless_concurrency: int
    environment: Mapping[str, str]
    more: Mapping[str, Any]


def find_running(aws: Aws, name: str) -> Running:
    """Look up what an update has to keep.

    Raises:
        UserMistake: there is no such endpoint, it is another program's, is being changed, serves
            several models, or what says what it runs on was deleted.
    """
    described = describe(aws, name)
    check_ours(aws, described, "update-endpoint --endpoint-config-name CONFIG")
    if described["EndpointStatus"] in IN_PROGRESS:
        raise UserMistake(
            f"Endpoint {name!r} is {described['EndpointStatus']}; try again when it is done."
        )
    config = _still_there(
        aws, name, "describe_endpoint_config", EndpointConfigName=described["EndpointConfigName"]
    )
    if len(config["ProductionVariants"]) != 1:
        raise UserMistake(f"Endpoint {name!r} serves several models; update it with AWS's tools.")
    (variant,) = config["ProductionVariants"]
    model = _still_there(aws, name, "describe_model", ModelName=variant["ModelName"])
    container = model["PrimaryContainer"]
    serverless = variant.get("ServerlessConfig") or {}
    capture = config.get("DataCaptureConfig") or {}
    more = {
        CAPTURE: capture if capture.get("EnableCapture") else None,
        "async_inference_config": config.get("AsyncInferenceConfig"),
        "vpc_config": model.get("VpcConfig"),
    }
    return Running(
        role=model["ExecutionRoleArn"],
        image=container["Image"],
        bucket=_bucket(container.get("ModelDataUrl") or ""),
        instance_type=variant.get("InstanceType"),
        instances=variant.get("InitialInstanceCount", 1),
        serverless_mb=serverless.get("MemorySizeInMB"),
        serverless_concurrency=serverless.get("MaxConcurrency", 5),
        environment={
            key: value
            for key, value in container.get("Environment", {}).items()
            if key not in _MLFLOWS_OWN
        },
        more={key: value for key, value in more.items() if value},
    )


def _bucket(archive: str) -> str | None:
    """MLflow uploads to `s3://BUCKET/MODEL/model.tar.gz`."""
    return archive.removeprefix("s3://").partition("/")[0] or None


def _still_there(aws: Aws, name: str, method: str, **kwargs: str) -> dict[str, Any]:
    """MLflow's own update asks the same."""
    found = if_there(aws, method, **kwargs)
    if found is None:
        raise UserMistake(
            f"Endpoint {name!r} serves, but {next(iter(kwargs.values()))} was deleted, which says "
            f"what it runs on. Make it anew: "
            f"`{next_command('undeploy', name, flags=aws.flags)}`, then "
            f"`{next_command('deploy', 'MODEL', '--name', name, flags=aws.flags)}`."
        )
    return found
