"""AWS for tests: moto as an HTTP server on this machine, and what moto lacks of endpoints and jobs.

An endpoint here is `Creating` until a real MLflow scoring server, started from the very
model.tar.gz that a deployment uploaded to its S3, answers; `invoke_endpoint` passes on to that
server, with AWS's limits and errors. As in AWS, an endpoint whose server does not start is
`Failed`, an update whose server does not start keeps the old one, and an endpoint that is being
created or updated can be neither updated nor deleted.

Training jobs really run (`training_jobs.py`), or are directed by a test (`stand_in_jobs.py`).

    python stand_in.py      prints its port; ends with SIGTERM, or when who started it has ended

What a test can ask for:
    a role whose name holds `unpassable`            the caller may not pass it
    instance type ml.p3.16xlarge                    the account's quota is 0
    the container's variable STAND_IN_HANG=SECONDS  never answers, and is given up after so long,
                                    or STAND_IN_HANG=PATH  as soon as there is such a file
    the container's variable STAND_IN_VANISH=1      someone deletes the endpoint meanwhile
    an access key that begins with AKIAEXPIRED      credentials that have expired
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import policies
import stand_in_jobs
import stand_in_serving
import training_jobs
from moto.applicationautoscaling.models import applicationautoscaling_backends
from moto.core.exceptions import ServiceException
from moto.core.responses import ActionResult
from moto.core.utils import unix_time_millis, utcnow
from moto.ecr.responses import ECRResponse
from moto.logs.models import logs_backends
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.s3.models import s3_backends
from moto.sagemaker.exceptions import ValidationError
from moto.sagemaker.models import sagemaker_backends
from moto.sagemaker.responses import SageMakerResponse
from moto.sagemakerruntime.responses import SageMakerRuntimeResponse
from werkzeug.serving import make_server

from visiontuner.errors import VisiontunerError
from visiontuner.io.download import extract
from visiontuner.serving.server import ScoringServer, local_environment

NO_QUOTA = "ml.p3.16xlarge"
HANG, VANISH = "STAND_IN_HANG", "STAND_IN_VANISH"
LAYERS = "ecr-layers"  # a bucket: image configurations by digest
EXPIRED = "AKIAEXPIRED"
_UNHEALTHY = (
    "The primary container for production variant {} did not pass the ping health check. "
    "Please check CloudWatch logs for this endpoint."
)
_PORT = 0


class ResourceLimitExceeded(ServiceException):
    code = "ResourceLimitExceeded"


class AccessDenied(ServiceException):
    code = "AccessDeniedException"


class Servers:
    """Scoring servers by the content of their models; equal models share one."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stand-in-")
        self._servers: dict[str, ScoringServer] = {}
        self._lock = threading.Lock()

    def url(self, archive: bytes) -> str:
        """Of the server for a model.tar.gz, which is started if none runs."""
        with self._lock:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                digest = _content(tar)
            folder = Path(self._folder.name) / digest
            packed = folder.with_suffix(".tar.gz")
            packed.write_bytes(archive)
            extract(packed, folder)
            packed.unlink()
            if digest not in self._servers:
                server = ScoringServer(folder, local_environment())
                server.__enter__()
                self._servers[digest] = server
            return self._servers[digest].url

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()
        self._folder.cleanup()


