"""`kill -9` of the driver once in each fifth of a search, features included, then `--resume`.

Every kill meets a fresh folder, database and cache, so that it may hit export, features, trials or
packaging. Where it comes before there is a search folder, the same command is typed again.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measuring import (
    Command,
    Row,
    configurations,
    end,
    events,
    points,
    report,
    run,
    scratch,
    settings,
    store_in,
    trial_runs,
    tune,
)

TARGETS = ("all trials in MLflow once, finished ones untouched, same configurations",)
SMALL = {"trials": 4, "epochs": 2, "kills": 1}


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What a killed driver left: its finished trials with a digest of their files."""

    seconds: float
    phase: str
    finished: dict[str, str]
    left_over: list[psutil.Process]


def measure(*, trials: int = 16, epochs: int = 20, kills: int = 5) -> dict[str, Any]:
    with scratch() as folder:
        whole = folder / "whole"
        places = {"folder": whole, "cache": whole / "cache"}
        seconds = run(command_line(whole, trials, epochs), **places)
        expected = configurations(whole / "search")
        rows, details = [], []
        for number in range(kills):
            at = seconds * (number + 0.5) / kills
            place = folder / f"kill-{number + 1}"
            killed = start_and_kill(place, trials, epochs, at)
            problems = resume_and_check(place, trials, epochs, killed, expected)
            end(killed.left_over)
            what = f"killed after {killed.seconds:.1f} of {seconds:.1f} s ({killed.phase})"
            rows.append(
                Row(
                    what=what,
                    target=TARGETS[0],
                    result="; ".join(problems)
                    or f"{trials} trials, {len(killed.finished)} finished before and untouched",
                    met=not problems,
                )
            )
            details.append({"at": killed.seconds, "phase": killed.phase, "problems": problems})
    return report(rows, uninterrupted_seconds=seconds, kills=details)


def command_line(place: Path, trials: int, epochs: int) -> list[str]:
    """A random search without early stopping: all its trials are drawn beforehand."""
    return tune(
        *("--trials", str(trials), "--algorithm", "random"),
        *settings(search__scheduler="none", training__epochs=epochs),
        output=place / "search",
    )


def start_and_kill(place: Path, trials: int, epochs: int, at_seconds: float) -> Killed:
    arguments = command_line(place, trials, epochs)
    began = time.monotonic()
    with Command(arguments, folder=place, cache=place / "cache") as command:
        while command.running() and time.monotonic() - began < at_seconds:
            time.sleep(0.02)
        left_over = command.children()
        command.process.kill()
        command.process.wait()
        seconds = time.monotonic() - began
    search = place / "search"
    ended = {e["trial_id"] for e in events(search, "trial_ended")}
    return Killed(
        seconds=seconds,
        phase=phase_of(search),
        finished={trial_id: digest_of(search, trial_id) for trial_id in ended},
        left_over=left_over,
    )


def phase_of(search: Path) -> str:
    """How far a search had come, in words."""
    kinds = Counter(e["event"] for e in events(search))
    if not kinds:
        return "before there was a journal"
    if "search_ended" in kinds:
        return "after the trials"
    if "trial_started" in kinds:
        return f"in the trials, {kinds['trial_ended']} of them finished"
    return "in the features" if "features_ready" not in kinds else "before the first trial"


def resume_and_check(
    place: Path, trials: int, epochs: int, killed: Killed, expected: dict[str, dict[str, Any]]
) -> list[str]:
    """Bring the search to its end; what is wrong then, nothing if all is well."""
    search = place / "search"
    resumable = (search / "experiment.yaml").exists()
    arguments = (
        ["-m", "visiontuner", "tune", "--resume", str(search)]
        if resumable
        else command_line(place, trials, epochs)
    )
    try:
        run(arguments, folder=place, cache=place / "cache")
    except RuntimeError as error:
        return [" ".join(str(error).split())[-300:]]
    return [
        *wrong_in_folder(search, killed, expected),
        *wrong_in_mlflow(store_in(place), search, trials=trials, epochs=epochs),
    ]


def wrong_in_folder(search: Path, killed: Killed, expected: dict[str, dict[str, Any]]) -> list[str]:
    problems = []
    if configurations(search) != expected:
        problems.append("other configurations than uninterrupted")
    starts = Counter(e["trial_id"] for e in events(search, "trial_started"))
    again = sorted(t for t in killed.finished if starts[t] > 1)
    if again:
        problems.append(f"ran again although finished: {', '.join(again)}")
    changed = sorted(t for t, was in killed.finished.items() if digest_of(search, t) != was)
    if changed:
        problems.append(f"files of finished trials changed: {', '.join(changed)}")
    return problems


def wrong_in_mlflow(uri: str, search: Path, *, trials: int, epochs: int) -> list[str]:
    problems = []
    runs = trial_runs(uri, search)
    names = Counter(run.data.tags["visiontuner.trial_id"] for run in runs)
    if len(runs) != trials or len(names) != trials:
        problems.append(f"{len(runs)} runs of {len(names)} trials in MLflow, not {trials}")
    unfinished = sorted({run.info.status for run in runs} - {"FINISHED"})
    if unfinished:
        problems.append(f"runs are {', '.join(unfinished)}")
    steps = list(range(1, epochs + 1))
    uneven = [n for r in runs if (n := points(uri, r.info.run_id)) != steps]
    if uneven:
        problems.append(f"{len(uneven)} runs with lost or doubled epochs: {uneven[0]}")
    return problems


def digest_of(search: Path, trial_id: str) -> str:
    """The validation scores of a trial; weights and logits go when better trials come."""
    path = search / "trials" / trial_id / "validation_scores.npz"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"
