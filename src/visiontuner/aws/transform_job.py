"""Batch transform: a model of MLflow's answers every image of a folder on S3, and ends."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from visiontuner import interrupts
from visiontuner.aws.account import check_variables, has_own_disk
from visiontuner.aws.endpoint import (
    VPC,
    ModelPlan,
    Note,
    Parts,
    explain_failed_job,
    poll,
    through_mlflow,
)
from visiontuner.data.images import image_extensions
from visiontuner.errors import BadImageError, ServingError, UserMistake
from visiontuner.io.aws import Aws, AwsRefused, encryption
from visiontuner.io.s3 import RemoteFile, connect, list_files, read
from visiontuner.io.s3 import explained as s3_explained
from visiontuner.paths import split_folder, split_uri
from visiontuner.serving.answers import MAX_BYTES, Answer, Options
from visiontuner.serving.client import (
    REQUEST_BYTES,
    ImageAnswer,
    ImageSource,
    ReadImage,
    batches,
    decode_answers,
    encode_request,
)
from visiontuner.serving.server import QUIET
from visiontuner.text import hide_variables

PREFIX = "visiontuner/transform"
"""The folder in the bucket where requests and raw answers lie until the job has ended."""

_ENDED = ("Completed", "Failed", "Stopped")
# S3 requests at a time: of 25 MB at most each, so 800 MB of memory.
_AT_ONCE = 32
_DELETED_AT_ONCE = 1000  # S3's own limit
_ENVIRONMENT_LENGTH = 10 * 1024  # of a value, as botocore's model of CreateTransformJob has it
_ENVIRONMENT_MOST = 16


@dataclass(frozen=True, kw_only=True)
class TransformPlan(ModelPlan):
    """One batch transform job; in the bucket lie the requests and the raw answers, too.

    Args:
        source: `s3://…/`, the folder of the images.
        output: `s3://…`, where the answers will be, one line an image.
        images: what lies there, by the keys below it.
        others: how many objects there are no images by their names.
        price_per_hour: US dollars for one instance; None: not known.
    """

    source: str
    output: str
    images: Sequence[RemoteFile]
    others: int
    instance_type: str
    options: Options
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        check_variables(self.environment, longest=_ENVIRONMENT_LENGTH)
        most = _ENVIRONMENT_MOST - len(QUIET)
        if len(self.environment) > most:
            raise UserMistake(f"--env: a transform job takes {most} variables, beside ours.")

    @property
    def staged(self) -> str:
        """`s3://…/`, what is removed at the end."""
        return f"s3://{self.bucket}/{PREFIX}/{self.name}/"

    def complete(self, session: Any) -> None:
        """Add to a botocore session what MLflow has no words for."""

        def tag(params: dict[str, Any], **_: Any) -> None:
            own = [{"Key": key, "Value": value} for key, value in self.tags.items()]
            params["Tags"] = [*params.get("Tags", ()), *own]

        def job(params: dict[str, Any], **_: Any) -> None:
            params["Environment"] = {**QUIET, **self.environment}
            if self.kms_key:
                params["TransformOutput"]["KmsKeyId"] = self.kms_key
                if not has_own_disk(self.instance_type):
                    params["TransformResources"]["VolumeKmsKeyId"] = self.kms_key

        super().complete(session)
        session.register("before-parameter-build.sagemaker.CreateTransformJob", job)
        for made in ("CreateTransformJob", "CreateModel"):
            session.register(f"before-parameter-build.sagemaker.{made}", tag)

    def cost(self, seconds: float) -> float | None:
        """US dollars for so long on all instances."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour * self.instances * seconds / 3600

    def lines(self) -> list[str]:
        """What is going to happen, for a person."""
        size = sum(image.size for image in self.images) / 1e6
        others = f"; {self.others:,} other objects are left out" if self.others else ""
        made = "" if self.bucket_exists else " (is made)"
        hourly = self.cost(3600)
        price = (
            "its price is not known here; tell it with --price"
            if hourly is None
            else f"${hourly:.3g} an hour, paid while it runs"
        )
        lines = [
            f"transform  {self.name} in {self.region}, account {self.account}, as {self.caller}",
            f"model      {self.model_uri}",
            f"images     {len(self.images):,} in {self.source} ({size:,.0f} MB){others}",
            f"answers    {self.output}",
            f"runs on    {self.instances} x {self.instance_type}; {price}",
            f"role       {self.role}",
            f"container  {self.container_image.url} ({self.container_image.digest[:19]}…)",
            f"staged in  {self.staged}{made}, through this machine, and removed",
        ]
        lines += self.network_lines()
        if self.kms_key:
            lines.append(f"encrypted  what is staged and the disks, {self.kms_key}")
        if self.environment:
            shown = hide_variables(self.environment).items()
            lines.append(f"variables  {', '.join(f'{key}={value}' for key, value in shown)}")
        return lines


