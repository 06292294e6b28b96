"""YAML -> Experiment, checked at the door and trusted afterwards."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from visiontuner.errors import ExperimentError
from visiontuner.experiment.reading import (
    apply_overrides,
    explain,
    nearest,
    read_experiment,
    told,
    write_yaml,
)
from visiontuner.text import without_secrets

# The sections of an experiment file: which images, which network, how it is trained.


STOPPING_RULES = (
    "not_a_number",
    "exploding_gradient",
    "learning_rate_too_high",
    "learning_rate_too_low",
    "loss_not_decreasing",
    "overfit",
    "overtraining",
    "label_noise",
    "exploding_tensor",
    "vanishing_gradient",
    "all_zero",
    "unchanged_tensor",
    "weight_update_ratio",
    "poor_weight_initialisation",
    "tensor_variance",
    "saturated_activation",
    "dead_relu",
    "check_input_images",
    "low_gpu_use",
    "cpu_bottleneck",
    "io_bottleneck",
    "memory_increase",
)
"""Diagnostic rules that can stop a trial: those that see something while it runs."""
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([smhd])\s*$")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: object) -> object:
    """`"30m"` -> 1800.0 seconds; a number is taken as seconds."""
    if isinstance(text, str):
        match = _DURATION.match(text)
        if match is None:
            raise ValueError("must be a duration such as 90s, 30m or 2h")
        return float(match[1]) * _SECONDS[match[2]]
    return text


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the experiment file: immutable, finite numbers only, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reads_as_yaml(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads `off` and `no` as false, and pydantic would count true as 1.

        Other readers of YAML than ours take 1e-4 for text.
        """
        field = cls.model_fields[info.field_name or ""]
        if _takes_numbers(field.annotation):
            value = _read_exponents(value)
        if isinstance(value, bool) and field.annotation is not bool:
            word = "true" if value else "false"
            raise ValueError(f"got {word}; YAML reads yes, no, on and off so: put a word in quotes")
        return value


def _takes_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


