"""The states of an endpoint: wait for one, delete, compare its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from visiontuner import interrupts
from visiontuner.aws import Aws, AwsRefused
from visiontuner.commands import next_command
from visiontuner.errors import ServingError, UserMistake
from visiontuner.serving.batching import patiently
from visiontuner.serving.client import Refused, SageMakerTransport
from visiontuner.serving.deployment import MODEL_TAG
from visiontuner.serving.endpoint_parts import find_endpoint, tags_of
from visiontuner.serving.failures import explain_failure
from visiontuner.serving.reference import TOLERANCE, Reference

Note = Callable[[str], None]

IN_PROGRESS = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.5, 10.0
_NOTE_SECONDS = 30.0
_BEGIN_SECONDS = 20.0  # as long as MLflow gives an update to begin
# SageMaker gives a container up after an hour at most; until then it deletes nothing.
_GONE_SECONDS = 3600.0


def describe(aws: Aws, name: str) -> dict[str, Any]:
    """What SageMaker says of an endpoint.

    Raises:
        UserMistake: there is none of this name.
    """
    described = find_endpoint(aws, name)
    if described is None:
        raise UserMistake(
            f"There is no endpoint {name!r} in {aws.region}; "
            f"`{next_command('endpoints', flags=aws.flags)}` lists ours."
        )
    return described


def check_free(aws: Aws, name: str) -> None:
    """Make sure that no endpoint has a name.

    Raises:
        UserMistake: one has.
    """
    described = find_endpoint(aws, name)
    if described is None:
        return
    taken = f"There is an endpoint {name!r} already ({described['EndpointStatus']})"
    if not is_ours(aws, described):
        raise UserMistake(f"{taken}, which visiontuner did not deploy. Choose another --name.")
    raise UserMistake(
        f"{taken}. `{next_command('update', name, flags=aws.flags)}` swaps its model, "
        f"`{next_command('undeploy', name, flags=aws.flags)}` removes it, or choose another --name."
    )


def check_ours(aws: Aws, described: Mapping[str, Any], command: str) -> None:
    """Make sure that visiontuner deployed an endpoint.

    Args:
        described: what SageMaker says of it.
        command: AWS's own for what is not going to be done, as `delete-endpoint`.

    Raises:
        UserMistake: another program did.
    """
    if not is_ours(aws, described):
        name = described["EndpointName"]
        raise UserMistake(
            f"Endpoint {name!r} was not deployed by visiontuner: it is left alone. AWS's own "
            f"command: `aws sagemaker {command} --endpoint-name {name} --region {aws.region}`."
        )


def is_ours(aws: Aws, described: Mapping[str, Any]) -> bool:
    """Whether an endpoint's tags say that visiontuner deployed it."""
    return MODEL_TAG in tags_of(aws, described["EndpointArn"])


def wait_until_in_service(
    aws: Aws, name: str, timeout_seconds: float, note: Note, *, leaving: str | None = None
) -> dict[str, Any]:
    """Wait for an endpoint that was just created or updated.

    Args:
        leaving: the configuration that an update is to replace. In service with it means that
            SageMaker went back, unless the update has not begun yet.

    Returns:
        What SageMaker says of the endpoint then.

    Raises:
        ServingError: it failed, was deleted meanwhile, or takes longer.
    """
    begun = leaving is None
    for seconds in poll(name, note):
        try:
            described = aws.call("sagemaker", "describe_endpoint", EndpointName=name)
        except AwsRefused as error:
            if error.is_missing:
                raise ServingError(
                    f"Endpoint {name!r} was deleted by someone meanwhile. If it is still wanted, "
                    f"`{next_command('deploy', 'MODEL', '--name', name, flags=aws.flags)}` makes "
                    "it again."
                ) from None
            raise
        state = described["EndpointStatus"]
        begun = begun or state != "InService" or described["EndpointConfigName"] != leaving
        if state == "InService" and (begun or seconds > _BEGIN_SECONDS):
            note(f"{name} is in service after {seconds:.0f} s.")
            return described
        if state not in (*IN_PROGRESS, "InService"):
            raise ServingError(
                explain_failure(aws, name, described, f"Endpoint {name!r} is {state}")
            )
        if seconds > timeout_seconds:
            reason = f"Endpoint {name!r} is not in service after {timeout_seconds:g} s"
            raise ServingError(explain_failure(aws, name, described, reason))
    raise AssertionError("polling has no end")


