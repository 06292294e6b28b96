"""What a deployment needs and MLflow leaves to the user: role, image, bucket, price. Found and
checked before anything is made."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from visiontuner.errors import ServingError, UserMistake
from visiontuner.serving.aws import Aws, AwsRefused

IMAGE_VARIABLE = "MLFLOW_SAGEMAKER_DEPLOY_IMG_URL"  # MLflow's
DEFAULT_REPOSITORY = "mlflow-pyfunc"

_IMAGE = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(\.cn)?/"
    r"(?P<repository>[^:@]+)(:(?P<tag>[^@]+))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SAGEMAKER = "sagemaker.amazonaws.com"
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


def find_role(aws: Aws, wanted: str | None) -> str:
    """The ARN of the role that the endpoint runs as.

    Args:
        wanted: its name or ARN; None: the caller's own, or the only one that SageMaker may take on.

    Raises:
        UserMistake: there is none, or several, or SageMaker may not take it on.
    """
    if wanted and wanted.startswith("arn:"):
        return wanted
    name = wanted or _own_role(aws)
    if name:
        try:
            role = aws.call("iam", "get_role", RoleName=name)["Role"]
        except AwsRefused as error:
            if not wanted:
                return _only_role(aws)
            if error.is_missing:
                raise UserMistake(
                    f"The account has no role {name!r}. docs/aws.md shows how to make one."
                ) from None
            raise
        if _is_sagemakers(role):
            return str(role["Arn"])
        if wanted:
            raise UserMistake(
                f"SageMaker may not take on the role {name!r}: its trust policy does not name "
                f"{_SAGEMAKER} (docs/aws.md)."
            )
    return _only_role(aws)


def _own_role(aws: Aws) -> str | None:
    """In a notebook of SageMaker's the caller is such a role."""
    match = re.search(r":assumed-role/([^/]+)/", aws.caller)
    return match[1] if match else None


def _only_role(aws: Aws) -> str:
    try:
        roles = [r["Arn"] for r in aws.pages("iam", "list_roles", "Roles") if _is_sagemakers(r)]
    except AwsRefused:
        raise UserMistake(
            "The caller may not list roles: name the execution role with --role ARN."
        ) from None
    roles = [arn for arn in roles if "/aws-service-role/" not in arn]
    if len(roles) != 1:
        found = f"{len(roles)} roles: {', '.join(sorted(roles)[:5])}" if roles else "no role"
        raise UserMistake(
            f"SageMaker may take on {found}. Name one with --role; docs/aws.md shows how to make "
            "one."
        )
    return str(roles[0])


def _is_sagemakers(role: dict[str, Any]) -> bool:
    policy = role.get("AssumeRolePolicyDocument") or {}
    if isinstance(policy, str):
        policy = json.loads(policy)
    statements = policy.get("Statement", [])
    for statement in statements if isinstance(statements, list) else [statements]:
        principal = statement.get("Principal", {})
        services = principal.get("Service", []) if isinstance(principal, dict) else []
        if statement.get("Effect") == "Allow" and _SAGEMAKER in (
            services if isinstance(services, list) else [services]
        ):
            return True
    return False


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


def find_bucket(aws: Aws, wanted: str | None) -> tuple[str, bool]:
    """Where the model is uploaded, and whether it is there.

    Args:
        wanted: its name; None: MLflow's own, which MLflow makes if it is not there.

    Raises:
        UserMistake: the wanted one is not there, or another account's.
    """
    name = wanted or f"mlflow-sagemaker-{aws.region}-{aws.account}"
    try:
        aws.call("s3", "head_bucket", Bucket=name)
    except AwsRefused as error:
        if error.code not in ("404", "NoSuchBucket") and not error.is_missing:
            raise UserMistake(
                f"The bucket {name!r} cannot be used ({error.code}); name one of this account with "
                "--bucket."
            ) from None
        if wanted:
            raise UserMistake(
                f"There is no bucket {name!r}; make it, or leave --bucket out for MLflow's own."
            ) from None
        return name, False
    return name, True


def hourly_price(aws: Aws, instance_type: str) -> float | None:
    """US dollars an hour for one instance that hosts an endpoint; None if AWS does not say.

    From AWS's public price list, which one region serves for all.
    """
    wanted = {"regionCode": aws.region, "instanceName": instance_type, "component": "Hosting"}
    filters = [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()]
    try:
        products = aws.client("pricing", "us-east-1", patient=False).get_products(
            ServiceCode="AmazonSageMaker", Filters=filters, MaxResults=1
        )
        terms = json.loads(products["PriceList"][0])["terms"]["OnDemand"]
        dimensions = next(iter(terms.values()))["priceDimensions"]
        return float(next(iter(dimensions.values()))["pricePerUnit"]["USD"])
    except Exception:  # whatever it is, the price is not known, and nothing depends on it
        return None
