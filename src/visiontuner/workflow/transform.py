"""Answer every image of a folder on S3 with a batch transform job of SageMaker's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from visiontuner import interrupts
from visiontuner.aws import transform_job as jobs
from visiontuner.aws.account import (
    find_bucket,
    find_role,
    hourly_price,
    instance_types,
    refuse_small_quotas,
)
from visiontuner.aws.endpoint import (
    DEFAULT_INSTANCE,
    check_own_tags,
    find_container_image,
    make_tags,
    mlflows_bucket,
    telling_what_is_left,
)
from visiontuner.aws.transform_job import TransformPlan, job_name
from visiontuner.errors import ServingError, UserMistake
from visiontuner.io.aws import Aws
from visiontuner.paths import split_folder, tracking_uri
from visiontuner.serving.answers import Options
from visiontuner.serving.preflight import check_instance_type
from visiontuner.workflow.deploy import ServingOptions, check_served, model_facts
from visiontuner.workflow.promote import locate_model


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
