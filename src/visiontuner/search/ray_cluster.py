"""A Ray for one search: started on this machine, or the cluster that this machine is in."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from visiontuner import interrupts
from visiontuner.errors import ExperimentError, SearchFailed, UserMistake
from visiontuner.experiment.schema import Search
from visiontuner.paths import changed_environment
from visiontuner.text import one_line
from visiontuner.workarounds.ray import (
    no_runtime_environments,
    ray_constant,
    read_token_settings_again,
    waits_until,
    without_monitors,
)

Where = Literal["local", "auto"]

# Trials map the features by path, so the object store holds next to nothing.
OBJECT_STORE_BYTES = 100 * 1024**2

# Ray and its workers read these at start. Tune's tables and loggers are replaced by ours.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A search is resumed from its journal: Ray's own snapshots would only cost time.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "MALLOC_ARENA_MAX": "2",
}


# Below `uv run` Ray would pack the working folder, images and all, and run workers in the copy.
_UV_RUN = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
_VITAL = ("raylet", "gcs_server")
_WATCH_SECONDS = 0.5
_ANSWERS_WITHIN_SECONDS = 10.0
_LAST_WRITES_SECONDS = 5.0
# A socket's path may have 103 bytes (macOS, 107 on Linux), of which Ray's own part takes so many.
_LONGEST_TMPDIR = 103 - len(
    "/vt-12345678/ray/session_2026-11-30_23-59-59_123456_4194304/sockets/plasma_store"
)
_CLUSTER_ADVICE = (
    "Start one with `ray start --head` and set RAY_ADDRESS to it (and RAY_AUTH_MODE=token if it "
    "wants its token), or leave out `--on auto` to search on this machine alone."
)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial takes, and how many trials run at once.

    Args:
        threads: of one trial's arithmetic, or beside a GPU of what prepares its images.
    """

    cpus_per_trial: float
    gpus_per_trial: float
    concurrent_trials: int
    threads: int

    def to_ray(self) -> dict[str, float]:
        return {"cpu": self.cpus_per_trial, "gpu": self.gpus_per_trial}


