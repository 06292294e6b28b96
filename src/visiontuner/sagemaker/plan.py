"""What a job is going to be, for a person and for the request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from visiontuner import NO_TELEMETRY
from visiontuner.experiment import Experiment
from visiontuner.sagemaker.cost import Price, billed_seconds, dollars
from visiontuner.sagemaker.instances import has_own_disk
from visiontuner.sagemaker.limits import LONGEST_SECONDS, check_choices, check_no_apostrophe
from visiontuner.sagemaker.source import CHANNEL_FOLDER, CHECKPOINTS

PREFIX = "visiontuner"
"""Of our jobs' names and of their folder in the bucket."""

SEARCH_TAG = "visiontuner.search"
PRICE_TAG = "visiontuner.price_per_hour"

_JOB_NAME_LENGTH = 63
_TIMESTAMP_LENGTH = 15  # what the SDK appends, with its hyphen
# SageMaker waits for spot machines within this, running time included.
SPOT_WAIT_SECONDS = 4 * 3600
_GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures on S3 as a job gets them.

    Attributes:
        uri: a folder, with a slash at its end, or an archive.
        size: bytes in all.
        upload: the folder here that has to be uploaded first.
        others: files that lie there already and not in that folder; a job gets them as well.
    """

    uri: str
    size: int = 0
    upload: Path | None = None
    others: int = 0

    @property
    def folder(self) -> str:
        """Where they lie in the job."""
        return CHANNEL_FOLDER if self.uri.endswith("/") else f"{CHANNEL_FOLDER}/{self._name}"

    @property
    def _name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """One training job that is going to run one search.

    Attributes:
        search: names the search's folder in the bucket.
        experiment: with its pictures on S3, if they have to be.
        tracking_uri: an MLflow that the job can reach; None: the journal travels.
        tracking: the same in words.
        disk_gb: of each host; by the size of the pictures if None.
        resumed: the job whose checkpoints this one goes on with.

    Raises:
        UserMistake: SageMaker could not take it.
    """

    search: str
    experiment: Experiment
    region: str
    account: str
    caller: str
    role: str
    bucket: str
    bucket_exists: bool
    image: str
    instance_type: str
    instances: int
    max_run_seconds: int
    price: Price
    tracking_uri: str | None
    tracking: str
    pictures: Pictures | None = None
    disk_gb: int | None = None
    spot: bool = False
    warm_pool_seconds: int = 0
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    resumed: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in self.environment.items():
            check_no_apostrophe(name, value)

    @property
    def root(self) -> str:
        """The search's folder in the bucket."""
        return f"s3://{self.bucket}/{PREFIX}/{self.search}"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    @property
    def output(self) -> str:
        return f"{self.root}/output"

    @property
    def base_name(self) -> str:
        """To which the SDK appends a time."""
        plain = re.sub(r"[^a-zA-Z0-9]+", "-", f"{PREFIX}-{self.experiment.name}")
        return plain[: _JOB_NAME_LENGTH - _TIMESTAMP_LENGTH].strip("-")

    @property
    def has_own_disk(self) -> bool:
        """Whether the machines have disks, so that SageMaker attaches none."""
        return has_own_disk(self.instance_type)

    @property
    def volume_gb(self) -> int | None:
        """Of each host: the pictures, unpacked if they are an archive, and room for the rest.

        None: the machine's own disk, whatever its size.
        """
        if self.has_own_disk:
            return None
        if self.disk_gb is not None:
            return self.disk_gb
        size = self.pictures.size if self.pictures else 0
        return 50 + round((1 if self._is_folder else 3) * size / _GB)

    @property
    def _is_folder(self) -> bool:
        return self.pictures is None or self.pictures.uri.endswith("/")

    @property
    def max_wait_seconds(self) -> int | None:
        """With spot: how long SageMaker may take, waiting for machines included."""
        if not self.spot:
            return None
        return min(self.max_run_seconds + SPOT_WAIT_SECONDS, LONGEST_SECONDS)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the container."""
        variables = {
            **NO_TELEMETRY,
            "VISIONTUNER_CACHE": f"{CHECKPOINTS}/cache",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            # The list is complete: what a package wants of the image's torch changes nothing.
            "PIP_NO_DEPS": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PYTHONUNBUFFERED": "1",
        }
        if self.pictures is not None:
            variables["VISIONTUNER_CHANNEL"] = f"{self.pictures.uri}={self.pictures.folder}"
        return variables

    @property
    def all_tags(self) -> dict[str, str]:
        """The user's, and those that `jobs` and `attach` read."""
        tags = {**self.tags, SEARCH_TAG: self.search}
        if self.price.per_hour is not None:
            tags[PRICE_TAG] = f"{self.price.per_hour:g}"
        return tags

    @property
    def most_it_can_cost(self) -> float | None:
        """US dollars, on demand, as far as is known: with the job's end and the warm pool."""
        seconds = billed_seconds(
            max_run_seconds=self.max_run_seconds, warm_pool_seconds=self.warm_pool_seconds
        )
        return self.price.of(seconds)

    def lines(self) -> list[str]:
        """What is going to happen, for a person."""
        machines = f"{self.instances} x {self.instance_type}" + (", spot" if self.spot else "")
        made = "" if self.bucket_exists else " (is made)"
        lines = [
            f"job        {self.base_name}-… in {self.region}, account {self.account}, "
            f"as {self.caller}",
            f"search     {self._describe_search()}",
            f"pictures   {self._describe_pictures()}",
            f"runs on    {machines}; at most {words_for(self.max_run_seconds)}",
            f"cost       {self._describe_cost()}",
            f"tracking   {self.tracking}",
            f"image      {self.image}",
            f"role       {self.role}",
            f"keeps      {self.root}{made}",
        ]
        lines.append(f"disk       {self._describe_disk()}")
        if self.kms_key is not None:
            lines.append(f"encrypted  {self._describe_encryption()}")
        if self.warm_pool_seconds:
            lines.append(f"warm pool  {words_for(self.warm_pool_seconds)} after the job, and paid")
        if self.tags:
            tags = ", ".join(f"{key}={value}" for key, value in self.tags.items())
            lines.append(f"tags       {tags}")
        if self.subnets:
            subnets, groups = ", ".join(self.subnets), ", ".join(self.security_groups)
            lines.append(f"network    {subnets} ({groups})")
        return lines

    def _describe_search(self) -> str:
        search = self.experiment.search
        described = f"{self.search}: {search.trials} trials ({search.algorithm})"
        return described + (f", goes on after {self.resumed}" if self.resumed else "")

    def _describe_pictures(self) -> str:
        if self.pictures is None:
            return self.experiment.data.source
        size = f" ({self.pictures.size / 1e6:,.0f} MB)" if self.pictures.size else ""
        origin = f", uploaded from {self.pictures.upload}" if self.pictures.upload else ""
        count = self.pictures.others
        lie = "1 other file lies" if count == 1 else f"{count:,} other files lie"
        others = f"; {lie} there already, for the job as well" if count else ""
        return f"{self.pictures.uri}{size}{origin}{others}"

    def _describe_disk(self) -> str:
        if self.has_own_disk:
            return f"the own one of each {self.instance_type}, of a fixed size"
        return f"{self.volume_gb:,} GB each"

    def _describe_encryption(self) -> str:
        disks = "" if self.has_own_disk else ", the disks"
        own = "; the machines' disks with keys of their own" if self.has_own_disk else ""
        return (
            f"what is uploaded, model.tar.gz{disks} with {self.kms_key}{own}; the checkpoints by "
            "the bucket's own setting"
        )

    def _describe_cost(self) -> str:
        if self.price.per_hour is None:
            return "not known: AWS's price list does not say; tell it with --price"
        most = f"at most about {dollars(self.most_it_can_cost)}"
        saved = "; spot is mostly cheaper" if self.spot else ""
        return f"${self.price.per_hour:g} an hour each; {most}{saved}"


def words_for(seconds: float) -> str:
    """`2 h`, `1 h 30 min`, `45 min`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes or not hours else ""]
    return " ".join(part for part in parts if part)
