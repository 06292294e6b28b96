"""The commands that train: tune, train, lr-find, prepare, sync, backbones, doctor."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from visiontuner.cli.cloud import JobCommand, job_flags, only_for_sagemaker, run_on_sagemaker
from visiontuner.cli.console import (
    SearchConsole,
    TrainingConsole,
    make_console,
    print_artifacts,
    print_checks,
    print_dataset,
    print_recommendations,
    print_result,
)
from visiontuner.cli.options import (
    FOLDER,
    TEXT,
    Given,
    OneLineErrors,
    as_overrides,
    experiment_options,
    load_experiment,
    number,
    overrides_of_networks,
    read_raw,
)
from visiontuner.errors import UserMistake
from visiontuner.experiment.schema import Experiment
from visiontuner.journal import newest_search
from visiontuner.paths import cache_folder, tracking_uri
from visiontuner.text import next_command
from visiontuner.workflow.doctor import run_checks
from visiontuner.workflow.prepare import prepare as look
from visiontuner.workflow.train import find_origin, one_training, resume_training
from visiontuner.workflow.train import train as run
from visiontuner.workflow.tune import (
    EarlierSearch,
    experiment_of,
    find_search,
    resume_search,
    run_search,
)

if TYPE_CHECKING:
    from visiontuner.experiment.schema import Domain
    from visiontuner.workflow.lr_find import FoundLearningRate
    from visiontuner.workflow.run import SearchResult
    from visiontuner.workflow.train import Origin


# The experiment of one training: a file's, or all of the trial's that it begins from.


def choose_training(
    experiment: str | None, data: str | None, overrides: Sequence[str], origin: str | None
) -> tuple[Experiment, Origin | None]:
    """What `experiment_options` and `--from` say together, checked.

    With both, the file says which images and which network, and the origin only its values.
    Without a file all is the origin's; other images make another model of it, with their name.
    """

    raw, where = read_raw(experiment, data)
    own, other_images = experiment is not None, data is not None
    found = None
    if origin is not None:
        named = own or other_images
        found = find_origin(origin, name=Experiment.parse(raw, where=where).name if named else None)
        if not own:
            images = {"data": raw["data"], "name": None} if other_images else {}
            raw, where = {**found.experiment, **images}, origin
    return one_training(raw, overrides, found, where=where), found


# The experiment of a search: a file's, or that of the search that it begins with.


def choose_search(
    experiment: str | None, data: str | None, overrides: Sequence[str], origin: Path | None
) -> tuple[Experiment, EarlierSearch | None]:
    """What `experiment_options` and `--from` say together, checked.

    A file says all; without one all is the earlier search's, but for images that `--data` names.
    """
    earlier = None if origin is None else find_search(origin)
    if earlier is None or experiment is not None:
        return load_experiment(experiment, data, overrides), earlier
    images = None if data is None else {"source": data}
    return experiment_of(earlier, images, overrides), earlier


# Commands around a search: prepare, sync, backbones, doctor.


@click.command(cls=OneLineErrors)
@experiment_options
@click.option(
    "--upload",
    metavar="s3://BUCKET/FOLDER",
    type=TEXT,
    help="Bring the images there, as far as they are not there yet.",
)
@click.option(
    "--all", "list_all", is_flag=True, help="List every file with a fault, not the first ten."
)
def prepare(
    experiment: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    upload: str | None,
    list_all: bool,
) -> None:
    """Look at the images: how many of which class, and what is wrong with them.

    \b
    Examples:
      visiontuner prepare --data photos/
      visiontuner prepare --data photos/ --all
      visiontuner prepare --experiment experiments/flowers.yaml
      visiontuner prepare --data photos/ --upload s3://my-bucket/photos
    """
    chosen = load_experiment(experiment, data, overrides)

    console = SearchConsole()
    try:
        prepared = look(chosen, upload=upload, observer=console)
    finally:
        console.close()
    print_dataset(make_console(), prepared.summary, prepared.findings, list_all=list_all)
    moved = prepared.uploaded
    if moved is not None:
        others = f" {moved.others:,} others there are not here." if moved.others else ""
        click.echo(
            f"Uploaded {moved.files:,} files ({moved.bytes / 1e6:,.1f} MB) to {upload}; "
            f"{moved.skipped:,} were there already.{others}"
        )


@click.command(cls=OneLineErrors)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
def sync(folder: Path | None) -> None:
    """Write a search into MLflow, late or elsewhere; the newest one if none is named.

    Runs, figures, model and registration: whatever MLFLOW_TRACKING_URI does not hold yet.
    Repeating it changes nothing.

    \b
    Examples:
      visiontuner sync
      MLFLOW_TRACKING_URI=https://mlflow.example.org visiontuner sync searches/digits-20261122-1541
    """
    from visiontuner.workflow.sync import sync_search

    console = SearchConsole()
    try:
        result = sync_search(folder or newest_search(), observer=console)
    finally:
        console.close()
    click.echo(f"{result.folder}: {len(result.record.trials)} trials are in {result.tracking_uri}.")
    if result.model:
        click.echo(f"The best one is registered as {result.model}.")
    else:
        verb = "train" if result.record.is_training else "tune"
        command = next_command(verb, "--resume", result.folder)
        click.echo(f"It has no classifier yet; `{command}` makes one.")


@click.command(cls=OneLineErrors)
@click.argument("contains", default="")
@click.option("--recommend", is_flag=True, help="A short table of those worth trying first.")
@click.option(
    "--data",
    metavar="FOLDER|ARCHIVE|S3-ADDRESS",
    type=TEXT,
    help="With --recommend: measure what a pass over these images takes here.",
)
def backbones(contains: str, recommend: bool, data: str | None) -> None:
    """List pretrained networks whose name contains a text.

    \b
    Examples:
      visiontuner backbones resnet
      visiontuner backbones timm:convnext
      visiontuner backbones --recommend --data photos/
    """
    if recommend:
        if contains:
            raise UserMistake(
                "--recommend lists the networks worth trying first; leave out "
                f"{contains!r}, or leave out --recommend."
            )
        _print_recommended(data)
        return
    if data is not None:
        raise UserMistake("--data is for --recommend: visiontuner backbones --recommend --data …")
    from visiontuner.model.backbones import list_backbones

    found = list_backbones(contains)
    if not found:
        raise UserMistake(
            f"No backbone's name contains {contains!r}. All: `visiontuner backbones`."
        )
    for info in found:
        size = f"{info.parameters / 1e6:8.1f} M" if info.parameters else " " * 10
        here = ", its weights are installed" if info.source == "bundled" else ""
        click.echo(f"{info.name:<44} {size}  {info.source}{here}")
    click.echo(
        f"{len(found)} networks; use one as --backbone NAME. The weights of torchvision's and "
        "timm's are downloaded once.",
        err=True,
    )


def _print_recommended(data: str | None) -> None:
    from visiontuner.workflow.prepare import recommend

    console = SearchConsole()
    try:
        experiment = None if data is None else load_experiment(None, data, [])
        found = recommend(experiment, observer=console)
    finally:
        console.close()
    print_recommendations(make_console(), found)
    click.echo(
        "Use one as --backbone NAME, or search several: --backbones NAME,NAME or --backbones "
        "offline. The others are downloaded once. Where the accuracies are from: docs/networks.md.",
        err=True,
    )


@click.command(cls=OneLineErrors)
def doctor() -> None:
    """Look for what would fail on this machine, before it does.

    \b
    Example:
      visiontuner doctor
    """

    checks = run_checks(cache=cache_folder(), tracking_uri=tracking_uri())
    print_checks(make_console(), checks)
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)


# The command that searches: here, on a Ray cluster, or on SageMaker.


@click.command(cls=JobCommand)
@experiment_options
@click.option(
    "--backbone",
    metavar="NAME",
    type=TEXT,
    help="Pretrained network; `visiontuner backbones` lists them.",
)
@click.option(
    "--backbones",
    metavar="NAME,NAME",
    type=TEXT,
    help="Search several networks; `offline` names those that need no download.",
)
@click.option(
    "--from",
    "origin",
    metavar="SEARCH",
    type=FOLDER,
    help="Begin with what an earlier search found: its experiment, its best configurations, and "
    "its trials for Optuna.",
)
@click.option("--trials", metavar="N", type=TEXT, help="How many configurations to try.")
@click.option(
    "--algorithm", metavar="random|optuna|grid", type=TEXT, help="How configurations are chosen."
)
@click.option(
    "--no-baselines",
    is_flag=True,
    help="Do not compare with logistic regression and nearest neighbours on the same features.",
)
@click.option(
    "--output",
    metavar="FOLDER",
    type=FOLDER,
    help="The search folder. Default: searches/NAME-TIME.",
)
@click.option(
    "--resume",
    metavar="FOLDER|JOB",
    type=TEXT,
    help="Go on with the search in a folder, or with --on sagemaker with that of a training job. "
    "Of a search only --set search.time_budget=… may change; of a job any of its options, `off` "
    "leaves one out.",
)
@click.option(
    "--on",
    type=click.Choice(["local", "auto", "sagemaker"]),
    default="local",
    show_default=True,
    help="Where trials run: this machine, the Ray cluster it is in, or machines that SageMaker "
    "starts.",
)
@job_flags
def tune(
    experiment: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    backbone: str | None,
    backbones: str | None,
    origin: Path | None,
    trials: str | None,
    algorithm: str | None,
    no_baselines: bool,
    output: Path | None,
    resume: str | None,
    on: str,
    **job: Any,
) -> None:
    """Search hyperparameters; every trial becomes an MLflow run, the best one a model.

    \b
    Examples:
      visiontuner tune
      visiontuner tune --data photos/ --backbone resnet50 --trials 32
      visiontuner tune --data photos/ --backbones offline,resnet50 --trials 32
      visiontuner tune --experiment experiments/dog_breeds.yaml --set training.epochs=5
      visiontuner tune --from searches/photos-20261122-154100 --trials 16
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
        "search.baselines": "false" if no_baselines else None,
    }
    if backbone and backbones:
        raise UserMistake("--backbone is one network and --backbones are several; give one flag.")
    given = [*as_overrides(flags), *overrides_of_networks(backbones)]
    if resume is not None:
        # A job's search may come home to another folder than the one of the job before.
        fixed = overrides if on == "sagemaker" else output
        if given or experiment or data or fixed or origin:
            _refuse_changes_on_resume()
        chosen, earlier = None, None
    else:
        chosen, earlier = choose_search(experiment, data, [*given, *overrides], origin)
    if on == "sagemaker" and earlier is not None:
        raise UserMistake(
            "--from begins with a search in a folder here, which a job does not see. Leave --on "
            "sagemaker out, or hand the job configurations with --set search.first=…."
        )
    if on == "sagemaker":
        run_on_sagemaker(chosen, job, resume=resume, output=output)
    else:
        _run_here(chosen, on=on, resume=resume, output=output, overrides=overrides, start=earlier)


