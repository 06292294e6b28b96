"""Check a model as an endpoint will serve it, over HTTP, before it is deployed."""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import mlflow.version
import numpy as np
import pandas as pd
import requests

from visiontuner.errors import ServingError, UserMistake
from visiontuner.io.files import temporary_folder
from visiontuner.serving.answers import MAX_PIXELS, Options
from visiontuner.serving.client import REQUEST_BYTES, TOLERANCE, Reference, encode_request
from visiontuner.serving.server import QUIET, Served, wait_until_ready, wanted_by
from visiontuner.text import one_line

# Requests that a model must answer with a 4xx status, whatever is wrong with them.


JSON = "application/json"


def _table(value: Any, **params: Any) -> bytes:
    table = {"columns": ["image"], "data": [[value]]}
    return json.dumps({"dataframe_split": table, "params": params}).encode()


# The smallest image there is, one pixel.
_GIF = base64.b64encode(
    base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
).decode()
# What is wrong -> body and content type.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "an empty body": (b"", JSON),
    "no JSON": (b"{", JSON),
    "a list": (b"[1, 2]", JSON),
    "no table": (b'{"image": "x"}', JSON),
    "another column": (b'{"dataframe_split": {"columns": ["x"], "data": [["x"]]}}', JSON),
    "a number for an image": (_table(3), JSON),
    "null for an image": (_table(None), JSON),
    "no base64": (_table("§"), JSON),
    "no image": (_table(base64.b64encode(b"no image").decode()), JSON),
    "an empty image": (_table(""), JSON),
    "half an image": (_table(_GIF[:40]), JSON),
    "top_k of 0": (_table(_GIF, top_k=0), JSON),
    "top_k of text": (_table(_GIF, top_k="many"), JSON),
    "threshold of 2": (_table(_GIF, threshold=2.0), JSON),
    "another on_error": (_table(_GIF, on_error="ignore"), JSON),
    "a bare JPEG": (b"\xff\xd8\xff", "image/jpeg"),
}


# Which SageMaker instance a served model needs, and whether a chosen one fits.


# Name, vCPUs, memory in GiB; from the smallest, of families that every region has.
_INSTANCES = (
    ("ml.c5.large", 2, 4),
    ("ml.m5.large", 2, 8),
    ("ml.m5.xlarge", 4, 16),
    ("ml.m5.2xlarge", 8, 32),
)
SERVERLESS_MB = (1024, 2048, 3072, 4096, 5120, 6144)
# ml.FAMILY.SIZE; of a family's letters after its generation a g means AWS's own ARM processor.
_TYPE = re.compile(r"ml\.[a-z]+\d+(?P<letters>[a-z]*)(-[a-z0-9]+)?\.[a-z0-9-]+")

_MEMORY_MARGIN = 1.2  # other formats and images than the largest ones that were measured
_SYSTEM_MB = 500  # nginx, MLflow's parent process, the agent


def recommend(*, memory_mb: float, images_per_second: float) -> str:
    """The smallest instance whose memory holds the server, and serverless if that does.

    Args:
        memory_mb: the most that the server held, in 10^6 bytes.
        images_per_second: measured on this machine, for the sentence.
    """
    needed = _needed_mb(memory_mb)
    name, cpus, gigabytes = choose_instance(memory_mb)
    text = f"{name} ({cpus} vCPUs, {gigabytes} GB): the server needs {needed / 1000:.1f} GB"
    if needed > gigabytes * 1024:
        text += ", more than that has; choose one with more"
    serverless = next((size for size in SERVERLESS_MB if needed <= size), None)
    if serverless:
        text += f". For a few requests a minute: serverless with {serverless} MB"
    return f"{text}. This machine answers {images_per_second:.0f} images a second."


def choose_instance(memory_mb: float) -> tuple[str, int, int]:
    """Name, vCPUs and GiB of the smallest instance whose memory holds a server, or the largest.

    Args:
        memory_mb: the most that the server held, in 10^6 bytes.
    """
    needed = _needed_mb(memory_mb)
    return next((one for one in _INSTANCES if needed <= one[2] * 1024), _INSTANCES[-1])


