"""A Docker engine for the length of one command: the one that runs, or one started for it.

    python tests/container/engine.py [--or-skip] COMMAND…

Where no engine runs, root on Debian gets one of its own: in its own namespaces (network, processes,
mounts), with its data in a folder that is removed, and without any image registry. The image that
MLflow builds on, `python:VERSION-slim`, is then made by debootstrap and has Debian's Python. The
command runs in those namespaces too: ports that containers publish are on its 127.0.0.1.

Where there is none and none can be started, it says why in one line: exit status 2, or 0 with
`--or-skip`. Else the status is the command's.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# Debian's name of a package -> a program that it brings.
PACKAGES = {"docker.io": "dockerd", "debootstrap": "debootstrap", "slirp4netns": "slirp4netns"}
# Another installation may be under way.
APT = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3")
MIRROR = "http://deb.debian.org/debian"
RELEASE = "bookworm"  # with Python 3.11
# Certificates of this machine's own (a proxy's, say): pip needs them inside as outside.
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PASSED_ON = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")

_INSIDE, _OR_SKIP = "--inside", "--or-skip"
_READY_SECONDS = 60.0
_STEP_SECONDS = 900  # a mirror that hangs must not take a CI's time
_REASON = "no-engine"  # a file: why there is none, said by who tried inside the namespaces


class NoEngine(Exception):
    """No Docker engine runs here and none can be started; the message says why."""


def main(arguments: Sequence[str]) -> int:
    """Run a command with an engine; its exit status, or that of having none."""
    # Where Debian has its engine, and a user's PATH does not look.
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    if arguments[:1] == [_INSIDE]:
        return run_inside(Path(arguments[1]), arguments[2:])
    skip = arguments[:1] == [_OR_SKIP]
    command = arguments[1:] if skip else arguments
    if not command:
        print("Usage: engine.py [--or-skip] COMMAND…", file=sys.stderr)
        return 2
    if engine_runs():
        return subprocess.call(command)
    try:
        require_programs()
        return run_outside(command)
    except NoEngine as reason:
        skipped = f"Skipped `{' '.join(command[1:])}`: " if skip else ""
        print(f"{skipped}No Docker engine: {reason}", file=sys.stderr)
        return 0 if skip else 2


def engine_runs() -> bool:
    """Whether `docker` reaches one."""
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def require_programs() -> None:
    """Install what is missing, without starting any service.

    Raises:
        NoEngine: this machine is no Debian, this user is not root, or the packages cannot be had.
    """
    if platform.system() != "Linux" or os.geteuid() != 0:
        raise NoEngine("`docker info` fails; start Docker, or run this as root on Debian.")
    missing = [package for package, program in PACKAGES.items() if not shutil.which(program)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise NoEngine(f"`docker info` fails, and {', '.join(missing)} cannot be installed.")
    print(f"Installing {', '.join(missing)}", file=sys.stderr)
    with no_services():
        run([*APT, "update"])
        run([*APT, "install", "-y", "--no-install-recommends", *missing])


@contextmanager
def no_services() -> Iterator[None]:
    """Debian's packages start their services unless this file says no."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink()


