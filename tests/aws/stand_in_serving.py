"""What the stand-in's endpoints and models do beside answering at once.

Asynchronous endpoints take requests from S3 and answer there later; captured requests are written
to S3 some time after the answer; transform jobs send each object of their input to a model. As AWS
does, all of these refuse what they do not take, and never say so in the answer to the request
where AWS says it only later.

What a test can ask for:
    a transform job whose instance type is ml.m5.24xlarge    never begins, until it is stopped
"""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import requests
from moto.applicationautoscaling.exceptions import AWSValidationException
from moto.applicationautoscaling.models import ApplicationAutoscalingBackend
from moto.core.exceptions import JsonRESTError
from moto.core.responses import ActionResult
from moto.core.utils import utcnow
from moto.s3.models import s3_backends
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.models import sagemaker_backends
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse

_LATER = 0.3  # seconds until what is captured or answered on S3 is there
_PAYLOAD = 6 * 2**20  # of a transform job that names no MaxPayloadInMB
NEVER_BEGINS = "ml.m5.24xlarge"
_WITH_DISKS = ("ml.g4dn", "ml.g5", "ml.g6", "ml.m5d", "ml.c5d", "ml.r5d", "ml.p4d", "ml.p5")

Url = Callable[[bytes], str]  # of a scoring server for a model.tar.gz

# What the role of an endpoint or of a transform job does for each container.
PULLS = (
    "ecr:GetAuthorizationToken",
    "ecr:BatchCheckLayerAvailability",
    "ecr:BatchGetImage",
    "ecr:GetDownloadUrlForLayer",
)
LOGS = (
    "logs:CreateLogGroup",
    "logs:CreateLogStream",
    "logs:DescribeLogStreams",
    "logs:PutLogEvents",
)
GUARD: Any = None


def act_as_endpoint(*actions: str) -> None:
    """Do something as the role of an endpoint or of a transform job.

    Raises:
        PermissionError: its policies do not allow it.
    """
    for action in actions:
        if GUARD.refused("endpoint", action):
            raise PermissionError(f"The execution role may not {action}.")


def _objects(account: str, bucket: str) -> Any:
    return s3_backends[account]["aws"].buckets[bucket].keys


def _get(account: str, uri: str) -> bytes:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    content: bytes = _objects(account, bucket)[key].value
    return content


def _put(account: str, uri: str, content: bytes) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    s3_backends[account]["aws"].put_object(bucket, key, content)


def ask(url: str, body: bytes, content_type: str | None) -> requests.Response:
    """A model's server; no proxy is between."""
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Content-Type": content_type or "application/octet-stream"}
        return session.post(f"{url}/invocations", data=body, headers=headers, timeout=60)


# Endpoint configurations and tags.


def check_config(request: dict[str, Any]) -> None:
    """Refuse what CreateEndpointConfig refuses and moto takes."""
    _check_tags(request.get("Tags") or [])
    for variant in request["ProductionVariants"]:
        kind = variant.get("InstanceType") or ""
        if request.get("KmsKeyId") and kind.startswith(_WITH_DISKS):
            raise ValidationError(
                f"KmsKeyId is not supported for instance type {kind} with local storage."
            )
        low = variant.get("ContainerStartupHealthCheckTimeoutInSeconds", 60)
        if not 60 <= low <= 3600:
            raise ValidationError("ContainerStartupHealthCheckTimeoutInSeconds must be in 60-3600.")
        if "ServerlessConfig" in variant and (
            request.get("AsyncInferenceConfig") or request.get("DataCaptureConfig")
        ):
            raise ValidationError("Serverless variants take neither async nor data capture config.")


def _check_tags(tags: list[dict[str, str]]) -> None:
    keys = [tag["Key"] for tag in tags]
    if len(keys) > 50 or len(set(keys)) < len(keys):
        raise ValidationError("Tags must be 50 at most, with keys of their own.")


# Asynchronous endpoints.


def invoke_endpoint_async(urls: dict[tuple[str, str], str]) -> Callable[[Any], Any]:
    def invoke(self: Any) -> Any:
        name, account = self.path.split("/")[2], self.current_account
        backend = sagemaker_backends[account][self.region]
        url = urls.get((self.region, name)) if name in backend.endpoints else None
        config = async_config(backend, name) if url else None
        location = self.headers.get("X-Amzn-SageMaker-InputLocation") or ""
        if config is None:
            what = "not found" if url is None else "is not an asynchronous endpoint"
            return _error(f"Endpoint {name} of account {account} {what}.")
        if not location.startswith("s3://"):
            return _error("InputLocation must be an S3 URI.")
        number, output = str(uuid.uuid4()), config["OutputConfig"]
        answer = f"{output['S3OutputPath'].rstrip('/')}/{number}.out"
        failure = output.get("S3FailurePath")
        failure = f"{failure.rstrip('/')}/{number}-error.out" if failure else None
        content_type = self.headers.get("X-Amzn-SageMaker-Content-Type")

        def work() -> None:
            time.sleep(_LATER)
            act_as_endpoint("s3:GetObject", "s3:PutObject")
            try:
                asked = ask(str(url), _get(account, location), content_type)
            except KeyError:
                told = "An error occurred (404): The specified key does not exist."
            else:
                if asked.status_code == 200:
                    _put(account, answer, asked.content)
                    return
                told = (
                    f"Received client error ({asked.status_code}) from primary with message "
                    f'"{asked.text}". See https://console.aws.amazon.com/cloudwatch/home.'
                )
            if failure:
                _put(account, failure, told.encode())

        threading.Thread(target=work, daemon=True).start()
        headers = {"X-Amzn-SageMaker-OutputLocation": answer, "status": 202}
        headers |= {"X-Amzn-SageMaker-FailureLocation": failure} if failure else {}
        return 202, headers, json.dumps({"InferenceId": number})

    return invoke


