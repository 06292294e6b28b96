"""The MLflow that SageMaker runs: apps and tracking servers, by their ARNs."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from typing import Any

from packaging.version import InvalidVersion, Version

from visiontuner.errors import TrackingError, UserMistake
from visiontuner.io.aws import Aws, AwsRefused

_ARN = re.compile(
    r"arn:(?P<partition>aws[a-z-]*):sagemaker:(?P<region>[a-z0-9-]+):(?P<account>\d{12}):"
    r"(?P<kind>mlflow-app|mlflow-tracking-server)/(?P<name>[a-zA-Z0-9][a-zA-Z0-9-]*)"
)
_PLUGIN = "sagemaker_mlflow"
# That plugin knows no host in others.
_PARTITIONS = ("aws", "aws-us-gov")
# What a state says where nothing can be asked.
_AWAY = ("Creating", "CreateFailed", "Deleting", "Deleted", "Stopping", "Stopped", "StartFailed")
_LATER = "the journal travels instead, and `visiontuner attach JOB` writes it"


def usable(aws: Aws, arn: str) -> tuple[str | None, str]:
    """Whether a job can write to an MLflow of SageMaker's, and the same in words.

    SageMaker is asked which version it runs, and that MLflow a question that only one like ours
    answers. The job's role asks later as itself: docs/aws.md says what it needs.

    Args:
        arn: of an MLflow app or of a tracking server.

    Returns:
        The ARN, or None if the journal has to travel.

    Raises:
        UserMistake: it is no such ARN.
    """
    match = _ARN.fullmatch(arn)
    if match is None:
        raise UserMistake(
            f"MLFLOW_TRACKING_URI is no MLflow of SageMaker's: {arn!r}. Their ARNs are "
            "arn:aws:sagemaker:REGION:ACCOUNT:mlflow-app/ID and …:mlflow-tracking-server/NAME."
        )
    reason = _reason_against(match["partition"])
    version = ""
    if reason is None:
        version, reason = _version(aws, match)
    if reason is None:
        reason = _answers(aws, arn)
    if reason is not None:
        return None, f"{arn} {reason}: {_LATER}"
    return arn, f"live, into {arn}{_told(version)}"


def _reason_against(partition: str) -> str | None:
    if partition not in _PARTITIONS:
        return f"cannot be asked: sagemaker-mlflow knows no MLflow in {partition}"
    if importlib.util.find_spec(_PLUGIN) is None:
        return "cannot be asked without the package sagemaker-mlflow"
    return None


def _version(aws: Aws, match: re.Match[str]) -> tuple[str, str | None]:
    """The version that SageMaker says it runs, empty if it does not say; and why it is no use."""
    try:
        told = _describe(aws, match)
    except AwsRefused as error:
        if error.is_missing:
            return "", "is not there"
        if error.is_denied:  # the question itself may be allowed
            return "", None
        raise
    state = str(told.get("Status") or told.get("TrackingServerStatus") or "")
    if state in _AWAY:
        return "", f"is {state}"
    version = str(told.get("MlflowVersion") or "")
    own = metadata.version("mlflow")
    if version and _major(version) != _major(own):
        return version, f"runs MLflow {version}, and a job writes with {own}"
    return version, None


def _describe(aws: Aws, match: re.Match[str]) -> dict[str, Any]:
    client = aws.client("sagemaker", match["region"])
    if match["kind"] == "mlflow-app":
        return aws.ask("describe the MLflow app", client.describe_mlflow_app, Arn=match[0])
    return aws.ask(
        "describe the tracking server",
        client.describe_mlflow_tracking_server,
        TrackingServerName=match["name"],
    )


def _major(version: str) -> int | None:
    try:
        return Version(version).major
    except InvalidVersion:
        return None


def _told(version: str) -> str:
    own = metadata.version("mlflow")
    if not version or Version(version).release[:2] == Version(own).release[:2]:
        return ""
    return f" (MLflow {version}; visiontuner is tested with {own})"


def _answers(aws: Aws, arn: str) -> str | None:
    """Ask it: who may not, or where another MLflow answers, is told now and not by the job."""
    # MLflow takes seconds to import, and few jobs write to SageMaker's.
    import sagemaker_mlflow

    from visiontuner.serving.registry import fluent_uris
    from visiontuner.tracking.store import Store

    store = Store(arn, must_exist=True, live=True, advice="A job could not write either.")
    # The plugin signs for MLflow's current store, whichever is asked, and as boto3's own caller.
    with fluent_uris(arn), sagemaker_mlflow.use_session(aws.session_in_region()):
        try:
            found = store.call("search_experiments", max_results=1)
            # Models of MLflow 3 are what an older server does not know.
            store.call("search_logged_models", experiment_ids=[one.experiment_id for one in found])
        except TrackingError as error:
            return f"does not answer as is needed ({str(error).rstrip('.')})"
    return None
