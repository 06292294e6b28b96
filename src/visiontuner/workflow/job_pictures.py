"""The pictures of a job: on S3, brought there, or fetched by the job itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from visiontuner.data.objects import files_in, split_folder
from visiontuner.errors import UserMistake
from visiontuner.experiment import Experiment

if TYPE_CHECKING:
    from visiontuner.aws import Aws
    from visiontuner.sagemaker.plan import JobPlan, Pictures


def check_source(experiment: Experiment, upload: str | None) -> None:
    """Refuse what a job could not read, before AWS is asked for anything.

    Args:
        upload: `s3://BUCKET/FOLDER`, where pictures of this machine are brought.

    Raises:
        UserMistake: pictures or weights of this machine, or no pictures that could be uploaded.
    """
    from visiontuner.sagemaker.limits import check_no_apostrophe

    source, weights = experiment.data.source, experiment.model.weights
    check_no_apostrophe("The data source", source)
    check_no_apostrophe("--upload", upload or "")
    if weights not in ("default", "none") and "://" not in weights:
        raise UserMistake(
            f"model.weights is {weights}, a file of this machine; bring it to S3 or to an https "
            "server and name that."
        )
    if not _is_elsewhere(source):
        _check_folder(source, upload)
    elif upload is not None:
        raise UserMistake(
            f"--upload brings pictures of this machine to S3, and the data source is {source}: "
            "leave --upload out, or name a folder as --data."
        )


def _check_folder(source: str, upload: str | None) -> None:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserMistake(f"There is no data at {source}; name a folder, or s3://BUCKET/FOLDER.")
    if upload is None:
        raise UserMistake(
            f"{source} is on this machine, where a job cannot read it. Add --upload "
            f"s3://BUCKET/{path.resolve().name}, or name pictures that are on S3 already."
        )
    if not path.is_dir():
        raise UserMistake(f"--upload takes a folder, and {source} is a file: unpack it first.")


def _is_elsewhere(source: str) -> bool:
    return source == "digits" or source.split("://")[0].lower() in ("s3", "http", "https")


def find_pictures(aws: Aws, experiment: Experiment, upload: str | None) -> Pictures | None:
    """What a job reads from S3; None if it fetches its pictures itself.

    Raises:
        UserMistake: there is nothing, no such bucket, or one in another region.
    """
    from visiontuner.sagemaker.plan import Pictures
    from visiontuner.sagemaker.surroundings import as_channel, size_on_s3

    source = experiment.data.source
    if source.lower().startswith("s3://"):
        uri = as_channel(source)
        return Pictures(uri=uri, size=size_on_s3(aws, uri))
    if _is_elsewhere(source):
        return None
    return _to_upload(aws, Path(source).expanduser().resolve(), upload or "")


def _to_upload(aws: Aws, folder: Path, upload: str) -> Pictures:
    from visiontuner.data.s3 import connect, explained, list_files
    from visiontuner.sagemaker.plan import Pictures
    from visiontuner.sagemaker.surroundings import require_bucket

    bucket, prefix = split_folder(upload)
    uri = f"s3://{bucket}/{prefix}"
    require_bucket(aws, uri)
    files = files_in(folder)
    with explained(bucket, "read"):
        there = list_files(connect(aws.session, aws.region), bucket, prefix)
    return Pictures(
        uri=uri,
        size=sum(path.stat().st_size for path in files.values()),
        upload=folder,
        others=len({remote.name for remote in there} - files.keys()),
    )


def upload_pictures(
    aws: Aws,
    plan: JobPlan,
    *,
    note: Callable[[str], None],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Bring the pictures where the job reads them, as far as they are not there."""
    if plan.pictures is None or plan.pictures.upload is None:
        return
    from visiontuner.data.s3 import connect
    from visiontuner.data.storage import upload_folder

    moved = upload_folder(
        plan.pictures.upload,
        plan.pictures.uri,
        client=connect(aws.session, aws.region),
        kms_key=plan.kms_key,
        progress=progress,
        note=note,
    )
    note(
        f"Uploaded {moved.files:,} pictures to {plan.pictures.uri}; {moved.skipped:,} were "
        "there already."
    )
