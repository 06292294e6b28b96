"""Why an endpoint does not serve: SageMaker's reason, its log, what they usually mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visiontuner.aws import Aws
from visiontuner.errors import ServingError

_LINES, _LENGTH = 5, 300
# The first that is found in the reason or the log.
_MEANINGS = {
    "exec format error": "the image is for another processor; build it for linux/amd64",
    "No module named": "the image lacks one of the model's requirements; bake them in, or leave "
    "MLFLOW_DISABLE_ENV_CREATION out of its environment",
    "No space left": "the instance's disk is full; choose a larger one",
    "MemoryError": "it needs more memory; `visiontuner preflight MODEL` recommends an instance",
    "Could not access model data": "the execution role may not read the bucket (docs/aws.md)",
    "is damaged": "the model's files are damaged; `visiontuner preflight MODEL` shows it here",
    "ping health check": "the server did not start in time; installing requirements at the start "
    "takes long, so bake them into the image, and `visiontuner preflight MODEL` shows whether the "
    "model can be served",
}


def explain_failure(aws: Aws, name: str, described: Mapping[str, Any], what: str) -> str:
    """One line: what happened, SageMaker's reason, the end of the log, and what to do.

    Args:
        described: SageMaker's answer about the endpoint.
        what: happened, the start of a sentence.
    """
    reason = " ".join(str(described.get("FailureReason") or "").split())
    log = _last_lines(aws, name)
    meaning = next((said for sign, said in _MEANINGS.items() if sign in f"{reason} {log}"), None)
    parts = [f"{what}{': ' + reason.rstrip('.') if reason else ''}."]
    parts += [f"Its log ends with: {log.rstrip('.')}."] if log else []
    parts += [f"Usually {meaning}."] if meaning else []
    return " ".join(parts)


def _last_lines(aws: Aws, name: str) -> str:
    """Of the endpoint's newest log; empty if there is none or it may not be read."""
    group = f"/aws/sagemaker/Endpoints/{name}"
    try:
        streams = aws.call(
            "logs", "describe_log_streams", logGroupName=group, orderBy="LastEventTime",
            descending=True, limit=1,
        )["logStreams"]  # fmt: skip
        if not streams:
            return ""
        events = aws.call(
            "logs", "get_log_events", logGroupName=group,
            logStreamName=streams[0]["logStreamName"], limit=_LINES,
        )["events"]  # fmt: skip
    except ServingError:
        return ""
    return " ".join(" ".join(event["message"].split()) for event in events)[-_LENGTH:]
