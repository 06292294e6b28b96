"""Create, update and delete an endpoint through `mlflow.deployments`; nothing is left behind.

MLflow's client makes and starts everything, so that its own command gives the same endpoint. What
it lacks is added: waiting with progress, the reason of a failure, asking the reference pictures,
and taking away what a failed or interrupted attempt made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from visiontuner.aws import Aws, explained
from visiontuner.errors import ServingError, UserMistake, VisiontunerError
from visiontuner.serving.deployment import (
    CAPTURE,
    DEPLOYMENT_TAG,
    MODEL_TAG,
    PRICE_TAG,
    TTL_TAG,
    DeploymentPlan,
    ttl_hours,
)
from visiontuner.serving.endpoint_parts import (
    Parts,
    archive_of,
    delete_if_there,
    models_of,
    tags_of,
)
from visiontuner.serving.endpoint_states import (
    IN_PROGRESS,
    Note,
    check_answers,
    check_free,
    delete_endpoint,
    describe,
    roll_back,
    wait_until_in_service,
)
from visiontuner.serving.failures import explain_failure
from visiontuner.serving.reference import Reference

# What MLflow puts into a container's environment by itself.
_MLFLOWS_OWN = (
    "MLFLOW_DEPLOYMENT_FLAVOR_NAME",
    "SERVING_ENVIRONMENT",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One endpoint of ours, as `visiontuner endpoints` lists it.

    Args:
        age_hours: since it was created.
        ttl_hours: how long it was meant to live; None: not said.
        cost: US dollars since then; None: the price was not known, or it is paid by use.
    """

    name: str
    state: str
    model: str
    age_hours: float
    ttl_hours: float | None = None
    cost: float | None = None

    @property
    def overdue(self) -> bool:
        """Whether it has lived longer than it was meant to."""
        return self.ttl_hours is not None and self.age_hours > self.ttl_hours


def create(
    aws: Aws, plan: DeploymentPlan, reference: Reference, *, tracking_uri: str, note: Note
) -> None:
    """Make an endpoint and ask it; what a failure or Ctrl-C leaves is taken away again.

    Raises:
        UserMistake: the name is taken, or the credentials are not.
        ServingError: it does not come into service, or answers differently from its artifact.
    """
    check_free(aws, plan.name)
    before = Parts.find(aws, plan)
    try:
        note(f"Uploading {plan.model_uri} and creating {plan.name}; this takes minutes.")
        _ask_mlflow("create_deployment", plan, tracking_uri)
        wait_until_in_service(aws, plan.name, plan.timeout_seconds, note)
        check_answers(aws, plan.name, reference)
    except BaseException as error:
        with _telling_what_is_left(plan, error):
            note("Taking away what was made.")
            if tags_of(aws, plan.name).get(DEPLOYMENT_TAG) == plan.deployment:
                delete_endpoint(aws, plan.name, note)
            Parts.find(aws, plan).without(before).delete(aws, plan)
        raise


def update(
    aws: Aws, plan: DeploymentPlan, reference: Reference, *, tracking_uri: str, note: Note
) -> None:
    """Put another model behind an endpoint while it serves; the old one stays if that fails.

    Raises:
        ServingError: SageMaker rolled back, or the new model answers differently from its artifact;
            the old one serves again.
    """
    old_config = aws.call("sagemaker", "describe_endpoint", EndpointName=plan.name)[
        "EndpointConfigName"
    ]
    before = Parts.find(aws, plan)
    old = before.of_config(aws, old_config)
    try:
        note(
            f"Uploading {plan.model_uri} and updating {plan.name}; the old model serves meanwhile."
        )
        _ask_mlflow("update_deployment", plan, tracking_uri)
        now = wait_until_in_service(aws, plan.name, plan.timeout_seconds, note, leaving=old_config)
        if now["EndpointConfigName"] == old_config:
            raise ServingError(explain_failure(aws, plan.name, now, "SageMaker rolled back"))
        check_answers(aws, plan.name, reference)
    except BaseException as error:
        with _telling_what_is_left(plan, error):
            note("Going back to the old model.")
            roll_back(aws, plan.name, old_config, plan.timeout_seconds, note)
            # The old parts are still used, unless someone deleted the endpoint meanwhile.
            Parts.find(aws, plan).without(before).delete(aws, plan)
            old.delete(aws, plan)
        raise
    arn = now["EndpointArn"]
    tags = [{"Key": key, "Value": value} for key, value in plan.tags.items()]
    aws.call("sagemaker", "add_tags", ResourceArn=arn, Tags=tags)
    old.delete(aws, plan)


