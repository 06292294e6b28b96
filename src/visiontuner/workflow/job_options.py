"""What a user may choose of a training job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from visiontuner.errors import UserMistake
from visiontuner.experiment import parse_duration

DEFAULT_INSTANCE = "ml.g5.xlarge"
DEFAULT_MAX_RUN = "2h"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a user may choose; None: found, or a default, or with `resume` as that job had it.

    What is empty and not None is left out, even if the job that is resumed had it.

    Args:
        image: URL of a training image in ECR; AWS's PyTorch image if None.
        image_version: of PyTorch in AWS's image, as `2.8`; the newest if None.
        role: name or ARN of the role that the job runs as.
        bucket: for everything the job keeps; by default SageMaker's of this account and region.
        max_run: how long the job may run, as `2h`.
        max_cost: US dollars; shortens `max_run`.
        price: US dollars for an hour of one instance.
        volume: GB of each machine's disk; by the size of the pictures if None.
        warm_pool: how long machines stay for a next job, as `30m`.
        tags: with `resume` beside those of that job.
        upload: `s3://BUCKET/FOLDER`, where pictures of this machine are brought.
        resume: a job of ours; its search goes on from its checkpoints.
    """

    instances: int | None = None
    instance_type: str | None = None
    image: str | None = None
    image_version: str | None = None
    role: str | None = None
    bucket: str | None = None
    region: str | None = None
    assume_role: str | None = None
    spot: bool | None = None
    max_run: str | None = None
    max_cost: float | None = None
    price: float | None = None
    volume: int | None = None
    warm_pool: str | None = None
    subnets: tuple[str, ...] | None = None
    security_groups: tuple[str, ...] | None = None
    kms_key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    upload: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        if self.image and self.image_version:
            raise UserMistake("--image-version is of AWS's image: leave it or --image out.")

    @property
    def max_run_seconds(self) -> float:
        """Raises UserMistake: it is no time."""
        return _seconds("--max-run", self.max_run or DEFAULT_MAX_RUN)

    @property
    def warm_pool_seconds(self) -> float:
        """Raises UserMistake: it is no time."""
        return _seconds("--warm-pool", self.warm_pool) if self.warm_pool else 0.0


def _seconds(flag: str, text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if not isinstance(seconds, float) or seconds < 60:
        raise UserMistake(
            f"{flag} takes a time such as 30m or 2h, of a minute at least, got {text!r}."
        )
    return seconds