def _run_here(
    experiment: Experiment | None,
    *,
    on: str,
    resume: str | None,
    output: Path | None,
    overrides: Sequence[str],
    start: EarlierSearch | None,
) -> None:
    console = SearchConsole()
    try:
        if experiment is None:
            result = resume_search(
                Path(str(resume)),
                overrides=overrides,
                on=on,  # type: ignore[arg-type]
                observer=console,
            )
        else:
            result = run_search(
                experiment,
                output=output,
                on=on,  # type: ignore[arg-type]
                start=start,
                observer=console,
            )
    finally:
        console.close()
    print_result(result, said=console.said)


def _refuse_changes_on_resume() -> None:
    raise UserMistake(
        "--resume goes on with the search as it was, but for --set search.time_budget=…; leave the "
        "other flags out, or start a new search with them."
    )


# The command `train`: one training with given or with the best found hyperparameters.


def _steps(text: str) -> tuple[int, int]:
    """`3-5` -> (3, 5); one step may stand alone."""
    first, _, last = text.partition("-")
    if not (first.isascii() and first.isdigit() and (last or first).isdigit()):
        raise UserMistake(f"--trace {text!r}: write the steps as 3-5, the first step is 1.")
    steps = int(first), int(last or first)
    if not 1 <= steps[0] <= steps[1]:
        raise UserMistake(f"--trace {text!r}: the first step is 1, and none comes before it.")
    return steps


