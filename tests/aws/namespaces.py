"""Several hosts on one machine: network namespaces on a bridge.

Each host has its own network, processes, host name, /opt/ml, /dev/shm, Ray folder and
/tmp/visiontuner-job (scratch in its /opt/ml); files are otherwise those of the machine. Needs root
and `ip`, `unshare` and `mount`: Linux only.

    with Hosts(2) as hosts:
        process = hosts.start("algo-1", ["python", "-m", ...], ml=folder, environment={...})
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

BASE = Path("/opt/ml")
_NETNS = Path("/etc/netns")
_LOCKS = Path("/tmp")  # the same for every process, whatever its TMPDIR
# In the host's own mount namespace; Ray's sockets need a short path, so its folder stays in /tmp.
_ENTER = """set -e
hostname "$HOST_NAME"
mkdir -p /tmp/ray /tmp/visiontuner-job "$HOST_ML/scratch"
mount --bind "$HOST_ML/scratch" /tmp/visiontuner-job
mount --bind "$HOST_ML" /opt/ml
mount -t tmpfs -o size=256m tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp/ray
unset HOST_NAME HOST_ML
exec "$@"
"""


def reason_against() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    missing = [
        tool for tool in ("ip", "unshare", "mount", "setpriv", "taskset") if not shutil.which(tool)
    ]
    if missing:
        return f"hosts need {', '.join(missing)}"
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    try:
        with Hosts(1) as hosts, tempfile.TemporaryDirectory() as ml:
            process = hosts.start("algo-1", ["true"], ml=Path(ml), environment={})
            _, error = process.communicate(timeout=30)
            if process.returncode:
                return f"namespaces are not allowed here: {error.decode().strip()[-200:]}"
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or b""
        return f"network namespaces are not allowed here: {told.decode().strip() or error}"
    return None


class Hosts:
    """algo-1 to algo-N on a network of their own, which also has this machine (`gateway`).

    Names and addresses follow from a number that is locked while it is in use, so that test
    processes do not meet, and what a killed one left is cleared away by the next.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"algo-{number}" for number in range(1, count + 1)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self._shared = (_LOCKS / "visiontuner-hosts.lock").open("w")
        fcntl.flock(self._shared, fcntl.LOCK_SH)
        self._lock, self._number = _take_number()
        try:
            self._clear()
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        self._lock.close()
        with suppress(BlockingIOError):  # others have hosts
            fcntl.flock(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_mount_points()
        self._shared.close()

    @property
    def gateway(self) -> str:
        """This machine's address as the hosts see it."""
        return f"{self._network}.254"

    def start(
        self,
        host: str,
        command: Sequence[str],
        *,
        ml: Path,
        environment: Mapping[str, str],
        log: IO[bytes] | None = None,
        cpu: int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run a command as process 1 of a host.

        Args:
            ml: becomes its /opt/ml.
            log: takes its output; default: the process's own pipes.
            cpu: the one core that it may use.
        """
        BASE.mkdir(parents=True, exist_ok=True)
        pinned = ["taskset", "-c", str(cpu)] if cpu is not None else []
        own = {"HOST_NAME": host, "HOST_ML": str(ml)}
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # with who started it
                *("ip", "netns", "exec", self._namespace(host), *pinned),
                *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"),
                *("--kill-child", "bash", "-c", _ENTER, "bash", *command),
            ],
            env={"PATH": os.environ["PATH"], **environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=log or subprocess.PIPE,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
        )
        self._processes.append(process)
        return process

    def _build(self) -> None:
        bridge = self._bridge
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        addresses = {name: f"{self._network}.{n}" for n, name in enumerate(self.names, 1)}
        table = {"localhost": "127.0.0.1", **addresses, "gateway": self.gateway}
        for number, (name, address) in enumerate(addresses.items(), 1):
            namespace, end = self._namespace(name), f"vt{self._number}p{number}"
            _ip("netns", "add", namespace)
            _ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", end, "master", bridge, "up")
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "route", "add", "default", "via", self.gateway)
            self._write_names(namespace, table)

    def _write_names(self, namespace: str, table: Mapping[str, str]) -> None:
        """What `ip netns exec` puts over the machine's own /etc."""
        folder = _NETNS / namespace
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{address} {name}" for name, address in table.items()]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "nsswitch.conf").write_text("hosts: files\n")  # without it look-ups stall
        (folder / "resolv.conf").write_text("")

    def _clear(self) -> None:
        """End what runs in this number's namespaces and remove them, whoever made them."""
        prefix = f"vt{self._number}-"
        listed = _ip("netns", "list").split("\n")
        for namespace in [line.split(" ")[0] for line in listed if line.startswith(prefix)]:
            _end_all(namespace)
            _ip("netns", "del", namespace)
            shutil.rmtree(_NETNS / namespace, ignore_errors=True)
        subprocess.run(["ip", "link", "del", self._bridge], check=False, capture_output=True)

    @property
    def _network(self) -> str:
        return f"10.213.{self._number}"

    @property
    def _bridge(self) -> str:
        return f"vt{self._number}br"

    def _namespace(self, host: str) -> str:
        return f"vt{self._number}-{host}"


def first_process(outer: subprocess.Popen[bytes]) -> int | None:
    """Process 1 of a host that `Hosts.start` began, as this machine numbers it; None if it ended.

    A SIGTERM to it is what a container gets; SIGKILL to `outer` ends the whole host.
    """
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _remove_mount_points() -> None:
    """Folders that only hosts needed. To remove one that is in use would unmount it there."""
    for folder in (_NETNS, BASE, Path("/tmp/visiontuner-job")):
        with suppress(OSError):  # not empty: it is somebody else's
            folder.rmdir()


def _take_number() -> tuple[IO[str], int]:
    """A number that nobody else holds; the lock ends with the process, however it ends."""
    for number in range(1, 255):
        lock = (_LOCKS / f"visiontuner-hosts-{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return lock, number
    raise OSError("no network is free for hosts")


def _end_all(namespace: str) -> None:
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
