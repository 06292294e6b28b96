"""SageMaker endpoints: planned, created, updated, listed and taken away."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import mlflow.version
from mlflow.exceptions import MlflowException

from visiontuner import interrupts
from visiontuner.aws import scaling as autoscaling
from visiontuner.aws.account import (
    OCI_TYPES,
    PLATFORM,
    ContainerImage,
    check_network,
    check_tags,
    check_variables,
    has_own_disk,
    look_up_container_image,
    make_bucket,
    registry,
)
from visiontuner.aws.scaling import Scaling, check_scales
from visiontuner.errors import ServingError, UserMistake, VisiontunerError
from visiontuner.io.aws import Aws, AwsRefused, encrypt_uploads, explained, lent_to_library
from visiontuner.paths import changed_environment
from visiontuner.serving.async_client import open_endpoint
from visiontuner.serving.client import Reference, Refused, patiently
from visiontuner.serving.preflight import SERVERLESS_MB
from visiontuner.serving.registry import fluent_uris, quiet
from visiontuner.serving.server import QUIET
from visiontuner.text import hide_variables, hours_of, next_command, one_line

Note = Callable[[str], None]

# Why an endpoint does not serve: SageMaker's reason, its log, what they usually mean.


_LINES, _LENGTH = 5, 300
# The first that is found in the reason or the log.
_CAUSES = {
    "exec format error": "the container image is for another processor; build it for linux/amd64",
    "No module named": "the container image lacks one of the model's requirements; bake them in, "
    "or leave MLFLOW_DISABLE_ENV_CREATION out of its environment",
    "No space left": "the instance's disk is full; choose a larger one",
    "MemoryError": "it needs more memory; `visiontuner preflight MODEL` recommends an instance",
    "Could not access model data": "the execution role may not read the bucket (docs/aws.md)",
    "is damaged": "the model's files are damaged; `visiontuner preflight MODEL` shows it here",
    "ping health check": "the server did not start in time; installing requirements at the start "
    "takes long, so bake them into the container image, and `visiontuner preflight MODEL` shows "
    "whether the model can be served",
}


def explain_failure(aws: Aws, name: str, described: Mapping[str, Any], what: str) -> str:
    """One line: what happened, SageMaker's reason, the end of the log, and what to do.

    Args:
        described: SageMaker's answer about the endpoint.
        what: happened, the start of a sentence.
    """
    reason = " ".join(str(described.get("FailureReason") or "").split())
    log = _last_lines(
        aws, f"/aws/sagemaker/Endpoints/{name}", orderBy="LastEventTime", descending=True, limit=1
    )
    meaning = next((said for sign, said in _CAUSES.items() if sign in f"{reason} {log}"), None)
    told = _what_is_known(what, reason, log)
    return f"{told} Usually {meaning}." if meaning else told


def explain_failed_job(aws: Aws, name: str, described: Mapping[str, Any]) -> str:
    """The same of a transform job, without what to do."""
    reason = " ".join(str(described.get("FailureReason") or "").split())
    log = _last_lines(aws, "/aws/sagemaker/TransformJobs", logStreamNamePrefix=f"{name}/")
    return _what_is_known(f"{name} is {described['TransformJobStatus']}", reason, log)


def _what_is_known(what: str, reason: str, log: str) -> str:
    end = f" Its log ends with: {log.rstrip('.')}." if log else ""
    return f"{what}{': ' + reason.rstrip('.') if reason else ''}.{end}"


def _last_lines(aws: Aws, group: str, **which: Any) -> str:
    """Of the first log stream that is found; empty if there is none or it may not be read."""
    try:
        streams = aws.call("logs", "describe_log_streams", logGroupName=group, **which)[
            "logStreams"
        ]
        if not streams:
            return ""
        events = aws.call(
            "logs", "get_log_events", logGroupName=group,
            logStreamName=streams[0]["logStreamName"], limit=_LINES,
        )["events"]  # fmt: skip
    except ServingError:
        return ""
    return " ".join(" ".join(event["message"].split()) for event in events)[-_LENGTH:]


# The serving image that a deployment needs and MLflow leaves to the user, checked beforehand.


IMAGE_VARIABLE = "MLFLOW_SAGEMAKER_DEPLOY_IMG_URL"  # MLflow's
DEFAULT_REPOSITORY = "mlflow-pyfunc"

_REBUILD = "docker buildx build --platform linux/amd64 --provenance=false --output type=docker …"


def mlflows_bucket(aws: Aws) -> str:
    """The bucket that MLflow uploads to if none is named."""
    return f"mlflow-sagemaker-{aws.region}-{aws.account}"


def find_container_image(aws: Aws, wanted: str | None) -> ContainerImage:
    """The serving image, known to be in ECR and fit for SageMaker.

    Args:
        wanted: its URL; None: the environment's, or the one that `mlflow sagemaker
            build-and-push-container` pushes.

    Raises:
        UserMistake: it is not there, in another region, for another processor, or of a format that
            SageMaker refuses.
    """

    url = wanted or os.environ.get(IMAGE_VARIABLE)
    container_image = look_up_container_image(
        aws,
        url or f"{registry(aws)}/{DEFAULT_REPOSITORY}:{mlflow.version.VERSION}",
        runs="the endpoint",
        advice="Push one with `mlflow sagemaker build-and-push-container`, or name another with "
        "--image.",
    )
    if container_image.media_type in OCI_TYPES:
        raise UserMistake(
            f"SageMaker refuses container images of type {container_image.media_type}, which newer "
            f"Docker builds make. Build it with `{_REBUILD}` and push it again."
        )
    if container_image.platform not in (None, PLATFORM):
        raise UserMistake(
            f"The container image is for {container_image.platform}, and this endpoint's instances "
            f"are {PLATFORM}. Build it with `{_REBUILD}`."
        )
    return container_image


# What is going to be deployed, as MLflow's Python client and its command line take it.


# Tags of an endpoint; the first is what makes it ours.
MODEL_TAG = "visiontuner.model"
DEPLOYMENT_TAG = "visiontuner.deployment"
TTL_TAG = "visiontuner.ttl"
PRICE_TAG = "visiontuner.price_per_hour"
IMAGE_TAG = "visiontuner.image_digest"

# Dictionaries that MLflow takes as they are.
CAPTURE, ASYNC, VPC = "data_capture_config", "async_inference_config", "vpc_config"
# MLflow has no word for these: they are added to its CreateEndpointConfig.
KMS_KEY, STARTUP = "KmsKeyId", "ContainerStartupHealthCheckTimeoutInSeconds"
FAILURES = "failures"
"""The folder below an asynchronous endpoint's output path where SageMaker writes what failed."""
# 50, of which ours and MLflow's may be 13.
_TAGS = 37
_VARIABLE_LENGTH = 1024  # of a model's value, as botocore's model has it
DEFAULT_INSTANCE = "ml.m5.large"
# Autoscaling is registered for a variant's name: MLflow would give each update another one, and
# SageMaker refuses to remove a variant that is scaled.
DEFAULT_VARIANT = "AllTraffic"
# MLflow appends "-config-" and 20 letters, and shortens what then exceeds 63.
NAME_LENGTH = 35
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
_TAG_LETTERS = re.compile(r"[^\w .:/=+@-]")
_TAG_LENGTH = 256
_MLFLOWS_TAGS = {"app_name", "model_uri"}
_S3_FOLDER = re.compile(r"s3://[^/\s]+(/\S*)?")
# Of an output or capture path, with room for what is appended to it.
_S3_LENGTH = 500
_STARTUP_SECONDS = (60, 3600)  # as botocore's model of SageMaker has them


_NOT_SERVERLESS = {
    CAPTURE: "captures no data; leave --data-capture",
    ASYNC: "answers at once; leave --async",
    VPC: "has no VPC; leave --subnets and --security-groups",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelPlan:
    """A model that MLflow gives to SageMaker: what an endpoint and a transform job have alike.

    Args:
        name: of the endpoint or the job.
        model_uri: `models:/NAME/VERSION` or a model folder.
        bucket: the model's archive is uploaded there; it is made first if `bucket_exists` is not.
        more: further dictionaries that MLflow takes: data_capture_config, vpc_config,
            async_inference_config.
        kms_key: encrypts the upload and the disks that SageMaker attaches.
        environment: more variables for the container.
        tags: of the endpoint or the job and its model; their values are what AWS allows.
    """

    name: str
    model_uri: str
    region: str
    account: str
    caller: str
    role: str
    container_image: ContainerImage
    bucket: str
    bucket_exists: bool = True
    instances: int = 1
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kms_key: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    assume_role: str | None = None

    def complete(self, session: Any) -> None:
        """Add to a botocore session what MLflow has no words for."""
        encrypt_uploads(session, self.bucket, self.kms_key)

    def network_lines(self) -> list[str]:
        """Its VPC for a person, if it has one."""
        if VPC not in self.more:
            return []
        network = self.more[VPC]
        groups = ", ".join(network["SecurityGroupIds"])
        return [f"network    {', '.join(network['Subnets'])} ({groups})"]

    def make_bucket(self, aws: Aws, note: Note) -> None:
        """Where it is missing."""
        if not self.bucket_exists:
            make_bucket(aws, self.bucket)
            note(f"Made the bucket {self.bucket}.")


@dataclass(frozen=True, kw_only=True, repr=False)
class DeploymentPlan(ModelPlan):
    """One deployment.

    Args:
        newer_model: NAME/VERSION of one that is newer than the champion, which is deployed.
        variant: the name of the endpoint's production variant.
        instance_type: None for a serverless endpoint.
        serverless_mb: its memory; None for instances.
        startup_seconds: how long a container may take to answer pings; None: SageMaker's default.
        scaling: between how many instances AWS scales; None: as it is.
        unscaled: AWS scales it no more.
        price_per_hour: US dollars for all instances; None: not known.
    """

    variant: str = DEFAULT_VARIANT
    instance_type: str | None = DEFAULT_INSTANCE
    serverless_mb: int | None = None
    serverless_concurrency: int = 5
    startup_seconds: int | None = None
    scaling: Scaling | None = None
    unscaled: bool = False
    price_per_hour: float | None = None
    newer_model: str | None = None
    timeout_seconds: int = 1800
    region_is_default: bool = True

    def __post_init__(self) -> None:
        check_name(self.name)
        check_variables(self.environment, longest=_VARIABLE_LENGTH)
        if self.serverless_mb is not None and self.serverless_mb not in SERVERLESS_MB:
            listed = ", ".join(map(str, SERVERLESS_MB))
            raise UserMistake(f"--serverless takes one of {listed} MB, got {self.serverless_mb}.")
        for key, flag in _NOT_SERVERLESS.items():
            if self.serverless_mb is not None and key in self.more:
                raise UserMistake(f"A serverless endpoint {flag} out.")
        low, high = _STARTUP_SECONDS
        if self.startup_seconds is not None and not low <= self.startup_seconds <= high:
            raise UserMistake(
                f"--startup-timeout takes {low} to {high} seconds, got {self.startup_seconds}."
            )
        if self.scaling is not None:
            check_scales(self.scaling, self.instance_type, self.instances)

    @property
    def target(self) -> str:
        """As MLflow names a region and a role to take on."""
        return f"sagemaker:/{self.region}" + (f"/{self.assume_role}" if self.assume_role else "")

    @property
    def deployment(self) -> str:
        """What tells this deployment's resources from others'."""
        return self.tags[DEPLOYMENT_TAG]

    @property
    def is_async(self) -> bool:
        """Whether requests and answers lie on S3."""
        return ASYNC in self.more

    @property
    def disk_key(self) -> str | None:
        """SageMaker takes a key for the disks that it attaches, and refuses one for others."""
        attaches = self.instance_type is not None and not has_own_disk(self.instance_type)
        return self.kms_key if attaches else None

    def complete(self, session: Any) -> None:
        """Add to a botocore session what MLflow has no words for."""

        def config(params: dict[str, Any], **_: Any) -> None:
            if self.disk_key:
                params[KMS_KEY] = self.disk_key
            if self.startup_seconds is not None:
                params["ProductionVariants"][0][STARTUP] = self.startup_seconds

        super().complete(session)
        session.register("before-parameter-build.sagemaker.CreateEndpointConfig", config)

    def config(self) -> dict[str, str]:
        """MLflow's `-C` values; MLflow reads the same texts from Python."""
        config = {
            "execution_role_arn": self.role,
            "image_url": self.container_image.url,
            "timeout_seconds": str(self.timeout_seconds),
            "tags": json.dumps(dict(self.tags)),
            "bucket": self.bucket,
            "variant_name": self.variant,
        }
        if self.serverless_mb is not None:
            config["serverless_config"] = json.dumps(
                {
                    "MemorySizeInMB": self.serverless_mb,
                    "MaxConcurrency": self.serverless_concurrency,
                }
            )
        else:
            config["instance_type"] = str(self.instance_type)
            config["instance_count"] = str(self.instances)
        config |= {key: json.dumps(value) for key, value in self.more.items()}
        config["env"] = json.dumps({**QUIET, **self.environment})
        return config

    def command(self, verb: str = "create") -> str:
        """MLflow's own command for this, to be pasted into a shell; the bucket has to be there."""
        words = ["mlflow", "deployments", verb, "-t", self.target, "--name", self.name]
        lines = [shlex.join(words), shlex.join(["-m", self.model_uri])]
        shown = replace(self, environment=hide_variables(self.environment)).config()
        lines += [shlex.join(["-C", f"{key}={value}"]) for key, value in shown.items()]
        # MLflow would make it with an ACL, which needs a permission of its own.
        first = f"# First: aws s3 mb s3://{self.bucket} --region {self.region}\n"
        first = "" if self.bucket_exists else first
        without = [
            flag
            for flag, chosen in (
                ("--kms-key", self.kms_key),
                ("--startup-timeout", self.startup_seconds),
                ("--autoscale", self.scaling),
            )
            if chosen
        ]
        if without:
            first += f"# MLflow's command has no words for {', '.join(without)}.\n"
        if hide_variables(self.environment) != self.environment:
            first += "# The values of env that are *** have to be put in.\n"
        prefix = "" if self.region_is_default else f"AWS_DEFAULT_REGION={self.region} "
        return first + prefix + " \\\n    ".join(lines)

    def lines(self) -> list[str]:
        """What is going to happen, for a person."""
        platform = self.container_image.platform or "its processor could not be looked up"
        made = "" if self.bucket_exists else " (is made)"
        lines = [
            f"endpoint   {self.name} in {self.region}, account {self.account}, as {self.caller}",
            f"model      {self.model_uri}{self._newer()}",
            f"runs on    {self._machine()}; {self.cost()}",
            f"role       {self.role}",
            f"container  {self.container_image.url} ({self.container_image.digest[:19]}…, "
            f"{platform})",
            f"upload to  s3://{self.bucket}{made}",
        ]
        lines += self._choices()
        if TTL_TAG in self.tags:
            lines.append(f"lives for  {self.tags[TTL_TAG]}; nothing deletes it by itself")
        return lines

    def _choices(self) -> list[str]:
        """The lines of what was asked for beside a model and its machines."""
        lines = []
        if self.is_async:
            answers = self.more[ASYNC]["OutputConfig"]["S3OutputPath"]
            lines.append(f"answers    asynchronously, in {answers}; failures below it")
        if self.scaling is not None:
            lines.append(f"scales     {self.scaling.words(is_async=self.is_async)}")
        if CAPTURE in self.more:
            lines.append(f"captures   requests in {self.more[CAPTURE]['DestinationS3Uri']}")
        lines += self.network_lines()
        if self.kms_key:
            disks = ", the disks" if self.disk_key else ""
            lines.append(f"encrypted  the upload{disks} and what is written to S3, {self.kms_key}")
        if self.startup_seconds is not None:
            lines.append(f"start-up   {self.startup_seconds} s at most")
        return lines

    def __repr__(self) -> str:
        return (
            f"DeploymentPlan {self.name} in {self.region}, account {self.account}\n"
            f"model {self.model_uri}\n"
            f"{self._machine()}; {self.cost()}"
        )

    def _machine(self) -> str:
        if self.serverless_mb is None:
            return f"{self.instances} x {self.instance_type}"
        return (
            f"serverless, {self.serverless_mb} MB, at most {self.serverless_concurrency} at a time"
        )

    def _newer(self) -> str:
        if self.newer_model is None:
            return ""
        name = self.newer_model.split("/")[0]
        return (
            f", the champion; {self.newer_model} is newer: name it to deploy it, or let "
            f"`{next_command('promote', name)}` decide"
        )

    def cost(self) -> str:
        """A few words."""
        if self.serverless_mb is not None:
            return "paid by use, nothing while nobody asks"
        if self.price_per_hour is None:
            return "its price is not known here; tell it with --price"
        hourly = self.price_per_hour
        if self.scaling is not None:
            one = hourly / self.instances
            low, high = one * self.scaling.least, one * self.scaling.most
            return (
                f"${low:.3g} to ${high:.3g} an hour, ${low * 24 * 30:,.0f} to "
                f"${high * 24 * 30:,.0f} a month if it stays"
            )
        return f"${hourly:.3g} an hour, ${hourly * 24 * 30:,.0f} a month if it stays"


def check_name(name: str) -> None:
    """Make sure that an endpoint can have a name.

    Raises:
        UserMistake: SageMaker or MLflow could not take it for an endpoint.
    """
    if not _NAME.fullmatch(name) or len(name) > NAME_LENGTH:
        raise UserMistake(
            f"{name!r} cannot be an endpoint's name: 1 to {NAME_LENGTH} letters, digits and single "
            "hyphens between them. Choose one with --name."
        )


def endpoint_name(model: str) -> str:
    """A name for a model's endpoint: its own, with what SageMaker refuses taken out.

    Where letters of other scripts are lost, a digest keeps the endpoints of two models apart.
    """
    lost = "" if model.isascii() else "-" + hashlib.sha256(model.encode()).hexdigest()[:6]
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", model)[: NAME_LENGTH - len(lost)].strip("-")
    return (plain or "visiontuner") + lost


def make_tags(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags as AWS allows them, with a new id for this deployment; empty values are left out."""
    tags = {
        key: _TAG_LETTERS.sub("_", str(value), re.ASCII)[:_TAG_LENGTH]
        for key, value in values.items()
        if value not in (None, "")
    }
    return tags | {DEPLOYMENT_TAG: uuid.uuid4().hex[:12]}


def capture_everything(folder: str, kms_key: str | None = None) -> dict[str, Any]:
    """SageMaker's configuration to keep all requests and answers, as the JSON that they are.

    Raises:
        UserMistake: the folder is not in S3.
    """
    config = {
        "EnableCapture": True,
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": _on_s3("--data-capture", folder),
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        # Without it SageMaker captures everything in base64.
        "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
    }
    return config | ({"KmsKeyId": kms_key} if kms_key else {})


def answer_on_s3(folder: str, kms_key: str | None = None) -> dict[str, Any]:
    """SageMaker's configuration of an asynchronous endpoint.

    Raises:
        UserMistake: the folder is not in S3.
    """
    output = _on_s3("--async", folder).rstrip("/")
    # Without a place for them failures are told nowhere.
    places = {"S3OutputPath": output, "S3FailurePath": f"{output}/{FAILURES}"}
    return {"OutputConfig": places | ({"KmsKeyId": kms_key} if kms_key else {})}


def in_network(subnets: Sequence[str], security_groups: Sequence[str]) -> dict[str, Any]:
    """SageMaker's configuration of a VPC.

    Raises:
        UserMistake: one of them is missing, or no such name.
    """
    check_network(subnets, security_groups)
    return {"Subnets": list(subnets), "SecurityGroupIds": list(security_groups)}


def check_own_tags(tags: Mapping[str, str]) -> None:
    """Refuse tags of a user's that AWS or MLflow refuses.

    Raises:
        UserMistake: naming the first.
    """
    check_tags(tags, most=_TAGS)
    for key in _MLFLOWS_TAGS & tags.keys():
        raise UserMistake(f"--tag {key}: MLflow sets this tag itself; choose another key.")


def _on_s3(flag: str, folder: str) -> str:
    if not _S3_FOLDER.fullmatch(folder) or len(folder) > _S3_LENGTH:
        raise UserMistake(f"{flag} takes s3://BUCKET/FOLDER, got {folder!r}.")
    return folder


# What an endpoint is made of: configurations, models and uploaded archives.


@dataclass(frozen=True)
class Parts:
    """What deployments of one endpoint's name made; archives are `s3://…/model.tar.gz`."""

    configs: frozenset[str] = field(default=frozenset())
    models: frozenset[str] = field(default=frozenset())
    archives: frozenset[str] = field(default=frozenset())

    @classmethod
    def find(cls, aws: Aws, name: str, bucket: str) -> Parts:
        """All that MLflow named after an endpoint, whoever deployed it."""
        return cls(
            frozenset(_named_configs(aws, name)),
            frozenset(entry["ModelName"] for entry in _named_models(aws, name)),
            frozenset(_named_archives(aws, name, bucket)),
        )

    @classmethod
    def in_use(cls, aws: Aws, name: str) -> Parts:
        """What the endpoint of this name serves; nothing if there is none."""
        described = find_endpoint(aws, name)
        return cls.of_config(aws, described["EndpointConfigName"]) if described else cls()

    @classmethod
    def of_config(cls, aws: Aws, config: str) -> Parts:
        """A configuration with its models, as far as they are there."""
        described = if_there(aws, "describe_endpoint_config", EndpointConfigName=config)
        if described is None:
            return cls()
        models = [variant["ModelName"] for variant in described["ProductionVariants"]]
        return cls(frozenset([config]), frozenset(models), frozenset(_archives(aws, models)))

    @classmethod
    def ours(cls, aws: Aws, name: str) -> Parts:
        """What visiontuner made for an endpoint of this name, by the tags of its models."""
        models = [
            entry["ModelName"]
            for entry in _named_models(aws, name)
            if MODEL_TAG in tags_of(aws, entry["ModelArn"])
        ]
        own = cls(frozenset(), frozenset(models), frozenset(_archives(aws, models)))
        for config in _named_configs(aws, name):
            parts = cls.of_config(aws, config)
            if parts.models and parts.models <= own.models:
                own = own.with_(parts)
        return own

    def __bool__(self) -> bool:
        return bool(self.configs or self.models or self.archives)

    def with_(self, other: Parts) -> Parts:
        return Parts(
            self.configs | other.configs, self.models | other.models, self.archives | other.archives
        )

    def without(self, other: Parts) -> Parts:
        return Parts(
            self.configs - other.configs, self.models - other.models, self.archives - other.archives
        )

    def named_after(self, name: str) -> Parts:
        """Without what MLflow did not make for an endpoint of this name."""
        return Parts(
            frozenset(config for config in self.configs if _is_named(config, name, "config")),
            frozenset(model for model in self.models if _is_named(model, name, "model")),
            frozenset(url for url in self.archives if _is_named(_model_of(url), name, "model")),
        )

    def delete(self, aws: Aws) -> None:
        """What is gone already is no mistake.

        Models last: they lead the next attempt to the rest.
        """
        for config in self.configs:
            if_there(aws, "delete_endpoint_config", EndpointConfigName=config)
        for archive in self.archives:
            _delete_archive(aws, archive)
        for model in self.models:
            if_there(aws, "delete_model", ModelName=model)

    def delete_unused(self, aws: Aws, name: str) -> None:
        """All but what the endpoint of this name serves: it may be another deployment's."""
        self.without(Parts.in_use(aws, name)).delete(aws)