@click.command(cls=OneLineErrors)
@experiment_options
@click.option(
    "--backbone",
    metavar="NAME",
    type=TEXT,
    help="Pretrained network; `visiontuner backbones` lists them.",
)
@click.option("--epochs", metavar="N", type=TEXT, help="The same as --set training.epochs=N.")
@click.option(
    "--from",
    "origin",
    metavar="SEARCH|RUN|MODEL",
    type=TEXT,
    help="Take the hyperparameters of a search's best trial, of a run, of `champion` or a model.",
)
@click.option(
    "--on",
    "trained_on",
    type=click.Choice(["train", "train+validation"]),
    default="train",
    show_default=True,
    help="Which images. Of train+validation the last epoch counts.",
)
@click.option(
    "--output",
    metavar="FOLDER",
    type=FOLDER,
    help="The training's folder. Default: searches/NAME-train-TIME.",
)
@click.option(
    "--trace",
    metavar="FIRST-LAST",
    is_flag=False,
    flag_value="3-5",
    type=Given(_steps),
    help="Write a profiler's trace of these steps, for Perfetto. Without a value: 3-5.",
)
@click.option("--resume", metavar="FOLDER", type=FOLDER, help="Go on with an earlier training.")
def train(resume: Path | None, output: Path | None, **asked: Any) -> None:
    """Train once, without a search; the model registers like any other.

    The folder is a search folder with one trial: evaluate, diagnose, promote and deploy take it.
    After any interruption --resume goes on from the last whole epoch, with the same numbers.

    \b
    Examples:
      visiontuner train --data photos/ --set training.learning_rate=0.003
      visiontuner train --from searches/photos-20261122-154100 --epochs 60
      visiontuner train --from champion --set model.train=last_stage
      visiontuner train --from searches/photos-20261122-154100 --on train+validation
      visiontuner train --data photos/ --set model.train=all --trace 100-104
      visiontuner train --resume searches/photos-train-20261122-161500
    """
    if resume is not None:
        _refuse_changes(output=output, **{k: v for k, v in asked.items() if k != "overrides"})

    console = TrainingConsole()
    try:
        if resume is not None:
            result = resume_training(resume, overrides=asked["overrides"], observer=console)
        else:
            result = _begin(console, output, **asked)
    finally:
        console.close()
    _print_result(result, said=console.said)


