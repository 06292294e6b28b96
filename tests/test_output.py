"""What commands leave and print where addresses hold secrets and names hold control characters."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from PIL import Image

from visiontuner.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("running_ray")]

DATA_SECRETS = ("dataPassw0rd", "dataSignature", "dataSessionToken")
STORE_SECRETS = ("storePassw0rd",)
# Classes; some of what they hold acts on a terminal, on a spreadsheet, or on rich.
CLASSES = {
    "=cmd|' .exe'!A0": (200, 40, 40),
    "[bold]:dog:[bold]": (40, 40, 200),
    "می\u200cخواهم\u3000犬": (40, 200, 200),
}
COUNTS = {"train": 8, "valid": 6, "test": 6}
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def png(colour: tuple[int, int, int], rng: np.random.Generator) -> bytes:
    pixels = np.clip(rng.normal(colour, 30, (32, 40, 3)), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def zipped() -> bytes:
    rng, content = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for split, count in COUNTS.items():
            for name, colour in CLASSES.items():
                for number in range(count):
                    file = f"{number}\x1b[31m\u202egnp.png" if number % 2 else f"{number}.png"
                    archive.writestr(f"p/{split}/{name}/{file}", png(colour, rng))
        twice = png((200, 40, 40), rng)
        for split in ("train", "valid"):
            archive.writestr(f"p/{split}/=cmd|' .exe'!A0/\x1b[2Jtwice.png", twice)
        archive.writestr("p/train/=cmd|' .exe'!A0/\x1b]0;title\x07bad.png", b"no image")
    return content.getvalue()


class _Private(BaseHTTPRequestHandler):
    """Gives the images to who has the password and the signature; errors are hostile."""

    images = zipped()

    def do_GET(self) -> None:
        user = base64.b64encode(b"bob:dataPassw0rd").decode()
        signed = "X-Amz-Signature=dataSignature" in self.path
        if self.headers.get("Authorization") != f"Basic {user}" or not signed:
            self.send_error(403)
            return
        self._send(200, self.images)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        told = f"\x1b[2J\x9bno\u202e, see http://me:storePassw0rd@host/{self.path}"
        self._send(400, json.dumps({"message": told}, ensure_ascii=False).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """HOST:PORT of the private server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Private)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def store(home: Path, new_database: Any) -> Iterator[str]:
    """HOST:PORT of a real MLflow server, whose files are in `home`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", new_database(home / "server.db")]
    process = subprocess.Popen(
        [*command, "--artifacts-destination", str(home / "artifacts")],
        cwd=home,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(address: str) -> None:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.fixture(autouse=True)
def _here(home: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("VISIONTUNER_CACHE", str(home / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:storePassw0rd@{store}")


def call(*arguments: str, code: int | None = 0) -> Result:
    """What a command prints, after a look at it."""
    result = CliRunner().invoke(main, list(arguments))
    for text in (result.stdout, result.stderr):
        assert not RAW.findall(text)
        assert not [secret for secret in (*DATA_SECRETS, *STORE_SECRETS) if secret in text]
    assert code in (None, result.exit_code), result.output
    return result


@pytest.fixture(scope="module")
def search(home: Path, site: str, store: str, small_search: dict[str, Any]) -> Path:
    """A search on private images, evaluated, in a private store."""
    address = f"http://bob:dataPassw0rd@{site}/p.zip"
    signature = "X-Amz-Date=1&X-Amz-Signature=dataSignature&X-Amz-Security-Token=dataSessionToken"
    (home / "small.yaml").write_text(yaml.safe_dump(small_search))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VISIONTUNER_CACHE", str(home / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", f"http://bob:storePassw0rd@{store}")
        data = ("--experiment", "small.yaml", "--data", f"{address}?{signature}")
        assert "\\u001b]0;title" in call("prepare", *data).stdout
        result = call("tune", *data, "--output", "s")
        assert f"(in http://***@{store})" in result.stdout
        assert "visiontuner prepare --experiment s/experiment.yaml" in result.stdout
        call("evaluate", "s")
    return home / "s"


def test_no_secret_of_an_address_is_left_but_in_a_private_file(search: Path, home: Path) -> None:
    holding = {
        path.relative_to(home).as_posix()
        for path in home.rglob("*")
        if path.is_file()
        for secret in (*DATA_SECRETS, *STORE_SECRETS)
        if secret.encode() in path.read_bytes()
    }
    assert holding == {"s/experiment.yaml"}
    assert (search / "experiment.yaml").stat().st_mode & 0o777 == 0o600


def test_a_search_on_private_images_is_resumed(search: Path) -> None:
    journal = search / "journal.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    last = next(n for n, line in enumerate(lines) if '"event": "trial_ended"' in line)
    journal.write_text("".join(lines[: last + 1]), encoding="utf-8")  # as a kill leaves it
    result = call("tune", "--resume", "s")
    assert "Best trial" in result.stdout
    call("evaluate", "s")


@pytest.mark.usefixtures("search")
def test_every_command_prints_names_that_do_nothing(home: Path, site: str) -> None:
    for arguments in (
        ("compare", "s"),
        ("compare", "s", "--format", "markdown"),
        ("diagnose", "s"),
        ("lineage", "s", "--verify"),
        ("promote", "--dry-run"),
        ("sync", "s"),
        ("doctor",),
        ("query", "--model", "s", "cache", "--workers", "1"),
    ):
        call(*arguments, code=None)
    rows = list(csv.DictReader(io.StringIO(call("compare", "s", "--format", "csv").stdout)))
    assert rows[0]["run"].startswith("t000")
    image = next(path for path in (home / "cache").rglob("0.png") if "cmd" in path.parent.name)
    asked = call("query", "--model", "s", str(image), "--format", "csv")
    (answer,) = csv.DictReader(io.StringIO(asked.stdout))
    assert answer["label"] == "'=cmd|' .exe'!A0"
    (spoken,) = call("query", "--model", "s", str(image), "--format", "json").stdout.splitlines()
    assert json.loads(spoken)["label"] == "=cmd|' .exe'!A0"
    url = f"http://me:storePassw0rd@{site}"
    asked = call("query", "--url", url, str(image), "--format", "csv", code=1)
    assert r"\u001b[2J\u009bno\u202e, see http://***@host/" in asked.stdout


@pytest.mark.usefixtures("search")
def test_json_is_json_with_the_names_as_they_are() -> None:
    traced = json.loads(call("lineage", "s", "--json").stdout)
    assert set(traced["data"]["class_names"]) == set(CLASSES)
    assert traced["data"]["source"].startswith("http://***@127.0.0.1")
    assert traced["experiment"]["data"]["source"].endswith("Security-Token=***")


def test_the_table_of_classes_runs_no_formula(search: Path) -> None:
    text = (search / "evaluation" / "classes.csv").read_text(encoding="utf-8")
    assert not RAW.findall(text)
    names = [row["name"] for row in csv.DictReader(io.StringIO(text))]
    assert "'=cmd|' .exe'!A0" in names
    assert {"[bold]:dog:[bold]", "می\u200cخواهم\u3000犬"} < set(names)


def test_runs_of_others_print_nothing_that_acts(store: str) -> None:
    client = MlflowClient(f"http://{store}")
    experiment = client.create_experiment("foreign")
    for value in ("=1+1", "\x1b[31mred\u202e"):
        run = client.create_run(experiment, run_name=f"{value} http://me:storePassw0rd@host")
        client.log_param(run.info.run_id, "p", value)
        client.set_terminated(run.info.run_id)
    call("compare", "foreign")
    text = call("compare", "foreign", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["p"] for row in rows} == {"'=1+1", r"\u001b[31mred\u202e"}
    assert {row["run"] for row in rows} >= {"'=1+1 http://***@host"}
    call("diagnose", "foreign", code=None)
    call("lineage", run.info.run_id, code=2)


def test_a_class_folder_that_would_act_on_a_terminal_is_refused(tmp_path: Path) -> None:
    for name in ("\x1b[31mred", "blue"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(png((9, 9, 9), np.random.default_rng(0)))
    refused = call("prepare", "--data", str(tmp_path / "data"), code=2)
    assert r"data/\u001b[31mred has an unreadable name" in refused.stderr


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_errors_and_tracebacks_hide_secrets(
    debug: tuple[str, ...], site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(
        *debug,
        "prepare",
        "--data",
        f"http://eve:dataPassw0rd@{site}/p.zip?sig=dataSignature",
        code=None,
    )
    call(*debug, "prepare", "--data", "ftp://eve:dataPassw0rd@host/p.zip", code=None)
    call(*debug, "prepare", "--data", "a\x1b[31m\nb", code=None)
    for uri in (
        f"http://bob:storePassw0rd@{site}",
        "postgresql://bob:storePassw0rd@127.0.0.1:9/mlflow",
        "postgresql://bob:store/storePassw0rd@127.0.0.1:9/mlflow",
        "file://bob:storePassw0rd@host/mlruns",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        call(*debug, "compare", "no-such-experiment", code=None)
        call(*debug, "doctor", code=None)


def test_a_source_whose_secret_was_left_out_says_so(site: str) -> None:
    refused = call("prepare", "--data", f"http://***@{site}/p.zip?X-Amz-Signature=***", code=2)
    assert "secret was left out" in refused.stderr
