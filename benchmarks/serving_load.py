"""The served model under 5,000 hostile requests, then under 10,000, then with costly images.

The server is MLflow's own, in the clean environment that preflight makes. The hostile requests are
drawn by hypothesis, from what `tests/serving/test_pyfunc.py` sends a hundred of.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from measuring import ROOT, Row, report, scratch

from serving import CLIENTS, Client, install, make_images, make_model

TARGETS = (
    "no 5xx but what MLflow's own parser answers so",
    "memory at most 5 % over that after the first 100",
    "at most 5 % more than after 1,500",
    "p99 of the good requests beside them under 3 s",
    "no 5xx",
    "memory at most 10 % over that after the first 1,000",
)
SMALL = {"hostile": 100, "requests": 400, "costly": 400}
GROWTH = 1.05
_JSON = "application/json"
_SETTLED = 100
_COSTLY_EVERY = 41  # no multiple of the clients: all of them send some
_CONTENT_TYPES = (*[_JSON] * 6, "text/csv", "image/png", "")


def measure(*, hostile: int = 5000, requests: int = 10_000, costly: int = 10_000) -> dict[str, Any]:
    """All on one server, the hostile ones first."""
    from visiontuner.serving.server import ScoringServer

    with scratch() as folder:
        _, model = make_model(folder)
        images = [path.read_bytes() for path in make_images(folder / "images")]
        with ScoringServer(model, install(model, folder)) as server:
            fuzzed = send_hostile(server, hostile)
            used = send_many(server, images, requests)
            held = send_costly(server, images, costly)
    rows = [*hostile_rows(fuzzed), growth_row(used), *costly_rows(held)]
    return report(rows, hostile=fuzzed, requests=used, costly=held)


def send_hostile(server: Any, count: int) -> dict[str, Any]:
    """Statuses by content type, and memory in MB after the first hundred and at the end."""
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from test_pyfunc import hostile_bodies

    client = Client(server.url)
    answers: Counter[tuple[str, int]] = Counter()
    unexplained: list[str] = []
    memory: list[float] = []

    @given(body=hostile_bodies, content_type=st.sampled_from(_CONTENT_TYPES))
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(body: bytes, content_type: str) -> None:
        status, text = client.send(body, content_type)
        answers[content_type, status] += 1
        if status >= 500 and content_type:
            unexplained.append(f"{content_type} {body[:200]!r}: {status} {text[:200]!r}")
        if answers.total() in (min(_SETTLED, count), count):
            memory.append(server.memory_mb())

    send()
    return {
        "answers": [[kind, status, number] for (kind, status), number in sorted(answers.items())],
        "unexplained": unexplained,
        "memory_mb": [memory[0], server.memory_mb()],
    }


def send_many(server: Any, images: Sequence[bytes], count: int) -> dict[str, Any]:
    """Several clients; a tenth of the requests hold no image, a tenth no JSON."""
    share = count // CLIENTS
    settled = max(share * 15 // 100, 1)
    clients = [Client(server.url) for _ in range(CLIENTS)]
    sources = [requests_of(images) for _ in clients]

    def ask(number: int, some: int) -> Counter[int]:
        bodies = islice(sources[number], some)
        return Counter(clients[number].send(body, _JSON)[0] for body in bodies)

    statuses: Counter[int] = Counter()
    memory = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        for some in (settled, share - settled):
            for counted in pool.map(ask, range(CLIENTS), [some] * CLIENTS):
                statuses += counted
            memory.append(server.memory_mb())
    return {"statuses": dict(statuses), "memory_mb": memory, "settled": settled * CLIENTS}


def send_costly(server: Any, images: Sequence[bytes], count: int) -> dict[str, Any]:
    """Several clients; each 41st request holds the largest image that is decoded."""
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    from test_pyfunc import make_large_images

    from visiontuner.serving.answers import Options
    from visiontuner.serving.client import encode_request

    large = [encode_request([one], Options()) for one in make_large_images().values()]
    good = [encode_request([one], Options()) for one in images]
    clients = [Client(server.url) for _ in range(CLIENTS)]
    took: list[float] = []
    statuses: Counter[tuple[str, int]] = Counter()

    def ask(client: int, start: int, end: int) -> None:
        for number in range(start + client, end, CLIENTS):
            costs = number % _COSTLY_EVERY == 0
            bodies = large if costs else good
            began = time.perf_counter()
            status, _ = clients[client].send(bodies[number // _COSTLY_EVERY % len(bodies)], _JSON)
            statuses["costly" if costs else "good", status] += 1
            if not costs:
                took.append(time.perf_counter() - began)

    memory = []
    settled = count // 10
    with ThreadPoolExecutor(CLIENTS) as pool:
        for start, end in ((0, settled), (settled, count)):
            list(pool.map(lambda client: ask(client, start, end), range(CLIENTS)))  # noqa: B023
            memory.append(server.memory_mb())
    return {
        "statuses": [[kind, status, number] for (kind, status), number in sorted(statuses.items())],
        "good_p50_s": float(np.percentile(took, 50)),
        "good_p99_s": float(np.percentile(took, 99)),
        "memory_mb": memory,
        "settled": settled,
    }


def requests_of(images: Sequence[bytes]) -> Iterator[bytes]:
    """Bodies, again and again."""
    from visiontuner.serving.answers import Options
    from visiontuner.serving.client import encode_request

    options = Options()
    while True:
        for number, image in enumerate(images):
            content = b"no image" if number % 10 == 5 else image
            body = encode_request([content], options)
            yield body[:-20] if number % 10 == 7 else body


def hostile_rows(sent: dict[str, Any]) -> list[Row]:
    numbers = Counter[str]()
    for kind, status, number in sent["answers"]:
        name = f"{status // 100}xx" if status < 500 or kind else "500 without a Content-Type"
        numbers[name] += number
    first, last = sent["memory_mb"]
    total = f"{sum(numbers.values()):,}"
    return [
        Row(
            what=f"{total} hostile requests: bodies, parameters, content types",
            target=TARGETS[0],
            result=", ".join(f"{number:,} {name}" for name, number in sorted(numbers.items())),
            met=not sent["unexplained"],
        ),
        Row(
            what=f"memory after {total} hostile requests",
            target=TARGETS[1],
            result=f"{first:.0f} MB, then {last:.0f} MB",
            met=last <= GROWTH * first,
        ),
    ]


def growth_row(used: dict[str, Any]) -> Row:
    first, last = used["memory_mb"]
    return Row(
        what=f"memory after {sum(used['statuses'].values()):,} requests by {CLIENTS} clients, "
        "a tenth without an image, a tenth no JSON",
        target=TARGETS[2],
        result=f"{first:.0f} MB after {used['settled']:,}, {last:.0f} MB at the end",
        met=last <= GROWTH * first,
    )


def costly_rows(held: dict[str, Any]) -> list[Row]:
    first, last = held["memory_mb"]
    total = sum(number for *_, number in held["statuses"])
    costly = sum(number for kind, _, number in held["statuses"] if kind == "costly")
    what = f"{total:,} requests by {CLIENTS} clients, {costly:,} of them with costly images"
    return [
        Row(
            what=f"good ones of {what}",
            target=TARGETS[3],
            result=f"p50 {1e3 * held['good_p50_s']:.0f} ms, p99 {1e3 * held['good_p99_s']:.0f} ms",
            met=held["good_p99_s"] < 3,
        ),
        Row(
            what=what,
            target=TARGETS[4],
            result=", ".join(f"{n:,} {kind} {status}" for kind, status, n in held["statuses"]),
            met=all(status < 500 for _, status, _ in held["statuses"]),
        ),
        Row(
            what=f"memory after {what}",
            target=TARGETS[5],
            result=f"{first:.0f} MB after {held['settled']:,}, {last:.0f} MB at the end",
            met=last <= 1.1 * first,
        ),
    ]