def _begin(
    console: TrainingConsole,
    output: Path | None,
    *,
    experiment: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    backbone: str | None,
    epochs: str | None,
    origin: str | None,
    trained_on: str,
    trace: tuple[int, int] | None,
) -> SearchResult:
    flags = {"model.backbone": backbone, "training.epochs": epochs}
    given = as_overrides(flags)
    chosen, found = choose_training(experiment, data, [*given, *overrides], origin)

    return run(
        chosen,
        origin=found,
        trained_on=trained_on,  # type: ignore[arg-type]  # click checked it
        output=output,
        trace_steps=trace,
        observer=console,
    )


def _refuse_changes(*, trained_on: str, **given: object) -> None:
    if any(value is not None for value in given.values()) or trained_on != "train":
        raise UserMistake(
            "--resume goes on with the training as it was; leave the other flags out, or start a "
            "new one with them."
        )


def _print_result(result: SearchResult, *, said: set[str]) -> None:
    record, best = result.record, result.best
    assert best is not None
    if record.is_unvalidated:
        click.echo(f"\nTrained on train and validation; the last epoch, {best.best_epoch}, counts.")
        calibrated = record.started.get("calibration")
        click.echo(
            f"  temperature and threshold: those of {calibrated['fitted_on']}"
            if calibrated
            else "  temperature and threshold: not set; no image is left to fit them on"
        )
    else:
        click.echo(f"\n{record.objective} {best.best_value:.4f} in epoch {best.best_epoch}")
    print_artifacts(result, said=said)
    if not result.tracking_problem:
        command = next_command("evaluate", result.folder)
        click.echo(f"\nNext, look at the test images: {command}")


# The command `lr-find`: where a search for the learning rate belongs.


_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


