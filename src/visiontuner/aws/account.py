"""What SageMaker's endpoints and jobs need of an account: role, bucket, price, container image."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import requests

from visiontuner.errors import ServingError, UserMistake
from visiontuner.io.aws import Aws, AwsRefused

# What SageMaker's endpoints and jobs need of an account: role, bucket, price. Found and checked
# before anything is made.


_SAGEMAKER = "sagemaker.amazonaws.com"


def find_role(aws: Aws, wanted: str | None) -> str:
    """The ARN of the role that an endpoint or a job runs as.

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


def find_bucket(aws: Aws, wanted: str | None, *, default: str) -> tuple[str, bool]:
    """Where things are uploaded, and whether it is there.

    Args:
        wanted: its name; None: the default, which `make_bucket` makes where it is used.

    Raises:
        UserMistake: the wanted one is not there, another account's, or in another region.
    """
    name = wanted or default
    try:
        check_bucket_region(aws, name, owner=aws.account)
    except AwsRefused as error:
        if error.code not in ("404", "NoSuchBucket") and not error.is_missing:
            raise UserMistake(
                f"The bucket {name!r} cannot be used ({error.code}); name one of this account with "
                "--bucket."
            ) from None
        if wanted:
            raise UserMistake(
                f"There is no bucket {name!r}; make it, or leave --bucket out for {default}."
            ) from None
        return name, False
    return name, True


def make_bucket(aws: Aws, bucket: str) -> None:
    """A private bucket in the caller's region, without an ACL.

    Raises:
        AwsRefused: another account has it, say.
    """
    where = {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
    aws.call("s3", "create_bucket", Bucket=bucket, **({} if aws.region == "us-east-1" else where))


def check_bucket_region(aws: Aws, bucket: str, *, owner: str | None = None) -> None:
    """SageMaker reads and writes in its own region only.

    Args:
        owner: the account that has to hold the bucket; None: whoever does.

    Raises:
        UserMistake: the bucket is elsewhere.
        AwsRefused: it is not there, or not for this caller.
    """
    expected = {"ExpectedBucketOwner": owner} if owner else {}
    answer = aws.call("s3", "head_bucket", Bucket=bucket, **expected)
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = answer.get("BucketRegion") or headers.get("x-amz-bucket-region")
    if region and region != aws.region:
        raise UserMistake(
            f"The bucket {bucket!r} is in {region}, and SageMaker in {aws.region} takes buckets of "
            f"its own region only: choose --region {region}, or another bucket."
        )


def hourly_price(
    aws: Aws, instance_type: str, component: Literal["Hosting", "Training"] = "Hosting"
) -> float | None:
    """US dollars an hour for one instance, on demand; None if AWS does not say.

    From AWS's public price list, which one region serves for all.
    """
    wanted = {"regionCode": aws.region, "instanceName": instance_type, "component": component}
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


# A container image in ECR, looked at before SageMaker is asked to start it.


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
class ContainerImage:
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


def look_up_container_image(aws: Aws, url: str, *, runs: str, advice: str) -> ContainerImage:
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
        raise UserMistake(
            f"{url!r} is no container image in ECR; SageMaker takes {registry(aws)}/NAME:TAG."
        )
    if match["region"] != aws.region:
        raise UserMistake(
            f"The container image is in {match['region']} and {runs} would be in {aws.region}: "
            "push it there, or choose the image's with --region."
        )
    where = {"registryId": match["account"], "repositoryName": match["repository"]}
    found = _find(aws, match, where)
    if found is None:
        raise UserMistake(f"There is no container image {url}. {advice}")
    manifest = json.loads(found["imageManifest"])
    return ContainerImage(
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
