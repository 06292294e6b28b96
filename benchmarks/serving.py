"""The served model: answers a second against a plain loop, its environment, its start.

The server is MLflow's own, in the clean environment that preflight makes. Starts are of containers
where a Docker engine runs (`python tests/container/engine.py …` brings one), else of servers.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from measuring import PHOTOS, ROOT, Row, report, run, scratch, script_result, settings, tune
from PIL import Image

TARGETS = (
    "installed from nothing in under 60 s",
    "at most 450 MB",
    "one at a time: p50 at most 1.5 x the plain loop",
    "8 clients: at least 0.6 x the plain loop's rate",
    "16 images a request: at least 0.8 x the plain loop's rate",
    "start to first answer at most 1.3 x a small scikit-learn model's",
)
SMALL = {"rounds": 1, "seconds": 1.0, "starts": 1}
SIDE, CLIENTS, BATCH = 224, 8, 16
IMAGES = 48


def measure(*, rounds: int = 5, seconds: float = 4.0, starts: int = 5) -> dict[str, Any]:
    """In rounds, so that what slows the machine slows both: the median of the rounds' ratios."""
    with scratch() as folder:
        classifier, model = make_model(folder)
        images = make_images(folder / "images")
        environment = install(model, folder)
        measured = measure_speed(classifier, model, environment, images, rounds, seconds)
        parts = measure_parts(model, environment, images, seconds)
        how, start = measure_starts(model, folder, starts)
    rows = [
        *environment_rows(environment),
        *speed_rows(measured),
        parts_row(measured, parts),
        start_row(how, start),
    ]
    return report(rows, rounds=measured, parts=parts, starts=start, how=how)


def make_model(folder: Path) -> tuple[Path, Path]:
    """A classifier on EfficientNet-Lite0 for 224 px, and the MLflow model of it."""
    search = folder / "search"
    few = settings(training__epochs=1, model__image_size=SIDE, data__limit_per_class=10)
    run(tune("--trials", "1", *few, output=search), folder=folder, cache=folder / "cache")
    from visiontuner.serving.registry import save_classifier

    return search / "classifier", save_classifier(search / "classifier", folder / "model")


