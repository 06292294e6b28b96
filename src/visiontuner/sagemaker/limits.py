"""What SageMaker refuses of a job, before anything is made."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING

from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.sagemaker.plan import JobPlan

LONGEST_SECONDS = 28 * 24 * 3600

_INSTANCE = re.compile(r"ml\.[a-z0-9-]+\.[a-z0-9]+")
_LARGEST_DISK_GB = 16384
# As botocore's model of SageMaker has them (TagList, TagKey, TagValue).
_TAGS = 48  # 50, and two are ours
_KEY_LENGTH, _VALUE_LENGTH = 128, 256
_TAG_SIGNS = "_.:/=+-@"
_TAG_CATEGORIES = "LZN"  # letters, spaces, digits
_RESERVED = ("aws:", "visiontuner.")


def check_choices(plan: JobPlan) -> None:
    """Refuse what SageMaker refuses.

    Raises:
        UserMistake: with the flag to change.
    """
    if not _INSTANCE.fullmatch(plan.instance_type):
        raise UserMistake(
            f"--instance-type takes a name such as ml.g5.xlarge, got {plan.instance_type!r}."
        )
    if plan.spot and plan.warm_pool_seconds:
        raise UserMistake("SageMaker keeps no spot machines warm: leave --spot or --warm-pool out.")
    if bool(plan.subnets) != bool(plan.security_groups):
        raise UserMistake("A VPC needs both: name --subnets and --security-groups.")
    if plan.warm_pool_seconds > 3600:
        raise UserMistake("SageMaker keeps machines warm for an hour at most (--warm-pool 1h).")
    if plan.max_run_seconds > LONGEST_SECONDS:
        raise UserMistake("A training job runs for 28 days at most (--max-run 28d).")
    _check_disk(plan)
    check_tags(plan.tags)


def _check_disk(plan: JobPlan) -> None:
    if plan.disk_gb is None:
        return
    if plan.has_own_disk:
        raise UserMistake(
            f"{plan.instance_type} has a disk of its own, of a fixed size: leave --volume out, or "
            "choose a larger --instance-type."
        )
    if not 1 <= plan.disk_gb <= _LARGEST_DISK_GB:
        raise UserMistake(f"--volume takes 1 to {_LARGEST_DISK_GB} GB, got {plan.disk_gb}.")


def check_tags(tags: Mapping[str, str]) -> None:
    """Refuse tags that AWS refuses, and those that are ours.

    Raises:
        UserMistake: naming the first.
    """
    if len(tags) > _TAGS:
        raise UserMistake(f"AWS allows {_TAGS} tags beside ours, got {len(tags)}.")
    for key, value in tags.items():
        reason = _reason_against(key, value)
        if reason:
            shown = f"{key}={value}"
            raise UserMistake(f"--tag {shown[:60]!r}: {reason}.")


def _reason_against(key: str, value: str) -> str | None:
    if key.lower().startswith(_RESERVED):
        return f"keys that begin with {' or '.join(_RESERVED)} are taken"
    if not 1 <= len(key) <= _KEY_LENGTH:
        return f"a key has 1 to {_KEY_LENGTH} characters, got {len(key)}"
    if len(value) > _VALUE_LENGTH:
        return f"a value has {_VALUE_LENGTH} characters at most, got {len(value)}"
    for sign in key + value:
        if sign not in _TAG_SIGNS and unicodedata.category(sign)[0] not in _TAG_CATEGORIES:
            return f"AWS takes letters, digits, spaces and {_TAG_SIGNS} in a tag, not {sign!r}"
    return None


def check_no_apostrophe(what: str, value: str) -> None:
    """An apostrophe ends the quotation in the SDK's start script on the hosts.

    Raises:
        UserMistake: there is one.
    """
    if "'" in value:
        raise UserMistake(
            f"{what} has an apostrophe ({value}), which SageMaker's start script does not survive; "
            "choose another."
        )
