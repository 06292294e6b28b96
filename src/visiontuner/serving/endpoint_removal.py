"""Take an endpoint away, and what an earlier attempt left of one."""

from __future__ import annotations

from visiontuner.aws import Aws
from visiontuner.commands import next_command
from visiontuner.errors import ServingError, UserMistake
from visiontuner.serving.endpoint_parts import Parts, find_endpoint
from visiontuner.serving.endpoint_states import Note, check_ours, delete_endpoint
from visiontuner.serving.surroundings import mlflows_bucket


def undeploy(aws: Aws, name: str, *, artifacts: bool, note: Note) -> dict[str, str]:
    """Delete an endpoint with its configurations and models.

    Where the endpoint is gone, what is left of it: someone deleted it, or undeploying was stopped.

    Args:
        artifacts: the uploaded archives too.

    Returns:
        What was kept, `s3://…`, and the command that deletes it.

    Raises:
        UserMistake: there is no such endpoint, and nothing is left of one; or it is another
            program's.
        ServingError: AWS refuses or cannot be reached.
    """
    described = find_endpoint(aws, name)
    if described is not None:
        check_ours(aws, described, "delete-endpoint")
    served = Parts.in_use(aws, name)
    parts = served.named_after(name).with_(Parts.ours(aws, name))
    if artifacts and not parts.archives:
        parts = parts.with_(_kept_before(aws, name))
    if described is None:
        if not parts:
            raise UserMistake(
                f"There is no endpoint {name!r} in {aws.region}, and no configuration or model of "
                f"one is left; `{next_command('endpoints', flags=aws.flags)}` lists ours."
            )
        note(f"The endpoint {name} is gone already: taking away what is left of it.")
    kept = frozenset[str]() if artifacts else parts.archives
    try:
        if described is not None:
            delete_endpoint(aws, name, note)
        Parts(parts.configs, parts.models, parts.archives - kept).delete(aws)
    except (KeyboardInterrupt, ServingError):
        also = ["--artifacts"] if artifacts else []
        command = next_command("undeploy", name, *also, flags=aws.flags)
        note(f"Not all of {name} is gone; this goes on: {command}")
        raise
    _tell_of_others(served.without(parts), note)
    return {archive: _how_to_delete(aws, name, archive) for archive in sorted(kept)}


def _kept_before(aws: Aws, name: str) -> Parts:
    """Archives whose models an earlier undeploy deleted.

    Only in the bucket that MLflow makes for one account and region: in another one they may be of
    another account's endpoint.
    """
    found = Parts.find(aws, name, mlflows_bucket(aws))
    models = found.models
    return Parts(
        archives=frozenset(url for url in found.archives if url.split("/")[-2] not in models)
    )


def _how_to_delete(aws: Aws, name: str, archive: str) -> str:
    if archive.startswith(f"s3://{mlflows_bucket(aws)}/"):
        return next_command("undeploy", name, "--artifacts", flags=aws.flags)
    return f"aws s3 rm {archive}"


def _tell_of_others(others: Parts, note: Note) -> None:
    left = sorted((*others.configs, *others.models, *others.archives))
    if left:
        note(f"Left alone, as it was not made for this endpoint: {', '.join(left)}")
