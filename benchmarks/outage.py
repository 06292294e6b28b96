"""A real MLflow server stopped for 20 s during a search, against the same search without that."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from measuring import (
    Command,
    Row,
    end,
    events,
    points,
    report,
    run,
    scratch,
    settings,
    trial_runs,
    tune,
)

TARGETS = (
    "every epoch of every trial in MLflow, the best model registered",
    "trials take at most 1.1 x as long",
)
SMALL = {"trials": 32, "epochs": 60, "away_seconds": 1.0}


class Server:
    """`mlflow server` on a port of its own; starts again on the same database."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._command: Command | None = None

    def start(self) -> None:
        """Return when it answers."""
        store, files = self._folder / "server.db", self._folder / "artifacts"
        places = ["--backend-store-uri", f"sqlite:///{store}", "--artifacts-destination", files]
        address = ["--host", "127.0.0.1", "--port", self._port, "--workers", "1"]
        arguments = ["-m", "mlflow", "server", *map(str, [*places, *address])]
        self._command = Command(arguments, folder=self._folder, cache=self._folder)
        deadline = time.monotonic() + 120
        while not self._answers():
            if time.monotonic() > deadline or not self._command.running():
                self.stop()
                raise RuntimeError(f"no MLflow server: {self._command.log.read_text()[-500:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        if self._command is not None and self._command.running():
            tree = [psutil.Process(self._command.process.pid), *self._command.children()]
            end(tree)
            self._command.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def measure(*, trials: int = 64, epochs: int = 60, away_seconds: float = 20.0) -> dict[str, Any]:
    with scratch() as folder:
        cache = folder / "cache"
        run(command_line(folder / "first", 2, 1), folder=folder / "first", cache=cache)
        steady = one_search(folder / "steady", cache, trials, epochs, None)
        outage = one_search(folder / "outage", cache, trials, epochs, away_seconds)
    slower = outage["trials_seconds"] / steady["trials_seconds"]
    rows = [
        Row(
            what=f"{trials} trials x {epochs} epochs, server away {outage['away_seconds']:.0f} s",
            target=TARGETS[0],
            result=f"{outage['missing_points']} points missing, {outage['runs']} of {trials} runs "
            f"finished, model {'registered' if outage['registered'] else 'not registered'}",
            met=outage["missing_points"] == 0 and outage["runs"] == trials and outage["registered"],
        ),
        Row(
            what="from the search's start to its last trial's end",
            target=TARGETS[1],
            result=f"{slower:.2f} x: {outage['trials_seconds']:.1f} s, "
            f"{steady['trials_seconds']:.1f} s without",
            met=slower <= 1.1,
        ),
    ]
    return report(rows, steady=steady, outage=outage)


def one_search(
    place: Path, cache: Path, trials: int, epochs: int, away_seconds: float | None
) -> dict[str, Any]:
    """One search against a server of its own, which may go away after the second trial."""
    search, away = place / "search", 0.0
    with Server(place / "server") as server:
        arguments = command_line(place, trials, epochs)
        places = {"folder": place, "cache": cache, "tracking_uri": server.uri}
        with Command(arguments, **places) as command:
            if away_seconds is not None:
                away = stop_for(away_seconds, server, command, search)
            seconds = command.wait()
        runs = [r for r in trial_runs(server.uri, search) if r.info.status == "FINISHED"]
        held = sum(len(points(server.uri, r.info.run_id)) for r in runs)
        registered = "MLflow model: models:/" in command.log.read_text()
    started = events(search, "search_started")[0]["time"]
    return {
        "command_seconds": seconds,
        "trials_seconds": events(search, "trial_ended")[-1]["time"] - started,
        "away_seconds": away,
        "runs": len(runs),
        "missing_points": trials * epochs - held,
        "registered": registered,
    }


def command_line(place: Path, trials: int, epochs: int) -> list[str]:
    return tune(
        *("--trials", str(trials), "--algorithm", "random"),
        *settings(search__scheduler="none", training__epochs=epochs),
        output=place / "search",
    )


def stop_for(seconds: float, server: Server, command: Command, search: Path) -> float:
    """Stop the server in the middle of a search; how long it was away while trials ran."""
    while command.running() and len(events(search, "trial_ended")) < 2:
        time.sleep(0.1)
    server.stop()
    began = time.time()
    time.sleep(seconds)
    server.start()
    back = time.time()
    if events(search, "search_ended"):
        raise RuntimeError("the search was over before the server came back: take more trials")
    return back - began
