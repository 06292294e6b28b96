"""YAML -> Experiment, checked at the door and trusted afterwards."""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from visiontuner.errors import ExperimentError
from visiontuner.experiment.reading import (
    apply_overrides,
    parse_yaml,
    read_experiment,
    write_yaml,
)
from visiontuner.experiment.search import (
    INTEGERS,
    SEARCHABLE,
    Configuration,
    Domain,
    Range,
    Search,
    Space,
    Stages,
    Values,
    default_space,
)
from visiontuner.experiment.sections import (
    AUGMENTATIONS,
    NO_AUGMENTATION,
    STOPPING_RULES,
    Augmentation,
    Data,
    Model,
    Rules,
    Section,
    Training,
    parse_duration,
)
from visiontuner.explain import explain, told
from visiontuner.text import without_secrets

__all__ = [
    "AUGMENTATIONS",
    "INTEGERS",
    "NO_AUGMENTATION",
    "QUICKSTART",
    "SEARCHABLE",
    "STOPPING_RULES",
    "Augmentation",
    "Configuration",
    "Data",
    "Domain",
    "Experiment",
    "Model",
    "Objective",
    "Range",
    "Rules",
    "Search",
    "Space",
    "Stages",
    "Training",
    "Values",
    "apply_overrides",
    "default_space",
    "parse_duration",
    "parse_yaml",
    "read_experiment",
]

Objective = Literal["validation_accuracy", "validation_macro_f1", "validation_loss"]
_NAME_LENGTH = 100  # characters
# A search's folder is called after it, with a time, and a folder's name holds 255 bytes.
_NAME_BYTES = 200

QUICKSTART: Mapping[str, Any] = {
    "name": "quickstart",
    "data": {"source": "digits"},
    "model": {"image_size": 96},
}
"""What `experiments/quickstart.yaml` says, for an installed package that has no such folder."""


def _check_experiment_name(name: str) -> str:
    if (
        not name[:1].isalnum()
        or not all(map(_fits_in_name, name))
        or len(name) > _NAME_LENGTH
        or len(name.encode()) > _NAME_BYTES
    ):
        raise told(
            f"name must start with a letter or digit and hold up to {_NAME_LENGTH} letters, "
            f"digits, spaces and _.- ({_NAME_BYTES} bytes), got {name!r}"
        )
    return name