def check_instance_type(wanted: str, known: Sequence[str]) -> None:
    """Make sure that an endpoint can run on instances of a type.

    Args:
        known: the types that boto3 knows. AWS may have newer families, whose sizes are not checked.

    Raises:
        UserMistake: there is no such type, or its processor is not the image's.
    """
    match = _TYPE.fullmatch(wanted)
    families = {each.rpartition(".")[0] for each in known}
    if match is None or (wanted.rpartition(".")[0] in families and wanted not in known):
        near = difflib.get_close_matches(wanted, known, 3) or [name for name, *_ in _INSTANCES]
        raise UserMistake(
            f"SageMaker has no instance type {wanted!r} for endpoints. Nearest: {', '.join(near)}."
        )
    if "g" in match["letters"]:
        raise UserMistake(
            f"{wanted} has an ARM processor, and the serving image is for linux/amd64. Choose "
            f"another --instance-type: {', '.join(name for name, *_ in _INSTANCES)}."
        )


def shortage(
    memory_mb: float, *, instance_type: str | None, serverless_mb: int | None
) -> str | None:
    """What is too small about the choice, one sentence; None if it fits, or is not known.

    Args:
        memory_mb: the most that the server held, in 10^6 bytes.
        instance_type: None for a serverless endpoint.
    """
    needed = _needed_mb(memory_mb)
    sizes = {name: 1024 * gigabytes for name, _, gigabytes in _INSTANCES}
    has = serverless_mb or sizes.get(instance_type or "")
    if has is None or needed <= has:
        return None
    name = f"serverless with {serverless_mb} MB" if serverless_mb else instance_type
    return f"{name} is too small: the server needs {needed:,.0f} MB"


def _needed_mb(memory_mb: float) -> float:
    return memory_mb * _MEMORY_MARGIN + _SYSTEM_MB


# Check a model as an endpoint will serve it, over HTTP, before it is deployed.


_ANSWER_SECONDS = 60.0  # an endpoint's limit for one request
_PING_SECONDS = 2.0  # and for one ping
_WARM_UP, _CLIENTS = 10, 8
_MEASURE_SECONDS = 15.0  # a slow network is measured on fewer requests
_PHOTOGRAPH_BYTES = 12_000
_LARGE_AT_A_TIME = 3
_LOOK_SECONDS = 0.02  # at the memory, while they are decoded
_BUSY = 429
# Of memory under load; allocators keep some of what was once needed, a part for each thread.
_GROWTH, _GROWTH_MB = 0.10, 64.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at; `detail` says what was found."""

    name: str
    status: Literal["ok", "error"]
    detail: str


@dataclass(frozen=True, kw_only=True, repr=False)
class PreflightReport:
    """What was found.

    Args:
        p50_ms, p95_ms, p99_ms: of requests with one image, one at a time, milliseconds.
        images_per_second: with 8 clients that send one image a request.
        memory_mb: the most resident memory that the server held, in 10^6 bytes.
        recommendation: where to run it, one sentence.
    """

    model: str
    checks: tuple[Check, ...]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_second: float
    memory_mb: float
    recommendation: str

    @property
    def passed(self) -> bool:
        return all(check.status == "ok" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "passed": self.passed}

    @property
    def table(self) -> pd.DataFrame:
        """One row a check: name, status, detail."""
        return pd.DataFrame(map(asdict, self.checks))

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if check.status != "ok"]
        return (
            f"PreflightReport {self.model}: "
            f"{'failed: ' + ', '.join(failed) if failed else f'{len(self.checks)} checks passed'}\n"
            f"{self.p50_ms:.0f} ms an image (95 %: {self.p95_ms:.0f} ms), "
            f"{self.images_per_second:.0f} images/s with 8 clients, {self.memory_mb:,.0f} MB\n"
            f"{self.recommendation}"
        )


def run_preflight(
    model: Path,
    server: Served,
    *,
    name: str,
    requests_measured: int = 200,
    note: Callable[[str], None] = lambda _: None,
) -> PreflightReport:
    """Serve a model and ask it.

    Args:
        model: an MLflow model folder.
        server: serves it; started and ended here.
        name: what the report calls the model.
        requests_measured: how many one after another, and as many again by 8 clients.

    Raises:
        ClassifierError: the model holds no readable reference images.
        ServingError: it cannot be served at all.
    """
    reference = Reference.read(model)
    note(f"Serving {name} with {server.description}.")
    with server:
        asked = _Asked(server)
        checks = [_check_ping(asked), _check_reference(asked, reference)]
        checks += [_check_reported_rows(asked, reference), _check_malformed(asked)]
        note("Measuring.")
        _one_at_a_time(asked, reference, _WARM_UP)
        before = server.memory_mb()
        milliseconds = _one_at_a_time(asked, reference, requests_measured)
        rate = _many_at_a_time(asked, reference, requests_measured // _CLIENTS)
        after = server.memory_mb()
        checks.append(_check_payload(asked, reference))
        large, peak = _check_large_images(asked)
        checks.append(large)
        peak = max(after, peak)
    p50, p95, p99 = (float(v) for v in np.percentile(milliseconds, (50, 95, 99)))
    checks += [_check_latency(p99), _check_memory(before, after)]
    return PreflightReport(
        model=name,
        checks=tuple(checks),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        images_per_second=rate,
        memory_mb=peak,
        recommendation=recommend(memory_mb=peak, images_per_second=rate),
    )


class _Asked:
    """The server, over one connection; not for several threads."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between us and this machine

    def ping(self) -> tuple[int, float]:
        """Status and seconds."""
        began = time.perf_counter()
        response = self._session.get(f"{self.server.url}/ping", timeout=_ANSWER_SECONDS)
        return response.status_code, time.perf_counter() - began

    def post(self, body: bytes, content_type: str = JSON) -> requests.Response:
        try:
            return self._post(body, content_type)
        except requests.ConnectionError:
            # The server ends idle connections, perhaps just as we use one.
            with suppress(requests.RequestException):
                return self._post(body, content_type)
        except requests.RequestException:
            pass
        raise ServingError(f"The scoring server stopped answering: {self.server.last_lines()}")

    def _post(self, body: bytes, content_type: str) -> requests.Response:
        return self._session.post(
            f"{self.server.url}/invocations",
            data=body,
            headers={"Content-Type": content_type},
            timeout=2 * _ANSWER_SECONDS,
        )

    def rows(self, contents: Sequence[bytes], options: Options) -> list[dict[str, Any]]:
        response = self.post(encode_request(contents, options))
        if response.status_code != 200:
            raise ServingError(
                f"The model answers its own reference images with {response.status_code}: "
                f"{one_line(response.text, 300)}"
            )
        rows: list[dict[str, Any]] = response.json()["predictions"]
        return rows