def undeploy(aws: Aws, name: str, *, artifacts: bool, note: Note) -> list[str]:
    """Delete an endpoint with its configurations and models.

    Args:
        artifacts: the uploaded archives too.

    Returns:
        What was kept: `s3://…`.

    Raises:
        UserMistake: there is no such endpoint.
    """
    config = describe(aws, name)["EndpointConfigName"]
    models = models_of(aws, name)
    archives = [archive_of(aws, model) for model in models]
    delete_endpoint(aws, name, note)
    delete_if_there(aws, "delete_endpoint_config", EndpointConfigName=config)
    for model in models:
        delete_if_there(aws, "delete_model", ModelName=model)
    found = [archive for archive in archives if archive]
    if not artifacts:
        return found
    for archive in found:
        bucket, key = archive.removeprefix("s3://").split("/", 1)
        aws.call("s3", "delete_object", Bucket=bucket, Key=key)
    return []


def list_endpoints(aws: Aws, now: datetime | None = None) -> list[Endpoint]:
    """Those that visiontuner deployed in this region, oldest first."""
    found = []
    for entry in aws.pages("sagemaker", "list_endpoints", "Endpoints", SortBy="CreationTime"):
        tags = tags_of(aws, entry["EndpointName"])
        if MODEL_TAG not in tags:
            continue
        hours = ((now or datetime.now(UTC)) - entry["CreationTime"]).total_seconds() / 3600
        price = tags.get(PRICE_TAG)
        found.append(
            Endpoint(
                name=entry["EndpointName"],
                state=entry["EndpointStatus"],
                model=tags[MODEL_TAG],
                age_hours=hours,
                ttl_hours=ttl_hours(tags[TTL_TAG]) if TTL_TAG in tags else None,
                cost=float(price) * hours if price else None,
            )
        )
    return sorted(found, key=lambda endpoint: -endpoint.age_hours)


def deployed_model(aws: Aws, name: str) -> str:
    """`NAME/VERSION` of the model that an endpoint serves.

    Raises:
        UserMistake: there is no such endpoint, or its tags do not say.
    """
    describe(aws, name)
    model = tags_of(aws, name).get(MODEL_TAG, "")
    if "/" not in model:
        raise UserMistake(f"Endpoint {name!r} does not say which registered model it serves.")
    return model


@dataclass(frozen=True, kw_only=True)
class Running:
    """What an endpoint runs on: MLflow's update would fall back to its own defaults."""

    role: str
    image: str
    instance_type: str | None
    instances: int
    serverless_mb: int | None
    serverless_concurrency: int
    environment: Mapping[str, str]
    more: Mapping[str, Any]


def find_running(aws: Aws, name: str) -> Running:
    """Look up what an update has to keep.

    Raises:
        UserMistake: there is no such endpoint, it is being changed, or serves several models.
    """
    described = describe(aws, name)
    if described["EndpointStatus"] in IN_PROGRESS:
        raise UserMistake(
            f"Endpoint {name!r} is {described['EndpointStatus']}; try again when it is done."
        )
    config = aws.call(
        "sagemaker", "describe_endpoint_config", EndpointConfigName=described["EndpointConfigName"]
    )
    if len(config["ProductionVariants"]) != 1:
        raise UserMistake(f"Endpoint {name!r} serves several models; update it with AWS's tools.")
    (variant,) = config["ProductionVariants"]
    model = aws.call("sagemaker", "describe_model", ModelName=variant["ModelName"])
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


def _ask_mlflow(method: str, plan: DeploymentPlan, tracking_uri: str) -> None:
    """MLflow's deployment client starts it; the waiting is ours."""
    import mlflow.deployments
    from mlflow.exceptions import MlflowException

    from visiontuner.serving.registry import fluent_uris, quiet

    config = plan.config() | {"synchronous": "False", "archive": "True"}
    with _mlflows_environment(plan.region), quiet(), fluent_uris(tracking_uri), explained("deploy"):
        try:
            client = mlflow.deployments.get_deploy_client(plan.target)  # type: ignore[no-untyped-call]
            getattr(client, method)(plan.name, model_uri=plan.model_uri, config=config)
        except MlflowException as error:
            text = " ".join(str(error).split())[:400]
            raise ServingError(f"MLflow could not deploy {plan.model_uri}: {text}") from error


@contextmanager
def _mlflows_environment(region: str) -> Iterator[None]:
    """MLflow makes its bucket in the region of AWS's settings, and copies proxies in lower case,
    with their passwords, to the container; boto3 reads those in upper case too."""
    changed = {"AWS_DEFAULT_REGION": region}
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        if name in os.environ:
            changed |= {name: "", name.upper(): os.environ.get(name.upper()) or os.environ[name]}
    before = {name: os.environ.get(name) for name in changed}
    _set_environment(changed)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Empty and None: not set."""
    for name, value in values.items():
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


@contextmanager
def _telling_what_is_left(plan: DeploymentPlan, cause: BaseException) -> Iterator[None]:
    """If even taking away fails, the user has to know that something may cost money."""
    try:
        yield
    except (VisiontunerError, KeyboardInterrupt) as error:
        first = str(cause) or "Stopped."
        why = str(error) or "stopped again"
        raise ServingError(
            f"{first} Taking away what was made did not end ({why}): something may cost money. "
            f"Look with `visiontuner endpoints --region {plan.region}`, and run "
            f"`visiontuner undeploy {plan.name}`."
        ) from None