def find_endpoint(aws: Aws, name: str) -> dict[str, Any] | None:
    """What SageMaker says of an endpoint, if it is there."""
    return if_there(aws, "describe_endpoint", EndpointName=name)


def endpoint_tags(aws: Aws, name: str) -> dict[str, str]:
    """Empty if there is no such endpoint."""
    described = find_endpoint(aws, name)
    return tags_of(aws, described["EndpointArn"]) if described else {}


def tags_of(aws: Aws, arn: str) -> dict[str, str]:
    """Empty if the resource has gone meanwhile."""
    try:
        return aws.tags(arn)
    except AwsRefused as error:
        if error.is_missing:
            return {}
        raise


def _named_archives(aws: Aws, name: str, bucket: str) -> Iterator[str]:
    try:
        for entry in aws.pages(
            "s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=f"{name}-model-",
            ExpectedBucketOwner=aws.account,
        ):  # fmt: skip
            model, _, file = entry["Key"].partition("/")
            if file == "model.tar.gz" and _is_named(model, name, "model"):
                yield f"s3://{bucket}/{entry['Key']}"
    except AwsRefused as error:
        if not error.is_missing:
            raise


def if_there(aws: Aws, method: str, **kwargs: str) -> dict[str, Any] | None:
    """SageMaker's answer; None if what was asked for is not there."""
    try:
        return aws.call("sagemaker", method, **kwargs)
    except AwsRefused as error:
        if error.is_missing:
            return None
        raise