def delete_endpoint(
    aws: Aws, name: str, note: Note, timeout_seconds: float = _GONE_SECONDS
) -> None:
    """Until it is gone; SageMaker deletes none that is being created, so that may take a while.

    Raises:
        ServingError: it is still there after `timeout_seconds`.
    """
    told = False
    for seconds in poll(name, note, "Deleting"):
        try:
            state = aws.call("sagemaker", "describe_endpoint", EndpointName=name)["EndpointStatus"]
            if state != "Deleting":
                aws.call("sagemaker", "delete_endpoint", EndpointName=name)
        except AwsRefused as error:
            if error.is_missing:
                return
            if not error.is_in_progress:
                raise
            if not told:
                note("SageMaker deletes no endpoint that is being created: waiting until it can.")
            told = True
        if seconds > timeout_seconds:
            raise ServingError(
                f"Endpoint {name!r} cannot be deleted yet; "
                f"`{next_command('undeploy', name, flags=aws.flags)}` tries again."
            )


def roll_back(aws: Aws, name: str, old_config: str, timeout_seconds: float, note: Note) -> None:
    """Let an endpoint serve its old configuration again, if it is there and does not."""
    for _ in poll(name, note, "Waiting for"):  # what is being updated cannot be updated
        try:
            described = aws.call("sagemaker", "describe_endpoint", EndpointName=name)
        except AwsRefused as error:
            if error.is_missing:  # someone deleted it
                return
            raise
        if described["EndpointStatus"] not in IN_PROGRESS:
            break
    new_config = described["EndpointConfigName"]
    if new_config == old_config:
        return
    aws.call("sagemaker", "update_endpoint", EndpointName=name, EndpointConfigName=old_config)
    now = wait_until_in_service(aws, name, timeout_seconds, note, leaving=new_config)
    if now["EndpointConfigName"] != old_config:
        raise ServingError(explain_failure(aws, name, now, f"{name!r} could not go back"))


def check_answers(aws: Aws, name: str, reference: Reference) -> None:
    """Ask an endpoint its model's reference pictures.

    Raises:
        ServingError: it does not answer, or differently from the artifact.
    """
    transport = SageMakerTransport(name, region=aws.region, session=aws.session)
    ask, options = transport.ask, reference.options()
    try:
        # One by one: together they may exceed a request.
        answers = [patiently(partial(ask, [one], options))[0] for one in reference.pictures]
    except Refused as error:
        raise ServingError(f"The endpoint refuses the model's own pictures: {error}") from None
    difference = reference.difference([answer.top_k or [] for answer in answers])
    if not difference <= TOLERANCE:  # NaN too
        raise ServingError(
            f"Endpoint {name!r} answers the model's own pictures differently (by "
            f"{difference:.1e}). "
            "`visiontuner preflight MODEL` shows whether the model or the image is to blame."
        )


def poll(name: str, note: Note, doing: str = "Waiting for") -> Iterator[float]:
    """Seconds since the start, with growing pauses and a note now and then."""
    began = noted = time.monotonic()
    for count in range(10**9):
        yield time.monotonic() - began
        interrupts.sleep(min(_FIRST_POLL_SECONDS * 1.3 ** min(count, 20), _LONGEST_POLL_SECONDS))
        if time.monotonic() - noted > _NOTE_SECONDS:
            noted = time.monotonic()
            note(f"{doing} {name}: {noted - began:.0f} s.")
