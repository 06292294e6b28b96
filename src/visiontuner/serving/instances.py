"""Which SageMaker instance a served model needs, and whether a chosen one fits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from visiontuner.errors import UserMistake

# Name, vCPUs, memory in GiB; from the smallest, of families that every region has.
_INSTANCES = (
    ("ml.c5.large", 2, 4),
    ("ml.m5.large", 2, 8),
    ("ml.m5.xlarge", 4, 16),
    ("ml.m5.2xlarge", 8, 32),
)
SERVERLESS_MB = (1024, 2048, 3072, 4096, 5120, 6144)
# ml.FAMILY.SIZE; of a family's letters after its generation a g means AWS's own ARM processor.
_TYPE = re.compile(r"ml\.[a-z]+\d+(?P<letters>[a-z]*)(-[a-z0-9]+)?\.[a-z0-9-]+")

_ROOM = 1.2  # other formats and pictures than the largest ones that were measured
_SYSTEM_MB = 500  # nginx, MLflow's parent process, the agent


def recommend(*, memory_mb: float, pictures_per_second: float) -> str:
    """The smallest instance whose memory holds the server, and serverless if that does.

    Args:
        memory_mb: the most that the server held, in 10^6 bytes.
        pictures_per_second: measured on this machine, for the sentence.
    """
    needed = _needed_mb(memory_mb)
    fitting = [one for one in _INSTANCES if needed <= one[2] * 1024]
    name, cpus, gigabytes = fitting[0] if fitting else _INSTANCES[-1]
    text = f"{name} ({cpus} vCPUs, {gigabytes} GB): the server needs {needed / 1000:.1f} GB"
    if not fitting:
        text += ", more than that has; choose one with more"
    serverless = next((size for size in SERVERLESS_MB if needed <= size), None)
    if serverless:
        text += f". For a few requests a minute: serverless with {serverless} MB"
    return f"{text}. This machine answers {pictures_per_second:.0f} pictures a second."


def check_instance_type(wanted: str, known: Sequence[str]) -> None:
    """Make sure that an endpoint can run on instances of a type.

    Args:
        known: the types that boto3 knows. AWS may have newer families, whose sizes are not checked.

    Raises:
        UserMistake: there is no such type, or its processor is not the image's.
    """
    match = _TYPE.fullmatch(wanted)
    families = {each.rpartition(".")[0] for each in known}
    if match is None or (wanted.rpartition(".")[0] in families and wanted not in known):
        near = difflib.get_close_matches(wanted, known, 3) or [name for name, *_ in _INSTANCES]
        raise UserMistake(
            f"SageMaker has no instance type {wanted!r} for endpoints. Nearest: {', '.join(near)}."
        )
    if "g" in match["letters"]:
        raise UserMistake(
            f"{wanted} has an ARM processor, and the serving image is for linux/amd64. Choose "
            f"another --instance-type: {', '.join(name for name, *_ in _INSTANCES)}."
        )


def shortage(
    memory_mb: float, *, instance_type: str | None, serverless_mb: int | None
) -> str | None:
    """What is too small about the choice, one sentence; None if it fits, or is not known.

    Args:
        memory_mb: the most that the server held, in 10^6 bytes.
        instance_type: None for a serverless endpoint.
    """
    needed = _needed_mb(memory_mb)
    sizes = {name: 1024 * gigabytes for name, _, gigabytes in _INSTANCES}
    has = serverless_mb or sizes.get(instance_type or "")
    if has is None or needed <= has:
        return None
    name = f"serverless with {serverless_mb} MB" if serverless_mb else instance_type
    return f"{name} is too small: the server needs {needed:,.0f} MB"


def _needed_mb(memory_mb: float) -> float:
    return memory_mb * _ROOM + _SYSTEM_MB
