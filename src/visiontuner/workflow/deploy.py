"""Put a registered model behind a SageMaker endpoint, and take it away again.

Also what is done beside an endpoint: a batch transform job over a folder on S3, and bringing home
what an endpoint was asked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as with_values
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from visiontuner import interrupts
from visiontuner.aws import endpoint
from visiontuner.aws import transform_job as jobs
from visiontuner.aws.account import (
    find_bucket,
    find_role,
    hourly_price,
    instance_types,
    refuse_small_quotas,
    require_bucket,
)
from visiontuner.aws.captured_requests import Captured, capture_folder, captured
from visiontuner.aws.endpoint import (
    ASYNC,
    CAPTURE,
    DEFAULT_INSTANCE,
    IMAGE_TAG,
    PRICE_TAG,
    TTL_TAG,
    VPC,
    DeploymentPlan,
    Endpoint,
    Running,
    answer_on_s3,
    capture_everything,
    check_free,
    check_own_tags,
    deployed_model,
    endpoint_name,
    find_container_image,
    find_running,
    in_network,
    list_endpoints,
    make_tags,
    mlflows_bucket,
    telling_what_is_left,
)
from visiontuner.aws.scaling import Scaling
from visiontuner.aws.transform_job import TransformPlan, job_name
from visiontuner.errors import ServingError, UserMistake
from visiontuner.io.aws import Aws
from visiontuner.io.files import cannot_write, write_atomically
from visiontuner.paths import split_folder, tracking_uri
from visiontuner.serving.answers import Options
from visiontuner.serving.client import Reference
from visiontuner.serving.preflight import PreflightReport, check_instance_type, shortage
from visiontuner.text import csv_row, hours_of, next_command
from visiontuner.workflow.preflight import preflight as run_preflight
from visiontuner.workflow.promote import locate_model, model_folder, open_store, passed_over

Note = Callable[[str], None]

_OFF = "off"

# What an endpoint says about its model, under the names that the model's version has.
_LINEAGE = (
    "visiontuner.search_id",
    "visiontuner.trial_id",
    "visiontuner.data_digest",
    "visiontuner.classifier_digest",
    "visiontuner.code_commit",
)


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """What a user may choose of an endpoint or a transform job; None: found, or a default.

    Args:
        role: name or ARN of the execution role.
        image: URL of the serving image in ECR.
        assume_role: ARN of a role to act as, of another account say.
        bucket: for what is uploaded; by default MLflow's of this account.
        instances: how many; None: one.
        subnets, security_groups: of a VPC.
        kms_key: encrypts the upload, the disks, and what is written to S3.
        tags: of what is made and its model, beside ours.
        price: US dollars for an hour of one instance.
        environment: more variables for the container.
    """

    region: str | None = None
    assume_role: str | None = None
    role: str | None = None
    image: str | None = None
    bucket: str | None = None
    instance_type: str | None = None
    instances: int | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    price: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def more(self) -> dict[str, dict[str, Any]]:
        """What MLflow takes as dictionaries.

        Raises:
            UserMistake: one of them breaks a rule.
        """
        if not self.subnets and not self.security_groups:
            return {}
        return {VPC: in_network(self.subnets, self.security_groups)}


@dataclass(frozen=True, kw_only=True)
class DeployOptions(ServingOptions):
    """What a user may choose of an endpoint.

    Args:
        serverless_mb: memory of a serverless endpoint; None: instances.
        autoscale: `1:4`, the fewest and the most instances, or `1:4:300` with the requests to an
            instance in a minute; for an update `off`, too.
        async_output: `s3://BUCKET/FOLDER`, where an asynchronous endpoint answers.
        data_capture: `s3://BUCKET/FOLDER`, where requests and answers are kept.
        startup_seconds: how long a container may take to start.
        ttl: how long the endpoint is meant to live, as `8h`; a tag, nothing deletes it by itself.
    """

    name: str | None = None
    serverless_mb: int | None = None
    autoscale: str | None = None
    async_output: str | None = None
    data_capture: str | None = None
    startup_seconds: int | None = None
    ttl: str | None = None
    timeout_seconds: int = 1800

    @property
    def scaling(self) -> Scaling | None:
        """Raises UserMistake: it is no range."""
        if self.autoscale in (None, "", _OFF):
            return None
        return Scaling.parse(str(self.autoscale))

    def more(self) -> dict[str, dict[str, Any]]:
        """As `ServingOptions.more`, with what is captured and answered on S3."""
        more = {}
        if self.data_capture:
            more[CAPTURE] = capture_everything(self.data_capture, self.kms_key)
        if self.async_output:
            more[ASYNC] = answer_on_s3(self.async_output, self.kms_key)
        return more | super().more()


def plan_deployment(
    model: str | None, options: DeployOptions, *, updated: bool = False
) -> tuple[Aws, DeploymentPlan]:
    """Find and check everything that a deployment needs; makes nothing.

    Args:
        model: NAME (its champion, or the newest version while there is none), NAME/VERSION,
            NAME@ALIAS, models:/… or an MLflow model folder. None: the NAME of the newest search's
            model, or of the one that is updated.
        updated: the endpoint is there, and keeps what it runs on.

    Raises:
        UserMistake: something is missing, taken or unfit.
        ServingError: AWS refuses or cannot be reached.
        TrackingError: MLflow is away or refuses.
    """

    _check_choices(options)
    aws = Aws(options.region, options.assume_role)
    if options.instance_type:
        known = instance_types(aws, "ProductionVariantInstanceType")
        check_instance_type(options.instance_type, known)
    for uri in filter(None, (options.async_output, options.data_capture)):
        require_bucket(aws, uri)
    running = find_running(aws, str(options.name)) if updated else None
    if running and model is None:
        model = deployed_model(aws, str(options.name)).split("/")[0]
    located = locate_model(model)
    uri, facts = model_facts(located)
    name = options.name or endpoint_name(facts["visiontuner.model"].split("/")[0])
    if running is None:
        check_free(aws, name)
    plan = _new_plan(aws, options, running, name, uri)
    plan = with_values(plan, newer_model=passed_over(model, located))
    if running is not None:
        plan = _on_what_runs(plan, running, options)
    if plan.instance_type:
        most = plan.scaling.most if plan.scaling else plan.instances
        refuse_small_quotas(aws, [f"{plan.instance_type} for endpoint usage"], most)
    return aws, _priced_and_tagged(aws, plan, options, facts)


def _new_plan(
    aws: Aws, options: DeployOptions, running: Running | None, name: str, model_uri: str
) -> DeploymentPlan:
    """As for a new endpoint, but for the account's things that a running one has already."""
    wanted = options.bucket or (running.bucket if running else None)
    bucket, exists = find_bucket(aws, wanted, default=mlflows_bucket(aws))
    return DeploymentPlan(
        name=name,
        model_uri=model_uri,
        region=aws.region,
        account=aws.account,
        caller=aws.caller,
        role=find_role(aws, options.role or (running.role if running else None)),
        container_image=find_container_image(
            aws, options.image or (running.container_image if running else None)
        ),
        bucket=bucket,
        bucket_exists=exists,
        instance_type=options.instance_type
        or (DEFAULT_INSTANCE if options.serverless_mb is None else None),
        instances=options.instances or (options.scaling.least if options.scaling else 1),
        serverless_mb=options.serverless_mb,
        environment=options.environment,
        more=options.more(),
        kms_key=options.kms_key,
        startup_seconds=options.startup_seconds,
        scaling=options.scaling,
        unscaled=options.autoscale == _OFF,
        assume_role=options.assume_role,
        timeout_seconds=options.timeout_seconds,
        region_is_default=aws.session.region_name == aws.region,
    )


