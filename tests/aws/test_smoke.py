"""`make aws-smoke` against the stand-in: deploys, asks, takes away, and refuses where it should."""

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.errors import ServingError

NOTHING: dict[str, list[str]] = {"endpoints": [], "configs": [], "models": [], "objects": []}


@pytest.fixture(scope="module")
def smoke(repository: Path) -> ModuleType:
    path = repository / "scripts" / "aws_smoke.py"
    specification = importlib.util.spec_from_file_location("aws_smoke", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["aws_smoke"] = module  # where its dataclasses look for their annotations
    specification.loader.exec_module(module)
    return module


def run(smoke: ModuleType, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(smoke.main, ["--no-preflight", *arguments], input=answer)


def test_it_deploys_asks_and_leaves_nothing(smoke: ModuleType, account: Any, model: str) -> None:
    done = run(smoke, model, "--price", "0.115", answer="y\n")
    assert done.exit_code == 0, done.output
    # 0.115 x (1800 + 900 + 3600) / 3600
    assert "It costs at most $0.20. Go on?" in done.stdout
    assert done.stdout.count("3 images answered; the first: red") == 2
    assert "nothing is left" in done.stdout
    assert account.holds() == NOTHING
    report = Path("aws-smoke-report.md").read_text()
    for step in ("deployed on ml.m5.large", "asked", "updated", "asked again", "taken away"):
        assert f"| {step} | " in report


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:sagemaker.train.configs has been moved")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:sagemaker")
def test_with_a_job_it_submits_follows_and_deploys_what_came_home(
    smoke: ModuleType,
    account: Any,
    directed: Any,
    packaged_search: Callable[[str], Path],
) -> None:
    # What a job's hosts do is tested in test_two_hosts.py.
    search = packaged_search("aws-smoke")
    threading.Thread(target=directed.direct_next, args=(search,), daemon=True).start()
    # 0.1 x (1800 + 300) / 3600 of the job, and 0.1 x 6300 / 3600 of the endpoint: $0.23.
    prices = ["--price", "0.1", "--training-price", "0.1"]
    done = run(smoke, "--job", "--yes", *prices, "--set", "training.epochs=1")
    assert done.exit_code == 0, done.output
    (job,) = account.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
    told = directed.describe(job["TrainingJobName"])
    assert told["ResourceConfig"]["InstanceType"] == "ml.m5.large"
    assert "runs on    1 x ml.m5.large; at most 30 min" in done.stdout
    assert "nothing is left" in done.stdout
    report = Path("aws-smoke-report.md").read_text()
    assert "| submitted on ml.m5.large | " in report
    assert "| taken away | " in report
    assert "123456789012" not in report
    assert account.holds()["endpoints"] == []


def test_what_fails_after_deploying_is_taken_away_too(
    smoke: ModuleType, account: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert account.holds()["endpoints"]
        raise ServingError("No answer.")

    monkeypatch.setattr(smoke, "ask", fail)
    done = run(smoke, model, "--price", "0.1", "--yes")
    assert done.exit_code == 1
    assert "Error: No answer." in done.stderr
    assert account.holds() == NOTHING


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "AWS does not say what the instance costs"),
        # 2 x (1800 + 900 + 3600) / 3600
        (["--price", "2"], "It could cost $3.50, more than --max-cost 0.25"),
        (["--gpu"], "--gpu is of the training job: add --job"),
        (["--price", "0.1", "--region", "nowhere"], "SageMaker has no region 'nowhere'"),
    ],
)
def test_it_refuses_before_anything_is_made(
    smoke: ModuleType, account: Any, model: str, arguments: list[str], said: str
) -> None:
    done = run(smoke, model, "--yes", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert account.holds() == NOTHING


def test_who_says_no_deploys_nothing(smoke: ModuleType, account: Any, model: str) -> None:
    done = run(smoke, model, "--price", "0.1", answer="n\n")
    assert done.exit_code == 1
    assert account.holds() == NOTHING


@pytest.mark.usefixtures("account")
def test_it_refuses_without_an_account(
    smoke: ModuleType, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    done = run(smoke, model, "--yes")
    assert done.exit_code == 2
    assert "No usable AWS credentials" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