def _is_named(text: str, name: str, kind: str) -> bool:
    return re.fullmatch(rf"{re.escape(name)}-{kind}-[0-9a-f]{{20}}", text) is not None


def _named_configs(aws: Aws, name: str) -> Iterator[str]:
    entries = aws.pages(
        "sagemaker", "list_endpoint_configs", "EndpointConfigs", NameContains=f"{name}-config-"
    )
    configs = (entry["EndpointConfigName"] for entry in entries)
    return (config for config in configs if _is_named(config, name, "config"))


def _named_models(aws: Aws, name: str) -> Iterator[dict[str, Any]]:
    entries = aws.pages("sagemaker", "list_models", "Models", NameContains=f"{name}-model-")
    return (entry for entry in entries if _is_named(entry["ModelName"], name, "model"))


def _archives(aws: Aws, models: Iterable[str]) -> Iterator[str]:
    for model in models:
        described = if_there(aws, "describe_model", ModelName=model)
        archive = ((described or {}).get("PrimaryContainer") or {}).get("ModelDataUrl")
        if archive:
            yield str(archive)


def _delete_archive(aws: Aws, archive: str) -> None:
    bucket, key = archive.removeprefix("s3://").split("/", 1)
    try:
        aws.call("s3", "delete_object", Bucket=bucket, Key=key)
    except AwsRefused as error:  # the bucket may be gone
        if not error.is_missing:
            raise


