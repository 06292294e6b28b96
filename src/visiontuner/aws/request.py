"""What a job is going to be, and the request that SageMaker gets."""

from __future__ import annotations

import gzip
import hashlib
import io
import ipaddress
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import visiontuner
from visiontuner import NO_TELEMETRY
from visiontuner.aws.account import (
    PLATFORM,
    check_network,
    check_tags,
    check_variables,
    has_own_disk,
    look_up_container_image,
    refuse_small_quotas,
    require_bucket,
)
from visiontuner.data.labels import is_table_name
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.io.aws import Aws, AwsRefused, explained
from visiontuner.io.download import is_archive_name
from visiontuner.paths import split_uri
from visiontuner.text import hide_variables, one_line, without_secrets

# What a job costs: at most, so far, and for each trial.


SHORTEST_RUN_SECONDS = 600
"""Less is spent on starting machines and installing packages."""

# At its limit a job has 120 s to end in order (botocore, StoppingCondition); then SageMaker uploads
# what it keeps. Both are billed; three minutes for the upload are a guess.
ENDING_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a cluster costs: US dollars for one instance for an hour, on demand; None: unknown."""

    per_hour: float | None
    instances: int

    def of(self, seconds: float) -> float | None:
        """US dollars for so long."""
        return None if self.per_hour is None else self.per_hour * self.instances * seconds / 3600


def billed_seconds(*, max_run_seconds: float, warm_pool_seconds: float) -> float:
    """Of each machine at most, as far as is known beforehand."""
    return max_run_seconds + ENDING_SECONDS + warm_pool_seconds


def limit_seconds(
    price: Price, *, max_run_seconds: float, warm_pool_seconds: float, max_cost: float | None
) -> int:
    """How long a job may run: as long as was said, and no longer than the money lasts.

    The money also pays for the end of the job and for the warm pool.

    Raises:
        UserMistake: there is a limit in money and no price, or it is too low for any search.
    """
    if max_cost is None:
        return int(max_run_seconds)
    if price.per_hour is None:
        raise UserMistake(
            "--max-cost needs the price of an instance, and AWS's price list does not say it; "
            "tell it with --price."
        )
    hourly = price.per_hour * price.instances
    beside = billed_seconds(max_run_seconds=0, warm_pool_seconds=warm_pool_seconds)
    affordable = max_cost * 3600 / hourly - beside if hourly else max_run_seconds
    if affordable < SHORTEST_RUN_SECONDS:
        also = " and the warm pool" if warm_pool_seconds else ""
        least = SHORTEST_RUN_SECONDS // 60
        raise UserMistake(
            f"--max-cost {max_cost:g} lasts {max(0, affordable) / 60:.0f} min at ${hourly:.2f} an "
            f"hour, beside the job's end{also}; a search needs {least} at least. "
            "Allow more, or choose a cheaper --instance-type."
        )
    return int(min(max_run_seconds, affordable))


def shares(seconds: Mapping[str, float], cost: float) -> dict[str, float]:
    """A search's cost over its trials, by their seconds; together they are the whole cost.

    Start-up and idle machines are paid as well: each trial bears them by its length.
    """
    total = sum(seconds.values())
    return {name: cost * part / total if total else 0.0 for name, part in seconds.items()}


def dollars(amount: float | None) -> str:
    """For a person."""
    return "not known" if amount is None else f"${amount:,.2f}"


# What a job's hosts get: this very package, what the image lacks, the experiment, its orders.


# `exec`: SIGTERM goes to a container's first process, and bash, which that is, passes nothing on.
COMMAND = "exec python -m visiontuner.aws.container"
CHECKPOINTS = "/opt/ml/checkpoints"
CHANNEL = "images"
CHANNEL_FOLDER = f"/opt/ml/input/data/{CHANNEL}"

# The image brings its own torch, built for its GPUs: it is neither listed nor looked behind.
_IMAGES_OWN = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")
# The hosts are not this machine: AWS's images are Linux, with a Python of their own.
_LINUX = {
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}
_PYTHONS = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0"}
    for minor in (11, 12, 13)
]
# Submitting is done here; a job talks to S3 and to MLflow only.
_NOT_NEEDED = ("sagemaker",)
# Signs requests to an MLflow that SageMaker runs.
SAGEMAKER_MLFLOW = "sagemaker-mlflow"


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """`job.json`.

    Attributes:
        checkpoints: the folder that SageMaker keeps on S3.
        tracking_uri: an MLflow that the job can reach; None: the journal travels instead.
        token: random, the same on every host and made for this job alone.
    """

    checkpoints: str = CHECKPOINTS
    tracking_uri: str | None = None
    token: str


def requirements(*, also: tuple[str, ...] = ()) -> list[str]:
    """Everything this package needs in a job but for the image's own, pinned to what is here.

    With `make install` these are the pins of constraints.txt. What only another Python or Linux
    needs is not installed here, and comes without a pin.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(name) for name in also] + list(_needs("visiontuner", frozenset()))
    while waiting:
        need = waiting.pop()
        name, extras = canonicalize_name(need.name), frozenset(need.extras)
        if (name, extras) in seen or _IMAGES_OWN.fullmatch(name) or name in _NOT_NEEDED:
            continue
        seen.add((name, extras))
        try:
            found[name] = f"=={distribution(name).version}"
        except PackageNotFoundError:
            found.setdefault(name, f"{need.specifier}")
            continue
        waiting += _needs(name, extras)
    return [f"{name}{version}" for name, version in sorted(found.items())]