class RayForSearch:
    """A quiet Ray for the length of a context; one that was there before is left running.

    It starts and ends in a thread of its own. There no signal can break into it, and Ray sets no
    handler for SIGTERM. The thread stays until the end: the kernel ends Ray's processes with the
    thread that started them.

    Args:
        on_loss: called when a part of the local Ray was killed, right before this process ends.
    """

    def __init__(self, where: Where, *, on_loss: Callable[[], None] = lambda: None) -> None:
        self._where = where
        self._on_loss = on_loss
        self._running: Future[None] | None = None
        self._ending = threading.Event()

    def __enter__(self) -> RayForSearch:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._running is not None:
            interrupts.result(self._running, in_any_case=True)

    @property
    def joins(self) -> bool:
        """Whether it is a cluster that was there before, perhaps of several machines."""
        return self._where == "auto"

    @property
    def is_started(self) -> bool:
        """Whether `start` has been called."""
        return self._running is not None

    def start(self) -> None:
        """Return when Ray is up; a second call does nothing.

        Raises:
            SearchFailed: Ray cannot start, or there is no cluster to join.
        """
        if self._running is not None:
            return
        started: Future[None] = Future()
        self._running = interrupts.beside(lambda: self._run(started))
        interrupts.result(started)

    def _run(self, started: Future[None]) -> None:
        # A shell sends it to all that it started as its terminal closes. Ray's processes inherit
        # this thread's mask, and end with the search.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        with ExitStack() as running:
            try:
                self._start(running)
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(None)
            self._ending.wait()

    def _start(self, running: ExitStack) -> None:
        wanted = dict(_ENVIRONMENT)
        if self.joins and _is_ours(_require_cluster(os.environ.get("RAY_ADDRESS", ""))):
            wanted["RAY_AUTH_MODE"] = "token"
        added = {name: value for name, value in wanted.items() if name not in os.environ}
        running.enter_context(changed_environment(added))
        import ray

        running.enter_context(no_runtime_environments())
        if _UV_RUN not in os.environ:
            running.enter_context(ray_constant(_UV_RUN, False))
        if ray.is_initialized():
            return
        try:
            self._init(running)
        except UserMistake:
            raise
        except Exception as error:  # a Ray that is not up in time is a plain Exception
            why = one_line(error, 200)
            raise SearchFailed(
                f"There is no Ray cluster to join here ({why}). {_CLUSTER_ADVICE}"
                if self.joins
                else f"Ray does not start here ({why}). Is the machine busy or its memory "
                "full? `visiontuner doctor` looks for the reason."
            ) from error

    def _init(self, running: ExitStack) -> None:
        import ray

        if self.joins:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            running.callback(_shut_down)
            return
        folder = running.enter_context(_private_folder())
        running.enter_context(_only_for_this_process())
        with without_monitors(), waits_until(self._ending):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
            )
        running.callback(_shut_down)
        running.enter_context(_watched(folder.parent, self._on_loss))


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs that no other user can open; gone afterwards.

    Ray opens the folder it is given to everybody (mode 0777), so that is one inside. Its processes
    may write for a moment after they were told to end.
    """
    own = Path(tempfile.mkdtemp(prefix="vt-", dir=folder_for_sockets()))  # mode 0700
    try:
        yield own / "ray"
    finally:
        end = time.monotonic() + _LAST_WRITES_SECONDS
        while own.exists() and time.monotonic() < end:
            shutil.rmtree(own, ignore_errors=True)
            time.sleep(0.01)


def folder_for_sockets() -> Path:
    """The folder for temporary files, or another where its path is too long for Ray's sockets.

    Raises:
        UserMistake: there is none that can be written.
    """
    for name in (os.environ.get("TMPDIR") or "/tmp", "/tmp", "/var/tmp", "/dev/shm"):
        folder = Path(name).absolute()
        is_short = len(os.fsencode(folder)) <= _LONGEST_TMPDIR
        if is_short and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserMistake(
        "Ray's sockets need a folder that can be written and has a path of at most "
        f"{_LONGEST_TMPDIR} bytes; neither TMPDIR nor /tmp is one. "
        "Name another: `export TMPDIR=FOLDER`."
    )


@contextmanager
def _only_for_this_process() -> Iterator[None]:
    """Have Ray listen on the loopback interface alone, and answer only those with a new token.

    The token is in the environment of this process and of Ray's, never in a file. Ray reads both
    settings once for a process, which may have run another Ray before: it reads them again.
    """
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: bind to 127.0.0.1
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    try:
        with changed_environment(own), ray_constant("ENABLE_RAY_CLUSTER", False):
            read_token_settings_again()
            yield
    finally:
        read_token_settings_again()


def _require_cluster(address: str) -> str | None:
    """The machine that answers there; Ray itself asks a wrong address for minutes.

    Args:
        address: of RAY_ADDRESS; empty where Ray shall look for a cluster on this machine: None.

    Raises:
        SearchFailed: nobody answers there, or it is not an address to join from within.
    """
    if address in ("", "auto", "local"):
        return None
    if "://" in address:
        raise SearchFailed(
            f"RAY_ADDRESS is {address}, a way in from outside. `--on auto` runs on one of the "
            "cluster's machines: use `ray job submit` (docs/sagemaker.md), or unset RAY_ADDRESS."
        )
    try:
        parts = urlsplit(f"//{address}")
        if not parts.hostname or not parts.port:
            raise ValueError("it is not HOST:PORT")
        socket.create_connection((parts.hostname, parts.port), _ANSWERS_WITHIN_SECONDS).close()
    except (OSError, ValueError) as error:
        raise SearchFailed(
            f"There is no Ray cluster at RAY_ADDRESS={address} ({error}). {_CLUSTER_ADVICE}"
        ) from None
    return parts.hostname


def user_has_ray_token() -> bool:
    """Whether `ray start` finds a token that this user's earlier clusters left."""
    try:
        return Path("~/.ray/auth_token").expanduser().is_file()
    except RuntimeError:  # no home, as in a container whose user has no name
        return False