def _check_choices(options: DeployOptions) -> None:
    """What is wrong whatever the account holds."""

    if options.ttl is not None:
        hours_of(options.ttl)
    options.more()
    check_own_tags(options.tags)
    if options.serverless_mb is not None and (options.instance_type or options.instances):
        raise UserMistake(
            "A serverless endpoint has no instances: leave --serverless out, or --instance-type "
            "and --instances."
        )


def _on_what_runs(plan: DeploymentPlan, running: Running, options: DeployOptions) -> DeploymentPlan:
    """An update changes the model, and of what it runs on only what is asked for."""
    if running.serverless_mb is not None and (options.instance_type or options.instances):
        raise UserMistake(
            f"{plan.name!r} is a serverless endpoint, which has no instances: leave "
            "--instance-type and --instances out."
        )
    instances = options.instances or running.instances
    if options.scaling is not None and options.instances is None:
        instances = min(max(instances, options.scaling.least), options.scaling.most)
    return with_values(
        plan,
        variant=running.variant,
        instance_type=options.instance_type or running.instance_type,
        instances=instances,
        serverless_mb=running.serverless_mb,
        serverless_concurrency=running.serverless_concurrency,
        environment={**running.environment, **options.environment},
        more=running.more,
        kms_key=running.kms_key,
        startup_seconds=options.startup_seconds or running.startup_seconds,
    )