def _model_of(archive: str) -> str:
    """MLflow uploads to `s3://BUCKET/MODEL/model.tar.gz`."""
    return archive.removesuffix("/model.tar.gz").rpartition("/")[2]


# The states of an endpoint: wait for one, delete, compare its answers.


IN_PROGRESS = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.5, 10.0
_NOTE_SECONDS = 30.0
_BEGIN_SECONDS = 20.0  # as long as MLflow gives an update to begin
# SageMaker gives a container up after an hour at most; until then it deletes nothing.
GONE_SECONDS = 3600.0


def describe(aws: Aws, name: str) -> dict[str, Any]:
    """What SageMaker says of an endpoint.

    Raises:
        UserMistake: there is none of this name.
    """
    described = find_endpoint(aws, name)
    if described is None:
        raise UserMistake(
            f"There is no endpoint {name!r} in {aws.region}; "
            f"`{next_command('endpoints', flags=aws.flags)}` lists ours."
        )
    return described


def check_free(aws: Aws, name: str) -> None:
    """Make sure that no endpoint has a name.

    Raises:
        UserMistake: one has.
    """
    described = find_endpoint(aws, name)
    if described is None:
        return
    taken = f"There is an endpoint {name!r} already ({described['EndpointStatus']})"
    if not is_ours(aws, described):
        raise UserMistake(f"{taken}, which visiontuner did not deploy. Choose another --name.")
    raise UserMistake(
        f"{taken}. `{next_command('update', name, flags=aws.flags)}` swaps its model, "
        f"`{next_command('undeploy', name, flags=aws.flags)}` removes it, or choose another --name."
    )