def job_name(model: str) -> str:
    """Short enough for MLflow to name a model after it whole."""
    plain = re.sub(r"[^a-zA-Z0-9]+", "-", model)[:16].strip("-") or "visiontuner"
    return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_images(aws: Aws, source: str) -> tuple[list[RemoteFile], int]:
    """The images under `s3://…/`, by their names, and how many other objects there are.

    Raises:
        UserMistake: there is none, no such bucket, or no permission.
        ServingError: S3 cannot be reached.
    """
    bucket, prefix = split_folder(source)
    with s3_explained(bucket, "read"):
        found = list_files(connect(aws.session, aws.region), bucket, prefix)
    endings = tuple(image_extensions())
    images = [one for one in found if one.key.lower().endswith(endings)]
    if not images:
        raise UserMistake(f"There are no images at {source} ({len(found):,} objects).")
    return images, len(found) - len(images)


# The requests: read from S3, staged, and remembered by what they hold.


@dataclass(frozen=True)
class Staged:
    """One request on S3: the images in it, without their contents."""

    key: str
    images: tuple[ReadImage, ...]


def stage(aws: Aws, plan: TransformPlan, progress: Callable[[int, int], None]) -> list[Staged]:
    """Put requests of JSON on S3, which MLflow's server takes: images alone it does not.

    Each holds up to 16 images, and less than the 6 MB that SageMaker sends at a time. An image that
    is larger is sent smaller, still more than a network sees; one that cannot be read is in none.

    Args:
        progress: told how many images are staged, and of how many.

    Raises:
        UserMistake: no permission.
        ServingError: S3 cannot be reached.
    """
    source, _ = split_folder(plan.source)
    bucket, prefix = split_folder(plan.staged)
    reading = connect(aws.session, aws.region)
    writing = connect(aws.session, aws.region, owner=aws.account)
    put = partial(
        writing.put_object, Bucket=bucket, ContentType="application/json",
        **encryption(plan.kms_key),
    )  # fmt: skip
    staged: list[Staged] = []
    done = 0
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="transform")
    try:
        with s3_explained(bucket, "write to"):
            images = _ahead(plan.images, partial(_read, reading, source), pool, plan.source)
            uploads: deque[Future[Any]] = deque()
            for batch in batches(images, lambda: REQUEST_BYTES):
                one = Staged(f"{prefix}requests/{len(staged):06d}.json", _without_content(batch))
                staged.append(one)
                contents = [image.content for image in batch if image.error is None]
                if contents:
                    body = encode_request(contents, plan.options)
                    uploads.append(pool.submit(put, Key=one.key, Body=body))
                if len(uploads) > _AT_ONCE:
                    interrupts.result(uploads.popleft())
                done += len(batch)
                progress(done, len(plan.images))
            while uploads:
                interrupts.result(uploads.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
    return staged


def _ahead(
    files: Iterable[RemoteFile],
    fetch: Callable[[RemoteFile], bytes],
    pool: ThreadPoolExecutor,
    folder: str,
) -> Iterator[ImageSource]:
    """Images that are being read while those before them are staged."""
    waiting: deque[tuple[RemoteFile, Future[bytes]]] = deque()

    def first() -> ImageSource:
        file, future = waiting.popleft()
        return ImageSource(name=folder + file.name, read=partial(interrupts.result, future))

    for file in files:
        waiting.append((file, pool.submit(fetch, file)))
        if len(waiting) > _AT_ONCE:
            yield first()
    while waiting:
        yield first()


def _read(client: Any, bucket: str, file: RemoteFile) -> bytes:
    if file.size > MAX_BYTES:
        raise BadImageError(
            f"It has {file.size / 1e6:,.1f} MB; at most {MAX_BYTES / 1e6:,.0f} MB are read."
        )
    content = read(client, bucket, file.key)
    if content is None:
        raise BadImageError("It was deleted meanwhile.")
    return content


def _without_content(batch: Sequence[ReadImage]) -> tuple[ReadImage, ...]:
    return tuple(ReadImage(one.name, error=one.error, reduced=one.reduced) for one in batch)


# The job: started through MLflow, followed, stopped.


def start(aws: Aws, plan: TransformPlan, *, tracking_uri: str) -> None:
    """Let MLflow upload the model and create the job.

    Raises:
        ServingError: MLflow or AWS refuses.
    """
    import mlflow.sagemaker

    with through_mlflow(
        aws, plan, "transform", plan.source, tracking_uri=tracking_uri,
        asking="create the transform job",
    ):  # fmt: skip
        mlflow.sagemaker.deploy_transform_job(  # type: ignore[no-untyped-call]
            plan.name,
            plan.model_uri,
            s3_input_data_type="S3Prefix",
            s3_input_uri=f"{plan.staged}requests/",
            content_type="application/json",
            s3_output_path=f"{plan.staged}answers",
            split_type="None",
            accept="application/json",
            assemble_with="None",
            execution_role_arn=plan.role,
            assume_role_arn=plan.assume_role,
            bucket=plan.bucket,
            image_url=plan.container_image.url,
            region_name=plan.region,
            instance_type=plan.instance_type,
            instance_count=plan.instances,
            vpc_config=plan.more.get(VPC),
            archive=True,
            synchronous=False,
        )


def follow(aws: Aws, plan: TransformPlan, note: Note) -> float:
    """Wait until the job is completed.

    Returns:
        The seconds that its instances ran and are paid for.

    Raises:
        ServingError: it failed, or someone stopped it.
    """
    for _ in poll(plan.name, note, "Transforming in"):
        told = aws.call("sagemaker", "describe_transform_job", TransformJobName=plan.name)
        state = told["TransformJobStatus"]
        if state == "Completed":
            return paid_seconds(told)
        if state in _ENDED:
            raise ServingError(_explained(aws, plan, told))
    raise AssertionError("polling has no end")


def paid_seconds(described: Mapping[str, Any]) -> float:
    """From the start of a job's instances to its end; 0 if they never started."""
    began, ended = described.get("TransformStartTime"), described.get("TransformEndTime")
    return (ended - began).total_seconds() if began and ended else 0.0


def _explained(aws: Aws, plan: TransformPlan, described: Mapping[str, Any]) -> str:
    spent = plan.cost(paid_seconds(described))
    parts = [explain_failed_job(aws, plan.name, described)]
    parts += [f"It has cost about ${spent:,.2f}."] if spent else []
    parts.append("`visiontuner preflight MODEL` shows whether the model can be served.")
    return " ".join(parts)


def stop(aws: Aws, name: str, note: Note) -> None:
    """End a job if it runs, and wait for that."""
    asked = False
    for _ in poll(name, note, "Stopping"):
        try:
            told = aws.call("sagemaker", "describe_transform_job", TransformJobName=name)
            if told["TransformJobStatus"] in _ENDED:
                return
            if not asked:
                aws.call("sagemaker", "stop_transform_job", TransformJobName=name)
            asked = True
        except AwsRefused as error:
            if error.is_missing:
                return
            if error.is_passing or asked:
                raise
            asked = True  # it has ended meanwhile


def remove(aws: Aws, plan: TransformPlan) -> None:
    """Delete what was staged, the raw answers, the model and its archive."""
    bucket, prefix = split_folder(plan.staged)
    client = connect(aws.session, aws.region, owner=aws.account)
    with s3_explained(bucket, "write to"):
        keys = [{"Key": one.key} for one in list_files(client, bucket, prefix)]
        for start_ in range(0, len(keys), _DELETED_AT_ONCE):
            some = keys[start_ : start_ + _DELETED_AT_ONCE]
            client.delete_objects(Bucket=bucket, Delete={"Objects": some, "Quiet": True})
    Parts.find(aws, plan.name, plan.bucket).delete(aws)


# The answers: joined to the keys of the images.


def join(aws: Aws, plan: TransformPlan, staged: Sequence[Staged]) -> Iterator[ImageAnswer]:
    """The answer of every image, in the order of the images.

    Raises:
        ServingError: S3 cannot be reached.
    """
    bucket, prefix = split_folder(plan.staged)
    client = connect(aws.session, aws.region, owner=aws.account)
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="transform")
    try:
        with s3_explained(bucket, "read"):
            keys = [f"{prefix}answers/{one.key.rpartition('/')[2]}.out" for one in staged]
            fetch = partial(read, client, bucket)
            contents = interrupts.map_ahead(pool, fetch, keys, ahead=_AT_ONCE)
            for one, content in zip(staged, contents, strict=True):
                yield from _answered(one, content)
    finally:
        pool.shutdown(cancel_futures=True)


