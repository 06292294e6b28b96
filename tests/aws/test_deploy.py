"""Deploying against the stand-in: the endpoint is served by a real scoring server."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.cli
import mlflow.sagemaker
import pytest
from click.testing import CliRunner, Result

from visiontuner.aws import endpoint
from visiontuner.aws.endpoint import Endpoint, Parts, delete_endpoint, endpoint_name, roll_back
from visiontuner.cli.main import main
from visiontuner.errors import ServingError
from visiontuner.io.download import extract
from visiontuner.model.classifier import Classifier
from visiontuner.serving.preflight import PreflightReport
from visiontuner.text import next_command
from visiontuner.workflow.deploy import DeployOptions, deploy, plan_deployment
from visiontuner.workflow.promote import model_folder

NOTHING: dict[str, list[str]] = {"endpoints": [], "configs": [], "models": [], "objects": []}
QUICKER = 20


def test_models_in_other_scripts_get_endpoints_of_their_own() -> None:
    names = [endpoint_name(model) for model in ("犬", "猫", "Größe", "Grüße", "x" * 70 + "é")]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", name) for name in names)
    assert endpoint_name("My dogs") == "My-dogs"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    """What a user sees of a failure."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.mark.slow
def test_the_printed_mlflow_command_makes_an_endpoint_that_answers_as_the_classifier(
    account: Any,
    model: str,
    colour_classifier: Path,
    make_image: Callable[..., bytes],
    photographs: list[bytes],
    tmp_path: Path,
) -> None:
    planned = run("deploy", model, "--dry-run", "--name", "first", "--ttl", "8h")
    assert planned.exit_code == 0, planned.output
    assert account.holds() == NOTHING
    (bucket,) = re.findall(
        r"^# First: aws s3 mb s3://(\S+) --region eu-west-1$", planned.stdout, re.M
    )
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    account.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration=place)
    # As from a shell: the command as it is, with this environment's programs.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        planned.stdout, shell=True, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    images = {f"{name}.png": make_image(name) for name in ("red", "green", "blue")}
    images |= {f"photo{number}.jpg": content for number, content in enumerate(photographs)}
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    own = Classifier.load(colour_classifier, threads=1)
    expected = own.probabilities(list(images.values()))
    asked = run("query", "first", "--format", "json", *images)
    assert asked.exit_code == 0, asked.output
    rows = [json.loads(line) for line in asked.stdout.splitlines()]
    assert [row["label"] for row in rows[:3]] == ["red", "green", "blue"]
    for answered in (rows, _ask_with_boto3(account, "first", list(images.values()))):
        got = [{c["label"]: c["probability"] for c in row["top_k"]} for row in answered]
        for found, probabilities in zip(got, expected, strict=True):
            assert [found[n] for n in own.class_names] == pytest.approx(probabilities, abs=1e-5)
    listed = json.loads(run("endpoints", "--format", "json").stdout)
    assert [(e["name"], e["model"], e["ttl_hours"]) for e in listed] == [("first", model, 8.0)]
    lineage = run("lineage", "endpoint:first", "--json")
    assert lineage.exit_code == 0, lineage.output
    traced = json.loads(lineage.stdout)
    assert traced["model"]["uri"] == f"models:/{model}"
    assert traced["trial"]["trial_id"] == "t0001"
    assert traced["data"]["digest"] == "d1"
    gone = run("undeploy", "first", "--artifacts")
    assert gone.exit_code == 0, gone.output
    assert account.holds() == NOTHING


def test_a_profile_with_a_second_factor_asks_for_one_code(
    account: Any, model: str, tmp_path: Path
) -> None:
    role = account.put_role("team", service="ec2.amazonaws.com")
    factor = "mfa_serial = arn:aws:iam::123456789012:mfa/me"
    config = f"[profile team]\nrole_arn = {role}\n{factor}\nsource_profile = base\n"
    (tmp_path / "config").write_text(f"{config}[profile base]\nregion = eu-west-1\n")
    keys = "aws_access_key_id = testing\naws_secret_access_key = testing\n"
    (tmp_path / "credentials").write_text(f"[base]\n{keys}")
    own = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    environment = os.environ | own | {"AWS_PROFILE": "team"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del environment[name]
    command = ["deploy", model, "--no-preflight", "--name", "first", "--role", "endpoints"]
    done = subprocess.run(
        [sys.executable, "-m", "visiontuner", *command],
        env=environment,
        input="123456\n",  # there is no second one
        start_new_session=True,  # no terminal to ask at
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("Enter MFA code") == 1


def test_an_update_of_an_autoscaled_endpoint_keeps_its_variant_and_its_instances(
    account: Any, model: str
) -> None:
    _deploy(model, "--name", "first")
    sagemaker = account.client("sagemaker")

    def variant() -> dict[str, Any]:
        described = sagemaker.describe_endpoint(EndpointName="first")
        (only,) = described["ProductionVariants"]
        return dict(only)

    name = variant()["VariantName"]
    account.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="sagemaker",
        ResourceId=f"endpoint/first/variant/{name}",
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        MinCapacity=1,
        MaxCapacity=4,
    )
    sagemaker.update_endpoint_weights_and_capacities(
        EndpointName="first",
        DesiredWeightsAndCapacities=[{"VariantName": name, "DesiredInstanceCount": 3}],
    )
    done = run("update", "first", model, "--no-preflight")
    assert done.exit_code == 0, done.output
    assert (variant()["VariantName"], variant()["CurrentInstanceCount"]) == (name, 3)


def test_a_bucket_of_our_name_that_another_account_holds_gets_no_model(
    account: Any, model: str
) -> None:
    bucket = "mlflow-sagemaker-eu-west-1-123456789012"
    s3 = account.client("s3")
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration=place)
    aws, plan = plan_deployment(model, DeployOptions(name="first"))
    s3.delete_bucket(Bucket=bucket)
    account.take_bucket(bucket)
    with pytest.raises(ServingError, match=r"AccessDenied|Forbidden|403"):
        deploy(aws, plan, preflight=None, note=lambda _: None)
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)
    assert f"The bucket '{bucket}' cannot be used (403)" in said(run("deploy", model, "--dry-run"))


