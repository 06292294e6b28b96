"""What data capture keeps of an endpoint comes home as images and answers."""

from __future__ import annotations

import base64
import csv
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.aws.captured_requests import read_events
from visiontuner.cli.main import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def event(request: object, answer: object, *, number: str = "e1", encoded: bool = False) -> bytes:
    """A line as SageMaker captures it."""

    def part(content: object) -> dict[str, Any]:
        text = json.dumps(content)
        data = base64.b64encode(text.encode()).decode() if encoded else text
        return {"data": data, "encoding": "BASE64" if encoded else "JSON"}

    told = {"endpointInput": part(request), "endpointOutput": part(answer)}
    about = {"eventId": number, "inferenceTime": "2026-11-30T10:00:00Z"}
    return json.dumps({"captureData": told, "eventMetadata": about, "eventVersion": "0"}).encode()


IMAGE = base64.b64encode(b"\xff\xd8\xff.").decode()
PREDICTION = {"label": "red", "probability": 0.9, "confident": True, "top_k": []}


@pytest.mark.parametrize("encoded", [False, True], ids=["json", "base64"])
@pytest.mark.parametrize(
    "request_",
    [
        {"dataframe_split": {"columns": ["other", "image"], "data": [[1, IMAGE]]}},
        {"dataframe_split": {"data": [[IMAGE]]}},
        {"dataframe_records": [{"image": IMAGE}]},
        {"instances": [{"image": IMAGE}]},
        {"inputs": {"image": [IMAGE]}},
        {"inputs": [IMAGE]},
        {"inputs": [[IMAGE]]},
    ],
)
def test_a_request_in_any_format_of_mlflows_is_read(request_: object, encoded: bool) -> None:
    line = event(request_, {"predictions": [PREDICTION]}, encoded=encoded)
    (one,) = read_events(line + b"\n")
    assert (one.event, one.row, one.content) == ("e1", 0, b"\xff\xd8\xff.")
    assert (one.answer.label, one.answer.probability) == ("red", 0.9)
    assert one.time == "2026-11-30T10:00:00Z"


def test_what_cannot_be_read_is_told_and_hides_no_other_request() -> None:
    fine = event({"instances": [{"image": IMAGE}]}, {"predictions": [PREDICTION]}, number="e2")
    other = event({"instances": [{"image": "?!"}]}, {"predictions": "none"}, number="e3")
    lines = [b"no json", event({"rows": 1}, {}), fine, other]
    found = list(read_events(b"\n".join(lines)))
    assert [one.event for one in found] == ["line-0", "e1", "e2", "e3"]
    assert [one.answer.error is None for one in found] == [False, False, True, False]
    assert found[3].answer.error == "Its answer was not captured."
    assert found[3].content == b""


def test_images_and_answers_come_home_once(
    account: Any, model: str, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    s3 = account.client("s3")
    s3.create_bucket(Bucket="kept", CreateBucketConfiguration=place)
    made = run("deploy", model, "--no-preflight", "--data-capture", "s3://kept/all")
    assert made.exit_code == 0, made.output
    images = tmp_path / "images"
    images.mkdir()
    for name in ("red", "green"):
        (images / f"{name}.png").write_bytes(make_image(name))
    asked = run("query", "colours", str(images))
    assert asked.exit_code == 0, asked.output
    one = run("query", "colours", str(images / "red.png"))
    assert one.exit_code == 0, one.output
    # The deployment asked for the model's own images, too; SageMaker writes it all later.
    before = 0
    while before != (now := s3.list_objects_v2(Bucket="kept").get("KeyCount", 0)) or not now:
        before = now
        time.sleep(0.6)

    command = ["capture", "colours", "--output", "captured"]
    came = run(*command)
    assert came.exit_code == 0, came.output
    folder = Path("captured")
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert f"{len(rows)} images from s3://kept/all/colours/ are in captured/images" in came.stdout
    assert [row["error"] for row in rows] == [None] * len(rows)
    by_content = {(folder / row["image"]).read_bytes(): row["label"] for row in rows}
    assert by_content[make_image("red")] == "red"
    assert by_content[make_image("green")] == "green"
    several = [row for row in rows if row["row"] == 1]
    assert several
    assert several[0]["image"] == f"images/{several[0]['event']}-01.png"
    with (folder / "answers.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["image"] for line in table] == [row["image"] for row in rows]
    assert [line["label"] for line in table] == [row["label"] for row in rows]

    # After the endpoint is gone, and of the last hours alone: nothing is doubled or lost.
    old = (datetime.now(UTC) - timedelta(days=3)).strftime("%Y/%m/%d/%H")
    fresh = event(
        {"instances": [{"image": IMAGE}]}, {"predictions": [PREDICTION]}, number="../../x"
    )
    s3.put_object(Bucket="kept", Key=f"all/colours/AllTraffic/{old}/1.jsonl", Body=fresh)
    assert run("undeploy", "colours", "--artifacts").exit_code == 0
    gone = ["capture", "s3://kept/all/colours", "--output", "captured"]
    assert run(*gone, "--since", "24h").exit_code == 0
    assert len((folder / "answers.jsonl").read_text().splitlines()) == len(rows)
    assert run(*gone).exit_code == 0
    assert len((folder / "answers.jsonl").read_text().splitlines()) == len(rows) + 1
    assert len(list((folder / "images").iterdir())) == len(rows) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no endpoint 'nowhere' in eu-west-1"),
        (["plain"], "Endpoint 'plain' captures nothing; it has to be made so"),
        (["s3://nowhere/x"], "There is no bucket 'nowhere'"),
        (
            ["s3://kept/x"],
            "There is nothing in s3://kept/x/. SageMaker writes what it captures some",
        ),
        (["plain", "--since", "soon"], "--since takes a time such as 45m, 8h or 2d"),
    ],
)
def test_where_there_is_nothing_it_is_said(
    account: Any, model: str, arguments: list[str], message: str
) -> None:
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    account.client("s3").create_bucket(Bucket="kept", CreateBucketConfiguration=place)
    if arguments == ["plain"]:
        assert run("deploy", model, "--no-preflight", "--name", "plain").exit_code == 0
    done = run("capture", *arguments, "--output", "captured")
    assert done.exit_code in (1, 2)
    assert message in said(done)
    assert not Path("captured").exists()
