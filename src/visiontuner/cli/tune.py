"""The command that searches: here, on a Ray cluster, or on SageMaker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from visiontuner.cli.cloud import JobCommand, job_flags, only_for_sagemaker, run_on_sagemaker
from visiontuner.cli.options import NOT_GIVEN, experiment_options, given_values, load_experiment
from visiontuner.cli.results import print_result
from visiontuner.errors import UserMistake

if TYPE_CHECKING:
    from visiontuner.experiment import Experiment


@click.command(cls=JobCommand)
@experiment_options
@click.option("--backbone", metavar="NAME", default="auto", help="See `visiontuner backbones`.")
@click.option("--trials", metavar="N", default="auto", help="How many configurations to try.")
@click.option("--algorithm", metavar="random|optuna|grid", default="auto", help="How to choose.")
@click.option(
    "--output",
    metavar="FOLDER",
    default="auto",
    help="The search folder. Default: searches/NAME-TIME.",
)
@click.option(
    "--resume",
    metavar="FOLDER|JOB",
    default="none",
    help="Go on with the search in a folder, perhaps with --set search.time_budget=…; with --on "
    "sagemaker with that of a training job, by its name. The new job has that one's options: name "
    "those that change; `off` leaves one out.",
)
@click.option(
    "--on",
    type=click.Choice(["local", "auto", "sagemaker"]),
    default="local",
    show_default=True,
    help="This machine, the Ray cluster it is in, or machines that SageMaker starts.",
)
@job_flags
def tune(
    experiment: str,
    data: str,
    overrides: tuple[str, ...],
    backbone: str,
    trials: str,
    algorithm: str,
    output: str,
    resume: str,
    on: str,
    **job: Any,
) -> None:
    """Search hyperparameters; every trial becomes an MLflow run, the best one a model.

    \b
    Examples:
      visiontuner tune
      visiontuner tune --data photos/ --backbone resnet50 --trials 32
      visiontuner tune --experiment experiments/dog_breeds.yaml --set training.epochs=5
      visiontuner tune --resume searches/digits-20261122-154100
      visiontuner tune --resume searches/digits-20261122-154100 --set search.time_budget=2h
      visiontuner tune --data s3://my-bucket/photos --on sagemaker --instances 4 --max-cost 20
    """
    if on != "sagemaker":
        only_for_sagemaker(job)
    flags = {
        "model.backbone": backbone,
        "search.trials": trials,
        "search.algorithm": algorithm,
    }
    given = [f"{key}={value}" for key, value in flags.items() if value not in NOT_GIVEN]
    if resume not in NOT_GIVEN:
        # A job's search may come home to another folder than the one of the job before.
        fixed = [data, *overrides] if on == "sagemaker" else [data, output]
        changed = [*given, *given_values(fixed)]
        if changed or experiment not in NOT_GIVEN:
            _refuse_changes_on_resume()
        chosen = None
    else:
        chosen = load_experiment(experiment, data, [*given, *given_values(overrides)])

    folder = None if output in NOT_GIVEN else Path(output)
    if on == "sagemaker":
        run_on_sagemaker(chosen, job, resume=None if chosen else resume, output=folder)
    else:
        _run_here(chosen, on=on, resume=resume, output=folder, overrides=given_values(overrides))


def _run_here(
    experiment: Experiment | None,
    *,
    on: str,
    resume: str,
    output: Path | None,
    overrides: list[str],
) -> None:
    from visiontuner.console import SearchConsole
    from visiontuner.workflow import resume_search, run_search

    console = SearchConsole()
    try:
        if experiment is None:
            result = resume_search(
                Path(resume),
                overrides=overrides,
                on=on,  # type: ignore[arg-type]
                observer=console,
            )
        else:
            result = run_search(experiment, output=output, on=on, observer=console)  # type: ignore[arg-type]
    finally:
        console.close()
    print_result(result, said=console.said)


def _refuse_changes_on_resume() -> None:
    raise UserMistake(
        "--resume goes on with the search as it was, but for --set search.time_budget=…; leave the "
        "other flags out, or start a new search with them."
    )