def check_ours(aws: Aws, described: Mapping[str, Any], command: str) -> None:
    """Make sure that visiontuner deployed an endpoint.

    Args:
        described: what SageMaker says of it.
        command: AWS's own for what is not going to be done, as `delete-endpoint`.

    Raises:
        UserMistake: another program did.
    """
    if not is_ours(aws, described):
        name = described["EndpointName"]
        raise UserMistake(
            f"Endpoint {name!r} was not deployed by visiontuner: it is left alone. AWS's own "
            f"command: `aws sagemaker {command} --endpoint-name {name} --region {aws.region}`."
        )


def is_ours(aws: Aws, described: Mapping[str, Any]) -> bool:
    """Whether an endpoint's tags say that visiontuner deployed it."""
    return MODEL_TAG in tags_of(aws, described["EndpointArn"])


def wait_until_in_service(
    aws: Aws, name: str, timeout_seconds: float, note: Note, *, leaving: str | None = None
) -> dict[str, Any]:
    """Wait for an endpoint that was just created or updated.

    Args:
        leaving: the configuration that an update is to replace. In service with it means that
            SageMaker went back, unless the update has not begun yet.

    Returns:
        What SageMaker says of the endpoint then.

    Raises:
        ServingError: it failed, was deleted meanwhile, or takes longer.
    """
    begun = leaving is None
    for seconds in poll(name, note):
        try:
            described = aws.call("sagemaker", "describe_endpoint", EndpointName=name)
        except AwsRefused as error:
            if error.is_missing:
                raise ServingError(
                    f"Endpoint {name!r} was deleted by someone meanwhile. If it is still wanted, "
                    f"`{next_command('deploy', 'MODEL', '--name', name, flags=aws.flags)}` makes "
                    "it again."
                ) from None
            raise
        state = described["EndpointStatus"]
        begun = begun or state != "InService" or described["EndpointConfigName"] != leaving
        if state == "InService" and (begun or seconds > _BEGIN_SECONDS):
            note(f"{name} is in service after {seconds:.0f} s.")
            return described
        if state not in (*IN_PROGRESS, "InService"):
            raise ServingError(
                explain_failure(aws, name, described, f"Endpoint {name!r} is {state}")
            )
        if seconds > timeout_seconds:
            reason = f"Endpoint {name!r} is not in service after {timeout_seconds:g} s"
            raise ServingError(explain_failure(aws, name, described, reason))
    raise AssertionError("polling has no end")


def delete_endpoint(aws: Aws, name: str, note: Note) -> None:
    """Until it is gone; SageMaker deletes none that is being created, so that may take a while.

    Raises:
        ServingError: it is still there after an hour.
    """
    told = False
    for seconds in poll(name, note, "Deleting"):
        try:
            state = aws.call("sagemaker", "describe_endpoint", EndpointName=name)["EndpointStatus"]
            if state != "Deleting":
                aws.call("sagemaker", "delete_endpoint", EndpointName=name)
        except AwsRefused as error:
            if error.is_missing:
                return
            if not error.is_in_progress:
                raise
            if not told:
                note("SageMaker deletes no endpoint that is being created: waiting until it can.")
            told = True
        if seconds > GONE_SECONDS:
            raise ServingError(
                f"Endpoint {name!r} cannot be deleted yet; "
                f"`{next_command('undeploy', name, flags=aws.flags)}` tries again."
            )


def roll_back(aws: Aws, name: str, old_config: str, timeout_seconds: float, note: Note) -> None:
    """Let an endpoint serve its old configuration again, if it is there and does not."""
    for _ in poll(name, note, "Waiting for"):  # what is being updated cannot be updated
        try:
            described = aws.call("sagemaker", "describe_endpoint", EndpointName=name)
        except AwsRefused as error:
            if error.is_missing:  # someone deleted it
                return
            raise
        if described["EndpointStatus"] not in IN_PROGRESS:
            break
    new_config = described["EndpointConfigName"]
    if new_config == old_config:
        return
    aws.call("sagemaker", "update_endpoint", EndpointName=name, EndpointConfigName=old_config)
    now = wait_until_in_service(aws, name, timeout_seconds, note, leaving=new_config)
    if now["EndpointConfigName"] != old_config:
        raise ServingError(explain_failure(aws, name, now, f"{name!r} could not go back"))