def _priced_and_tagged(
    aws: Aws, plan: DeploymentPlan, options: DeployOptions, facts: Mapping[str, Any]
) -> DeploymentPlan:
    """What it costs an hour, as far as that is known, and the tags of its lineage."""

    price = options.price
    if price is None and plan.instance_type:
        price = hourly_price(aws, plan.instance_type, "Async" if plan.is_async else "Hosting")
    whole = price * plan.instances if price is not None and plan.instance_type else None
    tags = make_tags(
        {
            **options.tags,
            **facts,
            IMAGE_TAG: plan.container_image.digest,
            TTL_TAG: options.ttl,
            PRICE_TAG: whole,
        }
    )
    return with_values(plan, tags=tags, price_per_hour=whole)


def deploy(
    aws: Aws,
    plan: DeploymentPlan,
    *,
    preflight: Literal["uv", "local"] | None = "uv",
    update: bool = False,
    note: Note,
) -> None:
    """Make the planned endpoint, or put the planned model behind the one that is there.

    Args:
        preflight: serve the model here first, in such an environment; None: do not.

    Raises:
        UserMistake: how far it scales cannot be said without a preflight.
        ServingError: the preflight fails, or the endpoint; nothing that costs money is left.
    """

    if not preflight:
        plan = _aimed(plan, None)
    else:
        report = check_served(
            plan.model_uri, preflight, instance_type=plan.instance_type,
            serverless_mb=plan.serverless_mb, note=note,
        )  # fmt: skip
        plan = _aimed(plan, report.p50_ms)
    with model_folder(plan.model_uri) as folder:
        reference = Reference.read(folder)
    act = endpoint.update if update else endpoint.create
    with interrupts.in_order():
        act(aws, plan, reference, tracking_uri=tracking_uri(), note=note)


def check_served(
    model_uri: str,
    env_manager: Literal["uv", "local"],
    *,
    instance_type: str | None,
    serverless_mb: int | None,
    note: Note,
) -> PreflightReport:
    """Serve a model here as its machines will.

    Raises:
        ServingError: it fails, or they are too small for it.
    """
    report = run_preflight(model_uri, env_manager=env_manager, note=note)
    failed = [f"{c.name} ({c.detail})" for c in report.checks if c.status != "ok"]
    small = shortage(report.memory_mb, instance_type=instance_type, serverless_mb=serverless_mb)
    failed += [f"{small} ({report.recommendation.rstrip('.')})"] if small else []
    if failed:
        raise ServingError(
            f"The preflight of {model_uri} fails: {'; '.join(failed)}. Nothing was made; "
            "--no-preflight goes on all the same."
        )
    note(f"Preflight passed. {report.recommendation}")
    return report


def _aimed(plan: DeploymentPlan, milliseconds: float | None) -> DeploymentPlan:
    """With the number of requests to an instance that autoscaling keeps to."""
    if plan.scaling is None:
        return plan
    aimed = plan.scaling.aimed(milliseconds=milliseconds, is_async=plan.is_async)
    return with_values(plan, scaling=aimed)


def undeploy(
    name: str,
    *,
    region: str | None = None,
    assume_role: str | None = None,
    artifacts: bool = False,
    note: Note,
) -> dict[str, str]:
    """Delete an endpoint, its configuration and its model, or what is left of them.

    Returns:
        The archives that were kept, and for each the command that deletes it.

    Raises:
        UserMistake: there is no such endpoint, and nothing is left of one.
        ServingError: AWS refuses or cannot be reached.
    """

    aws = Aws(region, assume_role)
    with interrupts.in_order():
        return endpoint.undeploy(aws, name, artifacts=artifacts, note=note)


def endpoints(region: str | None = None, assume_role: str | None = None) -> list[Endpoint]:
    """Those that visiontuner deployed in a region, oldest first."""

    return list_endpoints(Aws(region, assume_role))


def model_facts(located: Path | str) -> tuple[str, dict[str, Any]]:
    """The URI to deploy, and the tags that lead from the endpoint back to it."""
    if isinstance(located, Path):
        if not (located / "MLmodel").is_file():
            raise UserMistake(
                f"{located} is no MLflow model. Deploy the registered one: "
                f"`{next_command('deploy', 'NAME')}`."
            )
        return str(located.resolve()), {"visiontuner.model": located.resolve().name}
    registered, version = located.removeprefix("models:/").rsplit("/", 1)
    found = open_store().call("get_model_version", registered, version)
    lineage = {key: found.tags[key] for key in _LINEAGE if key in found.tags}
    return located, {"visiontuner.model": f"{registered}/{version}", **lineage}


