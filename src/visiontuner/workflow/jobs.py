"""The training jobs that run our searches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visiontuner.sagemaker.job import Job


def jobs(region: str | None = None, assume_role: str | None = None) -> list[Job]:
    """Ours in a region, the newest first."""
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.job import find_jobs

    return find_jobs(Aws(region, assume_role))


def stop(name: str, region: str | None = None, assume_role: str | None = None) -> str:
    """End a job in order; its checkpoints stay.

    Returns:
        What the next commands need beside its name, to find it from anywhere.

    Raises:
        UserMistake: there is no such job, it is not ours, or it has ended.
    """
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.job import describe
    from visiontuner.sagemaker.job import stop as end

    aws = Aws(region, assume_role)
    end(aws, describe(aws, name))
    return aws.flags