def _content(tar: tarfile.TarFile) -> str:
    digest = hashlib.sha256()
    for member in sorted(tar.getmembers(), key=lambda m: m.name):
        file = tar.extractfile(member)
        content = file.read() if file else b""
        digest.update(f"{member.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


GUARD = policies.Guard(
    Path(os.environ["STAND_IN_CALLS"]) if "STAND_IN_CALLS" in os.environ else None
)
SERVERS = Servers()
URLS: dict[tuple[str, str], str] = {}  # of scoring servers, by region and endpoint


def _wait(until: str) -> None:
    """For so many seconds, or until a file is there."""
    if "/" not in until:
        time.sleep(float(until))
        return
    while not Path(until).exists():
        time.sleep(0.02)


def _start(response: Any, name: str, config_name: str, failed: Callable[[str], None]) -> None:
    """What SageMaker does behind a create or an update, in a thread."""
    backend = response.sagemaker_backend
    account, region = response.current_account, response.region
    variant = backend.endpoint_configs[config_name].production_variants[0]
    container = backend._models[variant["ModelName"]].primary_container

    def work() -> None:
        if VANISH in container["Environment"]:
            del backend.endpoints[name]
            return
        try:
            hang = container["Environment"].get(HANG)
            if hang:
                _wait(hang)
                raise VisiontunerError("It hangs.")
            stand_in_serving.act_as_endpoint(*stand_in_serving.PULLS, "s3:GetObject")
            bucket, key = container["ModelDataUrl"].removeprefix("s3://").split("/", 1)
            URLS[region, name] = SERVERS.url(
                s3_backends[account]["aws"].get_object(bucket, key).value
            )
        except Exception as error:
            _log(account, region, name, variant["VariantName"], str(error))
            failed(_UNHEALTHY.format(variant["VariantName"]))
        else:
            endpoint = backend.endpoints[name]
            endpoint.endpoint_config_name = config_name
            endpoint.async_inference_config = stand_in_serving.async_config(backend, name)
            endpoint.production_variants = endpoint._process_production_variants([variant])
            endpoint.last_modified_time = utcnow()
            endpoint.endpoint_status = "InService"

    threading.Thread(target=work, daemon=True).start()


def _log(account: str, region: str, name: str, variant: str, text: str) -> None:
    stand_in_serving.act_as_endpoint(*stand_in_serving.LOGS)
    logs, group = logs_backends[account][region], f"/aws/sagemaker/Endpoints/{name}"
    stream = f"{variant}/i-0123456789"
    if group not in logs.groups:
        logs.create_log_group(group, {})
    if stream not in logs.groups[group].streams:
        logs.create_log_stream(group, stream)
    event = {"timestamp": int(unix_time_millis()), "message": text}
    logs.put_log_events(group, stream, [event])


_create_model = SageMakerResponse.create_model
_create_config = SageMakerResponse.create_endpoint_config
_create_endpoint = SageMakerResponse.create_endpoint
_delete_endpoint = SageMakerResponse.delete_endpoint


def create_model(self: Any) -> Any:
    role = self._get_param("ExecutionRoleArn")
    if "unpassable" in role:
        raise AccessDenied(
            "User: arn:aws:iam::123456789012:user/someone is not authorized to perform: "
            f"iam:PassRole on resource: {role}"
        )
    return _create_model(self)


def create_endpoint_config(self: Any) -> Any:
    stand_in_serving.check_config(json.loads(self.body))
    return _create_config(self)


def create_endpoint(self: Any) -> Any:
    backend, name = self.sagemaker_backend, self._get_param("EndpointName")
    if name in backend.endpoints:
        arn = backend.endpoints[name].arn
        raise ValidationError(f'Cannot create already existing endpoint "{arn}".')
    config_name = self._get_param("EndpointConfigName")
    variant = backend.describe_endpoint_config(config_name)["ProductionVariants"][0]
    if variant.get("InstanceType") == NO_QUOTA:
        raise ResourceLimitExceeded(
            f"The account-level service limit '{NO_QUOTA} for endpoint usage' is 0 Instances, with "
            "current utilization of 0 Instances and a request delta of 1 Instances."
        )
    result = _create_endpoint(self)
    endpoint = backend.endpoints[name]
    endpoint.endpoint_status = "Creating"

    def failed(reason: str) -> None:
        endpoint.endpoint_status, endpoint.failure_reason = "Failed", reason

    _start(self, name, config_name, failed)
    return result


def update_endpoint(self: Any) -> Any:
    backend, name = self.sagemaker_backend, self._get_param("EndpointName")
    _refuse_in_progress(backend, name)
    endpoint, config_name = backend.endpoints[name], self._get_param("EndpointConfigName")
    backend.describe_endpoint_config(config_name)
    _refuse_scaled(self, name, endpoint.endpoint_config_name, config_name)
    endpoint.endpoint_status, endpoint.failure_reason = "Updating", None

    def failed(reason: str) -> None:
        endpoint.endpoint_status, endpoint.failure_reason = "InService", reason

    _start(self, name, config_name, failed)
    return ActionResult({"EndpointArn": endpoint.arn})


def _refuse_scaled(response: Any, name: str, old: str, new: str) -> None:
    """Autoscaled variants are neither removed nor given another type of instance."""
    scaling = applicationautoscaling_backends[response.current_account][response.region]
    targets = scaling.targets.get("sagemaker:variant:DesiredInstanceCount", {})
    configs = response.sagemaker_backend.endpoint_configs
    types = {v["VariantName"]: v.get("InstanceType") for v in configs[new].production_variants}
    for variant in configs[old].production_variants:
        scaled = f"endpoint/{name}/variant/{variant['VariantName']}" in targets
        if scaled and types.get(variant["VariantName"]) != variant.get("InstanceType"):
            raise ValidationError(
                f"The variant(s) [{variant['VariantName']}] must be deregistered as scalable "
                "target with AWS Auto Scaling before they can be removed or have their instance "
                "type updated."
            )


def delete_endpoint(self: Any) -> Any:
    name = self._get_param("EndpointName")
    _refuse_in_progress(self.sagemaker_backend, name)
    URLS.pop((self.region, name), None)
    return _delete_endpoint(self)


def _refuse_in_progress(backend: Any, name: str) -> None:
    backend.describe_endpoint(name)
    endpoint = backend.endpoints[name]
    if endpoint.endpoint_status in ("Creating", "Updating"):
        raise ValidationError(f'Cannot update in-progress endpoint "{endpoint.arn}".')


def invoke_endpoint(self: Any) -> Any:
    name = self.path.split("/")[2]
    endpoints = sagemaker_backends[self.current_account][self.region].endpoints
    url = URLS.get((self.region, name)) if name in endpoints else None
    if url is None:
        message = f"Endpoint {name} of account {self.current_account} not found."
        return _error(400, "ValidationError", {"message": message})
    backend = sagemaker_backends[self.current_account][self.region]
    if stand_in_serving.async_config(backend, name):
        message = f"Endpoint {name} is asynchronous; it is invoked with InvokeEndpointAsync."
        return _error(400, "ValidationError", {"message": message})
    body = self.body if isinstance(self.body, bytes) else self.body.encode()
    if len(body) > _largest_request(endpoints[name]):
        message = "Request 0aa0bd2e-3bb4-4d4a-8f5f-9cc2a8b1c7f6 has oversize body."
        return _error(400, "ValidationError", {"message": message})
    kind = self.headers.get("Content-Type")
    answer = stand_in_serving.ask(url, body, kind)
    if answer.status_code != 200:
        message = (
            f"Received client error ({answer.status_code}) from primary with message "
            f'"{answer.text}". See https://console.aws.amazon.com/cloudwatch/home.'
        )
        told = {"OriginalStatusCode": answer.status_code, "OriginalMessage": answer.text}
        return _error(424, "ModelError", {"Message": message, **told})
    stand_in_serving.capture(self.current_account, backend, name, body, kind, answer.text)
    return 200, {"Content-Type": "application/json"}, answer.text


def _largest_request(endpoint: Any) -> int:
    variants = endpoint.production_variants
    serverless = any("CurrentServerlessConfig" in variant for variant in variants)
    return (4 if serverless else 6) * 2**20


def _error(status: int, code: str, told: dict[str, Any]) -> Any:
    # moto takes the status from the headers.
    headers = {"x-amzn-ErrorType": code, "Content-Type": "application/json", "status": status}
    return status, headers, json.dumps(told)


def get_download_url_for_layer(self: Any) -> Any:
    digest = self._get_param("layerDigest")
    url = f"http://127.0.0.1:{_PORT}/{LAYERS}/{digest.replace(':', '-')}"
    return ActionResult({"downloadUrl": url, "layerDigest": digest})


SageMakerResponse.create_model = create_model  # type: ignore[method-assign]
SageMakerResponse.create_endpoint_config = create_endpoint_config  # type: ignore[method-assign]
SageMakerResponse.create_endpoint = create_endpoint  # type: ignore[method-assign]
SageMakerResponse.update_endpoint = update_endpoint  # type: ignore[attr-defined]
SageMakerResponse.delete_endpoint = delete_endpoint  # type: ignore[method-assign]
SageMakerRuntimeResponse.invoke_endpoint = invoke_endpoint  # type: ignore[method-assign]
ECRResponse.get_download_url_for_layer = get_download_url_for_layer
training_jobs.install()
stand_in_jobs.install()
stand_in_serving.install(URLS, SERVERS.url, GUARD)


def refusing_expired(application: Any) -> Any:
    """AWS looks at the credentials first."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        signed = environ.get("HTTP_AUTHORIZATION", "")
        if EXPIRED not in signed:
            return application(environ, start_response)
        told = f"The security token {EXPIRED}000000000 included in the request is expired"
        if "/sts/" in signed:
            body = f"<E><Error><Code>ExpiredToken</Code><Message>{told}</Message></Error></E>"
        else:
            body = json.dumps({"message": told})
        headers = [("x-amzn-ErrorType", "ExpiredTokenException")]
        start_response("403 Forbidden", headers)
        return [body.encode()]

    return answer


def guarding_policies(application: Any) -> Any:
    """AWS refuses what the party's policies do not allow: here they are those of docs/aws.md."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        party = policies.party_of(environ.get("HTTP_AUTHORIZATION", ""))
        if party is None:
            return application(environ, start_response)
        body = b""
        if "/s3/" not in environ["HTTP_AUTHORIZATION"]:  # whose bodies are no part of an action
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
        for action in policies.actions_of(environ, body):
            if GUARD.refused(party, action):
                return _denied(environ, action, start_response)
        return application(environ, start_response)

    return answer


def _denied(environ: dict[str, Any], action: str, start_response: Any) -> list[bytes]:
    told = f"User is not authorized to perform: {action}"
    signed = environ["HTTP_AUTHORIZATION"]
    if any(service in signed for service in ("/s3/", "/sts/", "/iam/")):
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        error = f"<Error><Code>AccessDenied</Code><Message>{told}</Message></Error>"
        wrapped = error if "/s3/" in signed else f"<ErrorResponse>{error}</ErrorResponse>"
        return [wrapped.encode()]
    start_response("400 Bad Request", [("x-amzn-ErrorType", "AccessDeniedException")])
    return [json.dumps({"__type": "AccessDeniedException", "message": told}).encode()]


def guarding_buckets(application: Any) -> Any:
    """S3 refuses a bucket whose owner is not the expected one; without the header it only serves.

    The caller may make buckets, and not give them an ACL.
    """

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        expected = environ.get("HTTP_X_AMZ_EXPECTED_BUCKET_OWNER")
        _, owner = s3_backends.bucket_accounts.get(bucket, ("", expected))
        gives_acl = environ["REQUEST_METHOD"] == "PUT" and not key and "HTTP_X_AMZ_ACL" in environ
        if expected in (None, owner) and not gives_acl:
            return application(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]

    return answer


def main() -> None:
    global _PORT
    application: Any = DomainDispatcherApplication(create_backend_app)
    application = refusing_expired(guarding_policies(guarding_buckets(application)))
    server = make_server("127.0.0.1", 0, application, True, request_handler=MotoRequestHandler)
    _PORT = server.server_address[1]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(_PORT, flush=True)
    parent = os.getppid()
    try:
        while not ended.wait(0.5) and os.getppid() == parent:
            pass
    finally:
        training_jobs.stop_all()
        SERVERS.stop()
        sys.stdout.flush()
        os._exit(0)  # threads that wait for a server wait for nothing now


if __name__ == "__main__":
    main()
