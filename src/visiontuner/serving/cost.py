"""What an answer of each network costs: time, memory, size, price; measured on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from visiontuner.data.images import read_pixels
from visiontuner.errors import ServingError
from visiontuner.io.files import temporary_folder
from visiontuner.model.classifier import NETWORK, Classifier
from visiontuner.serving.preflight import Question, choose_instance, milliseconds_each

# US dollars an hour of a real-time endpoint, on demand, in us-east-1: assumed, since AWS's price
# list could not be reached where this was written. They compare networks; what an endpoint really
# costs `visiontuner deploy` asks AWS.
HOURLY_PRICES = {
    "ml.c5.large": 0.102,
    "ml.m5.large": 0.115,
    "ml.m5.xlarge": 0.23,
    "ml.m5.2xlarge": 0.461,
}

_ROUNDS, _IN_A_ROUND, _WARM_UP = 6, 20, 5
_ROUND_SECONDS = 3.0  # of a slow network fewer images
_PROBE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """One network as it is served, without HTTP, which adds about the same to each.

    Args:
        ms_one_thread, ms_all_threads: median milliseconds from an image's file to its answer,
            one at a time: processor time on one CPU thread, and time on `threads` of them.
        megabytes: of the network as it is deployed, 10^6 bytes.
        memory_mb: resident, of a process that has answered with it, 10^6 bytes.
        instance: the smallest of preflight's instances whose memory holds it.
        dollars_per_million: of answers, with every vCPU of that instance as fast as one thread
            here, and all of them busy.
    """

    ms_one_thread: float
    ms_all_threads: float
    threads: int
    megabytes: float
    memory_mb: float
    instance: str
    dollars_per_million: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def measure_costs(
    classifiers: Mapping[str, Path], images: Sequence[bytes]
) -> dict[str, NetworkCost]:
    """Answer images with every network, and weigh what it takes.

    The networks take turns, 20 images each, six times: what else the machine does meets all alike.

    Args:
        classifiers: by name a classifier folder, trained or not.
        images: contents of image files; at least one.

    Raises:
        ClassifierError: a folder is no classifier.
        ServingError: a process cannot load one.
    """
    opened = {name: Classifier.load(folder) for name, folder in classifiers.items()}
    alone = {name: Classifier.load(folder, threads=1) for name, folder in classifiers.items()}
    # One thread that computes all the time takes as long as its processor time, where it has a core
    # for itself; on a machine that is busy with other things the time on the clock is theirs too.
    one = _milliseconds(_predicting(alone), images, time.process_time)
    all_threads = _milliseconds(_predicting(opened), images, time.perf_counter)
    return {
        name: _cost(
            ms_one=one[name],
            ms_all=all_threads[name],
            threads=opened[name].threads,
            network=folder / NETWORK,
            memory_mb=_memory_mb(folder, images[0]),
        )
        for name, folder in classifiers.items()
    }


def _predicting(loaded: Mapping[str, Classifier]) -> dict[str, Callable[[bytes], object]]:
    return {name: classifier.predict for name, classifier in loaded.items()}


def _milliseconds(
    answers: Mapping[str, Callable[[Question], object]],
    questions: Sequence[Question],
    clock: Callable[[], float],
) -> dict[str, float]:
    """The median of each, over all rounds."""
    taken: dict[str, list[float]] = {name: [] for name in answers}
    for answer in answers.values():
        for question in islice(cycle(questions), _WARM_UP):
            answer(question)
    for _ in range(_ROUNDS):
        for name, answer in answers.items():
            asked = islice(cycle(questions), _IN_A_ROUND)
            taken[name] += milliseconds_each(answer, asked, seconds=_ROUND_SECONDS, clock=clock)
    return {name: float(np.median(values)) for name, values in taken.items()}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one classifier is on one thread, one image at a time.

    Args:
        images_per_second: of the network, from decoded pixels to logits.
        answers_per_second: from an image's file to its answer, decoding included.
    """

    images_per_second: float
    answers_per_second: float


def measure_speeds(classifiers: Mapping[str, Path], images: Sequence[bytes]) -> dict[str, Speed]:
    """Compare classifiers of the same preprocessing on one thread, in turns as `measure_costs`.

    Args:
        images: contents of image files; at least one.

    Raises:
        ClassifierError: a folder is no classifier.
        BadImageError: an image cannot be read.
    """
    loaded = {name: Classifier.load(folder, threads=1) for name, folder in classifiers.items()}
    preprocessing = next(iter(loaded.values())).preprocessing
    pixels = [read_pixels(image, preprocessing)[None] for image in images]
    networks = {name: each.logits for name, each in loaded.items()}
    network = _milliseconds(networks, pixels, time.process_time)
    whole = _milliseconds(_predicting(loaded), images, time.process_time)
    return {
        name: Speed(
            images_per_second=round(1000 / network[name], 1),
            answers_per_second=round(1000 / whole[name], 1),
        )
        for name in loaded
    }


def _cost(
    *, ms_one: float, ms_all: float, threads: int, network: Path, memory_mb: float
) -> NetworkCost:
    instance, cpus, _ = choose_instance(memory_mb)
    per_second = cpus * 1000 / ms_one
    return NetworkCost(
        ms_one_thread=round(ms_one, 2),
        ms_all_threads=round(ms_all, 2),
        threads=threads,
        megabytes=round(network.stat().st_size / 1e6, 1),
        memory_mb=round(memory_mb, 1),
        instance=instance,
        dollars_per_million=round(HOURLY_PRICES[instance] / 3600 / per_second * 1e6, 3),
    )


# A process of its own: this one holds more than the network. `visiontuner.model.classifier` is
# what an endpoint imports, without torch.
_PROBE = """
import json, pathlib, sys, psutil
from visiontuner.model.classifier import Classifier
classifier = Classifier.load(sys.argv[1])
for _ in range(5):
    classifier.predict(pathlib.Path(sys.argv[2]).read_bytes())
print(json.dumps(psutil.Process().memory_info().rss / 1e6))
"""


def _memory_mb(folder: Path, image: bytes) -> float:
    with temporary_folder() as temporary:
        path = temporary / "image"
        path.write_bytes(image)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROBE, str(folder), str(path)],
                capture_output=True,
                text=True,
                timeout=_PROBE_SECONDS,
                check=True,
            )
            return float(json.loads(done.stdout))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            raise ServingError(
                f"A process that loads {folder} does not answer ({type(error).__name__}): its "
                "memory is not known."
            ) from None