def check_answers(aws: Aws, name: str, reference: Reference) -> None:
    """Ask an endpoint its model's reference images.

    Raises:
        ServingError: it does not answer, or differently from the artifact.
    """
    transport = open_endpoint(name, region=aws.region, session=aws.session)
    ask, options = transport.ask, reference.options()
    try:
        # One by one: together they may exceed a request.
        answers = [patiently(partial(ask, [one], options))[0] for one in reference.images]
    except Refused as error:
        raise ServingError(f"The endpoint refuses the model's own images: {error}") from None
    difference = reference.difference([answer.to_dict() for answer in answers])
    if not difference <= reference.tolerance:  # NaN too
        raise ServingError(
            f"Endpoint {name!r} answers the model's own images differently (by "
            f"{difference:.1e}). "
            "`visiontuner preflight MODEL` shows whether the model or the container is to blame."
        )


def poll(name: str, note: Note, doing: str = "Waiting for") -> Iterator[float]:
    """Seconds since the start, with growing pauses and a note now and then."""
    began = noted = time.monotonic()
    for count in range(10**9):
        yield time.monotonic() - began
        interrupts.sleep(min(_FIRST_POLL_SECONDS * 1.3 ** min(count, 20), _LONGEST_POLL_SECONDS))
        if time.monotonic() - noted > _NOTE_SECONDS:
            noted = time.monotonic()
            note(f"{doing} {name}: {noted - began:.0f} s.")


# What an endpoint runs on, which an update keeps.


# What MLflow puts into a container's environment by itself.
_MLFLOWS_OWN = (
    "MLFLOW_DEPLOYMENT_FLAVOR_NAME",
    "SERVING_ENVIRONMENT",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)


@dataclass(frozen=True, kw_only=True)
class Running:
    """What an endpoint runs on: MLflow's update would fall back to its own defaults.

    `instances`: as many as there are now, which autoscaling may have changed.
    """

    variant: str
    role: str
    container_image: str
    bucket: str | None
    instance_type: str | None
    instances: int
    serverless_mb: int | None
    serverless_concurrency: int
    environment: Mapping[str, str]
    more: Mapping[str, Any]
    kms_key: str | None = None
    startup_seconds: int | None = None


def find_running(aws: Aws, name: str) -> Running:
    """Look up what an update has to keep.

    Raises:
        UserMistake: there is no such endpoint, it is another program's, is being changed, serves
            several models, or what says what it runs on was deleted.
    """
    described = describe(aws, name)
    check_ours(aws, described, "update-endpoint --endpoint-config-name CONFIG")
    if described["EndpointStatus"] in IN_PROGRESS:
        raise UserMistake(
            f"Endpoint {name!r} is {described['EndpointStatus']}; try again when it is done."
        )
    config = _still_there(
        aws, name, "describe_endpoint_config", EndpointConfigName=described["EndpointConfigName"]
    )
    if len(config["ProductionVariants"]) != 1:
        raise UserMistake(f"Endpoint {name!r} serves several models; update it with AWS's tools.")
    (variant,) = config["ProductionVariants"]
    model = _still_there(aws, name, "describe_model", ModelName=variant["ModelName"])
    container = model["PrimaryContainer"]
    serverless = variant.get("ServerlessConfig") or {}
    capture = config.get("DataCaptureConfig") or {}
    more = {
        CAPTURE: capture if capture.get("EnableCapture") else None,
        ASYNC: config.get("AsyncInferenceConfig"),
        VPC: model.get("VpcConfig"),
    }
    (now,) = described["ProductionVariants"]
    return Running(
        variant=variant["VariantName"],
        role=model["ExecutionRoleArn"],
        container_image=container["Image"],
        bucket=_bucket(container.get("ModelDataUrl") or ""),
        instance_type=variant.get("InstanceType"),
        instances=max(1, now.get("DesiredInstanceCount") or now.get("CurrentInstanceCount") or 1),
        serverless_mb=serverless.get("MemorySizeInMB"),
        serverless_concurrency=serverless.get("MaxConcurrency", 5),
        environment={
            key: value
            for key, value in container.get("Environment", {}).items()
            if key not in _MLFLOWS_OWN
        },
        more={key: value for key, value in more.items() if value},
        kms_key=config.get(KMS_KEY),
        startup_seconds=variant.get(STARTUP),
    )


def _bucket(archive: str) -> str | None:
    """MLflow uploads to `s3://BUCKET/MODEL/model.tar.gz`."""
    return archive.removeprefix("s3://").partition("/")[0] or None


def _still_there(aws: Aws, name: str, method: str, **kwargs: str) -> dict[str, Any]:
    """MLflow's own update asks the same."""
    found = if_there(aws, method, **kwargs)
    if found is None:
        raise UserMistake(
            f"Endpoint {name!r} serves, but {next(iter(kwargs.values()))} was deleted, which says "
            f"what it runs on. Make it anew: "
            f"`{next_command('undeploy', name, flags=aws.flags)}`, then "
            f"`{next_command('deploy', 'MODEL', '--name', name, flags=aws.flags)}`."
        )
    return found


# Which endpoints are ours, and what they serve.


