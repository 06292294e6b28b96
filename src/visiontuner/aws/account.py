"""What SageMaker's endpoints and jobs need of an account: role, bucket, price, container image."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import requests

from visiontuner.errors import ServingError, UserMistake
from visiontuner.io.aws import Aws, AwsRefused
from visiontuner.paths import split_uri

# What SageMaker's endpoints and jobs need of an account: role, bucket, price. Found and checked
# before anything is made.


_SAGEMAKER = "sagemaker.amazonaws.com"
_PRICING_REGION = "us-east-1"
# As AWS's price list has them in `usagetype`, after the region's letters.
_USAGE = {"Hosting": "Host", "Async": "AsyncInf", "Training": "Train", "Transform": "Tsform"}


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


def require_bucket(aws: Aws, uri: str) -> None:
    """Make sure that there is a bucket for what a user has named.

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


def hourly_price(
    aws: Aws,
    instance_type: str,
    use: Literal["Hosting", "Async", "Training", "Transform"] = "Hosting",
) -> float | None:
    """US dollars an hour for one instance, on demand; None if AWS does not say.

    From AWS's public price list, which one region serves for all. A machine has a product for each
    use, several of them with the same name (clusters, spaces, reserved ones): the one that is meant
    is told by its usage type, as `EUW1-Host:ml.m5.large`.
    """
    wanted = {"regionCode": aws.region, "instanceName": instance_type}
    filters = [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in wanted.items()]
    usage = re.compile(rf"([A-Z0-9]+-)?{_USAGE[use]}:{re.escape(instance_type)}")
    try:
        pages = aws.client("pricing", _PRICING_REGION, patient=False).get_paginator("get_products")
        for page in pages.paginate(ServiceCode="AmazonSageMaker", Filters=filters):
            for product in map(json.loads, page["PriceList"]):
                if usage.fullmatch(product["product"]["attributes"].get("usagetype", "")):
                    return _on_demand(product)
    except Exception:  # whatever it is, the price is not known, and nothing depends on it
        pass
    return None


def _on_demand(product: Mapping[str, Any]) -> float | None:
    """US dollars an hour; None if it is priced otherwise."""
    for term in product["terms"]["OnDemand"].values():
        for dimension in term["priceDimensions"].values():
            if dimension.get("unit") == "Hrs" and "USD" in dimension["pricePerUnit"]:
                return float(dimension["pricePerUnit"]["USD"])
    return None


# How many machines an account may use at all.


_QUOTAS_SHOWN = "Service Quotas, Amazon SageMaker"


def refuse_small_quotas(
    aws: Aws, names: Sequence[str], instances: int, *, advice: Mapping[str, str] | None = None
) -> None:
    """Refuse what the account may not start; silent where AWS does not say.

    Args:
        names: of quotas, as `ml.m5.large for endpoint usage`.
        advice: what else helps, by a part of a quota's name.

    Raises:
        UserMistake: a quota is smaller than the number of instances.
    """
    quotas = _quotas(aws)
    for name in names:
        if quotas.get(name, instances) < instances:
            also = [text for part, text in (advice or {}).items() if part in name]
            raise UserMistake(
                f"The account may use {quotas[name]:g} of {name} in {aws.region}, and {instances} "
                f"{'is' if instances == 1 else 'are'} asked for. Ask for a higher quota "
                f"({_QUOTAS_SHOWN}){''.join(', ' + text for text in also)}, or choose another "
                "--instance-type or --region."
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


# What SageMaker's kinds of machines differ in.


def instance_types(aws: Aws, shape: str) -> list[str]:
    """Those of one of SageMaker's shapes, as far as this boto3 knows them; asks nobody."""
    return list(aws.client("sagemaker").meta.service_model.shape_for(shape).enum)


# As the SageMaker SDK's `volume_size_supported` has them, and all of p6 (EC2's list of instance
# store volumes). An unknown family counts as one without: SageMaker says then what it refuses.
_FAMILIES_WITH_DISKS = ("g5", "g6", "g7e", "p5", "p6", "trn1", "trn2")


def has_own_disk(instance_type: str) -> bool:
    """Whether a machine has NVMe disks of its own, as ml.g5, ml.g4dn and ml.r5d have.

    SageMaker then attaches no volume: the size is fixed, and the hardware encrypts it with a key of
    its own.
    """
    family = instance_type.removeprefix("ml.").split(".")[0]
    return "d" in family or family.startswith(_FAMILIES_WITH_DISKS)


# What AWS refuses of tags, before anything is made.


# As botocore's model of SageMaker has them (TagList, TagKey, TagValue).
TAGS = 48  # 50, and two are ours
_KEY_LENGTH, _VALUE_LENGTH = 128, 256
_TAG_SIGNS = "_.:/=+-@"
_TAG_CATEGORIES = "LZN"  # letters, spaces, digits
_RESERVED = ("aws:", "visiontuner.")


def check_tags(tags: Mapping[str, str], *, most: int = TAGS) -> None:
    """Refuse tags that AWS refuses, and those that are ours.

    Args:
        most: how many are allowed beside ours.

    Raises:
        UserMistake: naming the first.
    """
    if len(tags) > most:
        raise UserMistake(f"AWS allows {most} tags beside ours, got {len(tags)}.")
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


# What AWS refuses of environment variables, before anything is made.


_VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,511}")
_VARIABLES = 80  # 100, and some are ours and MLflow's


def check_variables(variables: Mapping[str, str], *, longest: int) -> None:
    """Refuse variables of a container that SageMaker refuses; no value is told.

    Args:
        longest: characters of a value.

    Raises:
        UserMistake: naming the first.
    """
    if len(variables) > _VARIABLES:
        raise UserMistake(f"--env: {_VARIABLES} variables at most, got {len(variables)}.")
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            raise UserMistake(f"--env {name[:60]!r}: a name has letters, digits and _ only.")
        if len(value) > longest:
            raise UserMistake(
                f"--env {name}: SageMaker takes {longest} characters at most, got {len(value)}."
            )


# What AWS refuses of a network, before anything is made.


# As botocore's model of SageMaker has them (VpcConfig).
_SUBNETS, _GROUPS = 16, 5
_SUBNET = re.compile(r"subnet-[0-9a-z]{1,25}")
_GROUP = re.compile(r"sg-[0-9a-z]{1,29}")


def check_network(subnets: Sequence[str], security_groups: Sequence[str]) -> None:
    """Refuse what is no part of a VPC.

    Raises:
        UserMistake: one of them is missing, too many, or no such name.
    """
    if bool(subnets) != bool(security_groups):
        raise UserMistake("A VPC needs both: name --subnets and --security-groups.")
    for flag, names, rule, most in (
        ("--subnets", subnets, _SUBNET, _SUBNETS),
        ("--security-groups", security_groups, _GROUP, _GROUPS),
    ):
        wrong = next((name for name in names if not rule.fullmatch(name)), None)
        if wrong is not None or len(names) > most:
            example = "subnet-0123abcd" if rule is _SUBNET else "sg-0123abcd"
            got = repr(wrong) if wrong is not None else str(len(names))
            raise UserMistake(f"{flag} takes up to {most} names such as {example}, got {got}.")
