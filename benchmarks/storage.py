"""10,000 small files to an S3 stand-in: side by side, one after another, and its own limit."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from measuring import Row, report, scratch

TARGETS = (
    "at least 5 x faster than one upload_file after another, or the stand-in's own limit",
    "moves nothing",
)
SMALL = {"files": 200}
BYTES = 4096
CLASSES = 49
ROUNDS = 4
BUCKET = "photos"
# As many connections as upload_folder has, from processes that do nothing but send and receive.
PROCESSES = 2
CONNECTIONS = 16
# Of the rate that the stand-in takes.
LIMIT = 0.95


def measure(*, files: int = 10_000, stand_in: str | None = None) -> dict[str, Any]:
    """Seconds of each way, all of them on the same files and the same server.

    Args:
        stand_in: URL of an S3 stand-in that runs already; by default moto's server, started here.
    """
    with scratch() as folder, _settings(folder), _server(stand_in) as url:
        os.environ["AWS_ENDPOINT_URL"] = url
        images = _images(folder / "images", files)
        seconds = _uploads(images, url)
        seconds |= _downloads(folder)
    return _report(files, seconds)


def _uploads(images: Path, url: str) -> dict[str, float]:
    """The ways in turn, round by round: other work on the machine meets all of them."""
    import boto3

    from visiontuner.io.s3 import connect, upload_folder

    client, ours = boto3.client("s3"), connect()
    client.create_bucket(Bucket=BUCKET)
    seconds: dict[str, float] = {}
    for part in sorted(images.iterdir()):
        names = [path.relative_to(images).as_posix() for path in sorted(part.rglob("*.jpg"))]
        prepared = _prepare(part, url)
        assert len(prepared) == len(names)
        with _timed(seconds, "prepared"):
            _send_all(url, prepared)
        with _timed(seconds, "upload_folder"):
            moved = upload_folder(part, f"s3://{BUCKET}/ours/{part.name}")
        assert moved.files == len(names)
        for what, one in (("upload_file", client), ("upload_file, our client", ours)):
            with _timed(seconds, what):
                for name in names:
                    one.upload_file(str(images / name), BUCKET, f"{what}/{name}")
    with _timed(seconds, "again"):
        moved = upload_folder(images, f"s3://{BUCKET}/ours")
    assert moved.files == 0
    return seconds


def _downloads(folder: Path) -> dict[str, float]:
    from visiontuner.io.s3 import download_folder

    seconds: dict[str, float] = {}
    for what in ("download_folder", "download again"):
        with _timed(seconds, what):
            moved = download_folder(
                f"s3://{BUCKET}/ours", folder / "back", memory=folder / "memory.json"
            )
    assert moved.files == 0
    return seconds


def _report(files: int, seconds: dict[str, float]) -> dict[str, Any]:
    ours, plain, limit = (seconds[key] for key in ("upload_folder", "upload_file", "prepared"))
    same_client = seconds["upload_file, our client"]
    faster, of_limit = plain / ours, limit / ours
    rows = [
        Row(
            what=f"{files:,} files of {BYTES:,} bytes up",
            target=TARGETS[0],
            result=(
                f"{faster:.1f} x faster ({ours:.1f} s against {plain:.1f} s; {same_client:.1f} s "
                f"with our client's settings); {of_limit:.0%} of the {files / limit:.0f} such "
                f"requests/s that the stand-in takes ({limit:.1f} s; {plain / limit:.1f} x)"
            ),
            met=faster >= 5 or of_limit >= LIMIT,
        ),
        Row(
            what="a second run",
            target=TARGETS[1],
            result=f"moves nothing, {seconds['again']:.1f} s",
            met=True,  # asserted above
        ),
        Row(
            what="down again, and a second time",
            target="",
            result=f"{seconds['download_folder']:.1f} s, {seconds['download again']:.1f} s",
        ),
    ]
    return report(rows, files=files, bytes=BYTES, seconds=seconds)


def _images(folder: Path, files: int) -> Path:
    for number in range(files):
        path = folder / f"round {number % ROUNDS}" / f"class {number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(BYTES))
    return folder


def _prepare(folder: Path, url: str) -> list[bytes]:
    """The very requests that `upload_folder` makes, signed and with checksums, and not sent."""
    from botocore.awsrequest import AWSPreparedRequest, AWSResponse

    from visiontuner.io.s3 import connect, upload_folder

    made: list[bytes] = []
    host = urlsplit(url).netloc

    def keep(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        target = request.url.removeprefix(url)
        head = [f"{request.method} {target} HTTP/1.1", f"Host: {host}"]
        for name, value in request.headers.items():
            head.append(f"{name}: {value.decode() if isinstance(value, bytes) else value}")
        content = request.body if isinstance(request.body, bytes) else request.body.read()
        made.append("\r\n".join([*head, "", ""]).encode() + content)
        return AWSResponse(request.url, 200, {"ETag": '"kept"'}, _Empty())

    client = connect()
    client.meta.events.register("before-send.s3.PutObject", keep)
    upload_folder(folder, f"s3://{BUCKET}/prepared/{folder.name}", client=client)
    return made


class _Empty:
    """An answer's body without a byte."""

    def stream(self) -> Iterator[bytes]:
        yield b""


def _send_all(url: str, prepared: Sequence[bytes]) -> None:
    """Over as many connections as `upload_folder` has, from several processes."""
    context = multiprocessing.get_context("fork")
    count = PROCESSES * CONNECTIONS
    shares = [prepared[n::count] for n in range(count)]
    workers = [
        context.Process(target=_send_shares, args=(url, shares[n::PROCESSES]))
        for n in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError("the stand-in refused a prepared request")


def _send_shares(url: str, shares: Sequence[Sequence[bytes]]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(lambda share: _send(url, share), shares):
            pass


def _send(url: str, share: Sequence[bytes]) -> None:
    """One request after the other, each over its own connection: moto closes it with the answer."""
    address = urlsplit(url)
    for request in share:
        with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        if b" 200 " not in answer[:20]:
            raise RuntimeError(f"the stand-in answered {answer[:200]!r}")


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    seconds[what] = round(seconds.get(what, 0.0) + took, 2)
    print(f"  {what}: {took:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _settings(folder: Path) -> Iterator[None]:
    """AWS's settings of this process: nothing but the stand-in can be reached."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE=str(folder / "no-config"),
        AWS_SHARED_CREDENTIALS_FILE=str(folder / "no-credentials"),
        NO_PROXY="127.0.0.1",
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    """A stand-in that answers; moto's, if none is named."""
    if url is not None:
        yield url
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _settle(process)
    try:
        _await(f"http://127.0.0.1:{port}/moto-api/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _settle(process: subprocess.Popen[bytes]) -> None:
    """Keep the server on one core, which is all that one interpreter can use, for every way alike.

    Left alone, its threads are woken on the core where the client runs just then, and wait there
    while the other core is idle: the server then works 0.86 of the time with 32 requests before it.
    """
    cores = psutil.Process().cpu_affinity()
    if len(cores) > 1:
        psutil.Process(process.pid).cpu_affinity(cores[-1:])


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            requests.get(url, timeout=5)
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise RuntimeError("moto's server does not start: is `moto[server]` installed?")