_MLFLOWS_TAG = "model_uri"
_VERSION = re.compile(r"[^/:@]+/\d+")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One endpoint of ours, as `visiontuner endpoints` lists it.

    Args:
        age_hours: since it was created.
        ttl_hours: how long it was meant to live; None: not said.
        cost: US dollars since then; None: the price was not known, or it is paid by use. Of an
            endpoint that scales it is that of the instances that it began with.
        scales: `1 to 4`, instances; None: it does not.
        unreadable: tags that say neither, as someone set them by hand.
    """

    name: str
    state: str
    model: str
    age_hours: float
    ttl_hours: float | None = None
    cost: float | None = None
    scales: str | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def overdue(self) -> bool:
        """Whether it has lived longer than it was meant to."""
        return self.ttl_hours is not None and self.age_hours > self.ttl_hours

    @property
    def has_odd_ttl(self) -> bool:
        return TTL_TAG in self.unreadable

    @property
    def has_odd_price(self) -> bool:
        return PRICE_TAG in self.unreadable


def list_endpoints(aws: Aws) -> list[Endpoint]:
    """Those that visiontuner deployed in this region, oldest first."""
    found = []
    for entry in aws.pages("sagemaker", "list_endpoints", "Endpoints", SortBy="CreationTime"):
        if MODEL_TAG not in tags_of(aws, entry["EndpointArn"]):
            continue
        tags = what_serves(aws, entry["EndpointName"])
        hours = (datetime.now(UTC) - entry["CreationTime"]).total_seconds() / 3600
        found.append(_read(entry["EndpointName"], entry["EndpointStatus"], hours, tags))
    scaled = autoscaling.ranges(aws) if found else {}
    found = [replace(one, scales=scaled.get(one.name)) for one in found]
    return sorted(found, key=lambda endpoint: -endpoint.age_hours)


def _read(name: str, state: str, hours: float, tags: Mapping[str, str]) -> Endpoint:
    """One odd tag must not hide the endpoints."""
    said: dict[str, float | None] = {}
    for tag, read in ((TTL_TAG, hours_of), (PRICE_TAG, _price)):
        with suppress(UserMistake, ValueError):
            said[tag] = read(tags[tag]) if tags.get(tag) else None
    price = said.get(PRICE_TAG)
    return Endpoint(
        name=name,
        state=state,
        model=tags[MODEL_TAG],
        age_hours=hours,
        ttl_hours=said.get(TTL_TAG),
        cost=None if price is None else price * hours,
        unreadable={tag: tags[tag] for tag in (TTL_TAG, PRICE_TAG) if tag not in said},
    )


def _price(text: str) -> float:
    """US dollars an hour.

    Raises:
        ValueError: it is no price.
    """
    price = float(text)
    if not 0 <= price < math.inf:
        raise ValueError(text)
    return price


def deployed_model(aws: Aws, name: str) -> str:
    """`NAME/VERSION` of the model that an endpoint serves.

    Raises:
        UserMistake: there is no such endpoint, or its tags do not say.
    """
    describe(aws, name)
    model = what_serves(aws, name).get(MODEL_TAG, "")
    if not _VERSION.fullmatch(model):
        raise UserMistake(
            f"Endpoint {name!r} does not say which version of a registered model it serves"
            + (f", but {model!r}." if model else ".")
        )
    return model


def what_serves(aws: Aws, name: str) -> dict[str, str]:
    """An endpoint's tags, and over them those of the SageMaker model that it serves.

    MLflow's own update tags its model, and leaves the endpoint's tags as they were. Without ours
    MLflow still says which model it is.
    """
    models = Parts.in_use(aws, name).models
    if len(models) != 1:
        return endpoint_tags(aws, name)
    described = if_there(aws, "describe_model", ModelName=next(iter(models)))
    own = tags_of(aws, described["ModelArn"]) if described else {}
    if MODEL_TAG not in own and _MLFLOWS_TAG in own:
        own[MODEL_TAG] = own[_MLFLOWS_TAG].removeprefix("models:/")
    return endpoint_tags(aws, name) | own


# Take an endpoint away, and what an earlier attempt left of one.


def undeploy(aws: Aws, name: str, *, artifacts: bool, note: Note) -> dict[str, str]:
    """Delete an endpoint with its configurations and models.

    Where the endpoint is gone, what is left of it: someone deleted it, or undeploying was stopped.

    Args:
        artifacts: the uploaded archives too.

    Returns:
        What was kept, `s3://…`, and the command that deletes it.

    Raises:
        UserMistake: there is no such endpoint, and nothing is left of one; or it is another
            program's.
        ServingError: AWS refuses or cannot be reached.
    """
    described = find_endpoint(aws, name)
    if described is not None:
        check_ours(aws, described, "delete-endpoint")
    served = Parts.in_use(aws, name)
    parts = served.named_after(name).with_(Parts.ours(aws, name))
    if artifacts and not parts.archives:
        parts = parts.with_(_kept_before(aws, name))
    if described is None:
        if not parts:
            raise UserMistake(
                f"There is no endpoint {name!r} in {aws.region}, and no configuration or model of "
                f"one is left; `{next_command('endpoints', flags=aws.flags)}` lists ours."
            )
        note(f"The endpoint {name} is gone already: removing what is left of it.")
    kept = frozenset[str]() if artifacts else parts.archives
    try:
        autoscaling.take_away(aws, name)
        if described is not None:
            delete_endpoint(aws, name, note)
        Parts(parts.configs, parts.models, parts.archives - kept).delete(aws)
    except (KeyboardInterrupt, ServingError):
        also = ["--artifacts"] if artifacts else []
        command = next_command("undeploy", name, *also, flags=aws.flags)
        note(f"Not all of {name} is gone; this goes on: {command}")
        raise
    _tell_of_others(served.without(parts), note)
    return {archive: _how_to_delete(aws, name, archive) for archive in sorted(kept)}


def _kept_before(aws: Aws, name: str) -> Parts:
    """Archives whose models an earlier undeploy deleted.

    Only in MLflow's default bucket, of one account and region: in another one they may be of
    another account's endpoint.
    """
    found = Parts.find(aws, name, mlflows_bucket(aws))
    models = found.models
    return Parts(
        archives=frozenset(url for url in found.archives if url.split("/")[-2] not in models)
    )


def _how_to_delete(aws: Aws, name: str, archive: str) -> str:
    if archive.startswith(f"s3://{mlflows_bucket(aws)}/"):
        return next_command("undeploy", name, "--artifacts", flags=aws.flags)
    return f"aws s3 rm {archive}"


def _tell_of_others(others: Parts, note: Note) -> None:
    left = sorted((*others.configs, *others.models, *others.archives))
    if left:
        note(f"Left alone, as it was not made for this endpoint: {', '.join(left)}")


# Create and update an endpoint through `mlflow.deployments`; nothing is left behind.
#
# MLflow's client makes and starts everything, so that its own command gives the same endpoint.
# What it lacks is added: waiting with progress, the reason of a failure, asking the reference
# images, and taking away what a failed or interrupted attempt made.


def create(
    aws: Aws, plan: DeploymentPlan, reference: Reference, *, tracking_uri: str, note: Note
) -> None:
    """Make an endpoint and ask it; what a failure or Ctrl-C leaves is taken away again.

    Raises:
        UserMistake: the name is taken, or the credentials are not.
        ServingError: it does not come into service, or answers differently from its artifact.
    """
    check_free(aws, plan.name)
    before = Parts.find(aws, plan.name, plan.bucket)
    plan.make_bucket(aws, note)
    try:
        note(f"Uploading {plan.model_uri} and creating {plan.name}; this takes minutes.")
        _ask_mlflow(aws, "create_deployment", plan, tracking_uri)
        wait_until_in_service(aws, plan.name, plan.timeout_seconds, note)
        check_answers(aws, plan.name, reference)
        _scale(aws, plan, note)
    except BaseException as error:
        left = (
            f"something may cost money. Look with `{next_command('endpoints', flags=aws.flags)}`, "
            f"and run `{next_command('undeploy', plan.name, '--artifacts', flags=aws.flags)}`."
        )
        with telling_what_is_left("Removing what was made", left, error):
            note("Removing what was made.")
            if endpoint_tags(aws, plan.name).get(DEPLOYMENT_TAG) == plan.deployment:
                if plan.scaling is not None:
                    autoscaling.take_away(aws, plan.name)
                delete_endpoint(aws, plan.name, note)
            made = Parts.find(aws, plan.name, plan.bucket).without(before)
            made.delete_unused(aws, plan.name)
        raise


def update(
    aws: Aws, plan: DeploymentPlan, reference: Reference, *, tracking_uri: str, note: Note
) -> None:
    """Put another model behind an endpoint while it serves; the old one stays if that fails.

    Raises:
        ServingError: SageMaker rolled back, or the new model answers differently from its artifact;
            the old one serves again.
    """
    old_config = aws.call("sagemaker", "describe_endpoint", EndpointName=plan.name)[
        "EndpointConfigName"
    ]
    before = Parts.find(aws, plan.name, plan.bucket)
    old = Parts.of_config(aws, old_config).named_after(plan.name)
    plan.make_bucket(aws, note)
    taken = _stop_scaling(aws, plan, old_config, note)
    try:
        note(
            f"Uploading {plan.model_uri} and updating {plan.name}; the old model serves meanwhile."
        )
        _ask_mlflow(aws, "update_deployment", plan, tracking_uri)
        now = wait_until_in_service(aws, plan.name, plan.timeout_seconds, note, leaving=old_config)
        if now["EndpointConfigName"] == old_config:
            raise ServingError(explain_failure(aws, plan.name, now, "SageMaker rolled back"))
        check_answers(aws, plan.name, reference)
        _scale_again(aws, plan, taken, note)
    except BaseException as error:
        left = (
            f"look with `{next_command('endpoints', flags=aws.flags)}` what it serves, and repeat "
            "the update, or go without it: "
            f"`{next_command('undeploy', plan.name, '--artifacts', flags=aws.flags)}`."
        )
        with telling_what_is_left("Going back to the old model", left, error):
            note("Going back to the old model.")
            roll_back(aws, plan.name, old_config, plan.timeout_seconds, note)
            # The old parts are still used, unless someone deleted the endpoint meanwhile.
            made = Parts.find(aws, plan.name, plan.bucket).without(before)
            made.delete_unused(aws, plan.name)
            old.delete_unused(aws, plan.name)
            if taken and find_endpoint(aws, plan.name):
                autoscaling.put_back(aws, taken)
        raise
    arn = now["EndpointArn"]
    tags = [{"Key": key, "Value": value} for key, value in plan.tags.items()]
    aws.call("sagemaker", "add_tags", ResourceArn=arn, Tags=tags)
    old.delete_unused(aws, plan.name)


def _scale(aws: Aws, plan: DeploymentPlan, note: Note) -> None:
    if plan.scaling is not None:
        autoscaling.scale(aws, plan.name, plan.variant, plan.scaling, is_async=plan.is_async)
        note(f"{plan.name} scales: {plan.scaling.words(is_async=plan.is_async)}.")


def _stop_scaling(
    aws: Aws, plan: DeploymentPlan, old_config: str, note: Note
) -> list[autoscaling.Registered]:
    """SageMaker gives no variant that is scaled another type of instance."""
    described = aws.call("sagemaker", "describe_endpoint_config", EndpointConfigName=old_config)
    types = {variant.get("InstanceType") for variant in described["ProductionVariants"]}
    if types == {plan.instance_type} and not plan.unscaled:
        return []
    taken = autoscaling.take_away(aws, plan.name)
    if taken:
        note(f"{plan.name} does not scale for the length of the update.")
    return taken


def _scale_again(
    aws: Aws, plan: DeploymentPlan, taken: list[autoscaling.Registered], note: Note
) -> None:
    if taken and not plan.unscaled:
        autoscaling.put_back(aws, taken)
        note(f"{plan.name} scales again.")
    _scale(aws, plan, note)


def _ask_mlflow(aws: Aws, method: str, plan: DeploymentPlan, tracking_uri: str) -> None:
    """MLflow's deployment client starts it; the waiting is ours."""
    import mlflow.deployments

    config = plan.config() | {"synchronous": "False", "archive": "True"}
    with through_mlflow(aws, plan, "deploy", plan.model_uri, tracking_uri=tracking_uri):
        client = mlflow.deployments.get_deploy_client(plan.target)  # type: ignore[no-untyped-call]
        getattr(client, method)(plan.name, model_uri=plan.model_uri, config=config)