def _check_ping(asked: _Asked) -> Check:
    status, seconds = asked.ping()
    detail = f"ready after {asked.server.started_seconds:.1f} s, answers in {seconds * 1e3:.0f} ms"
    if asked.server.installed:
        detail += f"; {asked.server.installed}"
    return _check("ping", status == 200 and seconds <= _PING_SECONDS, detail)


def _check_reference(asked: _Asked, reference: Reference) -> Check:
    rows = asked.rows(reference.images, reference.options())
    difference = reference.difference(rows)
    detail = f"{len(rows)} images, probabilities differ by at most {difference:.1e}"
    return _check("reference images", difference <= TOLERANCE, detail)  # NaN fails


def _check_reported_rows(asked: _Asked, reference: Reference) -> Check:
    name = "a bad row among good ones"
    contents = [b"no image", reference.images[0]]
    response = asked.post(encode_request(contents, Options(on_error="report")))
    if response.status_code != 200:
        return _check(
            name, False, "the whole request fails; an older visiontuner packaged this model"
        )
    rows = response.json()["predictions"]
    passed = len(rows) == 2 and bool(rows[0].get("error")) and bool(rows[1].get("label"))
    return _check(name, passed, "is reported, the good one is answered")


def _check_malformed(asked: _Asked) -> Check:
    wrong = []
    for what, (body, content_type) in MALFORMED.items():
        response = asked.post(body, content_type)
        if not 400 <= response.status_code < 500 or "Traceback" in response.text:
            wrong.append(f"{what}: {response.status_code}")
    detail = f"{len(MALFORMED)} kinds, each answered with 4xx and without a traceback"
    return _check("malformed requests", not wrong, ", ".join(wrong) or detail)