def _ask_with_boto3(account: Any, name: str, images: list[bytes]) -> list[dict[str, Any]]:
    runtime = account.client("sagemaker-runtime")
    rows: list[dict[str, Any]] = []
    for start in range(0, len(images), 16):
        some = images[start : start + 16]
        data = [[base64.b64encode(content).decode()] for content in some]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": data}})
        answer = runtime.invoke_endpoint(
            EndpointName=name, ContentType="application/json", Body=body
        )
        rows += json.loads(answer["Body"].read())["predictions"]
    return rows


def test_an_endpoint_of_another_region_and_account_is_traced(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting = ["--assume-role", account.put_role("looker", service="ec2.amazonaws.com")]
    _deploy(model)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert "no endpoint 'colours' in us-east-1" in said(run("lineage", "endpoint:colours"))
    traced = run("lineage", "endpoint:colours", "--region", "eu-west-1", "--json", *acting)
    assert traced.exit_code == 0, traced.output
    assert json.loads(traced.stdout)["model"]["uri"] == f"models:/{model}"


@pytest.mark.slow
@pytest.mark.parametrize("tagged", [True, False], ids=["as-printed", "without-tags"])
def test_what_serves_is_known_after_mlflows_own_update(
    account: Any,
    model: str,
    registered: Callable[..., str],
    tagged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _deploy(model)
    newer = registered().removeprefix("models:/")
    planned = run("update", "colours", newer, "--dry-run")
    assert planned.exit_code == 0, planned.output
    words = shlex.split(planned.stdout.replace("\\\n", ""))
    if not tagged:
        at = next(i for i, word in enumerate(words) if word.startswith("tags="))
        del words[at - 1 : at + 1]
    # MLflow looks every 5 s, and at an update not for 20 s: a quicker clock for it alone.
    quick = SimpleNamespace(
        time=lambda: time.time() * QUICKER, sleep=lambda seconds: time.sleep(seconds / QUICKER)
    )
    monkeypatch.setattr(mlflow.sagemaker, "time", quick)
    assert words.pop(0) == "mlflow"
    done = CliRunner().invoke(mlflow.cli.cli, words)
    assert done.exit_code == 0, done.output
    (listed,) = json.loads(run("endpoints", "--format", "json").stdout)
    assert listed["model"] == newer
    traced = run("lineage", "endpoint:colours", "--json")
    assert json.loads(traced.stdout)["model"]["uri"] == f"models:/{newer}"
    gone = run("undeploy", "colours", "--artifacts")
    assert gone.exit_code == 0, gone.output
    assert account.holds() == NOTHING


@pytest.fixture
def damaged(colour_model: Path, tmp_path: Path) -> Path:
    """A model folder that no server can load."""
    folder = shutil.copytree(colour_model, tmp_path / "damaged")
    (folder / "artifacts/classifier/model.onnx").write_bytes(b"damaged")
    return folder


@pytest.fixture
def warmer(colour_model: Path, tmp_path: Path) -> Path:
    """A model folder that answers otherwise than its reference images say."""
    folder = shutil.copytree(colour_model, tmp_path / "warmer")
    _set_temperature(folder / "artifacts/classifier")
    return folder


def _set_temperature(classifier: Path) -> None:
    path = classifier / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 2.0}))