def _needs(package: str, extras: frozenset[str]) -> Iterator[Requirement]:
    for text in distribution(package).requires or ():
        need = Requirement(text)
        if need.marker is None or any(
            need.marker.evaluate({**_LINUX, **python, "extra": extra})
            for python in _PYTHONS
            for extra in (extras or {""})
        ):
            yield need


def write_source(folder: Path, *, experiment: str, job: JobFile) -> Path:
    """Write the archive that the job's hosts unpack and run.

    Args:
        folder: an existing one.
        experiment: the experiment file's text.

    Returns:
        The archive, named after its content.
    """

    also = (SAGEMAKER_MLFLOW,) if (job.tracking_uri or "").startswith("arn:") else ()
    texts = {
        "experiment.yaml": experiment,
        "job.json": json.dumps(asdict(job), indent=1),
        "requirements.txt": "\n".join(requirements(also=also)) + "\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    package = Path(visiontuner.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            files[f"visiontuner/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    digest = hashlib.sha256(plain.getvalue()).hexdigest()
    archive = folder / f"source-{digest[:12]}.tar.gz"
    archive.write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    return archive


# What SageMaker refuses of a job, before anything is made.


LONGEST_SECONDS = 28 * 24 * 3600

_INSTANCE = re.compile(r"ml\.[a-z0-9-]+\.[a-z0-9]+")
_LARGEST_DISK_GB = 16384
_VARIABLE_LENGTH = 512  # of a training job's value, as botocore's model has it


def check_choices(plan: JobPlan) -> None:
    """Refuse what SageMaker refuses.

    Raises:
        UserMistake: with the flag to change.
    """
    if not _INSTANCE.fullmatch(plan.instance_type):
        raise UserMistake(
            f"--instance-type takes a name such as ml.g5.xlarge, got {plan.instance_type!r}."
        )
    if plan.spot and plan.warm_pool_seconds:
        raise UserMistake("SageMaker keeps no spot machines warm: leave --spot or --warm-pool out.")
    check_network(plan.subnets, plan.security_groups)
    if plan.warm_pool_seconds > 3600:
        raise UserMistake("SageMaker keeps machines warm for an hour at most (--warm-pool 1h).")
    if plan.max_run_seconds > LONGEST_SECONDS:
        raise UserMistake("A training job runs for 28 days at most (--max-run 28d).")
    _check_disk(plan)
    check_tags(plan.tags)
    check_variables(plan.variables, longest=_VARIABLE_LENGTH)


def _check_disk(plan: JobPlan) -> None:
    if plan.disk_gb is None:
        return
    if plan.has_own_disk:
        raise UserMistake(
            f"{plan.instance_type} has a disk of its own, of a fixed size: leave --volume out, or "
            "choose a larger --instance-type."
        )
    if not 1 <= plan.disk_gb <= _LARGEST_DISK_GB:
        raise UserMistake(f"--volume takes 1 to {_LARGEST_DISK_GB} GB, got {plan.disk_gb}.")


def check_no_apostrophe(what: str, value: str) -> None:
    """An apostrophe ends the quotation in the SDK's start script on the hosts.

    Raises:
        UserMistake: there is one.
    """
    if "'" in value:
        raise UserMistake(
            f"{what} has an apostrophe ({value}), which SageMaker's start script does not survive; "
            "choose another."
        )


# What a job is going to be, for a person and for the request.


PREFIX = "visiontuner"
"""Of our jobs' names and of their folder in the bucket."""

SEARCH_TAG = "visiontuner.search"
PRICE_TAG = "visiontuner.price_per_hour"

CHANNEL_VARIABLE = "VISIONTUNER_CHANNEL"
_VARIABLES = {
    **NO_TELEMETRY,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    # The list is complete: what a package wants of the image's torch changes nothing.
    "PIP_NO_DEPS": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "PYTHONUNBUFFERED": "1",
}
OUR_VARIABLES = (*_VARIABLES, CHANNEL_VARIABLE)
"""What every job's container gets."""

_JOB_NAME_LENGTH = 63
_TIMESTAMP_LENGTH = 15  # what the SDK appends, with its hyphen
# SageMaker waits for spot machines within this, running time included.
SPOT_WAIT_SECONDS = 4 * 3600
_GB = 10**9


@dataclass(frozen=True, kw_only=True)
class S3Images:
    """Images on S3 as a job gets them.

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
        experiment: with its images on S3, if they have to be.
        tracking_uri: an MLflow that the job can reach; None: the journal travels.
        tracking: the same in words.
        disk_gb: of each host; by the size of the images if None.
        encrypt_traffic: what the hosts send each other is encrypted.
        variables: of the container, beside ours.
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
    container_image: str
    instance_type: str
    instances: int
    max_run_seconds: int
    price: Price
    tracking_uri: str | None
    tracking: str
    images: S3Images | None = None
    disk_gb: int | None = None
    spot: bool = False
    warm_pool_seconds: int = 0
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    encrypt_traffic: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
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
        """Of each host: the images, unpacked if they are an archive, and room for the rest.

        None: the machine's own disk, whatever its size.
        """
        if self.has_own_disk:
            return None
        if self.disk_gb is not None:
            return self.disk_gb
        size = self.images.size if self.images else 0
        return 50 + round((1 if self._is_folder else 3) * size / _GB)

    @property
    def _is_folder(self) -> bool:
        return self.images is None or self.images.uri.endswith("/")

    @property
    def max_wait_seconds(self) -> int | None:
        """With spot: how long SageMaker may take, waiting for machines included."""
        if not self.spot:
            return None
        return min(self.max_run_seconds + SPOT_WAIT_SECONDS, LONGEST_SECONDS)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the container."""
        variables = dict(_VARIABLES)
        if self.images is not None:
            variables[CHANNEL_VARIABLE] = f"{self.images.uri}={self.images.folder}"
        return variables | dict(self.variables)

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
            f"images     {self._describe_images()}",
            f"runs on    {machines}; at most {words_for(self.max_run_seconds)}",
            f"cost       {self._describe_cost()}",
            f"tracking   {self.tracking}",
            f"container  {self._describe_image()}",
            f"role       {self.role}",
            f"keeps      {self.root}{made}",
        ]
        lines.append(f"disk       {self._describe_disk()}")
        if self.kms_key is not None:
            lines.append(f"encrypted  {self._describe_encryption()}")
        if self.warm_pool_seconds:
            lines.append(f"warm pool  {words_for(self.warm_pool_seconds)} after the job, and paid")
        if self.encrypt_traffic:
            lines.append("traffic    encrypted between the hosts, which costs some speed")
        if self.variables:
            shown = hide_variables(self.variables).items()
            lines.append(f"variables  {', '.join(f'{key}={value}' for key, value in shown)}")
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

    def _describe_images(self) -> str:
        if self.images is None:
            return self.experiment.data.source
        size = f" ({self.images.size / 1e6:,.0f} MB)" if self.images.size else ""
        origin = f", uploaded from {self.images.upload}" if self.images.upload else ""
        count = self.images.others
        lie = "1 other file lies" if count == 1 else f"{count:,} other files lie"
        others = f"; {lie} there already, for the job as well" if count else ""
        return f"{self.images.uri}{size}{origin}{others}"

    def _describe_image(self) -> str:
        version = awss_version(self.container_image)
        if version is None or version in torch_range():
            return self.container_image
        tested = f"visiontuner is tested with {torch_range()}"
        return f"{self.container_image} (PyTorch {version}; {tested})"

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


