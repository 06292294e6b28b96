"""Coming home: jobs that a test directs, searches whose journals are written by hand."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from visiontuner.cli import main
from visiontuner.journal import FILE_NAME


@pytest.fixture
def jobs(
    directed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_database: Callable[[Path], str],
) -> Any:
    """The jobs of an account; MLflow is a database of this test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(tmp_path / "mlflow.db"))
    monkeypatch.chdir(tmp_path)
    return directed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result) -> str:
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


# Bringing home


def journal(*folders: Any) -> list[bytes]:
    return [(Path(folder) / FILE_NAME).read_bytes() for folder in folders]


def test_a_search_that_went_on_here_is_not_replaced_by_one_that_went_on_in_the_job(
    jobs: Any, new_search: Callable[..., Any], tmp_path: Path
) -> None:
    begun = new_search("begun")
    begun.begin()
    begun.trial(1)
    here = shutil.copytree(begun.folder, tmp_path / "searches/colours-1")
    begun.start(2)
    (here / FILE_NAME).write_bytes(begun.journal.path.read_bytes())
    begun.journal.close()
    there = new_search("there")
    there.begin()
    there.trial(1)
    there.trial(3)
    there.trial(4)
    there.finish()
    mine, jobs_own = journal(here, there.folder)
    assert len(mine) < len(jobs_own)
    job = jobs.place()
    jobs.keep_checkpoints(there.folder)
    jobs.direct(job, status="Stopped", seconds=1800)
    came = run("attach", job)
    assert journal(here) == [mine]
    assert f"{job}: Stopped. 3 trials were there; 1 x ml.g5.xlarge ran 30 min" in came.stdout
    assert "searches/colours-1 went on here, and the job went on without that" in came.stdout
    assert f"What the job did is in s3://{jobs.root}/checkpoints/search" in came.stdout
    apart = run("attach", job, "--output", "apart")
    assert apart.exit_code == 0, apart.output
    assert journal("apart") == [jobs_own]


def test_a_search_that_only_went_on_here_is_kept_and_that_is_said(
    jobs: Any, new_search: Callable[..., Any], tmp_path: Path
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    job = jobs.place()
    jobs.keep_checkpoints(search.folder)
    jobs.direct(job, status="Stopped", seconds=60)
    assert run("attach", job).exit_code == 130
    search.trial(2)
    search.finish()
    here = tmp_path / "searches/colours-1"
    shutil.copy(search.journal.path, here / FILE_NAME)
    kept = run("attach", job)
    assert kept.exit_code == 0, kept.output
    assert "searches/colours-1 went on here after that, and is kept as it is." in kept.stdout
    assert "Go on there" not in kept.stdout
    assert journal(here) == journal(search.folder)


def test_a_line_that_was_torn_on_its_way_home_does_not_keep_the_rest_out(
    jobs: Any, new_search: Callable[..., Any], tmp_path: Path
) -> None:
    search = new_search()
    search.begin()
    search.trial(1)
    job = jobs.place()
    jobs.keep_checkpoints(search.folder)
    jobs.direct(job, status="Stopped", seconds=60)
    run("attach", job)
    with (tmp_path / "searches/colours-1" / FILE_NAME).open("ab") as file:
        file.write(b'{"event": "trial_st')
    search.trial(2)
    search.finish()
    jobs.keep_checkpoints(search.folder)
    assert run("attach", job).exit_code == 0
    assert journal("searches/colours-1") == journal(search.folder)


# Stopping


def test_a_job_of_others_is_not_stopped(jobs: Any) -> None:
    jobs.place("their-language-model", Tags=[{"Key": "team", "Value": "language"}])
    refused = run("stop", "their-language-model")
    assert refused.exit_code == 2
    assert "their-language-model was not submitted by visiontuner, and runs on" in said(refused)
    assert jobs.describe("their-language-model")["TrainingJobStatus"] == "InProgress"