def _check_payload(asked: _Asked, reference: Reference) -> Check:
    """The largest request that an endpoint takes."""
    images: list[bytes] = []
    length = len(encode_request([], Options()))
    for image in cycle(reference.images):
        # What follows an image's end is ignored: small ones become as large as photographs.
        content = image.ljust(_PHOTOGRAPH_BYTES, b"\0")
        length += (len(content) + 2) // 3 * 4 + 6
        if length > REQUEST_BYTES:
            break
        images.append(content)
    began = time.perf_counter()
    response = asked.post(encode_request(images, Options()))
    seconds = time.perf_counter() - began
    passed = (
        response.status_code == 200
        and len(response.content) <= REQUEST_BYTES
        and seconds <= _ANSWER_SECONDS
    )
    detail = (
        f"{len(images)} images in {REQUEST_BYTES / 1e6:g} MB: status {response.status_code} "
        f"in {seconds:.1f} s, {len(response.content) / 1e6:.2f} MB back"
    )
    return _check("payload", passed, detail)


def _check_large_images(asked: _Asked) -> tuple[Check, float]:
    """The largest images that are decoded, some at a time, and the memory in MB meanwhile."""
    side = math.isqrt(MAX_PIXELS)
    body = encode_request([_transparent_png(side)], Options())
    peak = asked.server.memory_mb()
    with ThreadPoolExecutor(_LARGE_AT_A_TIME) as pool:
        sent = [pool.submit(_Asked(asked.server).post, body) for _ in range(_LARGE_AT_A_TIME)]
        while not all(one.done() for one in sent):
            time.sleep(_LOOK_SECONDS)
            peak = max(peak, asked.server.memory_mb())
        statuses = [one.result().status_code for one in sent]
    passed = 200 in statuses and {*statuses} <= {200, _BUSY}
    detail = (
        f"{_LARGE_AT_A_TIME} transparent ones of {side:,} x {side:,} pixels at a time: status "
        f"{', '.join(map(str, sorted({*statuses})))}, up to {peak:,.0f} MB of memory"
    )
    return _check("large images", passed, detail), peak


