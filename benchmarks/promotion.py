"""How often `visiontuner promote` takes luck for progress, and how often it sees real progress.

Answers are drawn, not computed: on each test image the challenger and the champion are both right,
both wrong, or one of them is. The registry is a dictionary; all that decides is the product's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from measuring import Row, report
from numpy.typing import NDArray

from visiontuner.io.files import temporary_folder
from visiontuner.serving.promotion import Promotion, promote
from visiontuner.serving.registry import (
    CHALLENGER,
    DIGEST_TAG,
    TEST_SET_TAG,
    ModelReference,
    digest_of_test_set,
)

TARGETS = (
    "of 20 equal challengers one is promoted in at most 5 % of the series",
    "a challenger that is 5 points better is promoted in at least 80 % of the cases",
)
SMALL = {"series": 5, "cases": 10}
ACCURACY, DISCORDANT, GAIN = 0.9, 0.10, 0.05
MODEL = "model"


class Registry:
    """What `promote` asks of MLflow, in memory: versions of one model, each evaluated."""

    tracking_uri = "memory"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._versions: dict[str, SimpleNamespace] = {}
        self._answers: dict[str, NDArray[np.bool_]] = {}
        self._aliases: dict[str, str] = {}

    def add(self, correct: NDArray[np.bool_]) -> str:
        """Register a version that names these of the test images rightly, (N,)."""
        number = str(len(self._versions) + 1)
        tags = {DIGEST_TAG: number, TEST_SET_TAG: digest_of_test_set(_digests(len(correct)))}
        self._versions[number] = SimpleNamespace(
            name=MODEL, version=number, run_id=number, tags=tags, description=""
        )
        self._answers[number] = correct
        self._aliases[CHALLENGER] = number
        return number

    def promote(self) -> Promotion:
        return promote(self, ModelReference(name=MODEL))

    def call(self, method: str, /, *args: Any) -> Any:
        return getattr(self, f"_{method}")(*args)

    def download(self, artifact_uri: str, folder: Path) -> Path:
        raise NotImplementedError

    def _get_registered_model(self, _name: str) -> Any:
        return SimpleNamespace(aliases=dict(self._aliases))

    def _get_model_version(self, _name: str, number: str) -> Any:
        return self._versions[number]

    def _search_model_versions(self, _filter: str) -> list[Any]:
        return list(self._versions.values())

    def _list_artifacts(self, _run_id: str, folder: str) -> list[Any]:
        names = ("report.json", "predictions.npz")
        return [SimpleNamespace(path=f"{folder}/{name}") for name in names]

    def _download_artifacts(self, run_id: str, path: str, _folder: str) -> str:
        correct = self._answers[run_id]
        file = self._folder / Path(path).name
        if file.suffix == ".json":
            file.write_text(json.dumps({"class_names": ["a", "b"], "classifier_digest": run_id}))
            return str(file)
        probabilities = np.stack([correct, ~correct], axis=1)
        labels = np.zeros(len(correct), dtype=np.int64)
        np.savez(
            file,
            probabilities=probabilities,
            labels=labels,
            digests=np.array(_digests(len(labels))),
        )
        return str(file)

    def _set_model_version_tag(self, _name: str, number: str, key: str, value: str) -> None:
        self._versions[number].tags[key] = value

    def _update_model_version(self, _name: str, number: str, text: str) -> None:
        self._versions[number].description = text

    def _set_registered_model_alias(self, _name: str, alias: str, number: str) -> None:
        self._aliases[alias] = number


def measure(*, series: int = 1000, cases: int = 1000) -> dict[str, Any]:
    """Args:
    series: of 20 challengers each.
    cases: in which one challenger is better.
    """
    with temporary_folder() as folder:
        lucky = sum(_any_equal_one_is_promoted(folder, seed) for seed in range(series)) / series
        seen = {
            look: sum(_better_one_is_promoted(folder, seed, look) for seed in range(cases)) / cases
            for look in (1, 5, 20)
        }
    return report(list(_rows(lucky, seen, series, cases)), lucky=lucky, seen=seen)


def _any_equal_one_is_promoted(folder: Path, seed: int) -> bool:
    generator = np.random.default_rng([seed, 0])
    registry = Registry(folder)
    champion = generator.random(300) < ACCURACY
    registry.add(champion)
    registry.promote()
    decisions = []
    for _ in range(20):
        registry.add(_other_answers(generator, champion, better_by=0))
        decisions.append(registry.promote().decision)
        if decisions[-1] == "promoted":
            break
    return "promoted" in decisions


def _better_one_is_promoted(folder: Path, seed: int, look: int) -> bool:
    """After `look` - 1 others were compared on the same images."""
    generator = np.random.default_rng([seed, look])
    registry = Registry(folder)
    champion = generator.random(500) < ACCURACY - GAIN
    registry.add(champion)
    registry.promote()
    for _ in range(look - 1):
        registry.add(champion)
    registry.add(_other_answers(generator, champion, better_by=GAIN))
    decided = registry.promote()
    assert decided.look == look
    return decided.decision == "promoted"


def _other_answers(
    generator: np.random.Generator, champion: NDArray[np.bool_], *, better_by: float
) -> NDArray[np.bool_]:
    """Answers (N,) that differ from the champion's on 10 % of the images, on average."""
    accuracy = ACCURACY - better_by
    lost, won = (DISCORDANT - better_by) / 2, (DISCORDANT + better_by) / 2
    chance = np.where(champion, lost / accuracy, won / (1 - accuracy))
    return champion ^ (generator.random(len(champion)) < chance)


def _digests(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _rows(lucky: float, seen: Mapping[int, float], series: int, cases: int) -> list[Row]:
    return [
        Row(
            what=f"20 challengers as good as the champion, 300 test images, 10 % of them answered "
            f"otherwise, {series} series: one is promoted",
            target="at most 5 %",
            result=f"{lucky:.1%}",
            met=lucky <= 0.05,
        ),
        Row(
            what=f"a challenger 5 points better, 500 test images, {cases} cases: promoted at its "
            "first comparison",
            target="at least 80 %",
            result=f"{seen[1]:.1%}",
            met=seen[1] >= 0.80,
        ),
        Row(
            what="the same as the fifth and as the twentieth model on these images",
            target="",
            result=f"{seen[5]:.1%} and {seen[20]:.1%}",
        ),
    ]
