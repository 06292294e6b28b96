"""The serving image that a deployment needs and MLflow leaves to the user, checked beforehand."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from visiontuner.aws import Aws, AwsRefused
from visiontuner.errors import ServingError, UserMistake

IMAGE_VARIABLE = "MLFLOW_SAGEMAKER_DEPLOY_IMG_URL"  # MLflow's
DEFAULT_REPOSITORY = "mlflow-pyfunc"

_IMAGE = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[^:@]+)(:(?P<tag>[^@]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_DOCKER_TYPES = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_OCI_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
)
_REBUILD = "docker buildx build --platform linux/amd64 --provenance=false --output type=docker …"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A container image in ECR; `platform` is None where it could not be looked up."""

    url: str
    digest: str
    platform: str | None


def find_image(aws: Aws, wanted: str | None) -> Image:
    """The serving image, known to be in ECR and fit for SageMaker.

    Args:
        wanted: its URL; None: the environment's, or the one that `mlflow sagemaker
            build-and-push-container` pushes.

    Raises:
        UserMistake: it is not there, in another region, for another processor, or of a format that
            SageMaker refuses.
    """
    import mlflow.version

    domain = "amazonaws.com.cn" if aws.region.startswith("cn-") else "amazonaws.com"
    url = wanted or os.environ.get(IMAGE_VARIABLE)
    url = url or (
        f"{aws.account}.dkr.ecr.{aws.region}.{domain}/{DEFAULT_REPOSITORY}:{mlflow.version.VERSION}"
    )
    match = _IMAGE.fullmatch(url)
    if match is None:
        raise UserMistake(
            f"{url!r} is no image in ECR; SageMaker takes "
            f"{aws.account}.dkr.ecr.{aws.region}.{domain}/NAME:TAG."
        )
    if match["region"] != aws.region:
        raise UserMistake(
            f"The image is in {match['region']} and the endpoint would be in {aws.region}: push it "
            "there, or choose the image's with --region."
        )
    return _look_up(aws, url, match)


def _look_up(aws: Aws, url: str, match: re.Match[str]) -> Image:
    wanted = (
        {"imageDigest": match["digest"]}
        if match["digest"]
        else {"imageTag": match["tag"] or "latest"}
    )
    where = {"registryId": match["account"], "repositoryName": match["repository"]}
    try:
        found = aws.call(
            "ecr",
            "batch_get_image",
            imageIds=[wanted],
            acceptedMediaTypes=[*_DOCKER_TYPES, *_OCI_TYPES],
            **where,
        )["images"]
    except AwsRefused as error:
        if not error.is_missing:
            raise
        found = []
    if not found:
        raise UserMistake(
            f"There is no image {url}. Push one with `mlflow sagemaker build-and-push-container`, "
            "or name another with --image."
        )
    manifest = json.loads(found[0]["imageManifest"])
    kind = found[0].get("imageManifestMediaType") or manifest.get("mediaType", "")
    if kind in _OCI_TYPES:
        raise UserMistake(
            f"SageMaker refuses images of type {kind}, which newer Docker builds make. Build it "
            f"with `{_REBUILD}` and push it again."
        )
    platform = _platform(aws, where, manifest)
    if platform not in (None, "linux/amd64"):
        raise UserMistake(
            f"The image is for {platform}, and this endpoint's instances are linux/amd64. Build it "
            f"with `{_REBUILD}`."
        )
    return Image(url=url, digest=found[0]["imageId"]["imageDigest"], platform=platform)


def _platform(aws: Aws, where: dict[str, str], manifest: dict[str, Any]) -> str | None:
    """`linux/amd64`, or None if neither the manifest nor its configuration can say."""
    import requests

    if "manifests" in manifest:
        platforms = [
            f"{entry['platform'].get('os')}/{entry['platform'].get('architecture')}"
            for entry in manifest["manifests"]
            if "platform" in entry
        ]
        return "linux/amd64" if "linux/amd64" in platforms else ", ".join(platforms) or None
    try:
        digest = manifest["config"]["digest"]
        layer = aws.call("ecr", "get_download_url_for_layer", layerDigest=digest, **where)
        config = requests.get(layer["downloadUrl"], timeout=10).json()
        return f"{config['os']}/{config['architecture']}"
    except (ServingError, requests.RequestException, ValueError, LookupError):
        return None
