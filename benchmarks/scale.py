"""500 short trials: does a search slow down or grow as trials pile up?

The whole command on small made-up images, the MLflow writer included; times are from its journal.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Command, Memory, Row, events, memory_of, report, scratch, settings, tune
from PIL import Image

TARGETS = (
    "time per trial in the last fifth at most 1.2 x the first",
    "driver's memory up by less than 50 MB from the first fifth's end to the last trial",
)
SMALL = {"trials": 20}
IMAGES_PER_CLASS = {"train": 20, "valid": 5}


def measure(*, trials: int = 500, epochs: int = 3) -> dict[str, Any]:
    fifth = trials // 5
    with scratch() as folder:
        make_images(folder / "images")
        arguments = [
            *("--data", str(folder / "images"), "--trials", str(trials)),
            *("--algorithm", "random"),
            *settings(search__scheduler="none", training__epochs=epochs, model__image_size=32),
        ]
        search = folder / "search"
        with Command(
            tune(*arguments, output=search), folder=folder, cache=folder / "cache"
        ) as command:
            memory = watch(command, search, at=(fifth, trials))
            seconds = command.wait()
        ended = sorted(e["time"] for e in events(search, "trial_ended"))
    # The first two wait for the workers to start.
    first = (ended[fifth - 1] - ended[1]) / (fifth - 2)
    last = (ended[-1] - ended[-1 - fifth]) / fifth
    grown = memory[trials].rss - memory[fifth].rss
    rows = [
        Row(
            what=f"{trials} trials x {epochs} epochs, trials 3-{fifth} and the last {fifth}",
            target=TARGETS[0],
            result=f"{last / first:.2f} x: {first * 1000:.0f} ms, then {last * 1000:.0f} ms",
            met=last <= 1.2 * first,
        ),
        Row(
            what=f"driver's resident memory after trial {fifth} and {trials}",
            target=TARGETS[1],
            result=f"{grown:+.0f} MB: {memory[fifth].rss:.0f}, then {memory[trials].rss:.0f} MB",
            met=grown < 50,
        ),
    ]
    by_fifth = [
        (ended[end - 1] - ended[max(1, end - fifth - 1)]) / (fifth if end > fifth else fifth - 2)
        for end in range(fifth, trials + 1, fifth)
    ]
    return report(
        rows,
        seconds=seconds,
        seconds_per_trial_by_fifth=by_fifth,
        driver={str(number): vars(value) for number, value in memory.items()},
    )


def watch(command: Command, search: Path, *, at: tuple[int, ...]) -> dict[int, Memory]:
    """The driver's memory just after so many trials had ended."""
    seen: dict[int, Memory] = {}
    while command.running() and len(seen) < len(at):
        ended = _count_ended(search)
        for number in at:
            now = memory_of(command.process.pid) if ended >= number else None
            if now is not None:
                seen.setdefault(number, now)
        time.sleep(0.1)
    if len(seen) < len(at):
        command.wait()
        raise RuntimeError("the command ended before its last trial was seen")
    return seen


def _count_ended(search: Path) -> int:
    """Cheaper than parsing the journal ten times a second."""
    path = search / "journal.jsonl"
    return path.read_bytes().count(b'"event": "trial_ended"') if path.exists() else 0


def make_images(folder: Path) -> None:
    """Ten classes of noise around a colour each, 32 x 32 pixels."""
    generator = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        for label in range(10):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            colour = np.array([label * 25, 255 - label * 25, 128])
            for number in range(count):
                pixels = generator.normal(colour, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
