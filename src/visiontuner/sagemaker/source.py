"""What a job's hosts get: this very package, what the image lacks, the experiment, its orders."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# `exec`: SIGTERM goes to a container's first process, and bash, which that is, passes nothing on.
COMMAND = "exec python -m visiontuner.sagemaker.cluster"
CHECKPOINTS = "/opt/ml/checkpoints"
CHANNEL = "pictures"
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
        search: `output`, the search folder in the job.
        tracking_uri: an MLflow that the job can reach; None: the journal travels instead.
        data_channel: a channel to read the pictures from instead of the experiment's source; None:
            the source is as it says, or `VISIONTUNER_CHANNEL` says where it lies.
        token: random, the same on every host and made for this job alone.
    """

    search: dict[str, str] = field(default_factory=lambda: {"output": f"{CHECKPOINTS}/search"})
    tracking_uri: str | None = None
    data_channel: str | None = None
    token: str


def requirements(package: str = "visiontuner", *, also: tuple[str, ...] = ()) -> list[str]:
    """Everything a package needs in a job but for the image's own, pinned to what is here.

    With `make install` these are the pins of constraints.txt. What only another Python or Linux
    needs is not installed here, and comes without a pin.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(name) for name in also] + list(_needs(package, frozenset()))
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
    import visiontuner

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
