"""URLs as they may be shown: without passwords and signatures."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(?<=://)[^/\s'\"]+@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]+")
_SECRET_VALUE = re.compile(
    r"([?&][\w.-]*(?:sig|token|credential|password|secret|key)[\w.-]*=)[^&#\s]*", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """Hide `user:password@` and the query, a signature perhaps, in any URL of a text."""
    return _QUERY.sub(r"\1", _PASSWORD.sub("", text))


def recognisable(url: str) -> str:
    """A URL that stays another than its neighbours: of its query only what looks secret is hidden.

    `https://me:pass@host/a?id=3&X-Amz-Signature=12ab` -> `https://host/a?id=3&X-Amz-Signature=…`
    """
    return _SECRET_VALUE.sub(r"\1…", _PASSWORD.sub("", url))
