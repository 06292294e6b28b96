"""What the measurements share: commands in scratch folders, memory by process, rows of a table."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from visiontuner.data.arrays import FeatureSet
    from visiontuner.workflow.inputs import Inputs

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = "VISIONTUNER_PHOTOS"
LONGEST_SECONDS = 3600.0


class Skipped(Exception):
    """A measurement cannot run here; the message says what it needs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result table; `met` is None where there is no target."""

    what: str
    target: str
    result: str
    met: bool | None = None


def report(rows: Sequence[Row], **details: Any) -> dict[str, Any]:
    """What every `measure` returns: the rows for people, the numbers behind them for machines."""
    return {"rows": [asdict(row) for row in rows], "details": details}


def photographs(name: str) -> Path:
    """A folder of real photographs inside `VISIONTUNER_PHOTOS`.

    Raises:
        Skipped: it is not there.
    """
    folder = Path(os.environ.get(PHOTOS, "")) / name
    if not os.environ.get(PHOTOS) or not folder.is_dir():
        raise Skipped(f"needs photographs: set {PHOTOS} to a folder that holds {name}/")
    return folder.resolve()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="visiontuner-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cache_of_its_own() -> Iterator[None]:
    """`VISIONTUNER_CACHE` is a scratch folder, unless the caller has set one."""
    with scratch() as folder:
        before = os.environ.get("VISIONTUNER_CACHE")
        os.environ["VISIONTUNER_CACHE"] = str(folder if before is None else before)
        try:
            yield
        finally:
            if before is None:
                del os.environ["VISIONTUNER_CACHE"]


def features_of(
    source: Path,
    splits: Sequence[str] = ("train", "validation", "test"),
    *,
    cache: Path | None = None,
) -> tuple[Inputs, FeatureSet]:
    """The features of a folder's images, computed as the product does, and what they are of.

    Args:
        cache: default: `VISIONTUNER_CACHE`.
    """
    from visiontuner.experiment.schema import Experiment
    from visiontuner.model.features import compute_features
    from visiontuner.model.onnx import make_engine
    from visiontuner.workflow.inputs import Inputs, Silent

    inputs = Inputs(Experiment.parse({"data": {"source": str(source)}}), Silent())
    features = compute_features(
        inputs.dataset,
        backbone=inputs.description,
        engine=lambda: make_engine(inputs.backbone, precision="fp32", cache=inputs.cache),
        precision="fp32",
        cache=cache or inputs.cache,
        splits=splits,
    )
    return inputs, features


class Command:
    """A Python program running in a folder of its own; its output goes to a log file there.

    Args:
        arguments: what follows `python`.
        folder: working folder, log file and MLflow's database.
        cache: `VISIONTUNER_CACHE` of the program.
        tracking_uri: default: a database in `folder`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        cache: Path,
        tracking_uri: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.arguments = list(arguments)
        self.log = folder / "output.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        environment |= {
            "VISIONTUNER_CACHE": str(cache),
            "MLFLOW_TRACKING_URI": tracking_uri or store_in(folder),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # two server processes instead of nine
        }
        self._began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def running(self) -> bool:
        """Whether it has not ended.

        Raises:
            RuntimeError: it has run so long that it will hardly end.
        """
        if time.monotonic() - self._began > LONGEST_SECONDS:
            raise RuntimeError(f"{' '.join(self.arguments)} does not end")
        return self.process.poll() is None

    def wait(self) -> float:
        """Seconds from start to exit.

        Raises:
            RuntimeError: it failed; the message has the last lines of its log.
        """
        code = self.process.wait(LONGEST_SECONDS)
        seconds = time.monotonic() - self._began
        if code != 0:
            tail = self.log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{' '.join(self.arguments)} ended with {code}:\n{tail}")
        return seconds

    def children(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            end([psutil.Process(self.process.pid), *self.children()])
            self.process.wait()


def end(processes: Sequence[psutil.Process]) -> None:
    """Kill what is left of some processes; psutil knows a reused process id."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def store_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def tune(*arguments: str, output: Path) -> list[str]:
    """`visiontuner tune` with a search folder, as arguments of Python."""
    return ["-m", "visiontuner", "tune", *arguments, "--output", str(output)]


def settings(**values: object) -> list[str]:
    """`training__epochs=5` -> `--set training.epochs=5`."""
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    return [part for pair in pairs for part in ("--set", pair)]


def run(arguments: Sequence[str], **places: Any) -> float:
    """Run a command to its end; its seconds."""
    with Command(arguments, **places) as command:
        return command.wait()


def script_result(
    name: str, *arguments: str, folder: Path, cache: Path | None = None
) -> dict[str, Any]:
    """The JSON that a script of this folder prints as its last line; by default nothing cached."""
    script = str(ROOT / "benchmarks" / name)
    places = {"folder": folder, "cache": cache or folder / "cache"}
    with Command([script, *arguments], **places) as command:
        command.wait()
    result: dict[str, Any] = json.loads(command.log.read_text().strip().splitlines()[-1])
    return result


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """A search's journal so far, of some kinds of events only; empty before it has one."""
    from visiontuner.errors import JournalError
    from visiontuner.journal import read_events

    try:
        return [e for e in read_events(folder).events if not kinds or e["event"] in kinds]
    except JournalError:
        return []


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """What a search tried, by trial id."""
    return {e["trial_id"]: e["configuration"] for e in events(folder, "trial_started")}


def best_value(folder: Path) -> float:
    from visiontuner.journal import SearchRecord

    best = SearchRecord.load(folder).best
    return float(best.best_value or 0.0) if best else 0.0


def trial_runs(tracking_uri: str, folder: Path) -> list[Any]:
    """MLflow's runs of a search's trials, as MlflowClient returns them."""
    from mlflow import MlflowClient

    # A plugin that comes with the SageMaker SDK warns at every call to a server.
    logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
    client = MlflowClient(tracking_uri)
    search_id = events(folder, "search_started")[0]["search_id"]
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(
        client.search_runs(
            experiments,
            f"tags.`visiontuner.search_id` = '{search_id}' and tags.`visiontuner.kind` = 'trial'",
            max_results=5000,
        )
    )


def points(tracking_uri: str, run_id: str, metric: str = "validation_accuracy") -> list[int]:
    """The steps at which MLflow holds a metric, doubled ones twice."""
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri).get_metric_history(run_id, metric)
    return sorted(point.step for point in history)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one process in MB (10^6 bytes); `private` is its clean and dirty private pages."""

    rss: float
    private: float
    private_dirty: float


def memory_of(pid: int) -> Memory | None:
    """From smaps_rollup; None where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: float(line.split()[1]) for line in lines}
    if "Rss" not in kilobytes:
        return None
    megabytes = {name: value * 1024 / 1e6 for name, value in kilobytes.items()}
    dirty = megabytes["Private_Dirty"]
    return Memory(
        rss=megabytes["Rss"], private=dirty + megabytes["Private_Clean"], private_dirty=dirty
    )


def describe_run() -> dict[str, Any]:
    """Machine, date and commit: without them a number says nothing."""
    from visiontuner.workflow.run import describe_code

    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "code": describe_code(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
