"""The page to try a model on, in a real browser and by hand-made requests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import requests
from click.testing import CliRunner

from visiontuner.cli.serve import demo
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import JournalWriter
from visiontuner.model.classifier import Classifier
from visiontuner.paths import EXPERIMENT_FILE

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_SECONDS = 60.0


class Browser:
    """One page in a headless chromium: its DevTools protocol, over two pipes.

    Args:
        profile: a new folder.
        size: of the window, in pixels; narrow ones are shown as a phone does.
    """

    def __init__(self, profile: Path, *, size: tuple[int, int]) -> None:
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        self._process = subprocess.Popen(
            [
                "bash", "-c", script, str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe",
            ],
            pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        self._number, self._rest, self._session = 0, b"", ""
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "DOM", "Runtime"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=size[0], height=size[1], deviceScaleFactor=1, mobile=size[0] < 600,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's result; requests of the page that are told meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            assert part, "chromium has ended"
            self._rest += part
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression, which may be a promise, comes to."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, wanted: Callable[[Any], bool] = bool) -> Any:
        """The expression's value once it is as wanted."""
        end = time.monotonic() + _SECONDS
        while not wanted(value := self.value(expression)):
            assert time.monotonic() < end, f"{expression} is {value!r}"
            time.sleep(0.05)
        return value

    def upload(self, selector: str, file: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)


@pytest.fixture(scope="module")
def search(colour_classifier: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search folder with that classifier, whose images are red, green and blue ones."""
    folder = tmp_path_factory.mktemp("demo") / "search"
    shutil.copytree(colour_classifier, folder / "classifier")
    experiment = Experiment.parse({"name": "colours", "data": {"source": str(images)}})
    (folder / EXPERIMENT_FILE).write_text(experiment.to_yaml())
    with closing(JournalWriter(folder, "search-1")) as journal:
        journal.append("search_started", name="colours")
    return folder


@pytest.fixture(scope="module")
def address(search: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `visiontuner demo`, which Ctrl-C ends without an error."""
    command = subprocess.Popen(
        [sys.executable, "-m", "visiontuner", "demo", str(search), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    assert command.stdout is not None
    line = command.stdout.readline()
    assert line.startswith("Open http://127.0.0.1:"), line
    yield line.split()[1]
    command.send_signal(signal.SIGINT)
    _, complaints = command.communicate(timeout=20)
    assert (command.returncode, "Error" in complaints) == (0, False), complaints


@pytest.mark.timeout(300)
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `apt-get install chromium`")
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_the_page_answers_as_query_does(
    size: tuple[int, int],
    address: str,
    search: Path,
    make_image: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    file = tmp_path / "an image.png"
    file.write_bytes(make_image("yellow"))
    (expected,) = Classifier.load(search / "classifier").predict([file])
    with Browser(tmp_path / "profile", size=size) as page:
        page.open(address)
        page.wait_for("document.querySelectorAll('#examples img').length", lambda n: n == 3)
        page.upload("#file", file)
        answer = json.loads(page.wait_for("document.body.dataset.answer"))
        assert answer["label"] == expected.label
        assert answer["probability"] == pytest.approx(expected.probability, abs=1e-5)
        assert page.value("document.querySelector('#label').textContent") == expected.label
        assert "new: unlike" in page.value("document.querySelector('#known').textContent")
        # Drawn: an image that did not load has no width.
        for drawn in ("#seen", "#heat", "#nearest img", "#examples img"):
            script = f"document.querySelector('{drawn}').decode().then(() => true)"
            assert page.value(script)
            assert page.value(f"document.querySelector('{drawn}').naturalWidth") > 0
        assert page.value("document.querySelectorAll('#nearest figure').length") == 6
        wide = page.value("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0
        # An example: the first, which is red.
        page.value("document.querySelector('#examples button').click()")
        known = "document.querySelector('#known').textContent"
        page.wait_for(known, lambda text: text.startswith("like"))
        assert page.value("document.querySelector('#label').textContent") == "red"
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        page.upload("#file", broken)
        page.wait_for("document.querySelector('#answer').hidden")
        assert page.value("document.querySelector('#message').textContent")
        asked = [url for url in page.requests if not url.startswith(("data:", "about:"))]
        assert asked
        assert all(url.startswith(address) for url in asked), asked


def test_the_first_answer_takes_less_than_a_second(
    address: str, make_image: Callable[..., bytes]
) -> None:
    began = time.monotonic()
    answer = requests.post(f"{address}answer", data=make_image("blue"), timeout=20).json()
    assert time.monotonic() - began < 1
    assert answer["label"] == "blue"
    assert answer["nearest"][0]["label"] == "blue"


@pytest.mark.parametrize(
    ("method", "path", "sent", "status"),
    [
        ("GET", "training/99999", {}, 404),
        ("GET", "training/-1", {}, 404),
        ("GET", "example/99/thumbnail", {}, 404),
        ("GET", "example/x", {}, 422),
        ("GET", "page.css/../../app.py", {}, 404),
        ("POST", "answer", {"data": b"no image"}, 200),
        ("POST", "answer", {"data": b"0" * 25_000_001}, 413),
        ("GET", "", {"headers": {"Host": "dogs.example"}}, 400),
    ],
)
def test_other_requests_are_refused(
    address: str, method: str, path: str, sent: dict[str, Any], status: int
) -> None:
    response = requests.request(method, address + path, timeout=20, **sent)
    assert response.status_code == status
    if path == "answer":
        assert response.json()["error"]
    assert "Traceback" not in response.text
    assert "default-src 'none'" in response.headers.get("Content-Security-Policy", "") or (
        status == 400
    )


def test_a_port_that_is_taken_is_said(address: str, search: Path) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    done = CliRunner().invoke(demo, [str(search), "--port", port])
    assert done.exit_code == 2
    assert f"Cannot serve on port {port}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_space_runs_with_its_own_files_alone(
    search: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    """Gradio cannot be installed beside the Pillow of these tests: a stand-in is imported."""
    folder = tmp_path / "space"
    done = CliRunner().invoke(demo, [str(search), "--export", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"The Space: {folder}" in done.stdout
    assert {path.name for path in folder.iterdir()} == {
        *("app.py", "requirements.txt", "README.md", "classifier", "visiontuner"),
    }
    assert not (folder / "classifier" / "reference.json").exists()
    for path in folder.rglob("*"):
        assert path.is_dir() or str(search).encode() not in path.read_bytes()
    (tmp_path / "red.png").write_bytes(make_image("red"))
    (tmp_path / "yellow.png").write_bytes(make_image("yellow"))
    program = f"""
import json, sys, types
from unittest.mock import MagicMock
sys.modules["gradio"] = MagicMock()
sys.path.insert(0, {str(folder)!r})
import app, visiontuner
answers = [app.answer(sys.argv[1] + name) for name in ("/red.png", "/yellow.png")]
print(json.dumps([visiontuner.__file__] + [
    (names, said, heat.shape) for names, said, heat in answers
] + [sorted(name for name in ("torch", "mlflow", "click") if name in sys.modules)]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    where, red, yellow, others = json.loads(ran.stdout)
    assert where == str(folder / "visiontuner" / "__init__.py")
    assert max(red[0], key=red[0].get) == "red"
    assert red[1:] == ["confident, like the training images", [16, 16, 3]]
    assert "new: perhaps of no class" in yellow[1]
    assert others == []

    again = CliRunner().invoke(demo, [str(search), "--export", str(folder)])
    assert again.exit_code == 2
    assert "already exists" in again.stderr
    both = CliRunner().invoke(demo, [str(search), "--export", "x", "--port", "0"])
    assert both.exit_code == 2
