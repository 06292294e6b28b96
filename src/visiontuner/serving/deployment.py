"""What is going to be deployed, as MLflow's Python client and its command line take it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visiontuner import NO_TELEMETRY
from visiontuner.aws_images import Image
from visiontuner.commands import next_command
from visiontuner.errors import UserMistake
from visiontuner.serving.instances import SERVERLESS_MB

# Tags of an endpoint; the first is what makes it ours.
MODEL_TAG = "visiontuner.model"
DEPLOYMENT_TAG = "visiontuner.deployment"
TTL_TAG = "visiontuner.ttl"
PRICE_TAG = "visiontuner.price_per_hour"
IMAGE_TAG = "visiontuner.image_digest"

CAPTURE = "data_capture_config"
DEFAULT_INSTANCE = "ml.m5.large"
# In the container MLflow is imported before the model, which brings its own copy of this package.
QUIET = {n: NO_TELEMETRY[n] for n in ("MLFLOW_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY")}
# MLflow appends "-config-" and 20 letters, and shortens what then exceeds 63.
NAME_LENGTH = 35
_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")
_TAG_LETTERS = re.compile(r"[^\w .:/=+@-]")
_TAG_LENGTH = 256
_TTL = re.compile(r"(\d+(?:\.\d+)?)([mhd])")
_HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}


@dataclass(frozen=True, kw_only=True)
class DeploymentPlan:
    """One deployment.

    Args:
        name: of the endpoint.
        model_uri: `models:/NAME/VERSION` or a model folder.
        newer_model: NAME/VERSION of one that is newer than the champion, which is deployed.
        bucket: the model's archive is uploaded there; MLflow makes it if `bucket_exists` is not.
        instance_type: None for a serverless endpoint.
        serverless_mb: its memory; None for instances.
        more: further dictionaries that MLflow takes: data_capture_config, vpc_config,
            async_inference_config.
        environment: more variables for the container.
        tags: of the endpoint and its model; their values are what AWS allows.
        price_per_hour: US dollars for all instances; None: not known.
    """

    name: str
    model_uri: str
    region: str
    account: str
    caller: str
    role: str
    image: Image
    bucket: str
    bucket_exists: bool = True
    instance_type: str | None = DEFAULT_INSTANCE
    instances: int = 1
    serverless_mb: int | None = None
    serverless_concurrency: int = 5
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    assume_role: str | None = None
    price_per_hour: float | None = None
    newer_model: str | None = None
    timeout_seconds: int = 1800
    region_is_default: bool = True

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.serverless_mb is not None and self.serverless_mb not in SERVERLESS_MB:
            listed = ", ".join(map(str, SERVERLESS_MB))
            raise UserMistake(f"--serverless takes one of {listed} MB, got {self.serverless_mb}.")
        if self.serverless_mb is not None and CAPTURE in self.more:
            raise UserMistake("A serverless endpoint captures no data; leave --data-capture out.")

    @property
    def target(self) -> str:
        """As MLflow names a region and a role to take on."""
        return f"sagemaker:/{self.region}" + (f"/{self.assume_role}" if self.assume_role else "")

    @property
    def deployment(self) -> str:
        """What tells this deployment's resources from others'."""
        return self.tags[DEPLOYMENT_TAG]

    def config(self) -> dict[str, str]:
        """MLflow's `-C` values; MLflow reads the same texts from Python."""
        config = {
            "execution_role_arn": self.role,
            "image_url": self.image.url,
            "timeout_seconds": str(self.timeout_seconds),
            "tags": json.dumps(dict(self.tags)),
        }
        if self.bucket_exists:
            config["bucket"] = self.bucket
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
        """MLflow's own command for this, to be pasted into a shell."""
        words = ["mlflow", "deployments", verb, "-t", self.target, "--name", self.name]
        lines = [shlex.join(words), shlex.join(["-m", self.model_uri])]
        lines += [shlex.join(["-C", f"{key}={value}"]) for key, value in self.config().items()]
        # MLflow makes its bucket in the region of AWS's settings, not in the endpoint's.
        prefix = "" if self.region_is_default else f"AWS_DEFAULT_REGION={self.region} "
        return prefix + " \\\n    ".join(lines)

    def lines(self) -> list[str]:
        """What is going to happen, for a person."""
        platform = self.image.platform or "its processor could not be looked up"
        made = "" if self.bucket_exists else " (MLflow makes it)"
        where = (
            f"serverless, {self.serverless_mb} MB, at most {self.serverless_concurrency} at a time"
            if self.serverless_mb is not None
            else f"{self.instances} x {self.instance_type}"
        )
        lines = [
            f"endpoint   {self.name} in {self.region}, account {self.account}, as {self.caller}",
            f"model      {self.model_uri}{self._newer()}",
            f"runs on    {where}; {self.cost()}",
            f"role       {self.role}",
            f"image      {self.image.url} ({self.image.digest[:19]}…, {platform})",
            f"upload to  s3://{self.bucket}{made}",
        ]
        if CAPTURE in self.more:
            lines.append(f"captures   requests in {self.more[CAPTURE]['DestinationS3Uri']}")
        if TTL_TAG in self.tags:
            lines.append(f"lives for  {self.tags[TTL_TAG]}; nothing deletes it by itself")
        return lines

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


def ttl_hours(text: str) -> float:
    """`45m`, `8h` or `2d` in hours.

    Raises:
        UserMistake: it is none of these.
    """
    match = _TTL.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise UserMistake(f"--ttl takes a time such as 45m, 8h or 2d, got {text!r}.")
    return float(match[1]) * _HOURS[match[2]]


def capture_everything(folder: str) -> dict[str, Any]:
    """SageMaker's configuration to keep all requests and answers.

    Raises:
        UserMistake: the folder is not in S3.
    """
    if not folder.startswith("s3://"):
        raise UserMistake(f"--data-capture takes s3://BUCKET/FOLDER, got {folder!r}.")
    return {
        "EnableCapture": True,
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": folder,
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
    }