class Asking:
    """Asks an endpoint again and again while the block runs."""

    def __init__(self, account: Any, name: str, image: bytes) -> None:
        self.answers: list[float] = []
        self.failures: list[str] = []
        self._asked = (account, name, [image])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ended.is_set():
            try:
                self.answers.append(_ask_with_boto3(*self._asked)[0]["probability"])
            except Exception as error:
                self.failures.append(repr(error))
            time.sleep(0.05)

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.slow
def test_an_update_swaps_the_model_without_losing_a_request_and_a_bad_one_changes_nothing(
    account: Any,
    model: str,
    registered: Callable[..., str],
    damaged: Path,
    warmer: Path,
    colour_classifier: Path,
    make_image: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy.invalid:3128")
    _make_bucket(account, "kept")
    chosen = ["--instance-type", "ml.c5.large", "--env", "A=1", "--data-capture", "s3://kept/here"]
    made = run("deploy", model, "--no-preflight", "--name", "c", *chosen)
    assert made.exit_code == 0, made.output
    first = account.holds()
    assert [len(first[kind]) for kind in first] == [1, 1, 1, 1]
    container = account.client("sagemaker").describe_model(ModelName=first["models"][0])
    assert "secret" not in str(container)

    with Asking(account, "c", make_image("red")) as asking:
        broken = run("update", "c", str(damaged), "--no-preflight")
        assert broken.exit_code == 1
        assert "SageMaker rolled back" in said(broken)
        assert "model.onnx is damaged" in said(broken)
        assert account.holds() == first

        different = run("update", "c", str(warmer), "--no-preflight")
        assert different.exit_code == 1
        assert "answers the model's own images differently" in said(different)
        assert account.holds() == first
        before = asking.answers[-1]

        retrained = shutil.copytree(colour_classifier, tmp_path / "retrained" / "classifier")
        _set_temperature(retrained)
        _repackage(retrained)
        version = registered(retrained).removeprefix("models:/")
        updated = run("update", "c", version, "--no-preflight")
        assert updated.exit_code == 0, updated.output
        while asking.answers[-1] == before:
            time.sleep(0.05)
    assert asking.failures == []

    second = account.holds()
    assert [len(second[kind]) for kind in second] == [1, 1, 1, 1]
    assert not set(first["configs"] + first["models"] + first["objects"]) & set(
        second["configs"] + second["models"] + second["objects"]
    )
    (listed,) = json.loads(run("endpoints", "--format", "json").stdout)
    assert listed["model"] == version
    config = account.client("sagemaker").describe_endpoint_config(
        EndpointConfigName=second["configs"][0]
    )
    assert config["ProductionVariants"][0]["InstanceType"] == "ml.c5.large"
    assert config["DataCaptureConfig"]["DestinationS3Uri"] == "s3://kept/here"
    container = account.client("sagemaker").describe_model(ModelName=second["models"][0])
    assert container["PrimaryContainer"]["Environment"]["A"] == "1"
    kept = run("undeploy", "c")
    assert (
        f"Kept s3://mlflow-sagemaker-eu-west-1-123456789012/{second['objects'][0]}" in kept.stdout
    )
    assert account.holds() == NOTHING | {"objects": second["objects"]}


def _make_bucket(account: Any, name: str) -> None:
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    account.client("s3").create_bucket(Bucket=name, CreateBucketConfiguration=place)


def _deploy(model: str, *arguments: str) -> None:
    made = run("deploy", model, "--no-preflight", *arguments)
    assert made.exit_code == 0, made.output


def test_an_update_stays_in_the_bucket_and_leaves_nothing_in_one_that_it_is_moved_from(
    account: Any, model: str
) -> None:
    for bucket in ("mine", "other"):
        place = {"LocationConstraint": "eu-west-1"}
        account.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration=place)
    _deploy(model, "--bucket", "mine")
    for arguments, bucket in ([], "mine"), (["--bucket", "other"], "other"):
        done = run("update", "colours", model, "--no-preflight", *arguments)
        assert done.exit_code == 0, done.output
        listed = account.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
        assert [entry["Key"] for entry in listed] == account.holds()["objects"]
    assert run("undeploy", "colours", "--artifacts").exit_code == 0
    assert account.holds() == NOTHING


def test_an_archive_that_was_kept_is_deleted_as_the_command_says(account: Any, model: str) -> None:
    _deploy(model, "--name", "kept")
    kept = run("undeploy", "kept")
    assert kept.exit_code == 0, kept.output
    assert account.holds() == NOTHING | {"objects": account.holds()["objects"]}
    (line,) = [line for line in kept.stdout.splitlines() if line.startswith("Kept s3://")]
    command = line.partition("this deletes it too: ")[2]
    deleted = run(*shlex.split(command)[1:])
    assert deleted.exit_code == 0, deleted.output
    assert account.holds() == NOTHING
    again = run(*shlex.split(command)[1:])
    assert again.exit_code == 2
    assert "There is no endpoint 'kept' in eu-west-1" in said(again)


def test_an_endpoint_whose_configuration_was_deleted_is_taken_away_but_not_updated(
    account: Any, model: str
) -> None:
    _deploy(model)
    (config,) = account.holds()["configs"]
    account.client("sagemaker").delete_endpoint_config(EndpointConfigName=config)
    updated = run("update", "colours", model, "--no-preflight")
    assert updated.exit_code == 2
    assert f"{config} was deleted, which says what it runs on" in said(updated)
    gone = run("undeploy", "colours", "--artifacts")
    assert gone.exit_code == 0, gone.output
    assert account.holds() == NOTHING


def test_what_a_deleted_endpoint_left_is_taken_away(account: Any, model: str) -> None:
    # Made by MLflow for another program's endpoint of this name: it has none of our tags.
    other = f"colours-model-{'0' * 20}"
    container = {"Image": "x", "ModelDataUrl": f"s3://x/{other}/model.tar.gz"}
    account.client("sagemaker").create_model(
        ModelName=other, PrimaryContainer=container, ExecutionRoleArn="arn:aws:iam::1:role/x"
    )
    _deploy(model)
    account.client("sagemaker").delete_endpoint(EndpointName="colours")
    gone = run("undeploy", "colours", "--artifacts")
    assert gone.exit_code == 0, gone.output
    assert "The endpoint colours is gone already" in gone.stderr
    assert account.holds() == NOTHING | {"models": [other]}