def _transparent_png(side: int) -> bytes:
    """A square RGBA image, made without its pixels in memory."""
    pack = zlib.compressobj(1)
    row = bytes(1 + 4 * side)
    rows = b"".join([*(pack.compress(row) for _ in range(side)), pack.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": rows, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


def _check_latency(p99_ms: float) -> Check:
    detail = f"p99 {p99_ms:.0f} ms; an endpoint's limit is {_ANSWER_SECONDS:g} s"
    return _check("latency", p99_ms <= _ANSWER_SECONDS * 1e3, detail)


def _check_memory(before: float, after: float) -> Check:
    grown = after - before
    detail = f"{before:.0f} MB before the load, {after:.0f} MB after it ({grown / before:+.1%})"
    return _check("memory", grown <= max(_GROWTH * before, _GROWTH_MB), detail)


def _one_at_a_time(asked: _Asked, reference: Reference, count: int) -> list[float]:
    """Milliseconds of each request."""
    bodies = islice(reference.bodies(), count)
    return milliseconds_each(asked.post, bodies, seconds=_MEASURE_SECONDS)


Question = TypeVar("Question")


def milliseconds_each(
    answer: Callable[[Question], object],
    questions: Iterable[Question],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Milliseconds of each answer, one after the other.

    Args:
        seconds: after so many no more questions are asked.
        clock: seconds; `time.process_time` leaves out what other programs take.
    """
    milliseconds: list[float] = []
    end = time.perf_counter() + seconds
    for question in questions:
        began = clock()
        answer(question)
        milliseconds.append((clock() - began) * 1e3)
        if time.perf_counter() > end:
            break
    return milliseconds


def _many_at_a_time(asked: _Asked, reference: Reference, count: int) -> float:
    """Images a second, with several clients that ask so often each."""
    clients = [_Asked(asked.server) for _ in range(_CLIENTS)]
    began = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        counts = pool.map(lambda client: len(_one_at_a_time(client, reference, count)), clients)
        return sum(counts) / (time.perf_counter() - began)


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name=name, status="ok" if passed else "error", detail=detail)


# A model in the container that SageMaker will run, on this machine's Docker engine.


REPOSITORY = "visiontuner-serving"
# What a deployment tells the container; `serve` is SageMaker's own argument.
VARIABLES = {
    **QUIET,
    "MLFLOW_DEPLOYMENT_FLAVOR_NAME": "python_function",
    "SERVING_ENVIRONMENT": "SageMaker",
}

_PORT = 8080
_CONTAINER_LOOK_SECONDS = 1.0
_REPEATS_OF_A_FATAL_ERROR = 2 * (
    os.cpu_count() or 1
)  # MLflow starts a worker a core, and all of them again
_CALL_SECONDS = 120.0
_BUILD_SECONDS = 3600.0
# MLflow starts nginx and then puts these links in the place of its log files. A log file that is
# opened is copied up from the image's layer, which fails where the link was made meanwhile: nginx
# ends with "open() failed (17: File exists)", in 31 of 1,200 tries. A link is not copied.
_LOG_LINKS = (
    "RUN ln -sf /dev/stdout /var/log/nginx/access.log && "
    "ln -sf /dev/stderr /var/log/nginx/error.log"
)
_NGINX_LINE = re.compile(r"GET /ping|\[(notice|error)\] \d+#")
_ERROR_LINE = re.compile(r"[\w.]+(Error|Exception): ")
_MEMORY = re.compile(r"([\d.]+)\s*([KMG]?)i?B")
_BYTES = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30}


def require_engine() -> None:
    """Make sure that a Docker engine answers.

    Raises:
        UserMistake: none does.
    """
    try:
        done = subprocess.run(
            ["docker", "info"], capture_output=True, text=True, timeout=30, check=False
        )
    except FileNotFoundError:
        reason = "there is no `docker` command"
    except subprocess.TimeoutExpired:
        reason = "`docker info` does not answer"
    else:
        if done.returncode == 0:
            return
        reason = _last(done.stderr) or "`docker info` fails"
    raise UserMistake(
        f"No Docker engine runs here: {reason.rstrip('.')}. Start Docker, or check the model "
        "without --container."
    )


def build_container_image(
    model: Path, container_image: str | None = None, *, note: Callable[[str], None] = lambda _: None
) -> str:
    """Build the image that serves a model, its requirements baked in, of a type SageMaker takes.

    Args:
        model: an MLflow model folder. One image serves all models with the same requirements:
            SageMaker puts its own model over the one that was built in.
        image: its name; None: one made of the requirements, and built only where it is missing.

    Returns:
        The image's name.

    Raises:
        ClassifierError: the model does not say what it needs.
        ServingError: it cannot be built.
    """
    name = container_image or _image_name(model)
    if container_image or not docker("images", "--quiet", name):
        note(f"Building the container image {name}; it takes some minutes, once.")
        with temporary_folder() as folder:
            _step([sys.executable, "-m", "mlflow", "models", "generate-dockerfile", "-m",
                   str(model.absolute()), "-d", str(folder), "--env-manager", "local"],
                  name)  # fmt: skip
            with (folder / "Dockerfile").open("a", encoding="utf-8") as file:
                file.write(f"\n{_LOG_LINKS}\n")
            _step([*_builder(), "--platform", "linux/amd64", "--tag", name, str(folder)], name)
    return name


def _image_name(model: Path) -> str:
    requirements, python = wanted_by(model)
    listed = sorted(requirements.split("\n"))
    wanted = "\n".join([mlflow.version.VERSION, python, *listed, _LOG_LINKS])
    return f"{REPOSITORY}:{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"


def _builder() -> list[str]:
    """The command that builds; SageMaker refuses OCI manifests, which BuildKit makes by default."""
    has_buildx = subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False)
    if has_buildx.returncode != 0:
        return ["docker", "build"]
    return ["docker", "buildx", "build", "--provenance=false", "--sbom=false",
            "--output", "type=docker,oci-mediatypes=false"]  # fmt: skip


def _step(command: list[str], container_image: str) -> None:
    # Where `docker build` is an alias of buildx: attestations need an OCI manifest.
    environment = {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment, timeout=_BUILD_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServingError(f"Building {container_image} took over {_BUILD_SECONDS:g} s.") from None
    if done.returncode != 0:
        raise ServingError(
            f"The container image {container_image} cannot be built: {_reason(done.stdout)}"
        )


class Container(Served):
    """Serves an MLflow model folder in a container while the `with` block runs.

    What runs is what `mlflow deployments run-local -t sagemaker` runs; the port is a free one of
    this machine, and the model cannot be written to. It ends with the block.

    Args:
        model: an MLflow model folder.
        container_image: one that MLflow built.
        ready_seconds: how long it may take until `/ping` answers.

    Raises:
        ServingError: on entering, if it ends or is not ready in time.
    """

    def __init__(self, model: Path, container_image: str, *, ready_seconds: float = 120.0) -> None:
        self.model = model.absolute()
        self.container_image = container_image
        self.ready_seconds = ready_seconds
        self.url = ""
        self.started_seconds = 0.0
        self._id = ""
        self._next_look = 0.0

    @property
    def description(self) -> str:
        return f"the container image {self.container_image}"

    @property
    def installed(self) -> str:
        size = (
            float(docker("image", "inspect", "--format", "{{.Size}}", self.container_image)) / 1e6
        )
        return f"image of {size:,.0f} MB"

    def __enter__(self) -> Self:
        variables = [part for k, v in VARIABLES.items() for part in ("--env", f"{k}={v}")]
        began = time.monotonic()
        self._id = docker(
            "run", "--detach", "--volume", f"{self.model}:/opt/ml/model:ro", *variables,
            "--publish", f"127.0.0.1::{_PORT}", self.container_image, "serve",
        )  # fmt: skip
        try:
            wait_until_ready(self, "The container", began, runs=self._runs)
        except BaseException:
            self.stop()
            raise
        return self

    def memory_mb(self) -> float:
        """What the whole container holds, in 10^6 bytes.

        Raises:
            ServingError: it has ended.
        """
        used = memory_of(self._id)
        if not used:
            raise ServingError(f"The container has ended: {self.last_lines()}")
        return used

    def last_lines(self) -> str:
        """Why it does not serve, or the end of what it printed, in one line."""
        lines = self._log()
        telling = [line for line in lines if _ERROR_LINE.match(line)]
        return " ".join(" ".join(telling[-1:] or lines).split())[-400:] or "it printed nothing"

    def stop(self) -> None:
        """End the container and remove it."""
        container, self._id = self._id, ""
        if container:
            with suppress(ServingError):
                docker("rm", "--force", "--volumes", container)

    def _runs(self) -> bool:
        """Whether it has not ended; its port is known from then on.

        Raises:
            ServingError: the server in it cannot start. The container does not end then: MLflow
                starts the server again and again.
        """
        if time.monotonic() < self._next_look:
            return True
        self._next_look = time.monotonic() + _CONTAINER_LOOK_SECONDS
        if docker("inspect", "--format", "{{.State.Running}}", self._id) != "true":
            return False
        published = docker("port", self._id, str(_PORT)).splitlines()
        if not published:  # it ended just now
            return False
        self.url = f"http://127.0.0.1:{published[0].rpartition(':')[2]}"
        said = Counter(line for line in self._log() if _ERROR_LINE.match(line))
        if said and max(said.values()) >= _REPEATS_OF_A_FATAL_ERROR:
            raise ServingError(f"The server in the container cannot start: {self.last_lines()}")
        return True

    def _log(self) -> list[str]:
        """The last lines that it printed, without nginx's."""
        try:
            done = subprocess.run(
                ["docker", "logs", "--tail", "5000", self._id],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return []
        lines = done.stdout.decode(errors="replace").splitlines()
        return [line for line in lines if line.strip() and not _NGINX_LINE.search(line)]


def memory_of(container: str) -> float:
    """What a container holds, in 10^6 bytes; 0 if it has ended."""
    used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container)
    match = _MEMORY.match(used)  # as "123.4MiB / 7.7GiB"
    return float(match[1]) * _BYTES[match[2]] / 1e6 if match else 0.0


def docker(*arguments: str) -> str:
    """What one `docker` command prints.

    Raises:
        ServingError: it fails.
    """
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=_CALL_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServingError(f"`docker {arguments[0]}` fails: {type(error).__name__}.") from None
    if done.returncode != 0:
        raise ServingError(f"`docker {arguments[0]}` fails: {_last(done.stderr)}")
    return done.stdout.strip()


def _reason(text: str) -> str:
    """The line of a build's log that says why, if one does."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "ERROR" in line or "denied" in line or "no such" in line]
    return (telling or lines or ["it printed nothing"])[-1][-300:]


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[-300:] if lines else ""
