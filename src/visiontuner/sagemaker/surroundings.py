"""What a job needs beside an account's role and bucket: image, quota, pictures on S3."""

from __future__ import annotations

import re

from visiontuner.aws import Aws, AwsRefused, explained
from visiontuner.aws_account import check_bucket_region
from visiontuner.aws_images import PLATFORM, look_up_image
from visiontuner.data.archive import is_archive_name
from visiontuner.data.objects import split_uri
from visiontuner.errors import ServingError, UserMistake
from visiontuner.text import one_line

_OLDEST_PYTHON = 11  # 3.11
_AWSS_IMAGE = re.compile(r"/pytorch-training:([\d.]+)-(?:cpu|gpu)-")
_ARM = re.compile(r"-gb\d")  # NVIDIA's Grace processors
_QUOTAS_SHOWN = "Service Quotas, Amazon SageMaker"


def find_image(
    aws: Aws, wanted: str | None, instance_type: str, *, version: str | None = None
) -> str:
    """AWS's PyTorch training image for a region and a kind of machine, as the SDK knows it.

    Args:
        wanted: the URL of another one in ECR.
        version: of PyTorch, as `2.8`; the newest if None.

    Raises:
        UserMistake: AWS has none there; the wanted one is not there, in another region, or for
            another processor.
    """
    if wanted:
        _check_image(aws, wanted, instance_type)
        return wanted
    from sagemaker.core import image_uris

    try:
        with explained("look for an image"):
            exact = _exact_version(image_uris.list_versions("pytorch", "training"), version)
            image: str = image_uris.retrieve(
                "pytorch",
                aws.region,
                version=exact,
                py_version=_newest_python(exact),
                instance_type=instance_type,
                image_scope="training",
            )
            return image
    except ValueError as error:
        raise UserMistake(
            f"AWS has no PyTorch image for {instance_type} in {aws.region} "
            f"({one_line(error, 160)}). Name one with --image."
        ) from None


def _exact_version(known: list[str], version: str | None) -> str:
    """The newest of the known ones, or of those that a version stands for, as 2.8.0 of 2.8."""
    from packaging.version import Version

    # 2.10 and 2.10.0 are the same: the longer name is the exact one.
    ordered = sorted(known, key=lambda text: (Version(text), len(text)))
    fitting = [text for text in ordered if version is None or f"{text}.".startswith(f"{version}.")]
    if not fitting:
        newest = ", ".join([text for text in ordered if text.count(".") == 1][-4:])
        raise UserMistake(f"AWS has no image with PyTorch {version}. The newest: {newest}.")
    return fitting[-1]


def _newest_python(version: str) -> str:
    from sagemaker.core import image_uris

    newest: str = image_uris.list_py_versions("pytorch", version, "training")[-1]
    if int(newest.removeprefix("py3")) < _OLDEST_PYTHON:
        raise UserMistake(
            f"AWS's image with PyTorch {version} has Python 3.{newest.removeprefix('py3')}, and "
            f"visiontuner needs 3.{_OLDEST_PYTHON}. Choose a newer --image-version."
        )
    return newest


def awss_version(image: str) -> str | None:
    """The PyTorch version of one of AWS's own images; None if it is another one."""
    match = _AWSS_IMAGE.search(image)
    return match[1] if match else None


def _check_image(aws: Aws, url: str, instance_type: str) -> None:
    try:
        advice = "Push it there, or leave --image out for AWS's PyTorch image."
        image = look_up_image(aws, url, runs="the job", advice=advice)
    except AwsRefused:  # not every caller may look; SageMaker itself refuses then
        return
    if image.platform not in (None, PLATFORM) and not _ARM.search(instance_type):
        raise UserMistake(
            f"The image is for {image.platform}, and {instance_type} is {PLATFORM}. Build it with "
            "`docker buildx build --platform linux/amd64 …`."
        )


def check_quota(
    aws: Aws, instance_type: str, instances: int, *, spot: bool, warm_pool: bool
) -> None:
    """Refuse what the account may not start; silent where AWS does not say.

    Raises:
        UserMistake: a quota is smaller than the number of instances.
    """
    usages = ["spot training job usage" if spot else "training job usage"]
    if warm_pool:
        usages.append("training warm pool usage")
    quotas = _quotas(aws)
    for usage in usages:
        name = f"{instance_type} for {usage}"
        if quotas.get(name, instances) < instances:
            without = ", leave --warm-pool out" if "warm pool" in usage else ""
            raise UserMistake(
                f"The account may use {quotas[name]:g} of {name} in {aws.region}, and {instances} "
                f"{'is' if instances == 1 else 'are'} asked for. Ask for a higher quota "
                f"({_QUOTAS_SHOWN}){without}, or choose another --instance-type or --region."
            )


def _quotas(aws: Aws) -> dict[str, float]:
    """The account's for SageMaker, by name."""
    try:
        found = aws.pages(
            "service-quotas", "list_service_quotas", "Quotas", ServiceCode="sagemaker"
        )
        return {quota["QuotaName"]: float(quota["Value"]) for quota in found}
    except ServingError:  # not every caller may ask; SageMaker itself refuses then
        return {}


def size_on_s3(aws: Aws, uri: str) -> int:
    """Bytes of the pictures under a URI.

    Raises:
        UserMistake: there is nothing, the bucket is not there, or in another region.
    """
    require_bucket(aws, uri)
    bucket, key = split_uri(uri)
    pages = aws.pages("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=key)
    size = sum(int(entry["Size"]) for entry in pages)
    if not size:
        raise UserMistake(
            f"There are no pictures at {uri}. Name the folder that holds them as --data and add "
            f"--upload {uri}."
        )
    return size


def require_bucket(aws: Aws, uri: str) -> None:
    """Make sure that there is a bucket for pictures.

    Raises:
        UserMistake: there is none, not for this caller, or in another region.
    """
    bucket = split_uri(uri)[0]
    try:
        check_bucket_region(aws, bucket)
    except AwsRefused as error:
        missing = error.is_missing or error.code == "404"
        if not missing and error.code != "403":
            raise
        why = "There is no bucket" if missing else "No access to"
        raise UserMistake(f"{why} {bucket!r}, where {uri} would be.") from None


def as_channel(uri: str) -> str:
    """A folder ends with a slash: without one `dogs` would hold `dogs2` as well."""
    return uri if is_archive_name(uri) or uri.endswith("/") else f"{uri}/"