@dataclass(frozen=True, kw_only=True)
class TransformOptions(ServingOptions):
    """What a user may choose of a transform job."""

    top_k: int = 5
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class TransformResult:
    """What a job did: `output` is `s3://…`, `seconds` and `cost` are of all that is paid for."""

    job: str
    output: str
    images: int
    failed: int
    seconds: float
    cost: float | None


def plan_transform(
    source: str, output: str, model: str | None, options: TransformOptions
) -> tuple[Aws, TransformPlan]:
    """Find and check everything that a transform job needs; makes nothing.

    Args:
        source: `s3://BUCKET/FOLDER` of the images, with all below it.
        output: `s3://BUCKET/FOLDER` for the answers.
        model: as `deploy` takes it.

    Raises:
        UserMistake: something is missing or unfit.
        ServingError: AWS refuses or cannot be reached.
        TrackingError: MLflow is away or refuses.
    """
    folders = [_folder(source), _folder(output)]
    if folders[1].startswith(folders[0]):
        raise UserMistake(f"{output} lies in {source}: name a folder beside it for the answers.")
    check_own_tags(options.tags)
    more = options.more()
    asked = Options.chosen(options.top_k, options.threshold)
    aws = Aws(options.region, options.assume_role)
    kind = options.instance_type or DEFAULT_INSTANCE
    check_instance_type(kind, instance_types(aws, "TransformInstanceType"))
    uri, facts = model_facts(locate_model(model))
    jobs.require_output(aws, folders[1])
    images, others = jobs.find_images(aws, folders[0])
    bucket, exists = find_bucket(aws, options.bucket, default=mlflows_bucket(aws))
    instances = options.instances or 1
    refuse_small_quotas(aws, [f"{kind} for transform job usage"], instances)
    name = job_name(facts["visiontuner.model"].split("/")[0])
    price = hourly_price(aws, kind, "Transform") if options.price is None else options.price
    return aws, TransformPlan(
        name=name,
        model_uri=uri,
        source=folders[0],
        output=f"{folders[1]}{name}.jsonl",
        images=images,
        others=others,
        region=aws.region,
        account=aws.account,
        caller=aws.caller,
        role=find_role(aws, options.role),
        container_image=find_container_image(aws, options.image),
        bucket=bucket,
        bucket_exists=exists,
        instance_type=kind,
        instances=instances,
        options=asked,
        more=more,
        kms_key=options.kms_key,
        environment=options.environment,
        tags=make_tags({**options.tags, **facts}),
        assume_role=options.assume_role,
        price_per_hour=price,
    )


def _folder(uri: str) -> str:
    if not uri.startswith("s3://"):
        raise UserMistake(f"`transform` takes s3://BUCKET/FOLDER twice, got {uri!r}.")
    bucket, prefix = split_folder(uri)
    return f"s3://{bucket}/{prefix}"