def run_outside(arguments: Sequence[str]) -> int:
    """Make the namespaces, connect them with the network, and wait."""
    folder = Path(tempfile.mkdtemp(prefix="visiontuner-docker-", dir="/var/tmp"))
    inside = [sys.executable, str(Path(__file__).resolve()), _INSIDE, str(folder), *arguments]
    flags = ["--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    network = None
    host = subprocess.Popen(["unshare", *flags, *inside])
    # The command hears a Ctrl-C from the terminal itself; it decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: host.kill())  # `unshare` ignores SIGTERM
    try:
        wait_for_namespace(host)
        log = (folder / "slirp4netns.log").open("wb")
        network = subprocess.Popen(
            ["slirp4netns", "--configure", "--mtu=65520", str(host.pid), "tap0"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        status = host.wait()
        if (folder / _REASON).is_file():
            raise NoEngine((folder / _REASON).read_text())
        return status
    finally:
        for process in (host, network):
            if process is not None and process.poll() is None:
                process.kill()  # all in the namespaces ends with the first
                process.wait()
        remove(folder)
        remove_control_groups(group_of(folder))


def wait_for_namespace(host: subprocess.Popen[bytes]) -> None:
    ours = Path("/proc/self/ns/net").readlink()
    for _ in range(600):
        with suppress(OSError):
            if Path(f"/proc/{host.pid}/ns/net").readlink() != ours:
                return
        if host.poll() is not None:
            break
        time.sleep(0.05)
    raise NoEngine("no namespaces can be made here (`unshare --net --mount --pid` fails).")


def run_inside(folder: Path, arguments: Sequence[str]) -> int:
    """Start the engine, give it a base image, run the command, end the engine."""
    environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock"}
    os.environ["DOCKER_HOST"] = environment["DOCKER_HOST"]
    try:
        run(["ip", "link", "set", "lo", "up"])
        with (folder / "dockerd.log").open("wb") as log:
            engine = subprocess.Popen(
                ["dockerd", "--data-root", str(folder / "data"), "--exec-root",
                 str(folder / "exec"), "--pidfile", str(folder / "pid"), "--host",
                 environment["DOCKER_HOST"], "--cgroup-parent", f"/{group_of(folder)}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        make_system(folder / "base")
        wait_for_engine(engine, folder)
        import_system(folder / "base")
        command = subprocess.Popen(arguments, env=environment)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # now: a child inherits what is ignored
        signal.signal(signal.SIGTERM, lambda *_: command.terminate())
        status = command.wait()
        end(engine)
        return status
    except NoEngine as reason:
        (folder / _REASON).write_text(str(reason))
        return 2


def wait_for_engine(engine: subprocess.Popen[bytes], folder: Path) -> None:
    end_time = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end_time and engine.poll() is None:
        if engine_runs():
            return
        time.sleep(0.5)
    lines = (folder / "dockerd.log").read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if "fail" in line), lines[-1] if lines else "")
    raise NoEngine(f"dockerd does not start: {' '.join(said.split())[-300:]}")


def make_system(folder: Path) -> None:
    """A small Debian with Python and this machine's certificates."""
    print("Making a base image", file=sys.stderr)
    packages = "python3,python3-pip,ca-certificates"
    run(["debootstrap", "--variant=minbase", f"--include={packages}", RELEASE, str(folder), MIRROR])
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    if CERTIFICATES.is_file():
        shutil.copyfile(CERTIFICATES, folder / CERTIFICATES.relative_to("/"))


def import_system(folder: Path) -> None:
    """It becomes `python:3.11.7-slim` (this Python's version), without any registry."""
    settings = {
        "PIP_CERT": str(CERTIFICATES),
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    changes = [part for k, v in settings.items() for part in ("--change", f"ENV {k}={v}")]
    tar = subprocess.Popen(
        ["tar", "--numeric-owner", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE
    )
    done = subprocess.run(
        ["docker", "import", *changes, "-", f"python:{platform.python_version()}-slim"],
        stdin=tar.stdout, capture_output=True, text=True,
    )  # fmt: skip
    if tar.wait() or done.returncode:
        raise NoEngine(f"the base image cannot be imported: {' '.join(done.stderr.split())[-300:]}")
    shutil.rmtree(folder, ignore_errors=True)


def end(engine: subprocess.Popen[bytes]) -> None:
    engine.terminate()
    with suppress(subprocess.TimeoutExpired):
        engine.wait(20)


def remove(folder: Path) -> None:
    for _ in range(20):  # what the kernel still unmounts is busy for a moment
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.25)
    print(f"{folder} could not be removed.", file=sys.stderr)


def group_of(folder: Path) -> str:
    """The control group of an engine's containers."""
    return folder.name


def remove_control_groups(name: str) -> None:
    """The kernel keeps those of containers that were killed."""
    for group in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        inner = [Path(folder) for folder, _, _ in os.walk(group, topdown=False)]
        for folder in inner:
            with suppress(OSError):
                folder.rmdir()


def run(command: Sequence[str]) -> None:
    """A program that has to succeed.

    Raises:
        NoEngine: it did not; with the end of what it said.
    """
    what = f"`{' '.join(command[:3])} …`"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment,
            timeout=_STEP_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoEngine(f"{what} fails: {error}.") from None
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout).split())[-300:]
        raise NoEngine(f"{what} fails: {said}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
