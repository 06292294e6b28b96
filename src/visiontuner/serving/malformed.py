"""Requests that a model must answer with a 4xx status, whatever is wrong with them."""

from __future__ import annotations

import base64
import json
from typing import Any

JSON = "application/json"


def _table(value: Any, **params: Any) -> bytes:
    table = {"columns": ["image"], "data": [[value]]}
    return json.dumps({"dataframe_split": table, "params": params}).encode()


# The smallest picture there is, one pixel.
_GIF = base64.b64encode(
    base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
).decode()
# What is wrong -> body and content type.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "an empty body": (b"", JSON),
    "no JSON": (b"{", JSON),
    "a list": (b"[1, 2]", JSON),
    "no table": (b'{"image": "x"}', JSON),
    "another column": (b'{"dataframe_split": {"columns": ["x"], "data": [["x"]]}}', JSON),
    "a number for a picture": (_table(3), JSON),
    "null for a picture": (_table(None), JSON),
    "no base64": (_table("§"), JSON),
    "no picture": (_table(base64.b64encode(b"no picture").decode()), JSON),
    "an empty picture": (_table(""), JSON),
    "half a picture": (_table(_GIF[:40]), JSON),
    "top_k of 0": (_table(_GIF, top_k=0), JSON),
    "top_k of text": (_table(_GIF, top_k="many"), JSON),
    "threshold of 2": (_table(_GIF, threshold=2.0), JSON),
    "another on_error": (_table(_GIF, on_error="ignore"), JSON),
    "a bare JPEG": (b"\xff\xd8\xff", "image/jpeg"),
}
