"""A job's flags, as words -> what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from visiontuner.cli.options import NOT_GIVEN
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.workflow.job_options import JobOptions

OFF = "off"
"""Leaves out what a job that is resumed had."""
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, OFF: False}


def read_options(job: dict[str, Any], resume: str | None) -> JobOptions:
    """What `cloud.job_flags` say.

    Raises:
        UserMistake: a word that is none of those a flag takes.
    """
    from visiontuner.workflow.job_options import JobOptions

    text = {key: _given(value) for key, value in job.items() if isinstance(value, str)}
    instances = _whole("--instances", text["instances"])
    if instances is not None and not 1 <= instances <= 100:
        raise UserMistake(f"--instances takes a number from 1 to 100, got {instances}.")
    return JobOptions(
        instances=instances,
        instance_type=text["instance_type"],
        image=text["image"],
        image_version=text["image_version"],
        role=text["role"],
        bucket=text["bucket"],
        region=text["region"],
        assume_role=text["assume_role"],
        spot=is_on("--spot", job["spot"]),
        max_run=text["max_run"],
        max_cost=_number("--max-cost", text["max_cost"]),
        price=_number("--price", text["price"]),
        volume=_whole("--volume", text["volume"]),
        warm_pool=_or_empty(text["warm_pool"]),
        subnets=_listed(text["subnets"]),
        security_groups=_listed(text["security_groups"]),
        kms_key=_or_empty(text["kms_key"]),
        tags=dict(_pair(tag) for tag in job["tags"]),
        upload=text["upload"],
        resume=resume,
    )


def _given(text: str) -> str | None:
    return None if text in NOT_GIVEN else text


def _or_empty(text: str | None) -> str | None:
    return "" if text == OFF else text


def _listed(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return tuple(part for part in parts if part not in ("", OFF))


def is_on(flag: str, text: str) -> bool | None:
    """What `yes_or_no` was told; None if it was not given.

    Raises:
        UserMistake: it is neither yes nor no.
    """
    if text in NOT_GIVEN:
        return None
    if text.lower() not in _SWITCH:
        raise UserMistake(f"{flag} takes true or off, got {text!r}.")
    return _SWITCH[text.lower()]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserMistake(f"--tag takes KEY=VALUE, got {text!r}.")
    return key, value


def _whole(flag: str, text: str | None) -> int | None:
    value = _number(flag, text)
    if value is not None and value != int(value):
        raise UserMistake(f"{flag} takes a whole number, got {text!r}.")
    return None if value is None else int(value)


def _number(flag: str, text: str | None) -> float | None:
    """A flag's number, or None if it was not given.

    Raises:
        UserMistake: it is none from 0.
    """
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value < 1e6:
        raise UserMistake(f"{flag} takes a number from 0, got {text!r}.")
    return value
