"""What a job needs beside an account's role and bucket: image, quota, pictures on S3."""

from __future__ import annotations

import re

from visiontuner.aws import Aws, AwsRefused, explained
from visiontuner.aws_account import check_bucket_region
from visiontuner.aws_images import PLATFORM, look_up_image
from visiontuner.data.archive import is_archive_name
from visiontuner.data.objects import split_uri
from visiontuner.errors import ServingError, UserMistake

_ARM = re.compile(r"-gb\d")  # NVIDIA's Grace processors
_QUOTAS_SHOWN = "Service Quotas, Amazon SageMaker"


def find_image(aws: Aws, wanted: str | None, instance_type: str) -> str:
    """AWS's newest PyTorch training image that the SDK knows, for a region and a kind of machine.

    Args:
        wanted: the URL of another one in ECR.

    Raises:
        UserMistake: AWS has none there; the wanted one is not there, in another region, or for
            another processor.
    """
    if wanted:
        _check_image(aws, wanted, instance_type)
        return wanted
    from packaging.version import Version
    from sagemaker.core import image_uris

    try:
        with explained("look for an image"):
            known = image_uris.list_versions("pytorch", "training")
            # 2.10 and 2.10.0 are the same: the longer name is the exact one.
            version = max(known, key=lambda text: (Version(text), len(text)))
            pythons = image_uris.list_py_versions("pytorch", version, "training")
            image: str = image_uris.retrieve(
                "pytorch",
                aws.region,
                version=version,
                py_version=pythons[-1],
                instance_type=instance_type,
                image_scope="training",
            )
            return image
    except ValueError as error:
        raise UserMistake(
            f"AWS has no PyTorch image for {instance_type} in {aws.region} "
            f"({' '.join(str(error).split())[:160]}). Name one with --image."
        ) from None


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
