"""What every test shares: nothing of the user's own machine reaches a test."""

from __future__ import annotations

import gc
import http.client
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

# Networks this small are slower with more threads, and much slower beside another test process.
# Before torch is imported, and for the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read by MLflow, Ray or visiontuner itself; a developer's own would change what a test sees.
OUTSIDE = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_ADDRESS",
    "VISIONTUNER_CACHE",
    "VISIONTUNER_CHANNEL",
)


# Old names in Ray's libraries, sockets left to the collector.
RAYS_OWN_WARNINGS = (
    "ignore::DeprecationWarning:ray",
    "ignore::FutureWarning:ray",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


# Longest first: a process that begins one of these last keeps the others waiting.
LONGEST = (
    "aws/test_bad_days.py",
    "aws/test_two_hosts.py",
    "test_interrupted_search.py",
    "test_train.py",
    "test_notebook.py",
)


# Fixtures that begin a Ray or a server: whoever wants one is slow.
BEGINS_SOMETHING = {"running_ray", "stand_in", "scoring_server", "moto", "hosts_allowed"}


_with_ray = pytest.StashKey[set[Path]]()  # the files whose tests run Ray in this process
_ray = ExitStack()  # holds that Ray


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark and order tests; where Ray runs in the test's process, its warnings are no errors."""
    tests = Path(__file__).parent
    with_ray = set()
    for item in items:
        wanted = BEGINS_SOMETHING.intersection(getattr(item, "fixturenames", ()))
        if wanted:
            item.add_marker(pytest.mark.slow)
        if "running_ray" in wanted:
            with_ray.add(item.path)
    config.stash[_with_ray] = with_ray

    def place(item: pytest.Item) -> tuple[bool, bool]:
        return item.path.relative_to(tests).as_posix() not in LONGEST, item.path not in with_ray

    items.sort(key=place)
    for item in items:
        if item.path in with_ray:
            for warning in RAYS_OWN_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """End Ray after the last of the files that use it one after the other."""
    yield
    if nextitem is None or nextitem.path not in item.config.stash[_with_ray]:
        _ray.close()


CALLS = "VISIONTUNER_TEST_CALLS"  # a file: what each party has asked of the AWS stand-in

_aws_files: set[str] = set()  # whose tests have all passed
_aws_others: set[str] = set()  # of which one failed or was skipped


def pytest_configure(config: pytest.Config) -> None:
    """One file for all test processes; they inherit the variable."""
    if not hasattr(config, "workerinput"):
        handle, path = tempfile.mkstemp(prefix="aws-calls-")
        os.close(handle)
        os.environ[CALLS] = path


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Which AWS tests ran: in the process that hears of all of them."""
    file = report.nodeid.partition("::")[0]
    if file.startswith("tests/aws/"):
        (_aws_files if report.passed else _aws_others).add(file)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After all AWS tests: each permission of docs/aws.md was used, or is explained there."""
    if hasattr(session.config, "workerinput"):
        return
    calls = Path(os.environ.pop(CALLS))
    options = session.config.option
    every = {f"tests/aws/{path.name}" for path in Path(__file__).parent.glob("aws/test_*.py")}
    whole = every <= _aws_files and not _aws_others and not (options.keyword or options.markexpr)
    try:
        wrong = policies().unused(calls) if whole else []
    finally:
        calls.unlink()
    if wrong:
        print("\ndocs/aws.md, Permissions:", *wrong, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def policies() -> Any:
    """tests/aws/policies.py, which the stand-in's process imports as well."""
    path = Path(__file__).parent / "aws" / "policies.py"
    specification = importlib.util.spec_from_file_location("policies", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def calls_of_all_tests() -> Path:
    """What each party has asked of the AWS stand-in, a line each."""
    return Path(os.environ[CALLS])


@pytest.fixture(scope="session", autouse=True)
def _signals_are_not_ignored() -> None:
    """As a shell leaves Ctrl-C to what it puts into the background, and `nohup` SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_garbage_collection() -> Iterator[None]:
    """A command lets garbage lie until it ends; this process goes on."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OUTSIDE, *(name for name in os.environ if name.startswith("RAY_"))):
        monkeypatch.delenv(name, raising=False)
    # mlflow.pyfunc.load_model puts a model's code first.
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(name, make)`: a folder that `make(folder)` fills once for all test processes.

    What lies in it is read by other processes at the same time, so no test changes it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fill(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = base / f"shared-{name}", base / f"shared-{name}.whole"
        with FileLock(f"{folder}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return fill


@pytest.fixture(scope="session")
def shared_cache(made_once: MadeOnce) -> Path:
    """One VISIONTUNER_CACHE for all searches of a session: a network is exported once."""
    return made_once("cache", lambda _: None)


@pytest.fixture(scope="session")
def new_database(made_once: MadeOnce) -> Callable[[Path], str]:
    """Makes empty MLflow databases and gives their URIs; MLflow itself takes seconds for each."""
    from visiontuner.tracking.store import create_database

    folder = made_once("database", lambda new: create_database(f"sqlite:///{new / 'mlflow.db'}"))
    ready = folder / "mlflow.db"

    def make(path: Path) -> str:
        shutil.copyfile(ready, path)
        return f"sqlite:///{path}"

    return make


@pytest.fixture(scope="module")
def running_ray() -> None:
    """One Ray for all files that want one: a search uses the one that is there.

    Of one core, so that a search starts one worker: each takes four seconds to import torch.
    """
    import ray

    from visiontuner.paths import changed_environment
    from visiontuner.search.ray_cluster import RayForSearch

    if not ray.is_initialized():
        with changed_environment({"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}):
            _ray.enter_context(RayForSearch("local")).start()


@pytest.fixture
def no_ray() -> None:
    """Ends the Ray that `running_ray` left for the files after it."""
    _ray.close()


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="session")
def images(made_once: MadeOnce) -> Path:
    """A folder of noisy red, green and blue images: 10 for training, 4 for validation a class."""
    return made_once("data", lambda folder: draw_images(folder / "colours")) / "colours"


def draw_images(root: Path, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for split, count in {"train": 10, "valid": 4}.items():
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 30, (32, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def images_with_test(tmp_path: Path, images: Path) -> Path:
    """The same images, and those of validation once more as a test split."""
    shutil.copytree(images, tmp_path / "colours")
    shutil.copytree(images / "valid", tmp_path / "colours" / "test")
    return tmp_path / "colours"


@pytest.fixture
def uri(tmp_path: Path, new_database: Callable[[Path], str]) -> str:
    """Of an MLflow database of the test's own."""
    return new_database(tmp_path / "mlflow.db")


@pytest.fixture
def own_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_cache: Path, uri: str
) -> None:
    """The test runs in a folder of its own, with its own MLflow database and the shared cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


@pytest.fixture(scope="session")
def small_search() -> dict[str, object]:
    """An experiment, but for its data, that needs no download and takes seconds."""
    return {
        "name": "colours",
        "model": {"backbone": "resnet18", "weights": "none", "image_size": 32},
        "training": {"epochs": 8, "learning_rate": 0.03, "batch_size": 16},
        "search": {
            "trials": 3,
            "algorithm": "random",
            "scheduler": "none",
            "baselines": False,
            "space": {"learning_rate": {"low": 0.01, "high": 0.1, "scale": "log"}},
        },
    }


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    """A real server that plays S3; its host and port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def use_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`use_aws(url)`: this process can reach no other AWS, and has no settings of its own."""

    def use(url: str, secret: str = "testing") -> None:
        import boto3

        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
            "NO_PROXY": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)

    return use


class Proxy:
    """What lies before an AWS: it answers in its place, cuts answers off, or passes them on."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.seen: list[str] = []
        # Called with method, path and headers: a status and a code to answer, "close" or None.
        self.rule: Callable[[str, str, Any], tuple[int, str] | str | None] = lambda *_: None
        self.change: Callable[[str, str, bytes], bytes] = lambda _method, _path, body: body
        self.message = "no"
        self.url = ""

    def count(self, method: str) -> int:
        """Requests of objects, not of lists."""
        return sum(line.startswith(method) and "list-type" not in line for line in self.seen)

    def refusal(self, code: str, headers: Any) -> tuple[dict[str, str], bytes]:
        """As S3 and STS say it, in XML, or as the others do, in JSON."""
        if "X-Amz-Target" in headers:
            told = {"__type": code, "message": self.message}
            return {"x-amzn-ErrorType": code}, json.dumps(told).encode()
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{self.message}</Message>"
            "<Region>eu-west-3</Region></Error>"
        )
        return {}, body.encode()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.seen.append(f"{self.command} {self.path}")
            answer = proxy.rule(self.command, self.path, self.headers)
            if answer == "close":
                self.close_connection = True
            elif isinstance(answer, tuple):
                self._send(answer[0], *proxy.refusal(answer[1], self.headers))
            else:
                self._pass_on(body)

        def _pass_on(self, body: bytes) -> None:
            connection = http.client.HTTPConnection(*proxy.target, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            headers = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding")
            }
            content = proxy.change(self.command, self.path, answer.read())
            self._send(answer.status, headers, content)
            connection.close()

        def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                # Cut off: the length that was promised does not come.
                self.close_connection = int(headers.get("Content-Length", 0)) > len(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    return Handler


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@pytest.fixture
def proxy_before() -> Iterator[Callable[[tuple[str, int]], Proxy]]:
    """Puts a proxy before a server that plays AWS; the proxy's `rule` makes its bad days."""
    servers: list[_ProxyServer] = []

    def make(target: tuple[str, int]) -> Proxy:
        proxy = Proxy(target)
        server = _ProxyServer(("127.0.0.1", 0), _handler(proxy))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        return proxy

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()
