"""JSON as we write it into files: UTF-8, readable by any reader."""

from __future__ import annotations

import json
from typing import Any


def encode_json(value: Any, *, indent: int | None = None) -> bytes:
    """JSON as UTF-8.

    Raises:
        ValueError: a number is not finite, which JSON has no word for.
    """
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False).encode()
    except UnicodeEncodeError:
        # A file name that is not UTF-8 holds halves of surrogate pairs; escaped they pass.
        return json.dumps(value, indent=indent, allow_nan=False).encode()
