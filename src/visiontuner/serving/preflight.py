"""Check a model as an endpoint will serve it, over HTTP, before it is deployed."""

from __future__ import annotations

import math
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import requests

from visiontuner.errors import ServingError
from visiontuner.serving.answers import MAX_PIXELS, Options
from visiontuner.serving.client import REQUEST_BYTES, encode_request
from visiontuner.serving.instances import recommend
from visiontuner.serving.malformed import JSON, MALFORMED
from visiontuner.serving.reference import TOLERANCE, Reference
from visiontuner.serving.server import Served
from visiontuner.text import one_line

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


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What was found.

    Args:
        p50_ms, p95_ms, p99_ms: of requests with one picture, one at a time, milliseconds.
        pictures_per_second: with 8 clients that send one picture a request.
        memory_mb: the most resident memory that the server held, in 10^6 bytes.
        recommendation: where to run it, one sentence.
    """

    model: str
    checks: tuple[Check, ...]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    pictures_per_second: float
    memory_mb: float
    recommendation: str

    @property
    def passed(self) -> bool:
        return all(check.status == "ok" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "passed": self.passed}


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
        ClassifierError: the model holds no readable reference pictures.
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
        large, peak = _check_large_pictures(asked)
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
        pictures_per_second=rate,
        memory_mb=peak,
        recommendation=recommend(memory_mb=peak, pictures_per_second=rate),
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
                f"The model answers its own reference pictures with {response.status_code}: "
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
    rows = asked.rows(reference.pictures, reference.options())
    difference = reference.difference([row["top_k"] for row in rows])
    detail = f"{len(rows)} pictures, probabilities differ by at most {difference:.1e}"
    return _check("reference pictures", difference <= TOLERANCE, detail)  # NaN fails


def _check_reported_rows(asked: _Asked, reference: Reference) -> Check:
    name = "a bad row among good ones"
    contents = [b"no picture", reference.pictures[0]]
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
    pictures: list[bytes] = []
    length = len(encode_request([], Options()))
    for picture in cycle(reference.pictures):
        # What follows a picture's end is ignored: small ones become as large as photographs.
        content = picture.ljust(_PHOTOGRAPH_BYTES, b"\0")
        length += (len(content) + 2) // 3 * 4 + 6
        if length > REQUEST_BYTES:
            break
        pictures.append(content)
    began = time.perf_counter()
    response = asked.post(encode_request(pictures, Options()))
    seconds = time.perf_counter() - began
    passed = (
        response.status_code == 200
        and len(response.content) <= REQUEST_BYTES
        and seconds <= _ANSWER_SECONDS
    )
    detail = (
        f"{len(pictures)} pictures in {REQUEST_BYTES / 1e6:g} MB: status {response.status_code} "
        f"in {seconds:.1f} s, {len(response.content) / 1e6:.2f} MB back"
    )
    return _check("payload", passed, detail)


def _check_large_pictures(asked: _Asked) -> tuple[Check, float]:
    """The largest pictures that are decoded, some at a time, and the memory in MB meanwhile."""
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
    return _check("large pictures", passed, detail), peak


def _transparent_png(side: int) -> bytes:
    """A square RGBA picture, made without its pixels in memory."""
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
    milliseconds: list[float] = []
    end = time.perf_counter() + _MEASURE_SECONDS
    for body in islice(reference.bodies(), count):
        began = time.perf_counter()
        asked.post(body)
        milliseconds.append((time.perf_counter() - began) * 1e3)
        if time.perf_counter() > end:
            break
    return milliseconds


def _many_at_a_time(asked: _Asked, reference: Reference, count: int) -> float:
    """Pictures a second, with several clients that ask so often each."""
    clients = [_Asked(asked.server) for _ in range(_CLIENTS)]
    began = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        counts = pool.map(lambda client: len(_one_at_a_time(client, reference, count)), clients)
        return sum(counts) / (time.perf_counter() - began)


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name=name, status="ok" if passed else "error", detail=detail)