def transform(
    aws: Aws,
    plan: TransformPlan,
    *,
    preflight: Literal["uv", "local"] | None = "uv",
    note: Callable[[str], None],
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> TransformResult:
    """Stage the images, run the job, join its answers to the images, and take the rest away.

    What was staged, the raw answers and the model are deleted whatever happens, and a job that
    runs is stopped.

    Args:
        preflight: serve the model here first, in such an environment; None: do not.

    Raises:
        ServingError: the preflight fails, or the job.
    """
    if preflight:
        check_served(
            plan.model_uri, preflight, instance_type=plan.instance_type, serverless_mb=None,
            note=note,
        )  # fmt: skip
    with interrupts.in_order():
        plan.make_bucket(aws, note)
        try:
            result = _run(aws, plan, note, progress)
        except BaseException as error:
            left = (
                "something may cost money: stop it with `aws sagemaker stop-transform-job "
                f"--transform-job-name {plan.name} --region {plan.region}`, and delete "
                f"{plan.staged} and the model {plan.name}-model-…"
            )
            with telling_what_is_left("Removing what was made", left, error):
                note("Removing what was made.")
                jobs.stop(aws, plan.name, note)
                jobs.remove(aws, plan)
            raise
        jobs.remove(aws, plan)
        return result


def _run(
    aws: Aws,
    plan: TransformPlan,
    note: Callable[[str], None],
    progress: Callable[[str, int, int, str], None],
) -> TransformResult:
    staged = jobs.stage(aws, plan, lambda done, total: progress("Staging", done, total, "images"))
    if all(image.error is not None for one in staged for image in one.images):
        first = staged[0].images[0]
        raise ServingError(
            f"None of the {len(plan.images):,} images can be read: {first.name}: {first.error}"
        )
    note(f"Uploading {plan.model_uri} and creating {plan.name}; this takes minutes.")
    jobs.start(aws, plan, tracking_uri=tracking_uri())
    seconds = jobs.follow(aws, plan, note)
    failed = jobs.write_answers(aws, plan, jobs.join(aws, plan, staged))
    return TransformResult(
        job=plan.name,
        output=plan.output,
        images=len(plan.images),
        failed=failed,
        seconds=seconds * plan.instances,
        cost=plan.cost(seconds),
    )


IMAGES, ANSWERS, TABLE = "images", "answers.jsonl", "answers.csv"
_FIELDS = ("image", "time", "label", "probability", "confident", "top_k", "error", "event", "row")
_EVENT = re.compile(r"[0-9A-Za-z-]{1,64}")
# By what a file begins with; others keep their content and no ending.
_ENDINGS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


@dataclass(frozen=True, kw_only=True)
class CaptureResult:
    """What was brought home: `images` are files in `folder`, `unreadable` requests without any."""

    folder: Path
    source: str
    images: int
    unreadable: int


def capture(
    name: str,
    *,
    output: Path,
    since: timedelta | None = None,
    region: str | None = None,
    assume_role: str | None = None,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> CaptureResult:
    """Download what SageMaker captured of an endpoint.

    `images/EVENT.jpg` (or `EVENT-ROW.jpg` where a request has several), answers.jsonl and
    answers.csv; what is there from an earlier call stays.

    Args:
        name: of the endpoint, or `s3://…/ENDPOINT`, where it captured.
        output: a folder, which is made.
        since: no older requests, to the hour.

    Raises:
        UserMistake: there is no such endpoint, it captures nothing, or nothing was captured yet.
        ServingError: AWS refuses or cannot be reached.
    """
    aws = Aws(region, assume_role)
    source = capture_folder(aws, name)
    rows = {(row["event"], row["row"]): row for row in _rows_before(output / ANSWERS)}
    images = unreadable = 0
    for done, total, found in captured(aws, source, since=since):
        several = {one.event for one in found if one.row > 0}
        for one in found:
            path = _save(output, one, several=one.event in several) if one.content else None
            images += path is not None
            unreadable += path is None
            rows[one.event, one.row] = _row(one, path)
        progress("Reading", done, total, "objects")
    if not rows:
        raise UserMistake(
            f"There is nothing in {source}. SageMaker writes what it captures some minutes after "
            "it was asked, and nothing where the endpoint's role may not write (docs/aws.md)."
        )
    _write(output, sorted(rows.values(), key=lambda row: (row["time"], row["event"], row["row"])))
    return CaptureResult(folder=output, source=source, images=images, unreadable=unreadable)


def _save(output: Path, one: Captured, *, several: bool) -> str:
    """Write an image unless it is there; returns its name below `output`."""
    known = _EVENT.fullmatch(one.event)
    event = one.event if known else hashlib.sha256(one.event.encode()).hexdigest()[:32]
    number = f"-{one.row:02d}" if several else ""
    name = f"{IMAGES}/{event}{number}{_ending(one.content)}"
    path = output / name
    if not path.exists():
        _write_file(path, one.content)
    return name


def _ending(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((end for start, end in _ENDINGS.items() if content.startswith(start)), "")


def _row(one: Captured, path: str | None) -> dict[str, Any]:
    told = {"image": path, "time": one.time, **one.answer.to_dict()}
    return {**told, "event": one.event, "row": one.row}


def _rows_before(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
            _ = row["event"], row["row"], row["time"]
        except (ValueError, LookupError, TypeError):
            raise UserMistake(f"{path} holds no captured answers; name another --output.") from None
        yield row


def _write(output: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = csv_row(_FIELDS) + "".join(
        csv_row({**row, "top_k": _choices(row)}.get(name) for name in _FIELDS) for row in rows
    )
    _write_file(output / ANSWERS, lines.encode())
    _write_file(output / TABLE, table.encode())


def _write_file(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    write_atomically(path, lambda file: file.write(content))


def _choices(row: dict[str, Any]) -> str:
    return "; ".join(f"{c['label']} {c['probability']:.4f}" for c in row.get("top_k") or ())
