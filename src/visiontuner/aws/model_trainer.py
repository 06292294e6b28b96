"""A plan -> SageMaker's CreateTrainingJob, through the SageMaker SDK's ModelTrainer.

The SDK takes seconds to import: what imports this does so when it asks for a job.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from botocore.validate import ParamValidator
from sagemaker.core.config.config import load_sagemaker_config
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.shapes import Channel, DataSource, S3DataSource, Tag
from sagemaker.core.training import configs
from sagemaker.train import ModelTrainer

from visiontuner.aws.request import CHANNEL, CHECKPOINTS, COMMAND, PREFIX, JobPlan
from visiontuner.errors import JobFailed
from visiontuner.io.aws import Aws, explained, require_owner
from visiontuner.paths import changed_environment
from visiontuner.text import one_line

_CREATE = "before-parameter-build.sagemaker.CreateTrainingJob"
# The role's trust was looked at already; the SDK asks for a permission that few callers have.
_SDK = {"SAGEMAKER_VALIDATE_ROLE": "false"}
_NO_TELEMETRY = {
    "SchemaVersion": "1.0",
    "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}},
}


class _OnlyLooked(Exception):
    """Ends a dry run where the request would be sent."""


def dry_request(aws: Aws, plan: JobPlan, source: str) -> dict[str, Any]:
    """The request as it would be sent, checked as botocore checks it; uploads and makes nothing.

    Args:
        source: where on S3 the archive of `write_source` would be.

    Raises:
        JobFailed: the request breaks SageMaker's rules.
    """
    return _run(aws, plan, source, dry=True)


def send_request(aws: Aws, plan: JobPlan, source: str) -> str:
    """Create the job; returns its name.

    Args:
        source: where on S3 the archive of `write_source` is.

    Raises:
        AwsRefused: SageMaker says no: quota, capacity, role.
        JobFailed: the request breaks SageMaker's rules.
    """
    return str(_run(aws, plan, source, dry=False)["TrainingJobName"])


def _run(aws: Aws, plan: JobPlan, source: str, *, dry: bool) -> dict[str, Any]:
    """Let the SDK make the request; botocore tells what it is."""
    seen: dict[str, Any] = {}

    def look(params: dict[str, Any], **_: Any) -> None:
        seen.update(params)
        _validate(boto, params)
        if dry:
            raise _OnlyLooked

    boto = aws.session_in_region()
    boto.events.register(_CREATE, look)
    require_owner(boto.events, plan.account, plan.bucket)
    with _sdk_settings(), explained("create the training job"):
        try:
            with _letting_go():
                trainer = _trainer(_session(boto, plan, dry=dry), plan, source)
                trainer.train(wait=False, logs=False)
        except _OnlyLooked:
            pass
        except ValueError as error:  # pydantic's and the SDK's own checks
            raise JobFailed(f"The SageMaker SDK refuses the job: {one_line(error, 300)}") from error
    return seen


@contextmanager
def _letting_go() -> Iterator[None]:
    """The SDK keeps an exception in a frame of its own, and with it the temporary folder."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _trainer(session: Any, plan: JobPlan, source: str) -> Any:
    options: dict[str, Any] = {}
    network: dict[str, Any] = {}
    if plan.subnets:
        network = {
            "subnets": list(plan.subnets),
            "security_group_ids": list(plan.security_groups),
        }
    if plan.encrypt_traffic:
        network["enable_inter_container_traffic_encryption"] = True
    if network:
        options["networking"] = configs.Networking(**network)
    code = configs.SourceCode(source_dir=source, requirements="requirements.txt", command=COMMAND)
    return ModelTrainer(
        sagemaker_session=session,
        role=plan.role,
        base_job_name=plan.base_name,
        training_image=plan.container_image,
        source_code=code,
        compute=configs.Compute(**_compute(plan)),
        stopping_condition=configs.StoppingCondition(
            max_runtime_in_seconds=plan.max_run_seconds,
            **({"max_wait_time_in_seconds": plan.max_wait_seconds} if plan.spot else {}),
        ),
        output_data_config=configs.OutputDataConfig(
            s3_output_path=plan.output, **({"kms_key_id": plan.kms_key} if plan.kms_key else {})
        ),
        checkpoint_config=configs.CheckpointConfig(s3_uri=plan.checkpoints, local_path=CHECKPOINTS),
        input_data_config=_channels(plan),
        environment=plan.environment,
        tags=[Tag(key=key, value=value) for key, value in plan.all_tags.items()],
        **options,
    )


def _compute(plan: JobPlan) -> dict[str, Any]:
    compute: dict[str, Any] = {
        "instance_type": plan.instance_type,
        "instance_count": plan.instances,
        "enable_managed_spot_training": plan.spot,
    }
    # Of a machine with a disk of its own SageMaker takes no key, and no size above the disk's; the
    # SDK sends its default then, which is smaller than any.
    if plan.volume_gb is not None:
        compute["volume_size_in_gb"] = plan.volume_gb
        if plan.kms_key:
            compute["volume_kms_key_id"] = plan.kms_key
    if plan.warm_pool_seconds:
        compute["keep_alive_period_in_seconds"] = plan.warm_pool_seconds
    return compute


def _channels(plan: JobPlan) -> list[Any] | None:
    if plan.images is None:
        return None
    images = S3DataSource(
        s3_data_type="S3Prefix",
        s3_uri=plan.images.uri,
        s3_data_distribution_type="FullyReplicated",
    )
    source = DataSource(s3_data_source=images)
    return [Channel(channel_name=CHANNEL, data_source=source, input_mode="File")]


def _session(boto: Any, plan: JobPlan, *, dry: bool) -> Any:
    class LookingSession(Session):  # type: ignore[misc]
        """Says where something would be uploaded."""

        def default_bucket(self) -> str:
            return plan.bucket

        def upload_data(
            self, path: str, bucket: str | None = None, key_prefix: str = "data", **_: Any
        ) -> str:
            return f"s3://{bucket or plan.bucket}/{key_prefix}"

    kind = LookingSession if dry else Session
    return kind(
        boto_session=boto,
        default_bucket=plan.bucket,
        default_bucket_prefix=f"{PREFIX}/{plan.search}",
        sagemaker_config=_merged(load_sagemaker_config() or {}, _NO_TELEMETRY),
    )


def _merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in more.items():
        inner = merged.get(key)
        merged[key] = _merged(inner or {}, value) if isinstance(value, dict) else value
    return merged


def _validate(boto: Any, params: dict[str, Any]) -> None:
    """As botocore does, but before anything else looks at it.

    Raises:
        JobFailed: naming every rule that is broken.
    """

    model = boto.client("sagemaker").meta.service_model.operation_model("CreateTrainingJob")
    report = ParamValidator().validate(params, model.input_shape)
    if report.has_errors():
        told = one_line(report.generate_report(), 400)
        raise JobFailed(f"SageMaker would not take this request: {told}")


@contextmanager
def _sdk_settings() -> Iterator[None]:
    """The SDK quiet, and as our checks need it."""
    logger = logging.getLogger("sagemaker")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with changed_environment(_SDK):
            yield
    finally:
        logger.setLevel(level)