@click.command("lr-find", cls=OneLineErrors)
@experiment_options
@click.option(
    "--backbone",
    metavar="NAME",
    type=TEXT,
    help="Pretrained network; `visiontuner backbones` lists them.",
)
@click.option(
    "--from",
    "origin",
    metavar="SEARCH|RUN|MODEL",
    type=TEXT,
    help="For what `train --from` would train, a network from the trained head where there is one.",
)
@click.option("--low", metavar="RATE", type=number(), help="Learning rate to begin with: 1e-6.")
@click.option("--high", metavar="RATE", type=number(), help="Learning rate to end with: 10.")
@click.option("--steps", metavar="N", type=number(whole=True), help="Default: 200, on images 100.")
@click.option(
    "--output",
    metavar="FOLDER",
    type=FOLDER,
    help="Where the curve goes. Default: lr-find/NAME-TIME.",
)
def lr_find(
    experiment: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    backbone: str | None,
    origin: str | None,
    low: float | None,
    high: float | None,
    steps: int | None,
    output: Path | None,
) -> None:
    """Train once with a growing learning rate, and suggest a range to search.

    The loss first stays where it is, then falls, then explodes (the learning rate range test,
    Smith 2017). A few seconds on features; nothing of the training is kept but its curve.

    \b
    Examples:
      visiontuner lr-find --data photos/
      visiontuner lr-find --data photos/ --set model.train=last_stage --set training.batch_size=64
      visiontuner lr-find --from searches/photos-20261122-154100 --set model.train=last_stage
    """
    from visiontuner.workflow.lr_find import find_learning_rate

    given = [*as_overrides({"model.backbone": backbone}), *overrides]
    found_origin = None
    if origin is None:
        chosen = load_experiment(experiment, data, given)
    else:
        chosen, found_origin = choose_training(experiment, data, given, origin)
    console = SearchConsole()
    try:
        found = find_learning_rate(
            chosen,
            origin=found_origin,
            output=output,
            steps=steps,
            low=low,
            high=high,
            observer=console,
            on_step=lambda step, steps, *_: console.progress("Steps", step, steps, "steps"),
        )
    finally:
        console.close()
    _print(found, _space_around(found, chosen) if found_origin is None else None)


def _print(found: FoundLearningRate, space: str | None) -> None:
    """The curve and what to do with it; `space` are the flags that search around it."""
    curve, suggestion = found.curve, found.curve.suggestion
    click.echo(f"\nTraining loss of {found.subject}:")
    click.echo(sparkline(curve.smoothed))
    click.echo(axis(curve.learning_rates[0], curve.learning_rates[-1]))
    click.echo(f"  curve: {found.figure}")
    if suggestion is None:
        click.echo("\nThe loss never fell: nothing to suggest. Try --high, or more --steps.")
        return
    click.echo(f"\nSuggested learning rate: {suggestion.learning_rate:g}")
    if space is None:
        rate = _yaml(suggestion.learning_rate)
        click.echo(f"To train with it:        --set training.learning_rate={rate}")
    else:
        click.echo(f"To search around it:     {space}")


def _space_around(found: FoundLearningRate, experiment: Experiment) -> str | None:
    """Flags that search around the suggestion, and everything else that is searched as before."""
    suggestion = found.curve.suggestion
    if suggestion is None:
        return None
    rates = f"{{low: {_yaml(suggestion.low)}, high: {_yaml(suggestion.high)}, scale: log}}"
    space = {"learning_rate": rates}
    # A space that begins with one name holds no other: the default's have to be said.
    if "space" not in experiment.search.model_fields_set:
        others = {n: d for n, d in experiment.search.space.items() if n != "learning_rate"}
        space |= {name: _flow(domain) for name, domain in others.items()}
    settings = [shlex.quote(f"search.space.{name}={domain}") for name, domain in space.items()]
    return " ".join(f"--set {setting}" for setting in settings)


def _flow(domain: Domain) -> str:
    """On one line of YAML."""

    raw = domain.model_dump(mode="json")
    return yaml.safe_dump(raw, default_flow_style=True, sort_keys=False, width=10_000).strip()


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """A curve as one line of bars; each is the mean of its share of the values.

    What lies above the first value, a loss that explodes, is as high as the first.
    """
    width = min(width, len(values))
    edges = [round(place * len(values) / width) for place in range(width + 1)]
    means = [
        math.fsum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)
    ]
    low, high = min(means), max(values[0], min(means))
    span = (high - low) or 1.0
    heights = [min(1.0, (mean - low) / span) for mean in means]
    return "".join(_BARS[round(height * (len(_BARS) - 1))] for height in heights)


def axis(low: float, high: float, width: int = _WIDTH) -> str:
    """The learning rates at both ends, under a sparkline."""
    left, right = f"{low:.0e}", f"{high:.0e}"
    return left + " " * max(1, width - len(left) - len(right)) + right


def _yaml(value: float) -> str:
    """As YAML 1.1 reads it as a number: an exponent needs a dot before it."""
    text = f"{value:g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text