# Whether a job can write to an MLflow, from its address alone; nothing is asked.


_NO_TRACKING = "none"
# MLflow's own; what they hold must not be readable in a job's description.
_SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)
_PRIVATE_ENDINGS = (".local", ".internal", ".lan", ".home.arpa", ".localdomain")
_LATER = "the journal travels instead, and `visiontuner attach JOB` writes it"


def reachable_tracking(
    uri: str, environment: Mapping[str, str] | None = None, *, in_vpc: bool = False
) -> tuple[str | None, str]:
    """Whether a job can write to an MLflow, and the same in words.

    A database or a server on this machine is out of a job's reach, a private address is without a
    VPC, and credentials do not travel in a job's request, where everybody who may describe the job
    would read them.

    Args:
        in_vpc: the job runs in a VPC, which may lead to private addresses.

    Raises:
        UserMistake: it is no address.
    """
    variables = os.environ if environment is None else environment
    reason = _reason_it_cannot_reach(uri, variables, in_vpc)
    if reason is None:
        return uri, f"live, into {without_secrets(uri)}"
    return None, f"{reason}: {_LATER}"


def _reason_it_cannot_reach(uri: str, variables: Mapping[str, str], in_vpc: bool) -> str | None:
    if uri == _NO_TRACKING:
        return "none is wanted"
    if uri.startswith("arn:"):
        return None
    shown = without_secrets(uri)
    try:
        parts = urlsplit(uri)
        host = parts.hostname or ""
    except ValueError:
        raise UserMistake(f"MLFLOW_TRACKING_URI is no address: {without_secrets(uri)!r}.") from None
    if parts.scheme not in ("http", "https"):
        return _no_server(uri, parts.scheme)
    if parts.username or parts.password or any(variables.get(name) for name in _SECRETS):
        return f"{host} wants credentials, which do not travel in a job's request"
    if _is_this_machine(host):
        return f"{shown} is this machine's own"
    if _is_private(host) and not in_vpc:
        return f"{shown} is in a private network, out of reach of a job without a VPC"
    return None