@contextmanager
def through_mlflow(
    aws: Aws,
    plan: ModelPlan,
    doing: str,
    what: str,
    *,
    tracking_uri: str,
    asking: str | None = None,
) -> Iterator[None]:
    """Let MLflow work with this account and MLflow store, and with all of a plan.

    Args:
        doing, what: for a failure of MLflow's, as `deploy` and the model.
        asking: for one of AWS's; `doing` if None.

    Raises:
        ServingError: MLflow or AWS refuses.
    """
    with (
        lent_to_library(aws, plan.bucket, also=plan.complete),
        _mlflows_environment(plan.region),
        quiet(),
        fluent_uris(tracking_uri),
        explained(asking or doing),
    ):
        try:
            yield
        except MlflowException as error:
            raise ServingError(
                f"MLflow could not {doing} {what}: {one_line(error, 400)}"
            ) from error


@contextmanager
def _mlflows_environment(region: str) -> Iterator[None]:
    """MLflow's own session is of the region of AWS's settings, and it copies proxies in lower case,
    with their passwords, to the container; boto3 reads those in upper case too."""
    changed: dict[str, str | None] = {"AWS_DEFAULT_REGION": region}
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        if name in os.environ:
            changed |= {
                name: None,
                name.upper(): os.environ.get(name.upper()) or os.environ[name] or None,
            }
    with changed_environment(changed):
        yield


@contextmanager
def telling_what_is_left(doing: str, next_step: str, cause: BaseException) -> Iterator[None]:
    """If even undoing fails, the user has to know what may cost money or serve wrongly.

    Args:
        doing: what did not end then, the start of a sentence.
    """
    try:
        yield
    except (VisiontunerError, KeyboardInterrupt) as error:
        first = str(cause) or "Stopped."
        why = str(error) or "stopped again"
        raise ServingError(f"{first} {doing} did not end ({why}): {next_step}") from None
