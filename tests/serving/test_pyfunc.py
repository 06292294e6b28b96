import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visiontuner.data.images import DecodingMemory
from visiontuner.errors import BusyError, ClassifierError
from visiontuner.model.classifier import Classifier
from visiontuner.model.novelty import Novelty
from visiontuner.serving import answers
from visiontuner.serving.answers import BadRequest, Options, answer
from visiontuner.serving.preflight import MALFORMED
from visiontuner.serving.registry import save_classifier
from visiontuner.serving.server import ScoringServer, local_environment

JSON = "application/json"
# softmax of 4 * (220 / 255 - 0.5) / 0.5 = 2.902 and twice 4 * (20 / 255 - 0.5) / 0.5 = -3.373
COLOURS = {"red", "green", "blue"}
RED = 1 / (1 + 2 * math.exp(-6.2745))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def post(server: ScoringServer, body: bytes | str, content_type: str = JSON) -> requests.Response:
    headers = {"Content-Type": content_type}
    return requests.post(f"{server.url}/invocations", data=body, headers=headers, timeout=60)


def table(contents: list[Any], **params: Any) -> str:
    rows = [[base64.b64encode(c).decode() if isinstance(c, bytes) else c] for c in contents]
    return json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}, "params": params})


def ask(server: ScoringServer, contents: list[Any], **params: Any) -> list[dict[str, Any]]:
    response = post(server, table(contents, **params))
    assert response.status_code == 200, response.text
    rows: list[dict[str, Any]] = response.json()["predictions"]
    return rows


def shows_code(response: requests.Response) -> bool:
    """Whether there are lines of a program in it, as in a traceback."""
    return re.search(r'Traceback|File \\?".*line \d', response.text) is not None


def reason(response: requests.Response) -> str:
    assert 400 <= response.status_code < 500
    assert not shows_code(response)
    return str(response.json()["message"])


def test_an_answer_is_a_name_with_its_probability(
    scoring_server: ScoringServer, make_image: Callable[..., bytes]
) -> None:
    red, blue = ask(scoring_server, [make_image("red"), make_image("blue", "JPEG")], top_k=2)
    assert red["label"] == "red"
    assert red["probability"] == pytest.approx(RED, abs=1e-5)
    assert red["confident"] is True
    assert [choice["label"] for choice in red["top_k"]] == ["red", "green"]
    assert blue["label"] == "blue"
    assert set(red) == {"label", "probability", "confident", "known", "novelty", "top_k"}


def test_a_server_says_which_images_are_new_as_the_classifier_does(
    scoring_server: ScoringServer, colour_classifier: Path, make_image: Callable[..., bytes]
) -> None:
    images = [make_image("red"), make_image("yellow")]
    red, yellow = ask(scoring_server, images)
    assert (red["known"], yellow["known"]) == (True, False)
    # Normalised pixels: (0.725, -0.843, -0.843) against (0.725, 0.725, -0.843).
    assert red["novelty"] == pytest.approx(0, abs=1e-3)  # the sample is float16
    assert yellow["novelty"] == pytest.approx(1 - 0.3375, abs=1e-3)
    own = Classifier.load(colour_classifier).predict(images)
    assert [one.known for one in own] == [True, False]
    for answered, expected in zip((red, yellow), own, strict=True):
        assert answered["novelty"] == pytest.approx(expected.novelty, abs=1e-5)