def _no_server(uri: str, scheme: str) -> str:
    shown = without_secrets(uri)
    if uri == "databricks" or scheme.startswith("databricks"):
        return f"{shown} wants credentials, which do not travel in a job's request"
    if scheme in ("", "file"):
        return f"{shown} is a folder, out of a job's reach"
    return f"{shown} is a database, out of a job's reach"


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    if address is not None:
        return address.is_loopback or address.is_unspecified
    return host in ("", "localhost") or host.endswith(".localhost")


def _is_private(host: str) -> bool:
    address = _address(host)
    if address is not None:
        return not address.is_global
    name = host.rstrip(".")
    return "." not in name or name.endswith(_PRIVATE_ENDINGS)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


# What a job needs beside an account's role and bucket: container image, quota, images on S3.


_OLDEST_PYTHON = 11  # 3.11
# The SDK's names for AWS's two lines of images, the newer one first; and what their URLs look like:
# pytorch:2.14-cu133-amzn2023-sagemaker, pytorch-training:2.10.0-gpu-py313.
_NEWER_LINE, _OLDER_LINE = "pytorch-amzn2023", "pytorch"
_AWSS_IMAGE = re.compile(r"/pytorch(?:-training)?:([\d.]+)-(?:cpu|gpu|cu\d+)-")
_PUBLIC_IMAGES = (
    "public.ecr.aws/deep-learning-containers/"  # AWS's own; no account's ECR knows them
)
_ARM = re.compile(r"-gb\d")  # NVIDIA's Grace processors