class Experiment(Section):
    """One experiment: data, model, training, search. Commented examples are in `experiments/`."""

    name: Annotated[str, AfterValidator(_check_experiment_name)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 7
    objective: Objective = "validation_accuracy"
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    search: Search = Search()
    rules: Rules = Rules()

    @property
    def mode(self) -> Literal["min", "max"]:
        """Which direction of the objective is better."""
        return "min" if self.objective == "validation_loss" else "max"

    @property
    def augmentation(self) -> Augmentation:
        """`training.augmentation`; where that is null, light if more than the head is trained."""
        if self.training.augmentation is not None:
            return self.training.augmentation
        return NO_AUGMENTATION if self.model.train == "head" else AUGMENTATIONS["light"]

    @property
    def trains_on_pictures(self) -> bool:
        """Whether trials run the network in every step, instead of a head on features."""
        return self.model.train != "head" or not self.augmentation.is_off

    @property
    def record_every_steps(self) -> int:
        """Steps between two recordings of tensors, 0 for none of anything.

        Where that is null a network is recorded every 50th step, and a head on features never:
        its trials take seconds.
        """
        if self.training.record_every_steps is not None:
            return self.training.record_every_steps
        return 50 if self.trains_on_pictures else 0

    def head_stage(self) -> Experiment:
        """The first of two stages: heads on features, over the whole space."""
        return self._changed(
            model={"train": "head"}, training={"augmentation": None}, search={"stages": None}
        )

    def network_stage(self) -> Experiment:
        """The second of two stages: a few trials that train the network, each to its end."""
        stages = self.search.stages or Stages()
        return self._changed(
            training={"epochs": stages.epochs}, search={"stages": None, "scheduler": "none"}
        )

    def _changed(self, **sections: Mapping[str, object]) -> Experiment:
        changes = {
            name: getattr(self, name).model_copy(update=dict(values))
            for name, values in sections.items()
        }
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def _has_something_to_train(self) -> Self:
        if self.model.train != "head":
            return self
        network_only = {
            "training.layer_decay": self.training.layer_decay is not None,
            "training.freeze_batch_norm": self.training.freeze_batch_norm,
            "search.stages": self.search.stages is not None,
        }
        for name, given in network_only.items():
            if given:
                raise told(
                    f"{name} is for training the network; set model.train to last_stage or all, "
                    "or leave it out"
                )
        return self

    def first_trials(self) -> list[Configuration]:
        """`search.first`; where that is null the values under `training`, if the space holds them.

        Without the defaults among its trials a search can lose to them.
        """
        if self.search.first is not None:
            return list(self.search.first)
        space = self.search.space
        defaults: Configuration = {name: getattr(self.training, name) for name in space}
        fits = all(domain.holds(defaults[name]) for name, domain in space.items())
        return [defaults] if fits and self.search.algorithm != "grid" else []

    @model_validator(mode="before")
    @classmethod
    def _name_after_the_data(cls, raw: object) -> object:
        if isinstance(raw, Mapping) and raw.get("name") is None:
            data = raw.get("data") or {}
            source = str(data.get("source", "digits")) if isinstance(data, Mapping) else "digits"
            return {**raw, "name": _default_name(source)}
        return raw

    @field_validator("data", "model", "training", "search", "rules", mode="before")
    @classmethod
    def _empty_section_is_default(cls, raw: object) -> object:
        """A section whose every line is commented out reads as null."""
        return {} if raw is None else raw

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
        """Read an experiment file and apply `section.key=value` overrides to it.

        Raises:
            ExperimentError: naming the key, the value and the rule it breaks.
        """
        return cls.parse(read_experiment(Path(path)), overrides, where=str(path))

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "experiment"
    ) -> Experiment:
        """Check a nested mapping; the same rules and errors as `load`."""
        try:
            return cls.model_validate(apply_overrides(raw, overrides))
        except RecursionError:
            raise ExperimentError(
                f"{where} holds a list or keys that hold themselves (`&a [*a]`). Write them out."
            ) from None
        except ValidationError as error:
            raise ExperimentError(f"{where}: {explain(error, cls)}") from None

    def to_yaml(self) -> str:
        """The complete experiment with every default spelled out; `load` reads it back."""
        return write_yaml(self.model_dump(mode="json"))

    def flatten(self) -> dict[str, str]:
        """Dotted names to text, `{"training.epochs": "20", …}`, as MLflow parameters need them."""
        return dict(_flatten("", self.model_dump(mode="json")))


def _default_name(source: str) -> str:
    """The name of the data's folder or archive, as an MLflow experiment and model can be called.

    Where something of it is lost, a digest of it keeps the names of two folders apart.
    """
    if "://" in source:  # neither a signed URL's query nor a user's password is a name
        source = unquote(re.split(r"[?#]", without_secrets(source), maxsplit=1)[0])
    else:
        source = os.path.abspath(os.path.expanduser(source))  # noqa: PTH100, PTH111 - no links
    last = unicodedata.normalize("NFC", source.rstrip("/").rsplit("/", 1)[-1])
    last = re.sub(r"\.(zip|tar|tgz|tar\.\w+)$", "", last, flags=re.IGNORECASE)
    name = "".join(letter if _fits_in_name(letter) else "\0" for letter in last)
    name = re.sub(r"\0+", "-", name).strip("-. ")
    while name and not name[0].isalnum():
        name = name[1:]
    if name and name == last and len(name) <= _NAME_LENGTH and len(name.encode()) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256((last or source).encode(errors="surrogateescape")).hexdigest()[:6]
    room = name[: _NAME_LENGTH - 7].encode()[: _NAME_BYTES - 7].decode(errors="ignore")
    return f"{room.rstrip('-. ') or 'images'}-{digest}"


def _fits_in_name(letter: str) -> bool:
    """Letters, their marks and digits of any script, and what MLflow and folders take besides."""
    return unicodedata.category(letter)[0] in "LMN" or letter in "_. -"


def _flatten(prefix: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [
            row
            for key, item in value.items()
            for row in _flatten(f"{prefix}.{key}" if prefix else str(key), item)
        ]
    if isinstance(value, float) and math.isfinite(value):
        return [(prefix, repr(value))]
    return [(prefix, "null" if value is None else str(value))]