def make_images(folder: Path) -> list[Path]:
    """JPEGs of 224 px: photographs where there are some, else smooth noise."""
    folder.mkdir()
    found = sorted(Path(os.environ[PHOTOS]).rglob("*.jpg")) if os.environ.get(PHOTOS) else []
    rng = np.random.default_rng(0)
    paths = []
    for number in range(IMAGES):
        if found:
            image = Image.open(found[number * len(found) // IMAGES]).convert("RGB")
        else:
            image = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.jpg")
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def install(model: Path, folder: Path) -> Any:
    """The clean environment, with nothing in the installer's cache."""
    from visiontuner.serving.server import clean_environment

    before = {name: os.environ.get(name) for name in ("UV_CACHE_DIR", "PIP_NO_CACHE_DIR")}
    os.environ.update(UV_CACHE_DIR=str(folder / "uv"), PIP_NO_CACHE_DIR="1")
    try:
        return clean_environment(model, folder / "cache")
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure_speed(
    classifier: Path,
    model: Path,
    environment: Any,
    images: Sequence[Path],
    rounds: int,
    seconds: float,
) -> list[dict[str, float]]:
    """In each round the plain loop, then the server's p50 and images a second."""
    from visiontuner.serving.answers import Options
    from visiontuner.serving.client import encode_request
    from visiontuner.serving.server import ScoringServer

    contents = [path.read_bytes() for path in images]
    single = [encode_request([one], Options()) for one in contents]
    batches = [
        encode_request(contents[i : i + BATCH], Options()) for i in range(0, len(contents), BATCH)
    ]
    measured = []
    with ScoringServer(model, environment) as server:
        clients = [Client(server.url) for _ in range(CLIENTS)]
        clients[0].ask(single, 1.0)
        for number in range(rounds):
            plain = script_result(
                "plain_answers.py", str(classifier), str(seconds), *map(str, images),
                folder=model.parent / f"plain-{number}",
            )  # fmt: skip
            alone = clients[0].ask(single, seconds)
            batched = clients[0].ask(batches, seconds)
            measured.append(
                {
                    **{f"plain_{key}": value for key, value in plain.items()},
                    "p50_ms": 1e3 * statistics.median(alone),
                    "batches_per_second": BATCH * len(batched) / sum(batched),
                    "eight_clients_per_second": many_clients(clients, single, seconds),
                }
            )
    return measured


def measure_parts(
    model: Path, environment: Any, images: Sequence[Path], seconds: float
) -> dict[str, float]:
    """Milliseconds of the parts of a request with one image, without HTTP."""
    from visiontuner.serving.answers import Options
    from visiontuner.serving.client import encode_request

    folder = model.parent / "bodies"
    folder.mkdir()
    for number, path in enumerate(images):
        (folder / str(number)).write_bytes(encode_request([path.read_bytes()], Options()))
    command = [str(environment.python), str(ROOT / "benchmarks/request_parts.py"), str(model),
               str(seconds), *map(str, folder.iterdir())]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean)
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return parts


def many_clients(clients: Sequence[Client], bodies: Sequence[bytes], seconds: float) -> float:
    """Requests a second."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        asked = list(pool.map(lambda client: client.ask(bodies, seconds), clients))
    return sum(map(len, asked)) / (time.perf_counter() - began)


class Client:
    """Asks over one connection, with requests made beforehand: what is measured is the server."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(str(urlsplit(url).netloc), timeout=60)

    def send(self, body: bytes, content_type: str) -> tuple[int, bytes]:
        """Status and content of the answer; an empty content type is not sent."""
        headers = {"Content-Type": content_type} if content_type else {}
        try:
            return self._send(body, headers)
        except (ConnectionError, http.client.HTTPException):  # closed after an error or a pause
            self._connection.close()
            return self._send(body, headers)

    def _send(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        self._connection.request("POST", "/invocations", body, headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def ask(self, bodies: Sequence[bytes], seconds: float) -> list[float]:
        """Seconds of each request."""
        self._connection.close()  # the server ends those that were idle; the next request opens it
        took: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            body = bodies[len(took) % len(bodies)]
            status, text = self.send(body, "application/json")
            if status != 200:
                raise RuntimeError(f"{status}: {text[:300]!r}")
            took.append(time.perf_counter() - began)
        return took


def measure_starts(model: Path, folder: Path, times: int) -> tuple[str, dict[str, list[float]]]:
    """Seconds from the start to the first answer, in turn; of containers or of servers."""
    from visiontuner.errors import UserMistake
    from visiontuner.serving.preflight import require_engine

    other = small_sklearn_model(folder / "sklearn")
    bodies = {"ours": first_request(model), "scikit-learn": SKLEARN_REQUEST}
    try:
        require_engine()
        how, starters = "container", containers(model, other)
    except UserMistake:
        how, starters = "server, no Docker engine here", servers(model, other, folder)
    took: dict[str, list[float]] = {name: [] for name in starters}
    for name in list(starters) * times:
        began = time.monotonic()
        with starters[name]() as server:
            Client(server.url).ask([bodies[name]], 0.0001)
            took[name].append(time.monotonic() - began)
    return how, took


SKLEARN_REQUEST = b'{"inputs": [[5.1, 3.5, 1.4, 0.2]]}'


def small_sklearn_model(folder: Path) -> Path:
    """A logistic regression on the iris flowers."""
    program = f"""
import mlflow, sklearn
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
X, y = load_iris(return_X_y=True)
mlflow.sklearn.save_model(
    LogisticRegression(max_iter=500).fit(X, y), {str(folder)!r}, input_example=X[:2],
    pip_requirements=[f"mlflow=={{mlflow.__version__}}", f"scikit-learn=={{sklearn.__version__}}"],
)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True)
    return folder


def first_request(model: Path) -> bytes:
    from visiontuner.serving.client import Reference

    return next(islice(Reference.read(model).bodies(), 1))


def containers(model: Path, other: Path) -> dict[str, Callable[[], Any]]:
    from visiontuner.serving.preflight import Container, build_container_image

    ours, its = build_container_image(model), build_container_image(other)
    return {
        "ours": lambda: Container(model, ours),
        "scikit-learn": lambda: Container(other, its),
    }


def servers(model: Path, other: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    from visiontuner.serving.server import ScoringServer, clean_environment

    ours, its = (clean_environment(one, folder / "cache") for one in (model, other))
    return {
        "ours": lambda: ScoringServer(model, ours),
        "scikit-learn": lambda: ScoringServer(other, its),
    }


def environment_rows(environment: Any) -> list[Row]:
    return [
        Row(
            what="the model's environment, nothing cached",
            target=TARGETS[0],
            result=f"{environment.install_seconds:.0f} s",
            met=environment.install_seconds < 60,
        ),
        Row(
            what="its size",
            target=TARGETS[1],
            result=f"{environment.size_mb:.0f} MB",
            met=environment.size_mb <= 450,
        ),
    ]


def speed_rows(rounds: Sequence[dict[str, float]]) -> list[Row]:
    def middle(value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(value(one) for one in rounds)

    slower = middle(lambda one: one["p50_ms"] / one["plain_p50_ms"])
    many = middle(lambda one: one["eight_clients_per_second"] / one["plain_one_per_second"])
    batched = middle(lambda one: one["batches_per_second"] / one["plain_one_per_second"])
    own = middle(lambda one: one["plain_one_per_second"])
    return [
        Row(
            what=f"one {SIDE} px JPEG at a time, median of {len(rounds)} rounds",
            target=TARGETS[2],
            result=f"{slower:.2f} x: {middle(lambda one: one['p50_ms']):.1f} ms "
            f"against {middle(lambda one: one['plain_p50_ms']):.1f} ms",
            met=slower <= 1.5,
        ),
        Row(
            what=f"{CLIENTS} clients, one image a request",
            target=TARGETS[3],
            result=f"{many:.2f} x: {middle(lambda one: one['eight_clients_per_second']):.0f} "
            f"against {own:.0f} images a second",
            met=many >= 0.6,
        ),
        Row(
            what=f"one client, {BATCH} images a request",
            target=TARGETS[4],
            result=f"{batched:.2f} x: {middle(lambda one: one['batches_per_second']):.0f} "
            f"against {own:.0f} images a second; a plain loop over batches of {BATCH}: "
            f"{middle(lambda one: one['plain_batches_per_second']):.0f}",
            met=batched >= 0.8,
        ),
    ]


def parts_row(rounds: Sequence[dict[str, float]], parts: dict[str, float]) -> Row:
    """Medians of runs of their own: the parts need not add up to the last digit."""

    def middle(key: str) -> float:
        return statistics.median(one[key] for one in rounds)

    whole, own = middle("p50_ms"), parts["read_pixels"] + parts["outputs"]
    shown = {
        "decoding and network in a plain loop": middle("plain_p50_ms"),
        "the same after pauses of 2 ms": middle("plain_paused_p50_ms"),
        "the same in MLflow's process": own,
        "MLflow reads JSON into a table": parts["_parse_json_data"],
        "MLflow checks table and parameters": parts["all"]
        - parts["_parse_json_data"]
        - parts["predict"]
        - parts["predictions_to_json"],
        "base64, options, names, table (ours)": parts["predict"] - own,
        "MLflow writes JSON": parts["predictions_to_json"],
        "HTTP, event loop, threads": whole - parts["all"],
    }
    result = ", ".join(f"{part} {value:.2f}" for part, value in shown.items())
    return Row(what=f"where the {whole:.1f} ms of a request go, ms", target="", result=result)


def start_row(how: str, starts: dict[str, list[float]]) -> Row:
    ours, its = (statistics.median(starts[name]) for name in ("ours", "scikit-learn"))
    return Row(
        what=f"start to first answer ({how}), median of {len(starts['ours'])}",
        target=TARGETS[5],
        result=f"{ours / its:.2f} x: {ours:.1f} s against {its:.1f} s",
        met=ours <= 1.3 * its,
    )