def _read_exponents(value: object) -> object:
    if isinstance(value, list):
        return [_read_exponents(item) for item in value]
    if isinstance(value, dict):
        return {key: _read_exponents(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


class Columns(Section):
    """What a table's columns are called, where not `path`, `label`, `split` and `group`."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}, got {pattern!r}") from None
    return pattern


class Data(Section):
    """Which images: `source` is a folder, a table, an archive (path or URL), or `digits`.

    `columns` names the columns of a table. `labels` is a table of single images' labels, `classes`
    one of classes and what becomes of them; both are looked for in the data's folder, then where
    the command runs. `group` is a pattern of file names: images for which it matches the same, as
    those with the same word in a table's group column, are in one split.
    `split` is how images are split that no folder sorts: `stratified` meets the shares in each
    class; `hashed`, the rule of version 0.1, meets them on average, and adding an image moves none.
    `validation` says what trials are judged by: the validation images (`holdout`), or all images of
    training and validation, each by a head that did not learn from its fold (`folds`); `auto` takes
    folds where heads are trained on few images and no validation images are given.
    `on_leak` says what becomes of images that show the same in two splits: they are named, or the
    training image (of a pair in validation and test, the validation image) is left out.
    """

    source: Annotated[str, Field(min_length=1)] = "digits"
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="be 64 hexadecimal digits"
    )
    columns: Columns = Columns()
    labels: Annotated[str, Field(min_length=1)] | None = None
    classes: Annotated[str, Field(min_length=1)] | None = None
    group: Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)] | None = None
    split: Literal["stratified", "hashed"] = "stratified"
    limit_per_class: PositiveInt | None = None
    validation: Literal["auto", "holdout", "folds"] = "auto"
    folds: Annotated[int, Field(ge=2, le=20)] | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"
    on_leak: Literal["warn", "drop"] = "warn"


OFFLINE_BACKBONES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
"""Networks whose pretrained weights are installed with the requirements."""


class Model(Section):
    """Which pretrained network, and how much of it is trained."""

    backbone: Annotated[str, Field(min_length=1)] = "efficientnet_lite0"
    weights: Annotated[str, Field(min_length=1)] = "default"
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    train: Literal["head", "last_stage", "all"] = "head"
    views: Literal[1, "flip"] = 1

    @model_validator(mode="after")
    def _views_are_of_a_frozen_network(self) -> Self:
        if self.views == "flip" and self.train != "head":
            raise told(
                "model.views: flip averages the features of a frozen network, and model.train is "
                f"{self.train}; leave one of them out"
            )
        return self


class Augmentation(Section):
    """Random changes to a training image; those of validation and test are never changed.

    `crop_scale` is the smallest share of the image's area that a random crop takes, 1 for the
    fixed crop of evaluation; `flip` and `erasing` are probabilities; `mixup` and `cutmix` are the
    alpha of their Beta distribution, 0 for without.
    """

    crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.35
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    policy: Literal["none", "randaugment", "trivial"] = "none"
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0

    @property
    def is_off(self) -> bool:
        """Whether a training image is the same in every epoch, as evaluation reads it."""
        return self == NO_AUGMENTATION


NO_AUGMENTATION = Augmentation(crop_scale=1, flip=0)
AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": NO_AUGMENTATION,
    "light": Augmentation(),
    "strong": Augmentation(crop_scale=0.2, policy="trivial", erasing=0.1, mixup=0.2),
}
"""What `training.augmentation` may be in one word."""


class Training(Section):
    """How one trial trains, where the search space says nothing else."""

    epochs: PositiveInt = 20
    learning_rate: Annotated[float, Field(gt=0)] = 0.003
    batch_size: PositiveInt = 128
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    momentum: Fraction = 0.9
    label_smoothing: Fraction = 0.0
    dropout: Fraction = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_fraction: Fraction = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    early_stop: PositiveInt | None = None
    log_every_steps: PositiveInt | None = None
    record_every_steps: Annotated[int, Field(ge=0)] | None = None
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    refit: Literal["auto", "on", "off"] = "auto"
    augmentation: Augmentation | None = None
    micro_batch_size: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    backbone_learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    freeze_batch_norm: bool = False

    @property
    def keeps_last(self) -> bool:
        """Whether the last epoch is the one to keep: the learning rate falls to zero in it.

        Otherwise it is the one with the lowest validation loss.
        """
        return self.schedule == "cosine" and self.early_stop is None

    @field_validator("augmentation", mode="before")
    @classmethod
    def _read_augmentation(cls, raw: object) -> object:
        if not isinstance(raw, str):
            return raw
        if raw not in AUGMENTATIONS:
            words = ", ".join(AUGMENTATIONS)
            raise ValueError(f"must be {words} or a section with crop_scale, flip, …, got {raw!r}")
        return AUGMENTATIONS[raw]


class Rules(Section):
    """Diagnostic rules that end a trial when they find an error; `docs/rules.md` describes them."""

    stop_on: tuple[str, ...] = ()

    @field_validator("stop_on", mode="before")
    @classmethod
    def _name_rules(cls, raw: object) -> object:
        if raw is None:
            return ()
        if not isinstance(raw, list | tuple):
            raise told(f"rules.stop_on must be a list of rules, got {raw!r}")
        for name in raw:
            if name not in STOPPING_RULES:
                raise told(
                    f"rules.stop_on: no rule {name!r} that can stop a trial; "
                    f"{nearest(name, STOPPING_RULES)}"
                )
        return raw


# What is searched: the space, its first configurations, by which algorithm and with what.


Configuration = dict[str, float | int | str]
"""One trial's searched values by name, `{"learning_rate": 0.003, "batch_size": 128}`."""

SEARCHABLE = (
    "learning_rate",
    "batch_size",
    "weight_decay",
    "dropout",
    "label_smoothing",
    "optimizer",
    "epochs",
    "backbone_learning_rate_factor",
    "backbone",
)
INTEGERS = ("batch_size", "epochs")
LARGEST_GRID = 100_000


class Values(Section):
    """A choice: `{values: [32, 64, 128]}`."""

    values: Annotated[tuple[float | int | str, ...], Field(min_length=1)]

    @field_validator("values", mode="before")
    @classmethod
    def _hold_no_booleans(cls, raw: object) -> object:
        if isinstance(raw, list | tuple) and any(isinstance(value, bool) for value in raw):
            raise ValueError(f"must hold numbers or words, got {list(raw)}")
        return raw

    def holds(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


class Range(Section):
    """An interval, both ends included: `{low: 1.0e-4, high: 1.0e-1, scale: log}`."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be < high, got {self.low:g} and {self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low must be > 0 on a log scale, got {self.low:g}")
        return self

    def holds(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


Domain = Values | Range
Space = Mapping[str, Domain]


DEFAULT_BATCH_SIZES = (32, 64, 128, 256)


def default_space() -> dict[str, Domain]:
    """Learning rate and batch size, as wide as a head on frozen features needs them."""
    return {
        "learning_rate": Range(low=1e-4, high=1e-1, scale="log"),
        "batch_size": Values(values=DEFAULT_BATCH_SIZES),
    }


class Stages(Section):
    """A search in two stages: first heads on features, then the best of them with the network.

    The second stage begins with the trained head of the first; it takes the `best` trials and those
    of `search.first`, and trains what `model.train` names for `epochs` epochs. `learning_rate` is
    its own for all of them; null keeps each trial's.
    """

    best: PositiveInt = 3
    epochs: PositiveInt = 5
    learning_rate: Annotated[float, Field(gt=0)] | None = None


class Search(Section):
    """What is searched, by which algorithm, with which resources."""

    trials: PositiveInt = 16
    algorithm: Literal["random", "optuna", "grid"] = "optuna"
    scheduler: Literal["auto", "none", "asha"] = "auto"
    time_budget: Seconds | None = None
    space: dict[str, Domain] = Field(default_factory=default_space)
    first: tuple[Configuration, ...] | None = None
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.25
    stages: Stages | None = None
    baselines: bool = True

    @field_validator("space", mode="before")
    @classmethod
    def _read_space(cls, raw: object) -> object:
        if not isinstance(raw, Mapping) or not raw:
            raise ValueError("must name at least one of " + ", ".join(SEARCHABLE))
        space = {name: _read_domain(name, domain) for name, domain in raw.items()}
        # Networks alone: heads are searched within each as they are without.
        return {**space, **default_space()} if set(space) == {"backbone"} else space

    @property
    def backbones(self) -> tuple[str, ...]:
        """The networks that are searched; empty where `model.backbone` is the only one."""
        domain = self.space.get("backbone")
        return tuple(map(str, domain.values)) if isinstance(domain, Values) else ()

    @field_validator("first", mode="before")
    @classmethod
    def _read_first(cls, raw: object) -> object:
        if raw is None:
            return None
        if not isinstance(raw, list | tuple):
            raise ValueError(f"must be a list of configurations, got {raw!r}")
        return [_read_configuration(index, item) for index, item in enumerate(raw)]

    @model_validator(mode="after")
    def _first_fits_space(self) -> Self:
        first = self.first or ()
        for index, configuration in enumerate(first):
            _check_configuration(f"search.first[{index}]", configuration, self.space)
            if configuration in first[:index]:
                raise told(f"search.first[{index}]: repeats an earlier configuration")
        if len(first) > self.trials:
            raise told(
                f"search.trials must be >= {len(first)}, the number of configurations in "
                f"search.first, got {self.trials}"
            )
        return self

    @model_validator(mode="after")
    def _every_network_gets_a_trial(self) -> Self:
        if self.algorithm != "grid" and self.trials < len(self.backbones):
            raise told(
                f"search.trials must be >= {len(self.backbones)}, the number of networks in "
                f"search.space.backbone, got {self.trials}"
            )
        return self

    @model_validator(mode="after")
    def _grid_has_no_range(self) -> Self:
        ranges = [name for name, domain in self.space.items() if isinstance(domain, Range)]
        if self.algorithm == "grid" and ranges:
            raise told(
                f"search.space.{ranges[0]}: a grid needs {{values: [...]}}, not a range; "
                "or use algorithm: random"
            )
        return self

    @model_validator(mode="after")
    def _grid_can_be_run(self) -> Self:
        counts = [
            len(domain.values) for domain in self.space.values() if isinstance(domain, Values)
        ]
        if self.algorithm == "grid" and math.prod(counts) > LARGEST_GRID:
            raise told(
                f"search.space has {math.prod(counts):,} combinations, and a grid runs all of "
                "them; leave values out, or use algorithm: random and search.trials"
            )
        return self


def _read_domain(name: object, raw: object) -> Domain:
    """One entry of the search space; its values obey the rule that `training` has for the name."""
    if name not in SEARCHABLE:
        raise told(f"search.space: {name!r} cannot be searched; {nearest(name, SEARCHABLE)}")
    where = f"search.space.{name}"
    if isinstance(raw, Section):
        raw = raw.model_dump()
    if name == "backbone":
        return _read_networks(where, raw)
    if not isinstance(raw, Mapping):
        raise told(
            f"{where} must be {{low: …, high: …, scale: log}} or {{values: [...]}}, got {raw!r}"
        )
    if "values" in raw and len(raw) > 1:
        others = ", ".join(sorted(str(key) for key in raw if key != "values"))
        raise told(f"{where} has values and {others}; write either values or low and high")
    kind: type[Range | Values] = Values if "values" in raw else Range
    try:
        domain = kind.model_validate(raw)
    except ValidationError as error:
        raise told(explain(error, kind, where.split("."))) from None
    if isinstance(domain, Values):
        return Values(values=_read_choices(where, str(name), domain.values))
    if name == "optimizer":
        raise told(f"{where} needs {{values: [...]}}: optimizers have no order")
    for bound in (domain.low, domain.high):
        _read_value(where, str(name), bound)
    return domain


OFFLINE = "offline"
"""In `search.space.backbone`: the networks that need no download."""


def search_networks(names: Sequence[str]) -> list[str]:
    """Overrides with which an experiment searches these networks, whatever its file names.

    Args:
        names: `offline` among them stands for each of `OFFLINE_BACKBONES`.
    """
    given = [name.strip() for name in names if name.strip()]
    if not given:
        raise ExperimentError("--backbones names no network; write NAME,NAME or offline.")
    first = OFFLINE_BACKBONES[0] if given[0] == OFFLINE else given[0]
    return [
        f"model.backbone={json.dumps(first)}",
        f"search.space.backbone={json.dumps({'values': given})}",
    ]


def _read_networks(where: str, raw: object) -> Values:
    """`{values: [resnet50, offline]}`; `offline` stands for each of `OFFLINE_BACKBONES`."""
    values = raw.get("values") if isinstance(raw, Mapping) and set(raw) == {"values"} else raw
    values = [values] if values == OFFLINE else values
    if not isinstance(values, list | tuple) or not values:
        raise told(f"{where} must be {{values: [NAME, …]}}: networks have no order, got {raw!r}")
    names = [one for v in values for one in (OFFLINE_BACKBONES if v == OFFLINE else (v,))]
    read = [_read_value(where, "backbone", name) for name in names]
    if OFFLINE in values:
        return Values(values=tuple(dict.fromkeys(read)))
    return Values(values=_read_choices(where, "backbone", read))


def _read_choices(
    where: str, name: str, values: Sequence[float | int | str]
) -> tuple[float | int | str, ...]:
    choices = tuple(_read_value(where, name, value) for value in values)
    if len(set(choices)) < len(choices):
        raise told(f"{where}: the same value twice in {list(choices)}")
    return choices


def _read_configuration(index: int, raw: object) -> Configuration:
    where = f"search.first[{index}]"
    if not isinstance(raw, Mapping):
        raise told(f"{where} must hold a value for each searched name, got {raw!r}")
    for name in raw:
        if name not in SEARCHABLE:
            raise told(f"{where}: {name!r} cannot be searched; {nearest(name, SEARCHABLE)}")
    return {name: _read_value(f"{where}.{name}", name, value) for name, value in raw.items()}


def _read_value(where: str, name: str, value: object) -> float | int | str:
    """A searched value as its own section reads the same name: 64.0 is the batch size 64."""
    section: type[Section] = Model if name == "backbone" else Training
    try:
        checked = section.model_validate({name: value})
    except ValidationError as error:
        raise told(explain(error, section).replace(name, where, 1)) from None
    read: float | int | str = getattr(checked, name)
    return read


def _check_configuration(where: str, configuration: Configuration, space: Space) -> None:
    for name, value in configuration.items():
        if name not in space:
            raise told(f"{where}: {name} is not in search.space; add it there")
        if not space[name].holds(value):
            raise told(f"{where}.{name} must be in search.space ({space[name]}), got {value!r}")
    # A configuration that names no network is tried with each.
    missing = [name for name in space if name not in configuration and name != "backbone"]
    if missing:
        raise told(
            f"{where}: gives no value for {', '.join(missing)}; "
            "add one, or leave search.first empty"
        )


# YAML -> Experiment, checked at the door and trusted afterwards.


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

_KEYS_OF_VERSION_0_1 = {
    "data": {"source", "sha256", "limit_per_class", "on_bad_image"},
    "model": {"backbone", "weights", "image_size", "train"},
}


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
    package: Literal["float32", "int8"] = "float32"

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
    def trains_on_images(self) -> bool:
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
        return 50 if self.trains_on_images else 0

    def for_backbone(self, name: str) -> Experiment:
        """The search over one of its networks alone: the same space without `backbone`."""
        search = self.search
        first = search.first and tuple(
            {key: value for key, value in configuration.items() if key != "backbone"}
            for configuration in search.first
            if configuration.get("backbone", name) == name
        )
        space = {key: domain for key, domain in search.space.items() if key != "backbone"}
        return self._changed(model={"backbone": name}, search={"space": space, "first": first})

    def for_configuration(self, configuration: Mapping[str, object]) -> Experiment:
        """What a trial runs: with the network that its configuration names, if it names one."""
        name = configuration.get("backbone")
        return self if name is None else self.for_backbone(str(name))

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

    @property
    def can_fold(self) -> bool:
        """Whether trials can be judged by folds: heads on features, and nothing after them."""
        return not self.trains_on_images and self.search.stages is None

    @property
    def has_baselines(self) -> bool:
        """Whether logistic regression and nearest neighbours are computed beside the trials."""
        return self.search.baselines and self.can_fold

    @property
    def refits(self) -> bool:
        """Whether the kept configuration is trained again on train and validation together."""
        return self.can_fold and self.training.refit != "off"

    @model_validator(mode="after")
    def _views_are_of_images_as_they_are(self) -> Self:
        if self.model.views == "flip" and self.trains_on_images:
            raise told(
                "model.views: flip averages features, and with training.augmentation none are "
                "kept; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_validated_so(self) -> Self:
        if self.data.folds is not None and self.data.validation == "holdout":
            raise told("data.folds is for data.validation: folds; leave one of them out")
        if self.data.validation == "folds" and not self.can_fold:
            raise told(
                "data.validation: folds is for heads on features (model.train: head, no "
                "augmentation, no search.stages); use holdout"
            )
        if self.data.validation == "folds" and self.training.refit == "off":
            raise told("data.validation: folds keeps no head but the refitted one; use refit: auto")
        if self.training.refit == "on" and not self.can_fold:
            raise told(
                "training.refit: on is for heads on features; to train a network on train and "
                "validation: visiontuner train --from SEARCH --on train+validation"
            )
        return self

    @model_validator(mode="after")
    def _can_search_networks(self) -> Self:
        names = self.search.backbones
        if not names:
            return self
        if self.model.backbone not in names:
            if "backbone" in self.model.model_fields_set:
                raise told(
                    f"model.backbone: {self.model.backbone!r} is not in search.space.backbone; "
                    "leave it out, or add it there"
                )
            # What stands for all of them where one network has to be named.
            model = self.model.model_copy(update={"backbone": names[0]})
            object.__setattr__(self, "model", model)
        if not self.can_fold:
            raise told(
                "search.space.backbone is for heads on features (model.train: head, no "
                "augmentation, no search.stages); search the networks first, then train the best "
                "one: visiontuner train --from SEARCH --set model.train=last_stage"
            )
        if len(names) > 1 and self.model.weights not in ("default", "none"):
            raise told(
                f"model.weights: {self.model.weights!r} are weights of one network, and "
                "search.space.backbone names several; use default"
            )
        return self

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

    def for_images(self, count: int) -> Experiment:
        """The same without the default space's batches of more than `count` training images.

        A space, first trials or a batch size that the file gives stay as they are.
        """
        search = self.search
        heads = {key: domain for key, domain in search.space.items() if key != "backbone"}
        only_networks = bool(search.backbones) and heads == default_space()
        if "space" in search.model_fields_set and not only_networks:
            return self
        if search.first is not None:
            return self
        own = self.training.batch_size
        given = "batch_size" in self.training.model_fields_set
        sizes = [n for n in DEFAULT_BATCH_SIZES if n <= count or (given and n == own)] or [count]
        space = {**search.space, "batch_size": Values(values=tuple(sizes))}
        # `training` stays among the trials.
        training = {"batch_size": own if given else min(own, sizes[-1])}
        return self._changed(search={"space": space}, training=training)

    def first_trials(self) -> list[Configuration]:
        """`search.first`; where that is null the values under `training`, if the space holds them.

        Without the defaults among its trials a search can lose to them.
        """
        if self.search.backbones:
            each = {name: self.for_backbone(name) for name in self.search.backbones}
            return [
                {"backbone": name, **configuration}
                for name, experiment in each.items()
                for configuration in experiment.first_trials()
            ]
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

    @model_validator(mode="before")
    @classmethod
    def _keep_the_split_of_version_0_1(cls, raw: object) -> object:
        """A search of version 0.1 goes on with its split.

        Its experiment file has no `data.split` and, unlike a person's, every other key.
        """
        if not isinstance(raw, Mapping):
            return raw
        complete = all(
            isinstance(raw.get(section), Mapping) and keys == set(raw[section])
            for section, keys in _KEYS_OF_VERSION_0_1.items()
        )
        return {**raw, "data": {**raw["data"], "split": "hashed"}} if complete else raw

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
    """The name of the data's folder or archive, as MLflow's experiment and model can be called.

    Where something of it is lost, a digest of it keeps the names of two folders apart.
    """
    if "://" in source:  # neither a signed URL's query nor a user's password is a name
        source = unquote(re.split(r"[?#]", without_secrets(source), maxsplit=1)[0])
    else:
        source = os.path.abspath(os.path.expanduser(source))  # noqa: PTH100, PTH111 - no links
    # Every table is called labels.csv: its folder tells it from others.
    source = re.sub(r"/[^/]+\.(csv|tsv|jsonl|ndjson|parquet)$", "", source, flags=re.IGNORECASE)
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
