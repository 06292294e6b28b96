"""The policies of docs/aws.md, and the calls that reach the stand-in, as AWS's IAM names both.

Three parties call: who runs a command (`caller`), the role of a training job (`job`) and that of an
endpoint or a transform job (`endpoint`). The stand-in refuses what the party's policies do not
allow, and writes down what each has called. Actions are compared, resources are not: the pages'
names of buckets are others than a test's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

PAGE = Path(__file__).parents[2] / "docs" / "aws.md"
HEADINGS = {
    "The caller": "caller",
    "The role of a training job": "job",
    "The role of an endpoint": "endpoint",
}
UNSEEN = "What the stand-in cannot show"
KEYS = {"testing": "caller", "job-role": "job", "endpoint-role": "endpoint"}
FREE = {"sts:GetCallerIdentity"}  # nobody needs a permission for it


def sections(page: Path = PAGE) -> dict[str, str]:
    """The text below each heading of the third level under `Permissions`."""
    text = page.read_text("utf-8").split("\n## Permissions\n")[1].split("\n## ")[0]
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def documents(text: str) -> list[dict[str, Any]]:
    """The JSON documents among the indented lines of a text."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, flags=re.MULTILINE)
    return [json.loads(block) for block in blocks if block.strip().startswith("{")]


def allowed(page: Path = PAGE) -> dict[str, set[str]]:
    """The actions that each party's policies allow."""
    found: dict[str, set[str]] = {}
    for heading, party in HEADINGS.items():
        actions = found.setdefault(party, set())
        for document in documents(sections(page)[heading]):
            for statement in document["Statement"]:
                if "Principal" not in statement:  # that is who may take a role on
                    actions.update(_listed(statement["Action"]))
    return found


def unseen(page: Path = PAGE) -> set[tuple[str, str]]:
    """Party and action of each row that explains why the stand-in cannot show it."""
    rows = re.findall(r"^\| (\w+) \| (.+?) \|", sections(page)[UNSEEN], flags=re.MULTILINE)
    return {
        (party, action)
        for party, actions in rows
        if party in KEYS.values()
        for action in re.findall(r"`([\w-]+:[\w*]+)`", actions)
    }


def _listed(actions: str | list[str]) -> list[str]:
    return [actions] if isinstance(actions, str) else actions


def is_allowed(action: str, actions: set[str]) -> bool:
    """Whether one of the actions, which may have `*`, is this one."""
    return action in FREE or any(fnmatchcase(action, one) for one in actions)


# Requests -> actions.


_CREDENTIAL = re.compile(r"Credential=([^/]+)/\d+/[^/]+/([^/]+)/aws4_request")
_OPERATION = re.compile(r"/service/[^/]+/operation/(\w+)")
_SERVICES = {"sagemaker-runtime": "sagemaker"}


def party_of(authorization: str) -> str | None:
    """Who signed a request; None: nobody, or who prepares a test."""
    match = _CREDENTIAL.search(authorization)
    if match is None:
        return None
    # The keys of a role that was taken on are moto's own.
    return "caller" if match[1].startswith("ASIA") else KEYS.get(match[1])


def actions_of(environ: dict[str, Any], body: bytes) -> Iterator[str]:
    """All that a request needs: some need more than their own name says."""
    match = _CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
    assert match is not None
    service = _SERVICES.get(match[2], match[2])
    if service == "s3":
        yield _s3(environ)
        if environ.get("HTTP_X_AMZ_SERVER_SIDE_ENCRYPTION") == "aws:kms":
            yield "kms:GenerateDataKey"
        return
    name = _name(environ, body)
    yield f"{service}:{name}"
    if service == "sagemaker" and name.startswith("Create"):
        request = json.loads(body)
        if request.get("Tags"):
            yield "sagemaker:AddTags"
        if "ExecutionRoleArn" in request or "RoleArn" in request:
            yield "iam:PassRole"


def _name(environ: dict[str, Any], body: bytes) -> str:
    target = environ.get("HTTP_X_AMZ_TARGET")
    if target:
        return str(target).rpartition(".")[2]
    path = environ["PATH_INFO"]
    if match := _OPERATION.search(path):
        return match[1]
    if path.startswith("/endpoints/"):
        return "InvokeEndpointAsync" if path.endswith("async-invocations") else "InvokeEndpoint"
    return parse_qs(body.decode())["Action"][0]


def _s3(environ: dict[str, Any]) -> str:
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), True)
    bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
    if not bucket:
        return "s3:ListAllMyBuckets"
    if not key:
        if method == "POST" and "delete" in query:
            return "s3:DeleteObject"
        if "location" in query:
            return "s3:GetBucketLocation"
        if "uploads" in query:
            return "s3:ListBucketMultipartUploads"
        return {"PUT": "s3:CreateBucket", "DELETE": "s3:DeleteBucket"}.get(method, "s3:ListBucket")
    if "tagging" in query:
        return "s3:PutObjectTagging" if method == "PUT" else "s3:GetObjectTagging"
    if method == "DELETE":
        return "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
    if "uploadId" in query and method == "GET":
        return "s3:ListMultipartUploadParts"
    return "s3:GetObject" if method in ("GET", "HEAD") else "s3:PutObject"


class Guard:
    """Refuses what a party may not do, and writes down what it did.

    Args:
        calls: a file that several processes append to; None: nothing is written.
    """

    def __init__(self, calls: Path | None) -> None:
        self._allowed = allowed()
        self._calls = calls
        self._written: set[tuple[str, str]] = set()

    def refused(self, party: str, action: str) -> bool:
        """Whether a party may not do this; written down before, as it was wanted."""
        if (party, action) not in self._written:
            self._written.add((party, action))
            if self._calls is not None:
                with self._calls.open("a") as file:
                    file.write(f"{party} {action}\n")
        return not is_allowed(action, self._allowed[party])


def unused(calls: Path, page: Path = PAGE) -> list[str]:
    """What the page allows and nobody did, but for what it explains; and what it explains twice."""
    done: dict[str, set[str]] = {party: set() for party in KEYS.values()}
    for line in calls.read_text().split("\n"):
        if line:
            party, action = line.split()
            done[party].add(action)
    explained = unseen(page)
    wrong = []
    for party, actions in allowed(page).items():
        for action in sorted(actions):
            used = any(fnmatchcase(one, action) for one in done[party])
            if not used and (party, action) not in explained:
                wrong.append(f"{party}: {action} is allowed, never used, and not explained")
            if used and (party, action) in explained:
                wrong.append(f"{party}: {action} is explained as unseen, and was seen")
    return wrong
