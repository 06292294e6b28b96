import json
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from visiontuner.cli.serve import preflight
from visiontuner.errors import ClassifierError, ServingError
from visiontuner.serving.preflight import PreflightReport, recommend, run_preflight
from visiontuner.serving.server import ScoringServer, clean_environment, local_environment

pytestmark = pytest.mark.slow

CHECKS = [
    "ping",
    "reference images",
    "a bad row among good ones",
    "malformed requests",
    "payload",
    "large images",
    "latency",
    "memory",
]


@pytest.fixture
def copy(colour_model: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(colour_model, tmp_path / "model")


def change_json(path: Path, change: Any) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def our_servers() -> list[psutil.Process]:
    running = [
        child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE
    ]
    return [child for child in running if "uvicorn" in child.cmdline()]


@pytest.fixture(scope="module")
def report(colour_model: Path) -> PreflightReport:
    server = ScoringServer(colour_model, local_environment())
    return run_preflight(colour_model, server, name="colours", requests_measured=40)


def test_a_good_model_passes_and_is_measured(report: PreflightReport) -> None:
    failed = {check.name: check.detail for check in report.checks if check.status != "ok"}
    assert not failed
    assert [check.name for check in report.checks] == CHECKS
    assert 0 < report.p50_ms <= report.p95_ms <= report.p99_ms
    assert report.images_per_second > 0
    # A transparent image of 50 million pixels is held as RGBA and as RGB, one at a time.
    assert 400 < report.memory_mb < 800
    assert f"up to {report.memory_mb:,.0f} MB" in report.checks[CHECKS.index("large images")].detail
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_another_temperature_than_the_references_is_found(copy: Path) -> None:
    """What was packaged and what answers differ: the check that deployment relies on."""
    folder = copy / "artifacts" / "classifier"
    change_json(folder / "classifier.json", lambda raw: raw.update(temperature=1.01))
    before = our_servers()
    done = CliRunner().invoke(preflight, [str(copy), "--env-manager", "local"])
    assert done.exit_code == 1
    assert "FAIL  reference images" in done.stdout
    assert done.stdout.count("FAIL") == 1
    assert "would fail as an endpoint" in done.stdout
    assert "the code that came with it runs here" in done.stderr
    assert our_servers() == before


def test_a_model_that_cannot_be_loaded_is_said_in_one_line_and_leaves_no_server(
    copy: Path,
) -> None:
    (copy / "artifacts" / "classifier" / "model.onnx").write_bytes(b"damaged")
    before = our_servers()
    with pytest.raises(
        ServingError, match=r"ended while starting: .*model\.onnx is damaged"
    ) as said:
        run_preflight(copy, ScoringServer(copy, local_environment()), name="damaged")
    assert "\n" not in str(said.value)
    assert our_servers() == before


def test_a_server_that_is_not_ready_in_time_is_ended(colour_model: Path) -> None:
    before = our_servers()
    with (
        pytest.raises(ServingError, match=r"not ready after 0\.2 s"),
        ScoringServer(colour_model, local_environment(), ready_seconds=0.2),
    ):
        pass
    assert our_servers() == before


@pytest.mark.parametrize("missing", ["artifacts/classifier/reference.json", "artifacts"])
def test_a_model_without_reference_images_is_refused(copy: Path, missing: str) -> None:
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ClassifierError, match="no MLflow model of visiontuner"):
        run_preflight(copy, ScoringServer(copy, local_environment()), name="x")


def test_a_reference_without_probabilities_is_refused(copy: Path) -> None:
    path = copy / "artifacts" / "classifier" / "reference.json"
    change_json(path, lambda raw: raw["images"][0].pop("probabilities"))
    with pytest.raises(ClassifierError, match=r"cannot be used .* Package the classifier again"):
        run_preflight(copy, ScoringServer(copy, local_environment()), name="x")


def test_a_clean_environment_is_built_once_for_the_same_requirements(
    copy: Path, tmp_path: Path
) -> None:
    (copy / "requirements.txt").write_text("")
    first = clean_environment(copy, tmp_path / "cache")
    (first.python.parent / "mark").touch()
    again = clean_environment(copy, tmp_path / "cache")
    assert again.python == first.python
    assert (again.python.parent / "mark").exists()
    assert first.python != Path(sys.executable)
    (copy / "requirements.txt").write_text("# others\n")
    assert clean_environment(copy, tmp_path / "cache").python != first.python


def test_an_environment_that_was_not_finished_is_built_again(copy: Path, tmp_path: Path) -> None:
    (copy / "requirements.txt").write_text("this is no requirement ==\n")
    for _ in range(2):
        with pytest.raises(ServingError, match=r"cannot be installed: .*--env-manager local"):
            clean_environment(copy, tmp_path / "cache")


def test_a_folder_that_says_no_requirements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="does not say what it needs"):
        clean_environment(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("memory_mb", "instance", "serverless"),
    [
        # 1.2 times the memory and 500 MB: 1,100; 2,900; 6,500; 48,500 MB
        (500, "ml.c5.large", "serverless with 2048 MB"),
        (2_000, "ml.c5.large", "serverless with 3072 MB"),
        (5_000, "ml.m5.large", None),
        (40_000, "more than that has", None),
    ],
)
def test_the_smallest_instance_that_holds_the_server_is_recommended(
    memory_mb: float, instance: str, serverless: str | None
) -> None:
    text = recommend(memory_mb=memory_mb, images_per_second=50)
    assert instance in text
    assert ("serverless" in text) == (serverless is not None)
    assert serverless is None or serverless in text


@pytest.mark.slow
def test_the_pinned_requirements_are_enough_to_serve(colour_model: Path, tmp_path: Path) -> None:
    """Installs them from the package registry; they hold neither torch nor all of MLflow."""
    environment = clean_environment(colour_model, tmp_path / "cache")
    assert environment.size_mb is not None
    assert environment.size_mb < 450
    packages = {
        path.name for path in environment.python.parent.parent.glob("lib/*/site-packages/*")
    }
    assert not packages & {"torch", "ray", "sagemaker", "boto3", "visiontuner"}
    server = ScoringServer(colour_model, environment)
    report = run_preflight(colour_model, server, name="colours", requests_measured=8)
    assert report.passed, report.checks
