"""The policies of docs/aws.md are whole, and the stand-in holds the parties to them.

That each of them is used is known when all tests have ended: `pytest_sessionfinish`.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

# Whose permissions have the names of their operations.
SERVICES = {
    "sagemaker": "sagemaker",
    "ecr": "ecr",
    "logs": "logs",
    "application-autoscaling": "application-autoscaling",
    "kms": "kms",
    "pricing": "pricing",
    "servicequotas": "service-quotas",
    "iam": "iam",
    "sts": "sts",
}
# Permissions that are no operations: AWS's service authorisation reference lists them.
NO_OPERATIONS = {"iam:PassRole", "sagemaker:CallMlflowAppApi"}
AT_RUNTIME = {"InvokeEndpoint", "InvokeEndpointAsync"}


@pytest.fixture(scope="module")
def policies() -> ModuleType:
    import importlib.util

    path = Path(__file__).with_name("policies.py")
    specification = importlib.util.spec_from_file_location("policies", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_permission_is_one_of_awss(policies: ModuleType) -> None:
    for party, actions in policies.allowed().items():
        assert actions, party
        for action in actions:
            service, _, name = action.partition(":")
            if service in SERVICES and action not in NO_OPERATIONS:
                client = boto3.client(SERVICES[service], region_name="eu-west-1")
                known = set(client.meta.service_model.operation_names) | AT_RUNTIME
                assert name in known, action


def test_what_is_explained_is_allowed(policies: ModuleType) -> None:
    allowed = policies.allowed()
    rows = policies.unseen()
    assert rows
    assert [row for row in rows if row[1] not in allowed[row[0]]] == []


@pytest.mark.parametrize(
    ("service", "call", "code"),
    [
        ("sagemaker", ("list_domains", {}), "AccessDeniedException"),
        ("s3", ("delete_bucket", {"Bucket": "photos"}), "AccessDenied"),
        ("iam", ("create_user", {"UserName": "me"}), "AccessDenied"),
    ],
)
def test_the_stand_in_refuses_what_no_policy_allows(
    aws: Any, service: str, call: tuple[str, dict[str, str]], code: str
) -> None:
    own = boto3.client(service, region_name="eu-west-1", endpoint_url=aws.url)
    with pytest.raises(ClientError, match="not authorized") as refused:
        getattr(own, call[0])(**call[1])
    assert refused.value.response["Error"]["Code"] == code


def test_a_permission_that_nobody_uses_is_told(policies: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n## Permissions\n\n### The caller\n\n"
        '    {"Statement": [{"Effect": "Allow", "Resource": "*",\n'
        '      "Action": ["s3:GetObject", "s3:PutObject", "kms:*"]}]}\n\n'
        "### The role of a training job\n\n### The role of an endpoint\n\n"
        "### What the stand-in cannot show\n\n| who | what | why |\n|---|---|---|\n"
        "| caller | `kms:*` | read |\n\n## Next\n"
    )
    calls = tmp_path / "calls"
    calls.write_text("caller s3:GetObject\n")
    assert policies.unused(calls, page) == [
        "caller: s3:PutObject is allowed, never used, and not explained"
    ]
    calls.write_text("caller s3:GetObject\ncaller s3:PutObject\ncaller kms:Decrypt\n")
    assert policies.unused(calls, page) == ["caller: kms:* is explained as unseen, and was seen"]
