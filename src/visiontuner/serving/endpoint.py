"""Create and update an endpoint through `mlflow.deployments`; nothing is left behind.

MLflow's client makes and starts everything, so that its own command gives the same endpoint. What
it lacks is added: waiting with progress, the reason of a failure, asking the reference pictures,
and taking away what a failed or interrupted attempt made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from visiontuner.aws import Aws, ending_uploads, explained
from visiontuner.commands import next_command
from visiontuner.errors import ServingError, VisiontunerError
from visiontuner.serving.deployment import DEPLOYMENT_TAG, DeploymentPlan
from visiontuner.serving.endpoint_parts import Parts, endpoint_tags
from visiontuner.serving.endpoint_states import (
    Note,
    check_answers,
    check_free,
    delete_endpoint,
    roll_back,
    wait_until_in_service,
)
from visiontuner.serving.failures import explain_failure
from visiontuner.serving.reference import Reference
from visiontuner.text import one_line


def create(
    aws: Aws, plan: DeploymentPlan, reference: Reference, *, tracking_uri: str, note: Note
) -> None:
    """Make an endpoint and ask it; what a failure or Ctrl-C leaves is taken away again.

    Raises:
        UserMistake: the name is taken, or the credentials are not.
        ServingError: it does not come into service, or answers differently from its artifact.
    """
    check_free(aws, plan.name)
    before = Parts.find(aws, plan.name, plan.bucket)
    try:
        note(f"Uploading {plan.model_uri} and creating {plan.name}; this takes minutes.")
        _ask_mlflow("create_deployment", plan, tracking_uri)
        wait_until_in_service(aws, plan.name, plan.timeout_seconds, note)
        check_answers(aws, plan.name, reference)
    except BaseException as error:
        left = (
            f"something may cost money. Look with `{next_command('endpoints', flags=aws.flags)}`, "
            f"and run `{next_command('undeploy', plan.name, '--artifacts', flags=aws.flags)}`."
        )
        with _telling_what_is_left("Taking away what was made", left, error):
            note("Taking away what was made.")
            if endpoint_tags(aws, plan.name).get(DEPLOYMENT_TAG) == plan.deployment:
                delete_endpoint(aws, plan.name, note)
            made = Parts.find(aws, plan.name, plan.bucket).without(before)
            made.delete_unused(aws, plan.name)
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
    before = Parts.find(aws, plan.name, plan.bucket)
    old = Parts.of_config(aws, old_config).named_after(plan.name)
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
        left = (
            f"look with `{next_command('endpoints', flags=aws.flags)}` what it serves, and repeat "
            "the update, or go without it: "
            f"`{next_command('undeploy', plan.name, '--artifacts', flags=aws.flags)}`."
        )
        with _telling_what_is_left("Going back to the old model", left, error):
            note("Going back to the old model.")
            roll_back(aws, plan.name, old_config, plan.timeout_seconds, note)
            # The old parts are still used, unless someone deleted the endpoint meanwhile.
            made = Parts.find(aws, plan.name, plan.bucket).without(before)
            made.delete_unused(aws, plan.name)
            old.delete_unused(aws, plan.name)
        raise
    arn = now["EndpointArn"]
    tags = [{"Key": key, "Value": value} for key, value in plan.tags.items()]
    aws.call("sagemaker", "add_tags", ResourceArn=arn, Tags=tags)
    old.delete_unused(aws, plan.name)


def _ask_mlflow(method: str, plan: DeploymentPlan, tracking_uri: str) -> None:
    """MLflow's deployment client starts it; the waiting is ours."""
    import mlflow.deployments
    from mlflow.exceptions import MlflowException

    from visiontuner.serving.registry import fluent_uris, quiet

    config = plan.config() | {"synchronous": "False", "archive": "True"}
    with (
        ending_uploads(),
        _mlflows_environment(plan.region),
        quiet(),
        fluent_uris(tracking_uri),
        explained("deploy"),
    ):
        try:
            client = mlflow.deployments.get_deploy_client(plan.target)  # type: ignore[no-untyped-call]
            getattr(client, method)(plan.name, model_uri=plan.model_uri, config=config)
        except MlflowException as error:
            text = one_line(error, 400)
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
def _telling_what_is_left(doing: str, next_step: str, cause: BaseException) -> Iterator[None]:
    """If even undoing fails, the user has to know what may cost money or serve wrongly.

    Args:
        doing: what did not end then, the start of a sentence.
    """
    try:
        yield
    except (VisiontunerError, KeyboardInterrupt) as error:
        first = str(cause) or "Stopped."
        why = str(error) or "stopped again"
        raise ServingError(f"{first} {doing} did not end ({why}): {next_step}") from None