def _answered(one: Staged, content: bytes | None) -> Iterator[ImageAnswer]:
    asked = [image for image in one.images if image.error is None]
    if content is None:
        answers = [Answer(error="SageMaker gave no answer.")] * len(asked)
    else:
        answers = decode_answers(content, len(asked))
    left = iter(answers)
    for image in one.images:
        answer = Answer(error=image.error) if image.error is not None else next(left)
        yield ImageAnswer(image=image.name, answer=answer, reduced=image.reduced)


def write_answers(aws: Aws, plan: TransformPlan, answers: Iterable[ImageAnswer]) -> int:
    """Write JSON lines to the plan's output; returns how many images have no answer.

    Raises:
        UserMistake: no such bucket, or no permission.
        ServingError: S3 cannot be reached.
    """
    lines, failed = [], 0
    for one in answers:
        failed += one.answer.error is not None
        lines.append(json.dumps(one.to_dict(), ensure_ascii=False) + "\n")
    bucket, key = split_uri(plan.output)
    client = connect(aws.session, aws.region)
    with s3_explained(bucket, "write to"):
        client.put_object(
            Bucket=bucket, Key=key, Body="".join(lines).encode(),
            ContentType="application/x-ndjson",
        )  # fmt: skip
    return failed


def require_output(aws: Aws, uri: str) -> None:
    """Make sure, before anything costs, that there is a bucket for the answers.

    Raises:
        UserMistake: there is none, or not for this caller.
    """
    bucket, _ = split_uri(uri)
    with s3_explained(bucket, "write to"):
        connect(aws.session, aws.region).head_bucket(Bucket=bucket)