def test_ctrl_c_after_the_endpoint_is_gone_can_be_made_good(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    _deploy(model)
    with monkeypatch.context() as pressing:
        pressing.setattr(Parts, "delete", press)
        stopped = run("undeploy", "colours", "--artifacts")
    assert stopped.exit_code == 130
    assert account.holds()["endpoints"] == []
    command = stopped.stderr.partition("this goes on: ")[2].splitlines()[0]
    assert command == "visiontuner undeploy colours --artifacts --region eu-west-1"
    gone = run(*command.split()[1:])
    assert gone.exit_code == 0, gone.output
    assert account.holds() == NOTHING


def test_a_role_that_is_taken_on_makes_a_serverless_endpoint_and_takes_it_away(
    account: Any, model: str, make_image: Callable[..., bytes]
) -> None:
    acting = ["--assume-role", account.put_role("deployer", service="ec2.amazonaws.com")]
    printed = run("deploy", model, "--dry-run", *acting)
    assert f"sagemaker:/eu-west-1/{acting[1]} " in printed.stdout
    assert "assumed-role/deployer/visiontuner" in printed.stderr
    made = run("deploy", model, "--no-preflight", "--serverless", "2048", *acting)
    assert made.exit_code == 0, made.output
    flags = f"--region eu-west-1 {' '.join(acting)}"
    assert f"Ask it:    visiontuner query colours IMAGE {flags}\n" in made.stdout
    assert f"Remove it: visiontuner undeploy colours {flags}\n" in made.stdout
    taken = run("deploy", model, "--no-preflight", *acting)
    update = next_command("update", "colours", flags=f" {flags}")
    assert f"`{update}` swaps its model" in said(taken)
    assert _variant(account)["ServerlessConfig"] == {"MemorySizeInMB": 2048, "MaxConcurrency": 5}
    assert _ask_with_boto3(account, "colours", [make_image("blue")])[0]["label"] == "blue"
    updated = run("update", "colours", model, "--no-preflight", *acting)
    assert updated.exit_code == 0, updated.output
    assert _variant(account)["ServerlessConfig"]["MemorySizeInMB"] == 2048
    listed = run("endpoints", *acting)
    assert "colours" in listed.stdout
    Path("red.png").write_bytes(make_image("red"))
    asked = run("query", "colours", "red.png", "--format", "json", *acting)
    assert json.loads(asked.stdout)["label"] == "red"
    gone = run("undeploy", "colours", "--artifacts", *acting)
    assert gone.exit_code == 0, gone.output
    assert account.holds() == NOTHING


def _variant(account: Any) -> dict[str, Any]:
    (name,) = account.holds()["configs"]
    config = account.client("sagemaker").describe_endpoint_config(EndpointConfigName=name)
    variant: dict[str, Any] = config["ProductionVariants"][0]
    return variant


def test_a_role_that_may_not_be_taken_on_is_said_in_one_line(account: Any, model: str) -> None:
    done = run("deploy", model, "--assume-role", "no-arn", "--no-preflight")
    assert done.exit_code in (1, 2)
    assert "no-arn" in said(done) or "RoleArn" in said(done)
    assert account.holds() == NOTHING


def test_an_endpoint_in_a_vpc_with_a_key_tags_and_patience_keeps_them_over_an_update(
    account: Any, model: str
) -> None:
    _make_bucket(account, "kept")
    chosen = [
        "--subnets", "subnet-1,subnet-2", "--security-groups", "sg-1", "--kms-key", "key-1",
        "--startup-timeout", "600", "--tag", "team=vision", "--env", "MY_TOKEN=aSecretToken",
        "--data-capture", "s3://kept/here",
    ]  # fmt: skip
    planned = run("deploy", model, "--dry-run", *chosen)
    assert "no words for --kms-key, --startup-timeout" in planned.stdout
    assert '"MY_TOKEN": "***"' in planned.stdout
    assert "aSecretToken" not in planned.output
    assert "network    subnet-1, subnet-2 (sg-1)" in planned.stderr
    made = run("deploy", model, "--no-preflight", *chosen)
    assert made.exit_code == 0, made.output
    sagemaker, network = account.client("sagemaker"), ["subnet-1", "subnet-2"]
    arn = sagemaker.describe_endpoint(EndpointName="colours")["EndpointArn"]
    tags = {tag["Key"]: tag["Value"] for tag in sagemaker.list_tags(ResourceArn=arn)["Tags"]}
    assert tags["team"] == "vision"
    for update in (False, True):
        if update:
            done = run("update", "colours", model, "--no-preflight")
            assert done.exit_code == 0, done.output
        held = account.holds()
        served = sagemaker.describe_model(ModelName=held["models"][0])
        assert served["VpcConfig"] == {"Subnets": network, "SecurityGroupIds": ["sg-1"]}
        assert served["PrimaryContainer"]["Environment"]["MY_TOKEN"] == "aSecretToken"
        config = sagemaker.describe_endpoint_config(EndpointConfigName=held["configs"][0])
        assert config["KmsKeyId"] == "key-1"
        assert config["DataCaptureConfig"]["KmsKeyId"] == "key-1"
        assert _variant(account)["ContainerStartupHealthCheckTimeoutInSeconds"] == 600
        archive = account.client("s3").head_object(
            Bucket="mlflow-sagemaker-eu-west-1-123456789012", Key=held["objects"][0]
        )
        assert archive["SSEKMSKeyId"] == "key-1"
    # Of a machine with a disk of its own SageMaker takes no key.
    own_disk = run(
        "update", "colours", model, "--no-preflight", "--instance-type", "ml.g4dn.xlarge"
    )
    assert own_disk.exit_code == 0, own_disk.output
    (name,) = account.holds()["configs"]
    assert "KmsKeyId" not in sagemaker.describe_endpoint_config(EndpointConfigName=name)


def test_captured_data_go_where_they_are_wanted(account: Any, model: str) -> None:
    _make_bucket(account, "kept")
    wanted = ["--data-capture", "s3://kept/here"]
    made = run("deploy", model, "--no-preflight", *wanted)
    assert made.exit_code == 0, made.output
    assert "captures   requests in s3://kept/here" in made.stderr
    (name,) = account.holds()["configs"]
    config = account.client("sagemaker").describe_endpoint_config(EndpointConfigName=name)
    kept = config["DataCaptureConfig"]
    assert kept["EnableCapture"] is True
    assert kept["InitialSamplingPercentage"] == 100
    assert kept["DestinationS3Uri"] == "s3://kept/here"
    assert [one["CaptureMode"] for one in kept["CaptureOptions"]] == ["Input", "Output"]
    refused = run("deploy", model, "--name", "two", "--serverless", "1024", *wanted)
    assert "A serverless endpoint captures no data" in said(refused)
    assert run("undeploy", "colours", "--artifacts").exit_code == 0
    assert account.holds() == NOTHING


def _repackage(classifier: Path) -> None:
    path = classifier / "reference.json"
    reference = json.loads(path.read_text())
    loaded = Classifier.load(classifier, threads=1)
    for image in reference["images"]:
        content = base64.b64decode(image["image"])
        image["probabilities"] = loaded.probabilities([content])[0].tolist()
    path.write_text(json.dumps(reference))


def test_a_model_that_cannot_be_served_is_not_deployed(account: Any, damaged: Path) -> None:
    done = run("deploy", str(damaged), "--env-manager", "local")
    assert done.exit_code == 1
    assert "model.onnx is damaged" in said(done)
    assert account.holds() == NOTHING


def test_a_serverless_endpoint_that_is_too_small_for_the_model_is_not_deployed(
    account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1.5 x 700 MB and 500 MB for the system: 1,550 MB.
    small = PreflightReport(
        model=model,
        checks=(),
        p50_ms=1,
        p95_ms=1,
        p99_ms=1,
        images_per_second=100,
        memory_mb=700,
        recommendation="Serverless with 2048 MB.",
    )
    monkeypatch.setattr("visiontuner.workflow.deploy.run_preflight", lambda *_, **__: small)
    arguments = ["--env-manager", "local", "--serverless"]
    refused = run("deploy", model, *arguments, "1024")
    assert refused.exit_code == 1
    assert "serverless with 1024 MB is too small: the server needs 1,340 MB" in said(refused)
    assert "Serverless with 2048 MB" in said(refused)
    assert account.holds() == NOTHING
    fits = run("deploy", model, *arguments, "2048")
    assert fits.exit_code == 0, fits.output


def test_an_endpoint_that_fails_is_taken_away_and_its_log_is_shown(
    account: Any, model: str
) -> None:
    done = run("deploy", model, "--no-preflight", "--env", "STAND_IN_HANG=0.1")
    assert done.exit_code == 1
    assert "did not pass the ping health check" in said(done)
    assert "Its log ends with: It hangs." in said(done)
    assert "Usually the server did not start in time" in said(done)
    assert account.holds() == NOTHING


class Hanging:
    """The flag for an endpoint that never answers; it fails when `let_go` is called.

    `undoing` is set when what was begun is being undone, and waits for the endpoint.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.flag = f"--env=STAND_IN_HANG={file}"
        self.undoing = threading.Event()

    def let_go(self) -> None:
        self._file.touch()

    def delete(self, aws: Any, name: str, note: Callable[[str], None]) -> None:
        def told(text: str) -> None:
            note(text)
            self.undoing.set()

        delete_endpoint(aws, name, told)

    def roll_back(self, *arguments: Any) -> None:
        self.undoing.set()
        roll_back(*arguments)


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    hanging = Hanging(tmp_path / "let go")
    monkeypatch.setattr(endpoint, "delete_endpoint", hanging.delete)
    monkeypatch.setattr(endpoint, "roll_back", hanging.roll_back)
    yield hanging
    hanging.let_go()


def test_an_endpoint_that_never_becomes_healthy_is_taken_away(
    account: Any, model: str, hanging: Hanging
) -> None:
    with pressing_ctrl_c(account, hanging, times=0):
        done = run("deploy", model, "--no-preflight", hanging.flag, "--timeout-seconds", "1")
    assert done.exit_code == 1
    assert "is not in service after 1 s" in said(done)
    assert account.holds() == NOTHING


@contextmanager
def pressing_ctrl_c(
    account: Any, hanging: Hanging, *, times: int = 1, state: str = "Creating"
) -> Iterator[None]:
    """When there is an endpoint in this state, and then when it waits for its end.

    After two times it hangs until the test has ended, else it fails then.
    """

    def press() -> None:
        while state not in _states(account):
            if ended.wait(0.05):
                return
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            hanging.undoing.wait()
        hanging.undoing.wait()
        if times < 2:
            hanging.let_go()

    ended = threading.Event()
    person = threading.Thread(target=press)
    person.start()
    try:
        yield
    finally:
        ended.set()
        hanging.undoing.set()
        person.join()


def _states(account: Any) -> list[str]:
    listed = account.client("sagemaker").list_endpoints()["Endpoints"]
    return [endpoint["EndpointStatus"] for endpoint in listed]


def test_ctrl_c_while_waiting_leaves_nothing(account: Any, model: str, hanging: Hanging) -> None:
    with pressing_ctrl_c(account, hanging):
        done = run("deploy", model, "--no-preflight", hanging.flag)
    assert done.exit_code == 130
    assert said(done) == "Error: Stopped."
    assert "SageMaker deletes no endpoint that is being created" in done.stderr
    assert account.holds() == NOTHING


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_left(
    account: Any, model: str, hanging: Hanging
) -> None:
    role = account.put_role("deployer", service="ec2.amazonaws.com")
    arguments = [hanging.flag, "--assume-role", role]
    with pressing_ctrl_c(account, hanging, times=2):
        done = run("deploy", model, "--no-preflight", *arguments)
    assert done.exit_code == 1
    assert "something may cost money" in said(done)
    acting_there = f"--region eu-west-1 --assume-role {role}"
    assert f"`visiontuner endpoints {acting_there}`" in said(done)
    assert f"`visiontuner undeploy colours --artifacts {acting_there}`" in said(done)
    assert account.holds()["endpoints"] == ["colours"]


def test_what_happens_to_an_endpoint_during_its_update_leaves_the_old_one_or_nothing(
    account: Any, model: str, hanging: Hanging
) -> None:
    made = run("deploy", model, "--no-preflight")
    assert made.exit_code == 0, made.output
    first = account.holds()
    with pressing_ctrl_c(account, hanging, state="Updating"):
        stopped = run("update", "colours", model, "--no-preflight", hanging.flag)
    assert stopped.exit_code == 130
    assert said(stopped) == "Error: Stopped."
    assert account.holds() == first
    deleted = run("update", "colours", model, "--no-preflight", "--env", "STAND_IN_VANISH=1")
    assert deleted.exit_code == 1
    assert "'colours' was deleted by someone meanwhile" in said(deleted)
    again = ("deploy", "MODEL", "--name", "colours")
    assert f"`{next_command(*again, flags=' --region eu-west-1')}` makes" in said(deleted)
    assert account.holds() == NOTHING


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--instance-type", "ml.p3.16xlarge"], 1, "ResourceLimitExceeded.*Service Quotas"),
        (["--role", "unpassable"], 1, "iam:PassRole.*docs/aws.md"),
        (["--env", "STAND_IN_VANISH=1"], 1, "deleted by someone meanwhile.*visiontuner deploy "),
    ],
)
def test_what_goes_wrong_on_the_way_leaves_nothing(
    account: Any, model: str, arguments: list[str], code: int, message: str
) -> None:
    account.put_role("unpassable")
    role = [] if "--role" in arguments else ["--role", "endpoints"]
    done = run("deploy", model, "--no-preflight", *role, *arguments)
    assert done.exit_code == code
    assert re.search(message, said(done)), said(done)
    assert account.holds() == NOTHING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--region", "eu-wst-1"], "no region 'eu-wst-1'. Nearest: eu-west-1"),
        (["--region", "us-east-1"], "There is no container image 123456789012.dkr.ecr.us-east-1"),
        (
            ["--image", "123456789012.dkr.ecr.us-east-1.amazonaws.com/mlflow-pyfunc:1"],
            "The container image is in us-east-1 and the endpoint would be in eu-west-1",
        ),
        (["--image", "python:3.11"], "is no container image in ECR"),
        (["--image", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/other:1"], "no container image"),
        (["--role", "nobody"], "no role 'nobody'"),
        (["--role", "trusts-others"], "SageMaker may not take on the role"),
        (["--bucket", "not-there"], "There is no bucket 'not-there'"),
        (["--bucket", "far-away"], "The bucket 'far-away' is in us-west-2, and SageMaker in eu-"),
        (["--name", "under_score"], "cannot be an endpoint's name"),
        (["--name", "a" * 36], "cannot be an endpoint's name"),
        (["--serverless", "1000"], "--serverless takes one of 1024"),
        (["--serverless", "much"], "--serverless takes a whole number"),
        (["--serverless", "2048", "--instances", "3"], "A serverless endpoint has no instances"),
        (
            ["--serverless", "2048", "--instance-type", "ml.c5.large"],
            "A serverless endpoint has no instances: leave --serverless out, or --instance-type",
        ),
        (["--instance-type", "nonsense"], "no instance type 'nonsense' for endpoints. Nearest: ml"),
        (["--instance-type", "ml.c5.lrge"], "Nearest: ml.c5.large"),
        (["--instance-type", "ml.m6g.large"], "ml.m6g.large has an ARM processor, and the serving"),
        (["--price", "nan"], "--price takes a number"),
        (["--ttl", "soon"], "--ttl takes a time such as 45m, 8h or 2d"),
        (["--env", "KEY"], "--env takes KEY=VALUE"),
        (["--env", "A-B=1"], "--env 'A-B': a name has letters, digits and _ only"),
        (["--tag", "aws:x=1"], "keys that begin with aws:"),
        (["--tag", "app_name=1"], "MLflow sets this tag itself"),
        (["--subnets", "subnet-1"], "A VPC needs both"),
        (["--subnets", "10.0.0.0/8", "--security-groups", "sg-1"], "--subnets takes up to 16"),
        (
            ["--serverless", "2048", "--subnets", "subnet-1", "--security-groups", "sg-1"],
            "A serverless endpoint has no VPC",
        ),
        (["--startup-timeout", "10"], "--startup-timeout takes a whole number from 60 to 3600"),
        (["--data-capture", "here"], "--data-capture takes s3://BUCKET/FOLDER"),
        (["--data-capture", "s3://not-there/x"], "There is no bucket 'not-there'"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    account: Any, model: str, arguments: list[str], message: str
) -> None:
    account.put_role("trusts-others", service="lambda.amazonaws.com")
    far = {"CreateBucketConfiguration": {"LocationConstraint": "us-west-2"}}
    account.client("s3", "us-west-2").create_bucket(Bucket="far-away", **far)
    done = run("deploy", model, *arguments)
    assert done.exit_code == 2
    assert message in said(done)
    assert account.holds() == NOTHING


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"architecture": "arm64"}, "for linux/arm64"),
        (
            {"media_type": "application/vnd.oci.image.manifest.v1+json"},
            "SageMaker refuses container images of type application/vnd.oci.image.manifest",
        ),
    ],
)
def test_an_image_that_sagemaker_cannot_run_is_refused(
    account: Any, model: str, image: dict[str, str], message: str
) -> None:
    url = account.put_image(tag="wrong", **image)
    done = run("deploy", model, "--image", url)
    assert done.exit_code == 2
    assert message in said(done)
    assert "docker buildx build --platform linux/amd64 --provenance=false" in said(done)


def test_more_instances_than_the_account_may_use_are_refused_beforehand(
    account: Any, model: str
) -> None:
    place = {"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    s3 = account.client("s3")
    s3.create_bucket(Bucket="directed-jobs", CreateBucketConfiguration=place)
    quotas = {"ml.m5.large for endpoint usage": 2, "ml.c5.large for endpoint usage": 0}
    s3.put_object(Bucket="directed-jobs", Key="quotas.json", Body=json.dumps(quotas).encode())
    assert run("deploy", model, "--dry-run", "--instances", "2").exit_code == 0
    told = "The account may use 2 of ml.m5.large for endpoint usage in eu-west-1, and 4 are asked"
    assert told in said(run("deploy", model, "--dry-run", "--autoscale", "1:4:300"))
    none = said(run("deploy", model, "--dry-run", "--instance-type", "ml.c5.large"))
    assert "may use 0 of ml.c5.large for endpoint usage in eu-west-1, and 1 is asked for" in none


def test_several_roles_have_to_be_chosen_from(account: Any, model: str) -> None:
    account.put_role("another")
    assert "may take on 2 roles: " in said(run("deploy", model, "--dry-run"))


@pytest.mark.usefixtures("account", "model")
@pytest.mark.parametrize(
    "arguments",
    [
        ["deploy", "colours"],
        ["update", "colours", "colours"],
        ["undeploy", "colours"],
        ["endpoints"],
        ["query", "colours", "red.png"],
        ["lineage", "endpoint:colours"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("missing", [True, False], ids=["none", "expired"])
def test_without_credentials_nothing_is_tried(
    make_image: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    missing: bool,
) -> None:
    Path("red.png").write_bytes(make_image("red"))
    if missing:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXPIRED000000000")
    done = run(*arguments)
    assert done.exit_code == 2
    if missing:
        assert "No usable AWS credentials" in said(done)
        assert "`aws configure`" in said(done)
    else:
        assert "AWS does not take these credentials" in said(done)
        assert "set new AWS_ACCESS_KEY_ID" in said(done)
        assert "AKIA" not in done.output


def test_secrets_appear_neither_in_what_is_made_nor_in_mlflow_nor_in_what_is_said(
    account: Any, registered: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIATESTING000000007",
        "AWS_SECRET_ACCESS_KEY": "aSecretAccessKey",
        "AWS_SESSION_TOKEN": "aSessionToken",
        "MLFLOW_TRACKING_PASSWORD": "aTrackingPassword",
        "https_proxy": "http://someone:aProxyPassword@proxy.invalid:3128",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    said = [
        run("deploy", model, "--dry-run"),
        run("deploy", model, "--no-preflight"),
        run("deploy", model, "--no-preflight", "--name", "two", "--env", "STAND_IN_HANG=0.1"),
        run("deploy", model, "--no-preflight", "--name", "three", "--region", "us-east-1"),
        run("update", "colours", model, "--no-preflight", "--env", "STAND_IN_HANG=0.1"),
        run("query", "nowhere", "nothing.png"),
        run("endpoints", "--format", "json"),
        run("lineage", "endpoint:colours"),
    ]
    assert [done.exit_code for done in said] == [0, 0, 1, 2, 1, 1, 0, 0]
    seen = [done.output.encode() for done in said] + [_everything(account, tmp_path)]
    store = Path(registered.tracking_uri.removeprefix("sqlite:///")).parent
    seen += [path.read_bytes() for path in store.rglob("*") if path.is_file()]
    for secret in (*secrets.values(), "aProxyPassword"):
        assert not [text for text in seen if secret.encode() in text], secret


def _everything(account: Any, folder: Path) -> bytes:
    """All that the stand-in holds of the endpoint `colours`."""
    sagemaker, s3, held = account.client("sagemaker"), account.client("s3"), account.holds()
    endpoint = sagemaker.describe_endpoint(EndpointName="colours")
    told = [
        endpoint,
        sagemaker.list_tags(ResourceArn=endpoint["EndpointArn"]),
        sagemaker.describe_model(ModelName=held["models"][0]),
        sagemaker.describe_endpoint_config(EndpointConfigName=held["configs"][0]),
    ]
    (key,) = held["objects"]
    s3.download_file("mlflow-sagemaker-eu-west-1-123456789012", key, str(folder / "model.tar.gz"))
    extract(folder / "model.tar.gz", folder / "model")
    files = [path for path in (folder / "model").rglob("*") if path.is_file()]
    return b"".join([repr(told).encode(), *(path.read_bytes() for path in files)])


@pytest.mark.usefixtures("account")
def test_without_a_region_nothing_is_tried(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    done = run("deploy", model)
    assert done.exit_code == 2
    assert "No AWS region: name one with --region" in said(done)


def test_a_name_that_is_taken_is_left_alone(account: Any, model: str) -> None:
    _make_endpoint(account, "taken")
    before = account.holds()
    done = run("deploy", model, "--no-preflight", "--name", "taken")
    assert done.exit_code == 2
    assert "'taken' already (Creating), which visiontuner did not deploy" in said(done)
    assert account.holds() == before


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["undeploy", "theirs", "--artifacts"], "delete-endpoint"),
        (["update", "theirs", "MODEL"], "update-endpoint --endpoint-config-name CONFIG"),
    ],
    ids=["undeploy", "update"],
)
def test_other_programs_endpoints_are_left_alone(
    account: Any, model: str, arguments: list[str], instead: str
) -> None:
    _make_endpoint(account, "theirs")
    before = account.holds()
    done = run(*(model if word == "MODEL" else word for word in arguments))
    assert done.exit_code == 2
    assert "Endpoint 'theirs' was not deployed by visiontuner: it is left alone" in said(done)
    assert f"`aws sagemaker {instead} --endpoint-name theirs --region eu-west-1`" in said(done)
    assert account.holds() == before


def _make_endpoint(account: Any, name: str) -> None:
    """Another program's endpoint; it stays in creation, so that undeploying it would wait."""
    sagemaker = account.client("sagemaker")
    container = {"Image": "x", "ModelDataUrl": "s3://x/y", "Environment": {"STAND_IN_HANG": "900"}}
    sagemaker.create_model(
        ModelName=name,
        PrimaryContainer=container,
        ExecutionRoleArn=account.put_role(f"role-of-{name}"),
    )
    variant = {"VariantName": "v", "ModelName": name, "InstanceType": "ml.m5.large"}
    sagemaker.create_endpoint_config(
        EndpointConfigName=name, ProductionVariants=[variant | {"InitialInstanceCount": 1}]
    )
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)


def test_other_programs_endpoints_are_not_listed(account: Any) -> None:
    _make_endpoint(account, "theirs")
    command = next_command("deploy", "MODEL", flags=" --region eu-west-1")
    assert run("endpoints").stdout == f"None. `{command}` makes one.\n"


def test_a_tag_that_cannot_be_read_hides_no_endpoint(account: Any) -> None:
    odd = {"visiontuner.ttl": "2 days", "visiontuner.price_per_hour": "cheap"}
    fine = {"visiontuner.ttl": "8h", "visiontuner.price_per_hour": "0.5"}
    for name, tags in ("odd", odd), ("fine", fine):
        _make_endpoint(account, name)
        arn = account.client("sagemaker").describe_endpoint(EndpointName=name)["EndpointArn"]
        told = [{"Key": k, "Value": v} for k, v in (tags | {"visiontuner.model": "m/1"}).items()]
        account.client("sagemaker").add_tags(ResourceArn=arn, Tags=told)
    listed = run("endpoints")
    assert listed.exit_code == 0, listed.output
    rows = {line.split()[0]: line.split()[1:] for line in listed.stdout.splitlines()}
    assert rows["odd"] == ["Creating", "m/1", "0.0", "h", "?", "?"]
    assert rows["fine"] == ["Creating", "m/1", "0.0", "h", "$0.00", "8", "h"]
    assert "odd has the tag visiontuner.ttl='2 days', which cannot be read" in listed.stderr
    objects = json.loads(run("endpoints", "--format", "json").stdout)
    assert {e["name"]: e["unreadable"] for e in objects} == {"odd": odd, "fine": {}}


@pytest.mark.parametrize(
    "arguments", [["update", "missing"], ["undeploy", "missing"]], ids=["update", "undeploy"]
)
def test_an_endpoint_that_is_not_there_is_a_mistake(
    account: Any, model: str, arguments: list[str]
) -> None:
    named = [model] if arguments[0] == "update" else []
    done = run(*arguments, *named)
    assert done.exit_code == 2
    assert "There is no endpoint 'missing' in eu-west-1" in said(done)
    assert account.holds() == NOTHING


@pytest.mark.usefixtures("account", "model", "newest_search")
def test_the_folder_of_the_images_does_not_hide_the_model_that_is_named_after_it() -> None:
    Path("colours/red").mkdir(parents=True)
    for named in ([], ["colours"]):
        planned = run("deploy", *named, "--dry-run")
        assert planned.exit_code == 0, planned.output
        assert "-m models:/colours/" in planned.stdout
    with model_folder("colours") as folder:  # as preflight and query find it
        assert (folder / "MLmodel").is_file()
    Path("others").mkdir()
    assert "The folder others holds no model. MLflow has no model 'others'" in said(
        run("deploy", "others", "--dry-run")
    )


@pytest.fixture
def challenger(registered: Any, model: str) -> Iterator[str]:
    """A version that is newer than the champion, which is `model`."""
    from mlflow import MlflowClient

    client = MlflowClient(registered.tracking_uri, registered.tracking_uri)
    client.set_registered_model_alias("colours", "champion", model.split("/")[1])
    yield registered().removeprefix("models:/")
    client.delete_registered_model_alias("colours", "champion")


@pytest.mark.usefixtures("account", "newest_search")
def test_a_name_means_the_champion_and_the_plan_says_which_version_is_newer(
    model: str, challenger: str
) -> None:
    for named in ([], ["colours"]):
        planned = run("deploy", *named, "--dry-run")
        assert f"-m models:/{model} " in planned.stdout
        assert f"models:/{model}, the champion; {challenger} is newer" in planned.stderr
    asked_for = run("deploy", challenger, "--dry-run")
    assert f"-m models:/{challenger} " in asked_for.stdout
    assert "newer" not in asked_for.stderr


@pytest.mark.usefixtures("account")
def test_an_update_without_a_model_stays_with_the_one_that_the_endpoint_serves(
    model: str, challenger: str
) -> None:
    _deploy(challenger, "--name", "c")
    planned = run("update", "c", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert f"-m models:/{model} " in planned.stdout
    assert f"{challenger} is newer" in planned.stderr


@pytest.mark.usefixtures("account")
def test_the_plan_says_what_it_costs_and_the_command_repeats_every_choice(model: str) -> None:
    done = run("deploy", model, "--dry-run", "--price", "0.115", "--instances", "2")
    assert "2 x ml.m5.large; $0.23 an hour, $166 a month if it stays" in done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert lines[0].startswith("mlflow deployments create -t sagemaker:/eu-west-1 --name colours")
    assert f"-m models:/{model}" in done.stdout
    unknown = run("deploy", model, "--dry-run")
    assert "its price is not known here; tell it with --price" in unknown.stderr
    elsewhere = run(
        "deploy", model, "--dry-run", "--serverless", "2048", "--env", "A=it's", "--ttl", "2d"
    )
    assert "paid by use" in elsewhere.stderr
    words = shlex.split(elsewhere.stdout)
    config = dict(word.split("=", 1) for word in words if "=" in word)
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "ORT_DISABLE_TELEMETRY": "1"}
    assert json.loads(config["env"]) == quiet | {"A": "it's"}
    assert json.loads(config["serverless_config"])["MemorySizeInMB"] == 2048
    tags = json.loads(config["tags"])
    assert {
        "visiontuner.model": model,
        "visiontuner.search_id": "s1",
        "visiontuner.data_digest": "d1",
        "visiontuner.ttl": "2d",
    }.items() <= tags.items()


def test_an_endpoint_that_outlived_its_time_is_said() -> None:
    endpoint = Endpoint(name="e", state="InService", model="m/1", age_hours=8.5, ttl_hours=8)
    assert endpoint.overdue
    assert not replace(endpoint, age_hours=7.5).overdue
    assert not replace(endpoint, ttl_hours=None).overdue
