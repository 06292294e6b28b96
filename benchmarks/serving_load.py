"""The served model under 5,000 hostile requests, then under 10,000: no crash, no growth.

The server is MLflow's own, in the clean environment that preflight makes. The hostile requests are
drawn by hypothesis, from what `tests/serving/test_pyfunc.py` sends a hundred of.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from measuring import ROOT, Row, report, scratch

from serving import CLIENTS, Client, install, make_model, make_pictures

TARGETS = (
    "no 5xx but what MLflow's own parser answers so",
    "memory at most 5 % over that after the first 100",
    "at most 5 % more than after 1,500",
)
SMALL = {"hostile": 100, "requests": 400}
GROWTH = 1.05
_JSON = "application/json"
_SETTLED = 100
_CONTENT_TYPES = (*[_JSON] * 6, "text/csv", "image/png", "")


def measure(*, hostile: int = 5000, requests: int = 10_000) -> dict[str, Any]:
    """Both on one server, the hostile ones first."""
    from visiontuner.serving.server import ScoringServer

    with scratch() as folder:
        _, model = make_model(folder)
        pictures = [path.read_bytes() for path in make_pictures(folder / "pictures")]
        with ScoringServer(model, install(model, folder)) as server:
            fuzzed = send_hostile(server, hostile)
            used = send_many(server, pictures, requests)
    return report([*hostile_rows(fuzzed), growth_row(used)], hostile=fuzzed, requests=used)


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


def send_many(server: Any, pictures: Sequence[bytes], count: int) -> dict[str, Any]:
    """Several clients; a tenth of the requests hold no picture, a tenth no JSON."""
    share = count // CLIENTS
    settled = max(share * 15 // 100, 1)
    clients = [Client(server.url) for _ in range(CLIENTS)]
    sources = [requests_of(pictures) for _ in clients]

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


def requests_of(pictures: Sequence[bytes]) -> Iterator[bytes]:
    """Bodies, again and again."""
    from visiontuner.serving.answers import Options
    from visiontuner.serving.client import encode_request

    options = Options()
    while True:
        for number, picture in enumerate(pictures):
            content = b"no picture" if number % 10 == 5 else picture
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
        "a tenth without a picture, a tenth no JSON",
        target=TARGETS[2],
        result=f"{first:.0f} MB after {used['settled']:,}, {last:.0f} MB at the end",
        met=last <= GROWTH * first,
    )
