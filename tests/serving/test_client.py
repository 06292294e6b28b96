import base64
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from visiontuner.aws.endpoint import check_answers
from visiontuner.cli.serve import query
from visiontuner.errors import ClassifierError, ServingError, UserMistake
from visiontuner.io.aws import Aws
from visiontuner.serving.answers import Options
from visiontuner.serving.client import (
    HttpTransport,
    ImageAnswer,
    ImageSource,
    Reference,
    SageMakerTransport,
    Transport,
    ask_all,
    decode_answers,
    find_images,
    open_model,
)
from visiontuner.serving.server import ScoringServer

OPTIONS = Options(top_k=2)
DROPPED, TORN = 0, 1
IDENTITY = (
    b"<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws:iam::1:user/me</Arn>"
    b"<Account>1</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"
)


@pytest.fixture
def folder(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    """Three images, one file that is none, and one of another kind."""
    (tmp_path / "images" / "below").mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(make_image("red"))
    (tmp_path / "images" / "b.JPG").write_bytes(make_image("green", "JPEG"))
    (tmp_path / "images" / "below" / "c.webp").write_bytes(make_image("blue", "WEBP"))
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    (tmp_path / "images" / "notes.txt").write_text("not asked about")
    return tmp_path / "images"


class Stub(BaseHTTPRequestHandler):
    """Answers each request with the next of `script`, then with one row an image.

    A status of `DROPPED` is a connection that ends without an answer, one of `TORN` within it.
    """

    protocol_version = "HTTP/1.1"
    script: list[tuple[int, dict[str, str], Any] | tuple[()]]  # an empty one: answers
    asked: list[list[bytes]]
    paths: list[str]
    signatures: list[str]
    refused: list[int]
    largest: int | None = None
    most_bytes: int | None = None
    too_large: tuple[int, dict[str, str], Any] = (413, {}, "too large")
    described: tuple[int, dict[str, str], Any] = (403, {}, {"__type": "AccessDeniedException"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"GetCallerIdentity" in body:
            self._send(200, {}, IDENTITY)
            return
        if "X-Amz-Target" in self.headers:
            self._send(*type(self).described)
            return
        table = json.loads(body)["dataframe_split"]["data"]
        type(self).paths.append(self.path)
        type(self).signatures.append(self.headers.get("Authorization", ""))
        type(self).asked.append([base64.b64decode(cells[0]) for cells in table])
        status, headers, answer = 200, {}, {"predictions": [row(cells[0]) for cells in table]}
        if type(self).script and (told := type(self).script.pop(0)):
            status, headers, answer = told
        elif type(self).largest is not None and len(table) > type(self).largest:
            status, answer = 413, "too large"
        elif type(self).most_bytes is not None and len(body) > type(self).most_bytes:
            type(self).refused.append(len(body))
            status, headers, answer = type(self).too_large
        self._send(status, headers, answer)

    def _send(self, status: int, headers: dict[str, str], answer: Any) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if status in (DROPPED, TORN):
            if status == TORN:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


def row(text: str) -> dict[str, Any]:
    """Names an image by its content, which these tests make a word."""
    name = base64.b64decode(text)[:10].decode(errors="replace")
    return {"label": name, "probability": 0.5, "confident": True, "top_k": [], "error": None}


@pytest.fixture
def stub() -> Iterator[tuple[str, type[Stub]]]:
    lists = ("script", "asked", "paths", "signatures", "refused")
    handler = type("Handler", (Stub,), {name: [] for name in lists})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["a server", "an endpoint"])
def way(
    request: pytest.FixtureRequest, stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch
) -> Transport:
    """To the stub: by its URL, or as if it were SageMaker."""
    if request.param == "a server":
        return HttpTransport(stub[0])
    return endpoint(stub[0], monkeypatch)


def endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> SageMakerTransport:
    """An endpoint `dogs` in an AWS that is at this URL."""
    amazon(url, monkeypatch)
    return SageMakerTransport("dogs", region="eu-west-1")


def amazon(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this URL all of AWS."""
    for name in (*(n for n in os.environ if n.startswith("AWS_")), "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "eu-west-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def words(count: int) -> list[ImageSource]:
    return [ImageSource(name=f"{i}", read=f"word{i}".encode) for i in range(count)]


def noise(side: int) -> bytes:
    """An image that compresses badly: some 2.5 bytes a pixel."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def labels(answers: Iterator[ImageAnswer]) -> list[str | None]:
    return [one.answer.label for one in answers]


def test_a_folder_is_answered_by_a_server_and_a_bad_file_is_reported(
    scoring_server: ScoringServer, folder: Path
) -> None:
    for left_out in (".hidden", "__MACOSX", "mlruns", "searches/a-1"):
        (folder / left_out).mkdir(parents=True)
        (folder / left_out / "0.png").write_bytes(b"no image")
    (folder / "searches" / "a-1" / "journal.jsonl").touch()
    (folder / "._red.png").write_bytes(b"what macOS leaves")
    images = find_images([str(folder), str(folder / "missing.png")])
    answers = list(ask_all(HttpTransport(scoring_server.url), images, OPTIONS))
    found = {Path(one.image).name: one.answer for one in answers}
    assert {name: answer.label for name, answer in found.items()} == {
        "a.png": "red", "b.JPG": "green", "c.webp": "blue", "broken.png": None, "missing.png": None,
    }  # fmt: skip
    assert "not an image" in str(found["broken.png"].error)
    assert found["missing.png"].error == "Cannot read it: No such file or directory."
    assert [choice["label"] for choice in found["a.png"].top_k] == ["red", "green"]


def test_a_classifier_a_model_and_a_server_give_the_same_answers(
    scoring_server: ScoringServer, colour_classifier: Path, colour_model: Path, folder: Path
) -> None:
    images = find_images([str(folder)])
    ways = [
        open_model(colour_classifier),
        open_model(colour_model),
        HttpTransport(scoring_server.url),
    ]
    first, second, third = ([a.to_dict() for a in ask_all(w, images, OPTIONS)] for w in ways)
    assert first == second
    for one, other in zip(first, third, strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


def test_answers_come_in_the_order_of_the_images(stub: tuple[str, type[Stub]]) -> None:
    url, handler = stub
    answers = ask_all(HttpTransport(url), words(50), OPTIONS, batch_size=7, workers=5)
    assert labels(answers) == [f"word{i}" for i in range(50)]
    assert sorted(len(batch) for batch in handler.asked) == [1] + [7] * 7


def test_batches_respect_the_payload_limit(stub: tuple[str, type[Stub]]) -> None:
    url, handler = stub
    images = [ImageSource(name=f"{i}", read=lambda: b"x" * 90) for i in range(10)]
    # 90 bytes are 120 letters, 126 with quotes: 3 fit into 700 - 300 bytes.
    list(ask_all(HttpTransport(url, body_limit=700), images, OPTIONS))
    assert sorted(len(batch) for batch in handler.asked) == [1, 3, 3, 3]


def test_an_image_that_exceeds_a_request_is_sent_smaller(
    scoring_server: ScoringServer,
) -> None:
    content = noise(900)
    transport = HttpTransport(scoring_server.url, body_limit=200_000)
    assert len(content) > transport.body_limit
    (one,) = ask_all(transport, [ImageSource(name="noise", read=lambda: content)], OPTIONS)
    assert one.reduced
    assert one.answer.error is None


def test_a_busy_server_is_asked_again_as_it_wishes(stub: tuple[str, type[Stub]]) -> None:
    url, handler = stub
    handler.script = [(429, {"Retry-After": "7"}, "slow down"), (503, {}, "starting")]
    waits: list[float] = []
    answers = ask_all(HttpTransport(url), words(1), OPTIONS, sleep=waits.append)
    assert labels(answers) == ["word0"]
    assert waits[0] == 7
    assert 0.5 <= waits[1] <= 1


@pytest.mark.parametrize("fault", [DROPPED, TORN], ids=["dropped", "torn"])
def test_a_connection_that_breaks_is_tried_again(
    way: Transport, stub: tuple[str, type[Stub]], fault: int
) -> None:
    _, handler = stub
    handler.script = [(fault, {}, None)]
    waits: list[float] = []
    assert labels(ask_all(way, words(3), OPTIONS, sleep=waits.append)) == [
        "word0", "word1", "word2",
    ]  # fmt: skip
    assert len(waits) == 1


def refusal(code: str, message: str, status: int = 400, **told: Any) -> tuple[int, Any, Any]:
    """As SageMaker sends one."""
    return status, {"x-amzn-ErrorType": code}, {"message": message, "Message": message, **told}


@pytest.mark.parametrize(
    "busy",
    [
        refusal("ThrottlingException", "Rate exceeded"),
        refusal("ServiceUnavailable", "The request has failed.", 503),
        refusal("ModelNotReadyException", "Model is not ready.", 429),
        refusal("InternalFailure", "An internal failure occurred.", 500),
        refusal("ModelError", "Received 502", 424, OriginalStatusCode=502, OriginalMessage=""),
    ],
    ids=lambda busy: busy[1]["x-amzn-ErrorType"],
)
def test_a_busy_endpoint_is_asked_again_after_growing_pauses(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch, busy: tuple[int, Any, Any]
) -> None:
    url, handler = stub
    handler.script = [busy] * 3
    waits: list[float] = []
    answers = ask_all(endpoint(url, monkeypatch), words(1), OPTIONS, sleep=waits.append)
    assert labels(answers) == ["word0"]
    assert [0.25 <= waits[0] <= 0.5, 0.5 <= waits[1] <= 1, 1 <= waits[2] <= 2] == [True] * 3


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (
            {"OriginalStatusCode": 400, "OriginalMessage": '{"message": "Row 0: no image"}'},
            "Row 0: no image",
        ),
        (
            {"message": "Received server error (0): Your invocation timed out while waiting."},
            "Received server error (0): Your invocation timed out while waiting.",
        ),
    ],
    ids=["refused", "timed out"],
)
def test_a_row_that_the_model_behind_an_endpoint_refuses_does_not_take_others_with_it(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch, told: Any, reason: str
) -> None:
    url, handler = stub
    error = refusal("ModelError", "Received client error", 424)
    handler.script = [(424, error[1], error[2] | told)] * 2
    first, second = ask_all(endpoint(url, monkeypatch), words(2), OPTIONS)
    assert first.answer.error == reason
    assert second.answer.label == "word1"


def test_a_model_that_fails_behind_an_endpoint_ends_the_query_and_its_log_is_named(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = stub
    told = {"OriginalStatusCode": 500, "OriginalMessage": '{"message": "internal error"}'}
    handler.script = [refusal("ModelError", "Received server error (500)", 424, **told)]
    with pytest.raises(ServingError, match=r"fails \(500\): internal error\. .*Endpoints/dogs"):
        list(ask_all(endpoint(url, monkeypatch), words(1), OPTIONS))


def test_a_new_endpoint_is_not_condemned_for_one_broken_connection(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = stub
    amazon(url, monkeypatch)
    choices = [{"label": "a", "probability": 0.75}, {"label": "b", "probability": 0.25}]
    answered = {"label": "a", "probability": 0.75, "top_k": choices}
    handler.script = [(DROPPED, {}, None), (200, {}, {"predictions": [answered]})]
    reference = Reference(["a", "b"], [b"image"], np.array([[0.75, 0.25]]))
    check_answers(Aws("eu-west-1"), "dogs", reference)
    assert handler.script == []


@pytest.mark.parametrize(
    ("answer", "difference"),
    [
        ({"top_k": {"a": 0.75, "b": 0.25}, "novelty": 0.5}, 0.0),
        ({"top_k": {"a": 0.7, "b": 0.3}, "novelty": 0.5}, 0.05),
        ({"top_k": {"a": 0.75, "b": 0.25}, "novelty": 0.6}, 0.1),
        ({"top_k": {"a": 0.75, "b": 0.25}}, np.nan),
        ({"top_k": {"a": 0.75}, "novelty": 0.5}, np.nan),
    ],
)
def test_what_an_endpoint_answers_is_compared_with_the_reference(
    answer: dict[str, Any], difference: float
) -> None:
    choices = [{"label": k, "probability": v} for k, v in answer["top_k"].items()]
    reference = Reference(["a", "b"], [b"image"], np.array([[0.75, 0.25]]), (0.5,))
    found = reference.difference([answer | {"top_k": choices}])
    assert found == pytest.approx(difference, nan_ok=True)


def test_connections_that_keep_breaking_are_given_up(
    way: Transport, stub: tuple[str, type[Stub]]
) -> None:
    _, handler = stub
    handler.script = [(DROPPED, {}, None)] * 6
    with pytest.raises(ServingError, match=r"Given up after 6 tries: .*[Cc]onnection"):
        list(ask_all(way, words(1), OPTIONS, sleep=lambda _: None))


def test_a_server_that_is_gone_for_a_while_is_waited_for(stub: tuple[str, type[Stub]]) -> None:
    url, _ = stub
    transport = HttpTransport(url)
    waits: list[float] = []

    def come_back(seconds: float) -> None:
        waits.append(seconds)
        transport.url = url

    assert labels(ask_all(transport, words(1), OPTIONS)) == ["word0"]
    transport.url = "http://127.0.0.1:9"
    assert labels(ask_all(transport, words(1), OPTIONS, sleep=come_back)) == ["word0"]
    assert len(waits) == 1


def test_a_server_that_stays_busy_is_given_up(stub: tuple[str, type[Stub]]) -> None:
    url, handler = stub
    handler.script = [(503, {}, {"message": "no capacity"})] * 6
    waits: list[float] = []
    with pytest.raises(ServingError, match=r"Given up after 6 tries: no capacity\."):
        list(ask_all(HttpTransport(url), words(1), OPTIONS, sleep=waits.append))
    assert len(waits) == 5


def test_a_request_that_is_refused_as_too_large_is_split(stub: tuple[str, type[Stub]]) -> None:
    url, handler = stub
    handler.largest = 2
    assert labels(ask_all(HttpTransport(url), words(5), OPTIONS)) == [f"word{i}" for i in range(5)]
    assert [len(batch) for batch in handler.asked] == [5, 2, 3, 1, 2]


OVERSIZE = (
    400,
    {"x-amzn-ErrorType": "ValidationError"},
    {"Message": "Request 7f0c2c5e has oversize body."},
)


def serverless(url: str, handler: type[Stub], monkeypatch: pytest.MonkeyPatch) -> Transport:
    """An endpoint as AWS has it: it takes no more than 4 MiB, and says so in its own way."""
    handler.most_bytes, handler.too_large = 4 * 2**20, OVERSIZE
    return endpoint(url, monkeypatch)


def test_a_serverless_endpoint_is_sent_no_more_than_it_takes(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = stub
    variant = {"VariantName": "a", "CurrentServerlessConfig": {"MaxConcurrency": 5}}
    handler.described = (200, {}, {"EndpointStatus": "InService", "ProductionVariants": [variant]})
    transport = serverless(url, handler, monkeypatch)
    images = [ImageSource(name=f"{i}", read=lambda: b"x" * 2_000_000) for i in range(5)]
    assert labels(ask_all(transport, images, OPTIONS, workers=1)) == ["x" * 10] * 5
    assert handler.refused == []


def test_what_an_endpoint_finds_too_large_is_halved_and_later_requests_are_smaller(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks may not look up whether it is serverless."""
    url, handler = stub
    transport = serverless(url, handler, monkeypatch)
    images = [ImageSource(name=f"{i}", read=lambda: b"x" * 2_000_000) for i in range(20)]
    assert labels(ask_all(transport, images, OPTIONS, workers=1)) == ["x" * 10] * 20
    # One at work and three that were made up before it was refused.
    assert 1 <= len(handler.refused) <= 5


@pytest.mark.parametrize("kind", ["a server", "an endpoint"])
def test_an_image_that_is_refused_as_too_large_is_sent_smaller(
    stub: tuple[str, type[Stub]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url, handler = stub
    content = noise(900)
    handler.most_bytes = 600_000
    transport: Transport = HttpTransport(url)
    if kind == "an endpoint":
        handler.too_large = OVERSIZE
        transport = endpoint(url, monkeypatch)
    (one,) = ask_all(transport, [ImageSource(name="noise", read=lambda: content)], OPTIONS)
    assert one.answer.error is None
    assert one.reduced
    assert Image.open(io.BytesIO(handler.asked[-1][0])).format == "JPEG"


def test_a_server_that_finds_everything_too_large_is_not_asked_forever(
    stub: tuple[str, type[Stub]],
) -> None:
    url, handler = stub
    handler.most_bytes = 10
    first, second = ask_all(HttpTransport(url), words(2), OPTIONS)
    assert (first.answer.error, second.answer.error) == ('"too large"', '"too large"')
    assert len(handler.refused) == 3


def test_a_row_that_an_older_model_refuses_does_not_take_others_with_it(
    stub: tuple[str, type[Stub]],
) -> None:
    url, handler = stub
    refusal = (400, {}, {"message": "Failed to predict data '…'. \nError: Row 0: no image"})
    handler.script = [refusal, refusal]
    first, second = ask_all(HttpTransport(url), words(2), OPTIONS)
    assert first.answer.error == "Row 0: no image"
    assert second.answer.label == "word1"


def test_another_error_of_the_server_ends_the_query(stub: tuple[str, type[Stub]]) -> None:
    url, handler = stub
    handler.script = [(404, {}, "Not Found")]
    with pytest.raises(ServingError, match=r"answers 404: .*Not Found"):
        list(ask_all(HttpTransport(url), words(1), OPTIONS))


def test_nothing_at_the_address_is_said_with_the_command_that_starts_it() -> None:
    with pytest.raises(ServingError, match=r"Nothing answers at .*mlflow models serve"):
        list(ask_all(HttpTransport("http://127.0.0.1:9"), words(1), OPTIONS))


def test_a_password_in_a_url_is_never_shown(stub: tuple[str, type[Stub]], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"word")
    stub[1].script = [(404, {}, "Not Found")]
    there = stub[0].replace("http://", "http://me:secret@")
    for url in (
        "http://me:secret@127.0.0.1:9",
        "http://me:secret@[::1",
        "ftp://me:secret@a",
        there,
    ):
        done = CliRunner().invoke(query, ["--url", url, str(tmp_path / "a.png")])
        assert done.exit_code == 1
        assert len(done.stderr.splitlines()) == 1
        assert "secret" not in done.output
    (image,) = find_images(["http://me:secret@127.0.0.1:9/a.png"])
    (one,) = ask_all(HttpTransport(stub[0]), [image], OPTIONS)
    assert one.image == "http://***@127.0.0.1:9/a.png"
    assert "secret" not in str(one.answer.error)


def test_a_proxy_that_is_not_there_is_not_taken_for_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    transport = HttpTransport("http://models.invalid:8080")
    with pytest.raises(ServingError, match="tries: the proxy does not let it through"):
        list(ask_all(transport, words(1), OPTIONS, sleep=lambda _: None))


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"predictions": 3}', b'{"predictions": [[1, 2]]}', b'{"predictions": []}'],
)
def test_what_is_no_answer_of_ours_is_said(body: bytes) -> None:
    with pytest.raises(ServingError, match="no visiontuner model"):
        decode_answers(body, 1)


def test_images_come_from_a_url_too(
    colour_classifier: Path, make_image: Callable[..., bytes]
) -> None:
    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/red.png" else 404)
            self.end_headers()
            self.wfile.write(make_image("red"))

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    images = find_images([f"{url}/red.png", f"{url}/none.png"])
    there, missing = ask_all(open_model(colour_classifier), images, OPTIONS)
    server.shutdown()
    server.server_close()
    thread.join()
    assert there.answer.label == "red"
    assert missing.answer.error == "Cannot fetch it: the server answers 404."


@pytest.mark.slow
def test_nobody_is_told_to_come_again_without_a_server(
    colour_classifier: Path, colour_model: Path, tmp_path: Path
) -> None:
    """Eight large images at a time: a server takes three and answers 429 to the others."""
    Image.new("RGBA", (1700, 1700), (220, 20, 20, 255)).save(tmp_path / "red.png")
    images = find_images([str(tmp_path / "red.png")] * 24)
    for way in (open_model(colour_classifier), open_model(colour_model)):
        answers = list(ask_all(way, images, OPTIONS, workers=8, batch_size=1))
        assert [one.answer.label for one in answers] == ["red"] * 24


def test_a_folder_without_images_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="holds no image files"):
        find_images([str(tmp_path)])


def with_own_code(model: Path, to: Path) -> Path:
    """A copy of an MLflow model folder whose code leaves a file behind when it is run."""
    shutil.copytree(model, to)
    for script in to.rglob("*.py"):
        script.write_text(f"open({str(to / 'ran')!r}, 'w')\n" + script.read_text())
    return to


def test_a_model_folder_is_asked_without_running_the_code_in_it(
    colour_model: Path, folder: Path, tmp_path: Path
) -> None:
    model = with_own_code(colour_model, tmp_path / "model")
    arguments = ["--model", str(model), "--format", "json", str(folder / "a.png")]
    done = CliRunner().invoke(query, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["label"] == "red"
    assert not (model / "ran").exists()


def test_a_model_without_a_classifier_of_ours_is_refused_and_not_run(
    colour_model: Path, tmp_path: Path
) -> None:
    model = with_own_code(colour_model, tmp_path / "model")
    shutil.rmtree(model / "artifacts")
    with pytest.raises(ClassifierError, match="without a classifier of visiontuner"):
        open_model(model)
    assert not (model / "ran").exists()


def test_a_folder_that_is_no_model_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="neither classifier"):
        open_model(tmp_path)


def test_the_command_prints_one_object_an_image(colour_classifier: Path, folder: Path) -> None:
    arguments = ["--model", str(colour_classifier), "--format", "json", "--threshold", "0.9999"]
    done = CliRunner().invoke(query, [*arguments, str(folder)])
    assert done.exit_code == 1  # one file is no image
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["red", "green", "blue", None]
    assert [row["confident"] for row in rows] == [False, False, False, None]


def test_the_command_shows_names_and_percentages(colour_classifier: Path, folder: Path) -> None:
    done = CliRunner().invoke(query, ["--model", str(colour_classifier), str(folder / "a.png")])
    assert done.exit_code == 0, done.output
    assert "red" in done.stdout
    assert "99.6%" in done.stdout


def test_the_command_reads_standard_input_and_writes_csv(
    colour_classifier: Path, make_image: Callable[..., bytes]
) -> None:
    arguments = ["--model", str(colour_classifier), "--format", "csv", "--top-k", "1", "-"]
    done = CliRunner().invoke(query, arguments, input=make_image("blue"))
    assert done.exit_code == 0, done.output
    heading, line = done.stdout.splitlines()
    assert heading == "image,label,probability,confident,known,novelty,top_k,error,reduced"
    assert line.startswith("-,blue,0.99")


def test_the_command_says_which_images_are_new(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    for colour in ("red", "yellow"):
        (tmp_path / f"{colour}.png").write_bytes(make_image(colour))
    done = CliRunner().invoke(query, ["--model", str(colour_classifier), str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "1 new: unlike the training images" in done.stdout
    assert done.stdout.count("(new)") == 1


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_what_was_answered_before_an_error_is_shown(
    stub: tuple[str, type[Stub]], tmp_path: Path, form: str
) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.png").write_bytes(f"word{number}".encode())
    stub[1].script = [(), (), (500, {}, "broken")]
    arguments = ["--url", stub[0], "--workers", "1", "--format", form, str(tmp_path)]
    done = CliRunner().invoke(query, arguments)
    assert done.exit_code == 1
    assert "answers 500: " in done.stderr
    assert [f"word{number}" in done.stdout for number in range(40)] == [True] * 32 + [False] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.png"], "Name an endpoint or a URL"),
        (["photo.png", "photo.png"], "Name an endpoint or a URL"),
        (["photos/", "photo.png"], "Name an endpoint or a URL"),
        (["--local", "--top-k", "0", "a.png"], "top_k must be a whole number >= 1"),
        (["--local", "--threshold", "much", "a.png"], "--threshold takes a number"),
        (["--model", "models:/", "a.png"], "is no model"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(query, arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_of_images_does_not_hide_the_endpoint_that_is_named_after_it(
    stub: tuple[str, type[Stub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    amazon(stub[0], monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/a.png").write_bytes(b"word")
    done = CliRunner().invoke(query, ["photos", "photos/a.png", "--format", "json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["label"] == "word"
    assert stub[1].paths == ["/endpoints/photos/invocations"]


def test_an_endpoint_is_asked_in_the_region_that_every_command_takes(
    stub: tuple[str, type[Stub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    amazon(stub[0], monkeypatch)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "a.png").write_bytes(b"word")
    for region, chosen in (("eu-north-1", []), ("ap-south-1", ["--region", "ap-south-1"])):
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        asked = CliRunner().invoke(query, ["dogs", str(tmp_path / "a.png"), *chosen])
        assert asked.exit_code == 0, asked.output
        assert f"/{region}/sagemaker/" in stub[1].signatures.pop()