def async_config(backend: Any, name: str) -> dict[str, Any] | None:
    """Of an endpoint; None if it answers at once."""
    config = backend.endpoint_configs[backend.endpoints[name].endpoint_config_name]
    found: dict[str, Any] | None = config.async_inference_config
    return found


def _error(message: str) -> Any:
    headers = {
        "x-amzn-ErrorType": "ValidationError",
        "Content-Type": "application/json",
        "status": 400,
    }
    return 400, headers, json.dumps({"message": message})


# Data capture.


def capture(
    account: str, backend: Any, name: str, body: bytes, content_type: str | None, answer: str
) -> None:
    """Write a request and its answer where the endpoint's configuration wants them, later."""
    config = backend.endpoint_configs[backend.endpoints[name].endpoint_config_name]
    wanted = config.data_capture_config or {}
    if not wanted.get("EnableCapture"):
        return
    header = wanted.get("CaptureContentTypeHeader") or {}
    as_json = content_type in (header.get("JsonContentTypes") or ())
    now = datetime.now(UTC)
    event = {
        "captureData": {
            "endpointInput": _captured("INPUT", body, content_type, as_json),
            "endpointOutput": _captured("OUTPUT", answer.encode(), "application/json", as_json),
        },
        "eventMetadata": {
            "eventId": str(uuid.uuid4()),
            "inferenceTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
        "eventVersion": "0",
    }
    (variant,) = config.production_variants
    place = f"{wanted['DestinationS3Uri'].rstrip('/')}/{name}/{variant['VariantName']}"
    uri = f"{place}/{now:%Y/%m/%d/%H}/{now:%M-%S}-{now.microsecond // 1000:03}-{uuid.uuid4()}.jsonl"

    def work() -> None:
        time.sleep(_LATER)
        try:
            act_as_endpoint("s3:PutObject")
            _put(account, uri, json.dumps(event).encode() + b"\n")
        except Exception:  # no such bucket: nobody is told
            return

    threading.Thread(target=work, daemon=True).start()


def _captured(mode: str, content: bytes, kind: str | None, as_json: bool) -> dict[str, Any]:
    data = content.decode() if as_json else base64.b64encode(content).decode()
    encoding = "JSON" if as_json else "BASE64"
    return {"observedContentType": kind, "mode": mode, "data": data, "encoding": encoding}


# Transform jobs.


def create_transform_job(url: Url) -> Callable[[Any], Any]:
    plain = SageMakerResponse.create_transform_job

    def create(self: Any) -> Any:
        request, backend = json.loads(self.body), self.sagemaker_backend
        name = request["TransformJobName"]
        _check_transform(backend, request)
        result = plain(self)
        job = backend.transform_jobs[name]
        job.transform_job_status, job.failure_reason = "InProgress", None
        job.transform_start_time = job.transform_end_time = None
        if request["TransformResources"]["InstanceType"] != NEVER_BEGINS:
            account = self.current_account
            threading.Thread(target=_transform, args=(account, backend, job, url)).start()
        return result

    return create


def _check_transform(backend: Any, request: dict[str, Any]) -> None:
    name, model = request["TransformJobName"], request["ModelName"]
    _check_tags(request.get("Tags") or [])
    if name in backend.transform_jobs:
        raise ValidationError(f"Job name must be unique within an AWS account: {name}")
    if model not in backend._models:
        raise ValidationError(f'Could not find model "{model}".')
    if request["TransformInput"].get("SplitType") != "None":
        raise ValidationError("The stand-in splits no objects.")
    if "MaxPayloadInMB" in request and request["MaxPayloadInMB"] > 100:
        raise ValidationError("MaxPayloadInMB must not exceed 100.")


def _transform(account: str, backend: Any, job: Any, url: Url) -> None:
    time.sleep(_LATER)
    try:
        job.transform_start_time = utcnow()
        act_as_endpoint(*PULLS, *LOGS, "s3:ListBucket", "s3:GetObject", "s3:PutObject")
        source = job.transform_input["DataSource"]["S3DataSource"]["S3Uri"]
        bucket, _, prefix = source.removeprefix("s3://").partition("/")
        keys = [key for key in list(_objects(account, bucket)) if key.startswith(prefix)]
        if not keys:
            raise ValueError(f"No objects found at {source}.")
        container = backend._models[job.model_name].primary_container
        server = url(_get(account, container["ModelDataUrl"]))
        output = job.transform_output["S3OutputPath"].rstrip("/")
        for key in keys:
            if job.transform_job_status == "Stopping":
                break
            body = _get(account, f"s3://{bucket}/{key}")
            if len(body) > (job.max_payload_in_mb * 2**20 if job.max_payload_in_mb else _PAYLOAD):
                raise ValueError("ClientError: Too much data for max payload size")
            asked = ask(server, body, job.transform_input.get("ContentType"))
            if asked.status_code != 200:
                raise ValueError("ClientError: See job logs for more information")
            _put(account, f"{output}/{key[len(prefix) :].lstrip('/')}.out", asked.content)
        job.transform_job_status = (
            "Stopped" if job.transform_job_status == "Stopping" else "Completed"
        )
    except Exception as error:
        job.transform_job_status, job.failure_reason = "Failed", str(error)
    job.transform_end_time = utcnow()


def stop_transform_job(self: Any) -> Any:
    name = self._get_param("TransformJobName")
    self.sagemaker_backend.describe_transform_job(transform_job_name=name)
    job = self.sagemaker_backend.transform_jobs[name]
    if job.transform_job_status != "InProgress":
        raise ValidationError(
            f"The request was rejected because the transform job is in status "
            f"{job.transform_job_status}."
        )
    job.transform_job_status = "Stopping"
    if job.transform_start_time is None:

        def end() -> None:
            time.sleep(_LATER)
            job.transform_job_status, job.transform_end_time = "Stopped", utcnow()

        threading.Thread(target=end, daemon=True).start()
    return ActionResult({})


# Autoscaling.


class ObjectNotFound(JsonRESTError):
    def __init__(self, message: str) -> None:
        super().__init__("ObjectNotFoundException", message)


def _register(plain: Callable[..., Any]) -> Callable[..., Any]:
    def register(self: Any, namespace: str, r_id: str, *args: Any, **kwargs: Any) -> Any:
        if namespace == "sagemaker":
            _check_target(self, r_id, *args, **kwargs)
        return plain(self, namespace, r_id, *args, **kwargs)

    return register


def _check_target(
    backend: Any,
    r_id: str,
    _: str,
    min_capacity: int,
    max_capacity: int,
    **__: Any,
) -> None:
    _, name, _, variant = r_id.split("/")
    endpoints = sagemaker_backends[backend.account_id][backend.region_name].endpoints
    configs = sagemaker_backends[backend.account_id][backend.region_name].endpoint_configs
    if name not in endpoints or endpoints[name].endpoint_status != "InService":
        raise AWSValidationException(f"SageMaker endpoint doesn't exist or is not ready: {name}")
    variants = configs[endpoints[name].endpoint_config_name].production_variants
    types = {one["VariantName"]: one.get("InstanceType") or "" for one in variants}
    if variant not in types or types[variant].startswith("ml.t"):
        raise AWSValidationException(f"This variant cannot be scaled: {variant}")
    if not 1 <= min_capacity <= max_capacity:
        raise AWSValidationException("Maximum capacity cannot be less than minimum capacity.")


def _deregister(plain: Callable[..., Any]) -> Callable[..., Any]:
    def deregister(self: Any, namespace: str, r_id: str, dimension: str) -> Any:
        if not self._scalable_target_exists(r_id, dimension):
            raise ObjectNotFound(f"No scalable target registered for resource ID: {r_id}")
        for key, policy in list(self.policies.items()):
            if policy.resource_id == r_id:
                del self.policies[key]
        return plain(self, namespace, r_id, dimension)

    return deregister


def _policy(plain: Callable[..., Any]) -> Callable[..., Any]:
    def put(self: Any, **given: Any) -> Any:
        where, dimension = given["resource_id"], given["scalable_dimension"]
        if not self._scalable_target_exists(where, dimension):
            raise ObjectNotFound(f"No scalable target registered for resource ID: {where}")
        return plain(self, **given)

    return put


def install(urls: dict[tuple[str, str], str], url: Url, guard: Any) -> None:
    """Put these in the place of what moto has.

    Args:
        urls: of scoring servers, by region and endpoint.
        url: of a scoring server for a model.tar.gz, which is started if none runs.
        guard: knows what each party may do.
    """
    global GUARD
    GUARD = guard
    SageMakerRuntimeResponse.invoke_endpoint_async = invoke_endpoint_async(urls)  # type: ignore[method-assign]
    SageMakerResponse.create_transform_job = create_transform_job(url)  # type: ignore[method-assign]
    SageMakerResponse.stop_transform_job = stop_transform_job  # type: ignore[attr-defined]
    scaling = ApplicationAutoscalingBackend
    scaling.register_scalable_target = _register(scaling.register_scalable_target)  # type: ignore[method-assign]
    scaling.deregister_scalable_target = _deregister(scaling.deregister_scalable_target)  # type: ignore[method-assign]
    scaling.put_scaling_policy = _policy(scaling.put_scaling_policy)  # type: ignore[method-assign]
