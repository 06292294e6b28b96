"""A container image in ECR, looked at before SageMaker is asked to start it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from visiontuner.aws import Aws, AwsRefused
from visiontuner.errors import ServingError, UserMistake

OCI_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
)
PLATFORM = "linux/amd64"

_IMAGE = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[^:@]+)(:(?P<tag>[^@]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_DOCKER_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


@dataclass(frozen=True, kw_only=True)
class Image:
    """A container image in ECR; `platform` is None where it could not be looked up.

    `media_type` is of its manifest.
    """

    url: str
    digest: str
    platform: str | None
    media_type: str = ""


def registry(aws: Aws) -> str:
    """The host of the account's own registry in its region."""
    domain = "amazonaws.com.cn" if aws.region.startswith("cn-") else "amazonaws.com"
    return f"{aws.account}.dkr.ecr.{aws.region}.{domain}"


def look_up_image(aws: Aws, url: str, *, runs: str, advice: str) -> Image:
    """What ECR says of an image.

    Args:
        runs: what would run it, as `The endpoint`.
        advice: what to do if it is not there, as a sentence.

    Raises:
        UserMistake: it is in no ECR, in another region's, or not there.
        AwsRefused: the caller may not look.
    """
    match = _IMAGE.fullmatch(url)
    if match is None:
        raise UserMistake(f"{url!r} is no image in ECR; SageMaker takes {registry(aws)}/NAME:TAG.")
    if match["region"] != aws.region:
        raise UserMistake(
            f"The image is in {match['region']} and {runs} would be in {aws.region}: push it "
            "there, or choose the image's with --region."
        )
    where = {"registryId": match["account"], "repositoryName": match["repository"]}
    found = _find(aws, match, where)
    if found is None:
        raise UserMistake(f"There is no image {url}. {advice}")
    manifest = json.loads(found["imageManifest"])
    return Image(
        url=url,
        digest=found["imageId"]["imageDigest"],
        platform=_platform(aws, where, manifest),
        media_type=found.get("imageManifestMediaType") or manifest.get("mediaType", ""),
    )


def _find(aws: Aws, match: re.Match[str], where: dict[str, str]) -> dict[str, Any] | None:
    tag, digest = match["tag"] or "latest", match["digest"]
    try:
        found: list[dict[str, Any]] = aws.call(
            "ecr",
            "batch_get_image",
            imageIds=[{"imageDigest": digest} if digest else {"imageTag": tag}],
            acceptedMediaTypes=[*_DOCKER_TYPES, *OCI_TYPES],
            **where,
        )["images"]
    except AwsRefused as error:
        if not error.is_missing:
            raise
        return None
    return found[0] if found else None


def _platform(aws: Aws, where: dict[str, str], manifest: dict[str, Any]) -> str | None:
    """`linux/amd64`, or None if neither the manifest nor its configuration can say."""
    import requests

    if "manifests" in manifest:
        platforms = [
            f"{entry['platform'].get('os')}/{entry['platform'].get('architecture')}"
            for entry in manifest["manifests"]
            if "platform" in entry
        ]
        return PLATFORM if PLATFORM in platforms else ", ".join(platforms) or None
    try:
        digest = manifest["config"]["digest"]
        layer = aws.call("ecr", "get_download_url_for_layer", layerDigest=digest, **where)
        config = requests.get(layer["downloadUrl"], timeout=10).json()
        return f"{config['os']}/{config['architecture']}"
    except (ServingError, requests.RequestException, ValueError, LookupError):
        return None