def test_a_classifier_of_format_1_cannot_say_what_is_known(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = changed(colour_classifier, tmp_path / "c", schema_version=1, novelty=None)
    (folder / "novelty.npz").unlink()
    network = onnx.load(folder / "model.onnx")
    del network.graph.output[1:]
    onnx.save(network, folder / "model.onnx")
    (own,) = Classifier.load(folder).predict([make_image("yellow")])
    assert (own.known, own.novelty, own.confident) == (None, None, True)
    (row,) = answer(Classifier.load(folder), [make_image("yellow")], Options())
    assert (row.to_dict()["known"], row.to_dict()["novelty"]) == (None, None)


def test_novelty_that_does_not_belong_to_the_network_is_refused(
    colour_classifier: Path, tmp_path: Path
) -> None:
    folder = changed(colour_classifier, tmp_path / "c")
    other = Novelty(images=np.eye(4, dtype=np.float32), neighbours=1, threshold=0.5)
    (folder / "novelty.npz").write_bytes(other.content())
    with pytest.raises(ClassifierError, match=r"novelty\.npz needs features \[4\]"):
        Classifier.load(folder)
    (folder / "novelty.npz").write_bytes(b"junk")
    with pytest.raises(ClassifierError, match=r"novelty\.npz is damaged"):
        Classifier.load(folder)
    (folder / "novelty.npz").unlink()
    with pytest.raises(ClassifierError, match=r"cannot read novelty\.npz"):
        Classifier.load(folder)


def test_below_the_threshold_the_name_stays_and_is_not_confident(
    scoring_server: ScoringServer, make_image: Callable[..., bytes]
) -> None:
    (row,) = ask(scoring_server, [make_image("red")], threshold=0.9999)
    assert (row["label"], row["confident"]) == ("red", False)
    (row,) = ask(scoring_server, [make_image("red")], threshold=0.9)
    assert row["confident"] is True


def test_the_classifiers_own_threshold_holds_unless_the_request_has_another(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    for path in colour_classifier.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    description = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps(description | {"threshold": 0.9999}))
    classifier = Classifier.load(tmp_path)
    (own,) = answer(classifier, [make_image("red")], Options())
    (other,) = answer(classifier, [make_image("red")], Options(threshold=0.5))
    (zero,) = answer(classifier, [make_image("red")], Options(threshold=0.0))
    assert (own.confident, other.confident, zero.confident) == (False, True, True)


def changed(classifier: Path, to: Path, **description: Any) -> Path:
    """A copy of a classifier folder whose classifier.json says something else."""
    shutil.copytree(classifier, to)
    raw = json.loads((to / "classifier.json").read_text())
    (to / "classifier.json").write_text(json.dumps(raw | description))
    return to


def precision(value: float | None) -> dict[str, Any]:
    return {"calibration": {"wanted_precision": 0.95, "validation_precision": value}}


# What `evaluate` wrote before there was the flag, and what a training took over from it.
SAID_1 = [
    {"threshold": 1.0, "metadata": precision(None)},
    {"threshold": 1.0, "metadata": {"calibration": {"fitted_on": "t0001 of dogs"}}},
]


@pytest.mark.parametrize("description", [{"abstains": True}, *SAID_1])
def test_where_every_answer_abstains_a_probability_of_1_is_not_confident(
    colour_classifier: Path,
    make_image: Callable[..., bytes],
    tmp_path: Path,
    description: dict[str, Any],
) -> None:
    folder = changed(colour_classifier, tmp_path / "c", temperature=1e-3, **description)
    classifier = Classifier.load(folder)
    (own,) = answer(classifier, [make_image("red")], Options())
    assert (own.label, own.probability, own.confident) == ("red", 1.0, False)
    (read,) = classifier.predict([make_image("red")])
    assert read.confident is False
    for threshold in (0.0, 1.0):  # the asker's own counts instead
        (other,) = answer(classifier, [make_image("red")], Options(threshold=threshold))
        assert other.confident is True


def test_a_threshold_of_1_that_was_chosen_is_one(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    chosen = {"threshold": 1.0, "metadata": precision(0.97)}
    sure = changed(colour_classifier, tmp_path / "sure", temperature=1e-3, **chosen)
    unsure = changed(colour_classifier, tmp_path / "unsure", **chosen)
    for folder, confident in ((sure, True), (unsure, False)):
        (own,) = answer(Classifier.load(folder), [make_image("red")], Options())
        assert own.confident is confident


def test_a_server_abstains_as_the_evaluation_says(
    colour_classifier: Path, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = changed(colour_classifier, tmp_path / "c", temperature=1e-3, abstains=True)
    model = save_classifier(folder, tmp_path / "model")
    with ScoringServer(model, local_environment()) as server:
        (row,) = ask(server, [make_image("red")])
        assert (row["probability"], row["confident"]) == (1.0, False)
        (row,) = ask(server, [make_image("red")], threshold=0.9)
        assert row["confident"] is True


def test_good_rows_are_not_lost_when_errors_are_reported(
    scoring_server: ScoringServer, make_image: Callable[..., bytes]
) -> None:
    contents = [make_image("red"), b"no image", make_image("red")[:60], make_image("blue")]
    rows = ask(scoring_server, contents, on_error="report")
    assert [row["label"] for row in rows] == ["red", None, None, "blue"]
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    assert "not an image" in rows[1]["error"]
    assert "60 bytes" in rows[2]["error"]
    assert rows[1]["probability"] is None
    assert rows[1]["top_k"] == []


def test_without_that_the_first_bad_row_is_named(
    scoring_server: ScoringServer, make_image: Callable[..., bytes]
) -> None:
    contents = [make_image("red"), make_image("red")[:60], b"no image"]
    response = post(scoring_server, table(contents))
    assert response.status_code == 400
    assert "Row 1: Cannot read an image of 60 bytes" in reason(response)


def test_a_text_that_is_no_base64_is_reported_in_its_row(colour_classifier: Path) -> None:
    """Without a server: MLflow's own decoding of JSON passes over letters that do not belong."""
    (row,) = answer(Classifier.load(colour_classifier), ["§"], Options(on_error="report"))
    assert row.error == "image is not base64; send the file's content."


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(
    scoring_server: ScoringServer,
) -> None:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 5_001)).save(buffer, "PNG")
    assert "Row 0: " in (text := reason(post(scoring_server, table([buffer.getvalue()]))))
    assert "its 10000 x 5001 pixels are more than the 50,000,000 allowed" in text


def make_large_images() -> dict[str, bytes]:
    """About as large as the endpoint decodes; the `serving_load` benchmark sends them too."""
    return {
        "PNG": encode(Image.new("RGBA", (7000, 7000)), "PNG"),
        "TIFF": encode(Image.new("RGBA", (4900, 4900)), "TIFF", compression="tiff_adobe_deflate"),
        "WEBP": encode(
            Image.new("RGBA", (4400, 4400), (9, 9, 9, 9)), "WEBP", lossless=True, method=0
        ),
        "JPEG2000": encode(Image.new("RGBA", (3700, 3700)), "JPEG2000"),
        "JPEG": encode(Image.new("RGB", (6500, 7500)), "JPEG", progressive=True),
    }


def test_large_images_take_turns_in_one_gigabyte_and_small_ones_are_answered(
    colour_model: Path, make_image: Callable[..., bytes]
) -> None:
    large_images = make_large_images()
    with (
        ScoringServer(colour_model, local_environment()) as server,
        ThreadPoolExecutor(10) as pool,
    ):
        port = server.url.rpartition(":")[2]
        (process,) = [one for one in psutil.Process().children() if port in one.cmdline()]
        large = [pool.submit(post, server, table([one])) for one in [*large_images.values()] * 2]
        small = [post(server, table([make_image("red")])) for _ in range(20)]
        statuses = {one.result().status_code for one in large}
        assert {response.status_code for response in small} == {200}
        assert 200 in statuses <= {200, 429}
        for name, content in large_images.items():
            assert ask(server, [content])[0]["label"] in COLOURS, name
        status = Path(f"/proc/{process.pid}/status").read_text()
    peak_kb = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak_kb < 900_000


def test_an_image_that_needs_more_memory_than_allowed_is_refused(
    scoring_server: ScoringServer,
) -> None:
    content = encode(Image.new("L", (5000, 5000)), "WEBP", method=0)
    text = reason(post(scoring_server, table([content])))
    assert "its 5000 x 5000 pixels need 500 MB as WEBP, more than the 400 MB allowed" in text


def test_more_large_images_than_may_wait_are_to_be_sent_again(
    colour_classifier: Path, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, red = Classifier.load(colour_classifier), make_image("red")
    monkeypatch.setattr(answers, "MEMORY", DecodingMemory(small=9599, most=9600, waiting=0))
    with answers.MEMORY.turn(), pytest.raises(BusyError, match="send it again"):
        answer(classifier, [red], Options(on_error="report"))  # 40 x 30 pixels, 8 bytes each
    assert answer(classifier, [red], Options())[0].label == "red"
    monkeypatch.setattr(answers, "MEMORY", DecodingMemory(small=9600, most=9600, waiting=0))
    with answers.MEMORY.turn():
        assert answer(classifier, [red], Options())[0].label == "red"


def test_a_busy_model_answers_429(tmp_path: Path) -> None:
    """The status that `visiontuner query` and AWS's clients take for "come again"."""
    assert fails_with(tmp_path, 'BusyError("send it again")') == (
        "MlflowException 429 send it again None"
    )


def test_an_image_with_too_many_bytes_is_refused(
    colour_classifier: Path, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_BYTES", len(make_image("red")) - 1)
    classifier = Classifier.load(colour_classifier)
    content = make_image("red")
    for image in (content, base64.b64encode(content).decode()):
        with pytest.raises(BadRequest, match="Row 0: image has"):
            answer(classifier, [image], Options())


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_requests_are_the_clients_mistake(
    scoring_server: ScoringServer, what: str
) -> None:
    body, content_type = MALFORMED[what]
    response = post(scoring_server, body, content_type)
    assert 400 <= response.status_code < 500
    assert not shows_code(response)


@pytest.mark.parametrize("form", ["dataframe_records", "inputs", "instances"])
def test_every_form_of_mlflows_protocol_is_understood(
    scoring_server: ScoringServer, make_image: Callable[..., bytes], form: str
) -> None:
    text = base64.b64encode(make_image("green")).decode()
    value = {"image": [text]} if form == "inputs" else [{"image": text}]
    response = post(scoring_server, json.dumps({form: value}))
    assert response.json()["predictions"][0]["label"] == "green"


def written(image: bytes, form: str) -> str:
    """Base64 as programs write it."""
    if form == "wrapped":
        return base64.encodebytes(image).decode()
    if form == "url-safe":
        return base64.urlsafe_b64encode(image).decode()
    text = base64.b64encode(image).decode()
    return text.rstrip("=") if form == "unpadded" else f"{text}\r\n"


@pytest.mark.parametrize(
    ("form", "answered"),
    [("wrapped", True), ("newline", True), ("url-safe", False), ("unpadded", False)],
)
def test_base64_gets_one_verdict_in_all_four_forms_of_a_request(
    scoring_server: ScoringServer, make_image: Callable[..., bytes], form: str, answered: bool
) -> None:
    image = make_image("green")
    image += bytes((2 - len(image)) % 3) + b"\xff\xef"  # ends in one =, with / or _ before
    assert b"=" in base64.b64encode(image)
    assert b"_" in base64.urlsafe_b64encode(image)
    text = written(image, form)
    bodies = {
        "dataframe_split": {"columns": ["image"], "data": [[text]]},
        "dataframe_records": [{"image": text}],
        "inputs": {"image": [text]},
        "instances": [{"image": text}],
    }
    for name, body in bodies.items():
        response = post(scoring_server, json.dumps({name: body}))
        assert (response.status_code == 200) == answered, (name, response.text)


BAD_ROWS = {
    "abcde": "it is not an image",
    "data:image/png;base64,iVBORw0K": "image is a data URL; send what follows its comma.",
    None: "it is not an image",
    3: "it is not an image",
}


def test_what_is_no_base64_is_told_in_its_row_of_instances(
    scoring_server: ScoringServer, make_image: Callable[..., bytes]
) -> None:
    good = base64.b64encode(make_image("green")).decode()
    instances = [{"image": value} for value in (good, *BAD_ROWS, good)]
    body = {"instances": instances, "params": {"on_error": "report"}}
    rows = post(scoring_server, json.dumps(body)).json()["predictions"]
    assert [row["label"] for row in rows] == ["green", *[None] * len(BAD_ROWS), "green"]
    for row, said in zip(rows[1:], BAD_ROWS.values(), strict=False):
        assert said in row["error"]
    refused = post(scoring_server, json.dumps({"instances": instances}))
    assert "Row 1: Cannot read an image" in reason(refused)


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_what_is_no_base64_in_a_table_is_refused_by_mlflow_before_the_model(
    scoring_server: ScoringServer, make_image: Callable[..., bytes], bad: Any
) -> None:
    """As docs/serving.md says; `instances` is the way around."""
    response = post(scoring_server, table([make_image("red"), bad], on_error="report"))
    assert "Failed to convert column image" in reason(response)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        ("[" * 100_000, JSON, 500),
        ('{"instances": [' + "1" * 5_000 + "]}", JSON, 500),
        ("", "text/csv", 400),
    ],
    ids=["nested deeply", "a long number", "empty CSV"],
)
def test_mlflows_own_parser_fails_as_the_documentation_says(
    scoring_server: ScoringServer,
    make_image: Callable[..., bytes],
    body: str,
    content_type: str,
    status: int,
) -> None:
    response = post(scoring_server, body, content_type)
    assert response.status_code == status
    assert shows_code(response) is (content_type == "text/csv")
    assert ask(scoring_server, [make_image("red")])[0]["label"] == "red"


def test_no_rows_have_no_answers(scoring_server: ScoringServer) -> None:
    assert ask(scoring_server, []) == []


def test_what_goes_wrong_inside_tells_nothing_about_the_inside(tmp_path: Path) -> None:
    assert fails_with(tmp_path, 'RuntimeError("/secret/path")') == (
        "MlflowException 500 internal error None"
    )


def fails_with(folder: Path, error: str) -> str:
    """How a request ends whose decoding raises an error.

    In a process of its own: importing the model's script sets MLflow's current model.
    """
    program = f"""
import warnings
warnings.simplefilter("ignore")
import pandas as pd
from visiontuner.errors import BusyError
from visiontuner.serving.pyfunc import ClassifierModel
class Broken:
    threshold = None
    def score(self, images, max_pixels, memory):
        raise {error}
model = ClassifierModel()
model.classifier = Broken()
try:
    model.predict(None, pd.DataFrame({{"image": [b"x"]}}))
except Exception as error:
    print(type(error).__name__, error.get_http_status_code(), error, error.__cause__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=True
    )
    return done.stdout.strip()


def test_a_broken_image_loads_nothing_that_was_not_there_before(colour_classifier: Path) -> None:
    program = f"""
import sys, types, warnings
warnings.simplefilter("ignore")
import pandas as pd
from visiontuner.serving.pyfunc import ClassifierModel
model = ClassifierModel()
model.load_context(types.SimpleNamespace(artifacts={{"classifier": {str(colour_classifier)!r}}}))
before = set(sys.modules)
print(model.predict(None, pd.DataFrame({{"image": [b"x"]}}), {{"on_error": "report"}}).error[0])
print({{name for name in set(sys.modules) - before if name.startswith("PIL.")}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "Cannot read an image of 1 bytes: it is not an image that Pillow knows.",
        "set()",
    ], done.stderr


_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.binary(max_size=60).map(lambda b: base64.b64encode(b).decode()),
)  # fmt: skip
_json = st.recursive(
    _values,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
_columns = st.lists(st.sampled_from(["image", "image", "x", ""]), min_size=1, max_size=2)
_params = st.dictionaries(
    st.sampled_from(["top_k", "threshold", "on_error", "x"]), _json, max_size=3
)


@st.composite
def _tables(draw: st.DrawFn) -> dict[str, Any]:
    columns = draw(_columns)
    cells = _values if draw(st.booleans()) else _json
    rows = draw(st.lists(st.lists(cells, min_size=len(columns), max_size=len(columns)), max_size=3))
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    by_column = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    form = draw(st.sampled_from(["split", "records", "inputs", "instances"]))
    body: dict[str, Any] = {
        "split": {"dataframe_split": {"columns": columns, "data": rows}},
        "records": {"dataframe_records": records},
        "inputs": {"inputs": by_column},
        "instances": {"instances": records},
    }[form]
    return body | ({"params": draw(_params)} if draw(st.booleans()) else {})


# The `serving_load` benchmark sends more of them.
hostile_bodies = st.one_of(
    st.binary(max_size=80),
    _json.map(lambda value: json.dumps(value).encode()),
    _tables().map(lambda value: json.dumps(value).encode()),
    _tables().map(lambda value: json.dumps(value).encode()[:-3]),
)


@given(body=hostile_bodies, content_type=st.sampled_from([JSON] * 6 + ["text/csv", "image/png"]))
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_request_brings_the_model_to_a_server_error(
    scoring_server: ScoringServer, body: bytes, content_type: str
) -> None:
    response = post(scoring_server, body, content_type)
    assert response.status_code < 500, response.text
    assert shows_code(response) is (content_type == "text/csv" and "parse" in response.text)
