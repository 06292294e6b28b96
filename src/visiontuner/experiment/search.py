"""What is searched: the space, its first configurations, by which algorithm and with what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from visiontuner.experiment.sections import PositiveInt, Seconds, Section, Training
from visiontuner.explain import explain, nearest, told

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


def default_space() -> dict[str, Domain]:
    """Learning rate and batch size, as wide as a head on frozen features needs them."""
    return {
        "learning_rate": Range(low=1e-4, high=1e-1, scale="log"),
        "batch_size": Values(values=(32, 64, 128, 256)),
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
    scheduler: Literal["none", "asha"] = "asha"
    time_budget: Seconds | None = None
    space: dict[str, Domain] = Field(default_factory=default_space)
    first: tuple[Configuration, ...] | None = None
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.25
    stages: Stages | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _read_space(cls, raw: object) -> object:
        if not isinstance(raw, Mapping) or not raw:
            raise ValueError("must name at least one of " + ", ".join(SEARCHABLE))
        return {name: _read_domain(name, domain) for name, domain in raw.items()}

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
    """A searched value as `training` reads the same name: 64.0 is the batch size 64."""
    try:
        training = Training.model_validate({name: value})
    except ValidationError as error:
        raise told(explain(error, Training).replace(name, where, 1)) from None
    read: float | int | str = getattr(training, name)
    return read


def _check_configuration(where: str, configuration: Configuration, space: Space) -> None:
    for name, value in configuration.items():
        if name not in space:
            raise told(f"{where}: {name} is not in search.space; add it there")
        if not space[name].holds(value):
            raise told(f"{where}.{name} must be in search.space ({space[name]}), got {value!r}")
    missing = [name for name in space if name not in configuration]
    if missing:
        raise told(
            f"{where}: gives no value for {', '.join(missing)}; "
            "add one, or leave search.first empty"
        )