def find_container_image(
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
        _check_container_image(aws, wanted, instance_type)
        return wanted
    from sagemaker.core import image_uris

    try:
        with explained("look for an image"):
            lines = {
                known: line
                for line in (_OLDER_LINE, _NEWER_LINE)
                for known in image_uris.list_versions(line, "training")
                if known[0].isdigit()  # not "latest"
            }
            exact = _exact_version(list(lines), version)
            python = None
            if lines[exact] == _OLDER_LINE:
                known = image_uris.list_py_versions(_OLDER_LINE, exact, "training")
                python = _fitting_python(exact, known[-1])
            container_image: str = image_uris.retrieve(
                lines[exact],
                aws.region,
                version=exact,
                py_version=python,
                instance_type=instance_type,
                image_scope="training",
            )
            return container_image
    except ValueError as error:
        raise UserMistake(
            f"AWS has no PyTorch image for {instance_type} in {aws.region} "
            f"({one_line(error, 160)}). Name one with --image."
        ) from None


def _exact_version(known: list[str], version: str | None) -> str:
    """The newest of the known ones, or of those that a version stands for, as 2.8.0 of 2.8."""

    # 2.10 and 2.10.0 are the same: the longer name is the exact one.
    ordered = sorted(known, key=lambda text: (Version(text), len(text)))
    fitting = [text for text in ordered if version is None or f"{text}.".startswith(f"{version}.")]
    if not fitting:
        newest = ", ".join([text for text in ordered if text.count(".") == 1][-4:])
        raise UserMistake(f"AWS has no image with PyTorch {version}. The newest: {newest}.")
    return fitting[-1]


def _fitting_python(version: str, newest: str) -> str:
    if int(newest.removeprefix("py3")) < _OLDEST_PYTHON:
        raise UserMistake(
            f"AWS's image with PyTorch {version} has Python 3.{newest.removeprefix('py3')}, and "
            f"visiontuner needs 3.{_OLDEST_PYTHON}. Choose a newer --image-version."
        )
    return newest


def torch_range() -> SpecifierSet:
    """The range of PyTorch that this package asks for."""
    needs = _needs("visiontuner", frozenset())
    return next(need.specifier for need in needs if need.name == "torch")


def awss_version(container_image: str) -> str | None:
    """The PyTorch version of one of AWS's own images; None if it is another one."""
    match = _AWSS_IMAGE.search(container_image)
    return match[1] if match else None


def _check_container_image(aws: Aws, url: str, instance_type: str) -> None:
    if url.startswith(_PUBLIC_IMAGES):
        return
    try:
        advice = "Push it there, or leave --image out for AWS's PyTorch image."
        container_image = look_up_container_image(aws, url, runs="the job", advice=advice)
    except AwsRefused:  # not every caller may look; SageMaker itself refuses then
        return
    if container_image.platform not in (None, PLATFORM) and not _ARM.search(instance_type):
        raise UserMistake(
            f"The container image is for {container_image.platform}, and {instance_type} is "
            f"{PLATFORM}. Build it with `docker buildx build --platform linux/amd64 …`."
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
    refuse_small_quotas(
        aws,
        [f"{instance_type} for {usage}" for usage in usages],
        instances,
        advice={"warm pool": "leave --warm-pool out"},
    )


def size_on_s3(aws: Aws, uri: str) -> int:
    """Bytes of the images under a URI.

    Raises:
        UserMistake: there is nothing, the bucket is not there, or in another region.
    """
    require_bucket(aws, uri)
    bucket, key = split_uri(uri)
    pages = aws.pages("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=key)
    size = sum(int(entry["Size"]) for entry in pages)
    if not size:
        raise UserMistake(
            f"There are no images at {uri}. Name the folder that holds them as --data and add "
            f"--upload {uri}."
        )
    return size


def as_channel(uri: str) -> str:
    """A folder ends with a slash: without one `dogs` would hold `dogs2` as well.

    A table comes with the folder that it lies in.
    """
    uri = uri.rpartition("/")[0] if is_table_name(uri) else uri
    return uri if is_archive_name(uri) or uri.endswith("/") else f"{uri}/"