def _is_ours(host: str | None) -> bool:
    """Whether the cluster runs on this machine, and this user has a token for clusters here.

    `ray start` asks for the token as soon as the user has one, a driver with RAY_ADDRESS does not
    send it unless told to (Ray 2.60). To other machines it goes only if RAY_AUTH_MODE says so.
    """
    if host is None or not user_has_ray_token():
        return False
    try:
        with socket.socket() as own:
            own.bind((host, 0))
    except OSError:
        return False
    return True


@contextmanager
def _watched(folder: Path, on_loss: Callable[[], None]) -> Iterator[None]:
    """End this process as soon as one of Ray's own is killed, by a lack of memory perhaps.

    Ray itself would do so ten seconds later, from within its compiled part and after pages of its
    logs; nothing can go on without it.

    Args:
        folder: Ray's own, which is removed.
        on_loss: called first.
    """
    parts = [each for each in psutil.Process().children() if each.name() in _VITAL]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_SECONDS):
            if not all(map(_runs, parts)) and not over.is_set():
                on_loss()
                shutil.rmtree(folder, ignore_errors=True)
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(1)

    thread = threading.Thread(target=watch, name="ray's processes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _shut_down() -> None:
    """End Ray with no garbage of its own left, and none collected meanwhile.

    A reference to an object of Ray's that another thread's garbage collection frees during the
    shutdown ends the whole process, with "The core worker has already been shutdown".
    """
    import ray

    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collecting:
            gc.enable()


def describe_cluster() -> str:
    """Where the running Ray is and how large, in one line."""
    import ray

    machines = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cores, gpus = (sum(m["Resources"].get(kind, 0) for m in machines) for kind in ("CPU", "GPU"))
    parts = [
        f"{count:g} {name}{'' if count == 1 else 's'}"
        for count, name in ((len(machines), "machine"), (cores, "core"), (gpus, "GPU"))
        if count
    ]
    return f"Joined the Ray cluster at {ray.get_runtime_context().gcs_address}: {', '.join(parts)}."


def require_room(search: Search) -> None:
    """What can be said of this machine's own Ray before it runs.

    Raises:
        ExperimentError: one trial wants more cores than there are.
        UserMistake: there is no folder for Ray's sockets.
    """
    folder_for_sockets()
    share_out([{"CPU": os.cpu_count() or 1}], search)


def resources_for(search: Search) -> Resources:
    """What a trial gets on the running Ray.

    Raises:
        ExperimentError: one trial wants more than the largest machine has.
    """
    import ray

    return share_out([node["Resources"] for node in ray.nodes() if node["Alive"]], search)  # type: ignore[no-untyped-call]


def share_out(machines: Sequence[Mapping[str, float]], search: Search) -> Resources:
    """What a trial gets of machines with so many "CPU" and "GPU".

    A GPU's trials share all cores of its machine, since each needs many to prepare its images.

    Raises:
        ExperimentError: one trial wants more than the largest machine has.
    """
    most_cpus = max(machine.get("CPU", 0) for machine in machines)
    if search.cpus_per_trial > most_cpus:
        raise ExperimentError(
            f"search.cpus_per_trial is {search.cpus_per_trial:g}, but the machine has "
            f"{most_cpus:g}; choose at most that."
        )
    most_gpus = max(machine.get("GPU", 0) for machine in machines)
    gpus = search.gpus_per_trial if most_gpus else 0.0
    if gpus > most_gpus:
        raise ExperimentError(
            f"search.gpus_per_trial is {gpus:g}, but the machine has {most_gpus:g}; "
            "choose at most that."
        )
    slots = [_slots(machine, search.cpus_per_trial, gpus) for machine in machines]
    threads = max(1, int(search.cpus_per_trial))
    if gpus:
        used = [(m["CPU"], count) for m, count in zip(machines, slots, strict=True) if count]
        threads = max(threads, min(int(cpus / count) for cpus, count in used))
    return Resources(
        cpus_per_trial=search.cpus_per_trial,
        gpus_per_trial=gpus,
        concurrent_trials=sum(slots),
        threads=threads,
    )


def _slots(machine: Mapping[str, float], cpus: float, gpus: float) -> int:
    by_cpu = int(machine.get("CPU", 0) / cpus)
    return min(by_cpu, int(machine.get("GPU", 0) / gpus)) if gpus else by_cpu
