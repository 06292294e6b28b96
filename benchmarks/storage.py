"""10,000 small files to an S3 stand-in: side by side, one after another, and its own limit."""

from __future__ import annotations

import http.client
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
from urllib.parse import quote

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
# Nothing but the requests themselves, from processes without boto3: what the stand-in can take.
BARE_PROCESSES = 2
BARE_CONNECTIONS = 16


def measure(*, files: int = 10_000, stand_in: str | None = None) -> dict[str, Any]:
    """Seconds of each way, all of them on the same files and the same server.

    Args:
        stand_in: URL of an S3 stand-in that runs already; by default moto's server, started here.
    """
    with scratch() as folder, _settings(folder), _server(stand_in) as url:
        os.environ["AWS_ENDPOINT_URL"] = url
        pictures = _pictures(folder / "pictures", files)
        seconds = _uploads(pictures, url)
        seconds |= _downloads(folder)
    return _report(files, seconds)


def _uploads(pictures: Path, url: str) -> dict[str, float]:
    """The three ways in turn, round by round: other work on the machine meets all of them."""
    import boto3

    from visiontuner.data.storage import upload_folder

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    seconds: dict[str, float] = {}
    for part in sorted(pictures.iterdir()):
        names = [path.relative_to(pictures).as_posix() for path in sorted(part.rglob("*.jpg"))]
        with _timed(seconds, "bare"):
            _bare(url, pictures, names)
        with _timed(seconds, "upload_folder"):
            moved = upload_folder(part, f"s3://{BUCKET}/ours/{part.name}")
        assert moved.files == len(names)
        with _timed(seconds, "upload_file"):
            for name in names:
                client.upload_file(str(pictures / name), BUCKET, f"one-by-one/{name}")
    with _timed(seconds, "again"):
        moved = upload_folder(pictures, f"s3://{BUCKET}/ours")
    assert moved.files == 0
    return seconds


def _downloads(folder: Path) -> dict[str, float]:
    from visiontuner.data.storage import download_folder

    seconds: dict[str, float] = {}
    for what in ("download_folder", "download again"):
        with _timed(seconds, what):
            moved = download_folder(
                f"s3://{BUCKET}/ours", folder / "back", memory=folder / "memory.json"
            )
    assert moved.files == 0
    return seconds


def _report(files: int, seconds: dict[str, float]) -> dict[str, Any]:
    ours, plain, bare = (seconds[key] for key in ("upload_folder", "upload_file", "bare"))
    faster, of_limit = plain / ours, bare / ours
    rows = [
        Row(
            what=f"{files:,} files of {BYTES:,} bytes up",
            target=TARGETS[0],
            result=(
                f"{faster:.1f} x faster ({ours:.1f} s against {plain:.1f} s); {of_limit:.0%} of "
                f"the {files / bare:.0f} bare requests/s that the stand-in takes ({bare:.1f} s)"
            ),
            # Within a fifth of bare requests, which sign, check and read nothing, is the limit.
            met=faster >= 5 or of_limit >= 0.8,
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


def _pictures(folder: Path, files: int) -> Path:
    for number in range(files):
        path = folder / f"round {number % ROUNDS}" / f"class {number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(BYTES))
    return folder


def _bare(url: str, pictures: Path, names: Sequence[str]) -> None:
    """Unsigned PUTs over connections that stay open, from several processes."""
    context = multiprocessing.get_context("fork")
    connections = BARE_PROCESSES * BARE_CONNECTIONS
    shares = [names[n::connections] for n in range(connections)]
    workers = [
        context.Process(target=_bare_share, args=(url, pictures, shares[n::BARE_PROCESSES]))
        for n in range(BARE_PROCESSES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError("the stand-in refused a bare request")


def _bare_share(url: str, pictures: Path, shares: Sequence[Sequence[str]]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(BARE_CONNECTIONS) as pool:
        for _ in pool.map(lambda share: _put_all(url, pictures, share), shares):
            pass


def _put_all(url: str, pictures: Path, names: Sequence[str]) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    for name in names:
        path = f"/{BUCKET}/bare/{quote(name)}"
        connection.request("PUT", path, (pictures / name).read_bytes())
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the stand-in answered {answer.status}")
    connection.close()


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
    try:
        _await(f"http://127.0.0.1:{port}/moto-api/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            requests.get(url, timeout=5)
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise RuntimeError("moto's server does not start: is `moto[server]` installed?")
