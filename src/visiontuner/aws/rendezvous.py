"""How the hosts of a job find each other, and learn how it ended.

Every worker keeps one connection to the head. Over it go, one JSON object a line:

    head     {"nonce": …}
    worker   {"host": "algo-2", "proof": HMAC-SHA256 of nonce and name}
    head     {"welcome": true}                  its Ray is up
    worker   {"joined": true} or {"failed": reason}
    head     {"code": 0, "reason": ""}          the job has ended

A connection that breaks says that a host has gone. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_RETRY_SECONDS = 0.5
_LONGEST_LINE = 65536


class RendezvousError(Exception):
    """The hosts do not come together; the message says which and why."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, and why if it is not 0."""

    code: int
    reason: str = ""


class Gathering:
    """The head's side.

    Args:
        workers: the hosts to wait for.
        address: where to listen; port 0 takes any, see `port`.
        key: what proves that a host belongs to this job.
    """

    def __init__(self, workers: Sequence[str], address: tuple[str, int], key: str) -> None:
        self._workers = set(workers)
        self._key = key
        self._changed = threading.Condition()
        self._joined: dict[str, _Line] = {}
        self._failed: dict[str, str] = {}
        self._ended = False
        self._listener = socket.create_server(address, backlog=max(8, len(workers)))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._listener.close()
        with self._changed:
            for line in self._joined.values():
                line.close()

    def wait(self, seconds: float, terminated: threading.Event) -> None:
        """Return when all workers have joined.

        Raises:
            RendezvousError: one failed, or did not join in time, or we are told to end.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while missing := sorted(self._workers - self._joined.keys()):
                if self._failed:
                    raise RendezvousError("; ".join(self._failed.values()))
                if terminated.is_set():
                    raise RendezvousError("The job was stopped before all its hosts were there.")
                if time.monotonic() > deadline:
                    raise RendezvousError(
                        f"{', '.join(missing)} did not join within {seconds:.0f} s. Their logs "
                        "say how far they came; submit the job again to go on."
                    )
                self._changed.wait(0.2)

    def tell(self, outcome: Outcome) -> None:
        """Send the end to every worker that is still there."""
        with self._changed:
            for line in self._joined.values():
                with suppress(OSError):
                    line.send({"code": outcome.code, "reason": outcome.reason})

    def _accept(self) -> None:
        while not self._ended:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        line, host = _Line(connection), None
        try:
            connection.settimeout(30)
            host = self._greet(line)
            connection.settimeout(None)
            answer = line.receive()
            with self._changed:
                if answer.get("joined"):
                    self._joined[host] = line
                else:
                    self._failed[host] = str(answer.get("failed", f"{host} does not answer."))
                    line.close()
                self._changed.notify_all()
        except (OSError, ValueError, KeyError):
            line.close()
            if host is not None and not self._ended:
                with self._changed:
                    self._failed[host] = f"{host} went away while it joined."
                    self._changed.notify_all()

    def _greet(self, line: _Line) -> str:
        nonce = secrets.token_hex(16)
        line.send({"nonce": nonce})
        answer = line.receive()
        host, proof = str(answer["host"]), str(answer["proof"])
        if host not in self._workers or not hmac.compare_digest(
            proof, _proof(self._key, nonce, host)
        ):
            raise ValueError(host)
        line.send({"welcome": True})
        return host


class Rendezvous:
    """A worker's side: connected to the head when the context is entered.

    Raises:
        RendezvousError: the head did not come up in time, or does not take us.
    """

    def __init__(
        self,
        host: str,
        head: tuple[str, int],
        key: str,
        seconds: float,
        terminated: threading.Event,
    ) -> None:
        self._host, self._head, self._key = host, head, key
        self._seconds, self._terminated = seconds, terminated

    def __enter__(self) -> Rendezvous:
        self._line = self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    @property
    def own_address(self) -> str:
        """This host's address on the network that it shares with the head."""
        return str(self._line.connection.getsockname()[0])

    def joined(self) -> None:
        self._send({"joined": True})

    def failed(self, reason: str) -> None:
        with suppress(RendezvousError):
            self._send({"failed": reason})

    def wait_for_outcome(self, ray_ended: Callable[[], bool]) -> Outcome:
        """What the head says at the end; meanwhile our Ray must stay up.

        Raises:
            RendezvousError: the head has gone without a word, or Ray ended here.
        """
        self._line.connection.settimeout(1.0)
        while True:
            try:
                told = self._line.receive()
                return Outcome(int(told["code"]), str(told["reason"]))
            except TimeoutError:
                if ray_ended():
                    raise RendezvousError(f"Ray ended on {self._host}.") from None
            except (OSError, ValueError, KeyError):
                raise RendezvousError(f"The head, {self._head[0]}, ended without a word.") from None

    def _connect(self) -> _Line:
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                return self._introduce(_Line(socket.create_connection(self._head, timeout=30)))
            except (OSError, ValueError, KeyError) as error:  # not there yet, or not known by name
                if time.monotonic() > deadline:
                    raise RendezvousError(
                        f"{self._host} cannot reach the head, {self._head[0]}, in "
                        f"{self._seconds:.0f} s: {error}"
                    ) from None
            if self._terminated.wait(_RETRY_SECONDS):
                raise RendezvousError(f"{self._host} was stopped before it met the head.")

    def _introduce(self, line: _Line) -> _Line:
        try:
            nonce = str(line.receive()["nonce"])
            line.send({"host": self._host, "proof": _proof(self._key, nonce, self._host)})
            if not line.receive()["welcome"]:
                raise ValueError("not welcome")
        except BaseException:
            line.close()
            raise
        return line

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._line.send(message)
        except OSError:
            raise RendezvousError(f"The head, {self._head[0]}, ended without a word.") from None


class _Line:
    """JSON lines over a connection that notices a machine which is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._waiting = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            OSError: the connection is broken (TimeoutError: nothing came yet).
            ValueError: what came is no message.
        """
        while b"\n" not in self._waiting:
            part = self.connection.recv(4096)
            if not part:
                raise ConnectionError("the other side has closed")
            self._waiting += part
            if len(self._waiting) > _LONGEST_LINE:
                raise ValueError("too long a line")
        line, self._waiting = self._waiting.split(b"\n", 1)
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message")
        return message

    def close(self) -> None:
        self.connection.close()


def _proof(key: str, nonce: str, host: str) -> str:
    return hmac.new(key.encode(), f"{nonce} {host}".encode(), hashlib.sha256).hexdigest()
