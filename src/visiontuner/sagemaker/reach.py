"""Whether a job can write to an MLflow, from its address alone; nothing is asked."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from visiontuner.errors import UserMistake
from visiontuner.text import without_secrets

_NO_TRACKING = "none"
# MLflow's own; what they hold must not be readable in a job's description.
_SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)
_PRIVATE_ENDINGS = (".local", ".internal", ".lan", ".home.arpa", ".localdomain")
_LATER = "the journal travels instead, and `visiontuner attach JOB` writes it"


def reachable_tracking(
    uri: str, environment: Mapping[str, str] | None = None, *, in_vpc: bool = False
) -> tuple[str | None, str]:
    """Whether a job can write to an MLflow, and the same in words.

    A database or a server on this machine is out of a job's reach, a private address is without a
    VPC, and credentials do not travel in a job's request, where everybody who may describe the job
    would read them.

    Args:
        in_vpc: the job runs in a VPC, which may lead to private addresses.

    Raises:
        UserMistake: it is no address.
    """
    variables = os.environ if environment is None else environment
    reason = _reason_against(uri, variables, in_vpc)
    if reason is None:
        return uri, f"live, into {without_secrets(uri)}"
    return None, f"{reason}: {_LATER}"


def _reason_against(uri: str, variables: Mapping[str, str], in_vpc: bool) -> str | None:
    if uri == _NO_TRACKING:
        return "none is wanted"
    if uri.startswith("arn:"):
        return None
    shown = without_secrets(uri)
    try:
        parts = urlsplit(uri)
        host = parts.hostname or ""
    except ValueError:
        raise UserMistake(f"MLFLOW_TRACKING_URI is no address: {without_secrets(uri)!r}.") from None
    if parts.scheme not in ("http", "https"):
        return _no_server(uri, parts.scheme)
    if parts.username or parts.password or any(variables.get(name) for name in _SECRETS):
        return f"{host} wants credentials, which do not travel in a job's request"
    if _is_this_machine(host):
        return f"{shown} is this machine's own"
    if _is_private(host) and not in_vpc:
        return f"{shown} is in a private network, out of reach of a job without a VPC"
    return None


def _no_server(uri: str, scheme: str) -> str:
    shown = without_secrets(uri)
    if uri == "databricks" or scheme.startswith("databricks"):
        return f"{shown} wants credentials, which do not travel in a job's request"
    if scheme in ("", "file"):
        return f"{shown} is a folder, out of a job's reach"
    return f"{shown} is a database, out of a job's reach"


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    if address is not None:
        return address.is_loopback or address.is_unspecified
    return host in ("", "localhost") or host.endswith(".localhost")


def _is_private(host: str) -> bool:
    address = _address(host)
    if address is not None:
        return not address.is_global
    name = host.rstrip(".")
    return "." not in name or name.endswith(_PRIVATE_ENDINGS)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
