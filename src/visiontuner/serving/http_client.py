"""The way to a scoring server's URL."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NoReturn
from urllib.parse import urlsplit

import requests

from visiontuner.errors import ServingError
from visiontuner.serving.answers import Answer, Options
from visiontuner.serving.client import (
    BUSY,
    REFUSED,
    REQUEST_BYTES,
    TIMEOUT_SECONDS,
    TOO_LARGE,
    Busy,
    Refused,
    TooLarge,
    decode_answers,
    encode_request,
    is_untrusted,
    lowered,
    reason_in,
)
from visiontuner.text import without_secrets

_NO_URL = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
)
_BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


class HttpTransport:
    """MLflow's scoring server behind a URL, such as `http://127.0.0.1:5000`."""

    def __init__(self, url: str, *, body_limit: int = REQUEST_BYTES) -> None:
        self.url = url.rstrip("/").removesuffix("/invocations")
        self.body_limit = body_limit
        self._shown = without_secrets(self.url)
        try:
            host = urlsplit(url).hostname
        except ValueError:
            raise self._no_url() from None
        # A proxy cannot reach this machine's own loopback.
        self._direct = host in ("127.0.0.1", "localhost", "::1")
        self._local = threading.local()
        self._has_answered = False

    def ask(self, contents: Sequence[bytes], options: Options) -> list[Answer]:
        return decode_answers(self._send(encode_request(contents, options)), len(contents))

    def _send(self, body: bytes) -> bytes:
        try:
            response = self._session().post(
                f"{self.url}/invocations",
                data=body,
                headers={"Content-Type": "application/json"},
                timeout=TIMEOUT_SECONDS,
            )
        except _NO_URL:
            raise self._no_url() from None
        except requests.ReadTimeout:
            raise Refused("no answer in time") from None
        except requests.RequestException as error:
            self._broken(error)
        self._has_answered = True
        if response.status_code == 200:
            return response.content
        reason = reason_in(response.content)
        if response.status_code in BUSY:
            raise Busy(reason, _seconds(response.headers.get("Retry-After")))
        if response.status_code == TOO_LARGE:
            self.body_limit = lowered(self.body_limit, body)
            raise TooLarge(reason)
        if response.status_code in REFUSED:
            raise Refused(reason)
        raise ServingError(f"{self._shown} answers {response.status_code}: {reason}")

    def _no_url(self) -> ServingError:
        return ServingError(f"{self._shown!r} is no URL; try http://127.0.0.1:5000.")

    def _broken(self, error: requests.RequestException) -> NoReturn:
        """What breaks is worth another try, but not an address where nothing ever answered."""
        if is_untrusted(error) or not isinstance(error, _BROKEN):
            raise ServingError(f"Cannot ask {self._shown}: {type(error).__name__}.") from None
        if isinstance(error, requests.exceptions.ProxyError):
            raise Busy("the proxy does not let it through") from None
        nobody = "NewConnectionError" in str(error) or "NameResolutionError" in str(error)
        if nobody and not self._has_answered:
            raise ServingError(
                f"Nothing answers at {self._shown}. Start it: mlflow models serve -m "
                "models:/NAME@champion --env-manager local --port 5000"
            ) from None
        raise Busy("the connection broke") from None

    def _session(self) -> requests.Session:
        # A session is one thread's; each keeps its connection.
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = not self._direct
        session: requests.Session = self._local.session
        return session


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None
