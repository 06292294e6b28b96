"""A program of `serving`: decoding and the network in a plain loop, without any server.

plain_answers.py CLASSIFIER SECONDS IMAGE…
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

from visiontuner.data.images import normalise, read_pixels
from visiontuner.model.classifier import Classifier

BATCH = 16
WARM_UP = 20
PAUSE_SECONDS = 0.002  # what a request spends outside decoding and network: processors fall asleep


def main() -> None:
    """Milliseconds of one image, at once and after a pause, and images a second one at a time
    and 16 at a time."""
    classifier, seconds = Classifier.load(Path(sys.argv[1])), float(sys.argv[2])
    images = [Path(name).read_bytes() for name in sys.argv[3:]]

    def answer(count: int) -> Callable[[], None]:
        source = cycle(images)

        def run() -> None:
            pixels = [read_pixels(next(source), classifier.preprocessing) for _ in range(count)]
            image = normalise(np.stack(pixels), classifier.preprocessing)
            classifier.session.run(["logits"], {"image": image})

        return run

    one, many = timed(answer(1), seconds), timed(answer(BATCH), seconds)
    paused = timed(answer(1), seconds / 2, PAUSE_SECONDS)
    result = {
        "p50_ms": 1e3 * statistics.median(one),
        "paused_p50_ms": 1e3 * statistics.median(paused),
        "one_per_second": len(one) / sum(one),
        "batches_per_second": BATCH * len(many) / sum(many),
        "threads": classifier.threads,
    }
    print(json.dumps(result))


def timed(run: Callable[[], None], seconds: float, pause: float = 0.0) -> list[float]:
    """Seconds of each call, without the pause before it."""
    for _ in range(WARM_UP):
        run()
    took: list[float] = []
    while sum(took) < seconds:
        if pause:
            time.sleep(pause)
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return took


if __name__ == "__main__":
    main()
