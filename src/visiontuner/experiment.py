"""YAML -> Experiment, checked at the door and trusted afterwards."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from visiontuner.errors import ExperimentError

Objective = Literal["validation_accuracy", "validation_macro_f1", "validation_loss"]
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
)
INTEGERS = ("batch_size", "epochs")

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


class Data(Section):
    """Which pictures: `source` is a folder, an archive (path or URL), or `digits`."""

    source: Annotated[str, Field(min_length=1)] = "digits"
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None = None
    limit_per_class: PositiveInt | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"


class Model(Section):
    """Which pretrained network, and how much of it is trained."""

    backbone: Annotated[str, Field(min_length=1)] = "efficientnet_lite0"
    weights: Annotated[str, Field(min_length=1)] = "default"
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    train: Literal["head"] = "head"


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


class Values(Section):
    """A choice: `{values: [32, 64, 128]}`."""

    values: Annotated[tuple[float | int | str, ...], Field(min_length=1)]


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


Domain = Values | Range


def default_space() -> dict[str, Domain]:
    """Learning rate and batch size, as wide as a head on frozen features needs them."""
    return {
        "learning_rate": Range(low=1e-4, high=1e-1, scale="log"),
        "batch_size": Values(values=(32, 64, 128, 256)),
    }


class Search(Section):
    """What is searched, by which algorithm, with which resources."""

    trials: PositiveInt = 16
    algorithm: Literal["random", "optuna", "grid"] = "optuna"
    scheduler: Literal["none", "asha"] = "asha"
    time_budget: Seconds | None = None
    space: dict[str, Domain] = Field(default_factory=default_space)
    first: tuple[Configuration, ...] = ()
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.25

    @field_validator("space", mode="before")
    @classmethod
    def _read_domains(cls, space: object) -> object:
        if not isinstance(space, Mapping) or not space:
            raise ValueError("must name at least one of " + ", ".join(SEARCHABLE))
        return {name: _read_domain(name, domain) for name, domain in space.items()}


class Experiment(Section):
    """One experiment: data, model, training, search. Commented examples are in `experiments/`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 7
    objective: Objective = "validation_accuracy"
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    search: Search = Search()

    @property
    def mode(self) -> Literal["min", "max"]:
        """Which direction of the objective is better."""
        return "min" if self.objective == "validation_loss" else "max"

    @model_validator(mode="before")
    @classmethod
    def _name_after_the_data(cls, raw: object) -> object:
        if isinstance(raw, Mapping) and raw.get("name") is None:
            data = raw.get("data") or {}
            source = str(data.get("source", "digits")) if isinstance(data, Mapping) else "digits"
            return {**raw, "name": _default_name(source)}
        return raw

    @model_validator(mode="after")
    def _search_fits_training(self) -> Self:
        for name, domain in self.search.space.items():
            for value in domain.values if isinstance(domain, Values) else (domain.low, domain.high):
                _check_value(f"search.space.{name}", name, value)
        for index, configuration in enumerate(self.search.first):
            where = f"search.first[{index}]"
            for name, value in configuration.items():
                if name not in self.search.space:
                    raise ValueError(f"{where}: {name} is not in search.space; add it there")
                _check_value(f"{where}.{name}", name, value)
            missing = sorted(set(self.search.space) - set(configuration))
            if missing:
                raise ValueError(f"{where}: gives no value for {', '.join(missing)}")
        if self.search.algorithm == "grid":
            ranges = [n for n, d in self.search.space.items() if isinstance(d, Range)]
            if ranges:
                raise ValueError(
                    f"search.space.{ranges[0]}: a grid needs {{values: [...]}}, not a range; "
                    "or use algorithm: random"
                )
        return self

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
        """Read an experiment file and apply `section.key=value` overrides to it.

        Raises:
            ExperimentError: naming the key, the value and the rule it breaks.
        """
        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ExperimentError(
                f"Cannot read the experiment file {path}: {error.strerror}. "
                "Examples are in experiments/."
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ExperimentError(f"{path} is not YAML: {_one_line(error)}") from None
        if raw is None:
            raw = {}
        if not isinstance(raw, dict):
            raise ExperimentError(f"{path} must hold keys and values, got {type(raw).__name__}.")
        return cls.parse(raw, overrides, where=str(path))

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "experiment"
    ) -> Experiment:
        """Check a nested mapping; the same rules and errors as `load`."""
        merged = apply_overrides(raw, overrides)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise ExperimentError(f"{where}: {explain(error)}") from None

    def to_yaml(self) -> str:
        """The complete experiment with every default spelled out; `load` reads it back."""
        raw = self.model_dump(mode="json")
        return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)

    def flatten(self) -> dict[str, str]:
        """Dotted names to text, `{"training.epochs": "20", …}`, as MLflow parameters need them."""
        return dict(_flatten("", self.model_dump(mode="json")))


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with each `a.b.c=value` (value in YAML) put in its place."""
    merged: dict[str, Any] = _deep_copy(raw)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not separator or not all(keys):
            raise ExperimentError(
                f"Cannot read the override {override!r}: write it as section.key=value, "
                "for example training.epochs=5."
            )
        try:
            value = _read_number(yaml.safe_load(text))
        except yaml.YAMLError:
            raise ExperimentError(f"The value in {override!r} is not YAML.") from None
        place = merged
        for key in keys[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[keys[-1]] = value
    return merged


def explain(error: ValidationError) -> str:
    """pydantic's findings as one line: key, rule, and the nearest known key for a typo."""
    parts = []
    for item in error.errors(include_url=False):
        # Drop pydantic's own names of union branches ("Range"), which no user ever wrote.
        keys = [str(k) for k in item["loc"] if k not in ("Range", "Values", "float", "int", "str")]
        parts.append(_explain_one(keys, item["type"], item["msg"], item.get("input"), item))
    return "; ".join(dict.fromkeys(parts))


_RULES = {
    "greater_than": ("> {gt}", "gt"),
    "greater_than_equal": (">= {ge}", "ge"),
    "less_than": ("< {lt}", "lt"),
    "less_than_equal": ("<= {le}", "le"),
}


def _explain_one(keys: list[str], kind: str, message: str, value: object, item: Any) -> str:
    where = ".".join(keys)
    if kind == "extra_forbidden":
        known = _known_keys(keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)
        return f"unknown key {where}; {hint}"
    if kind in _RULES:
        bound = _RULES[kind][0].format(**item["ctx"])
        return f"{where} must be {bound}, got {value!r}"
    if kind == "finite_number":
        # A NaN breaks the lower bound as well; the bound is the rule people know.
        field = _field_of(keys)
        for constraint in getattr(field, "metadata", ()):
            if getattr(constraint, "gt", None) is not None:
                return f"{where} must be > {constraint.gt}, got {value!r}"
        return f"{where} must be a finite number, got {value!r}"
    if kind == "literal_error":
        return f"{where} must be one of {item['ctx']['expected']}, got {value!r}"
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{where}: {text}" if where else text
    return f"{where}: {message[0].lower()}{message[1:]}, got {value!r}"


def _field_of(keys: Sequence[str]) -> Any:
    section: Any = Experiment
    field = None
    for key in keys:
        fields = getattr(section, "model_fields", {})
        if key not in fields:
            return None
        field = fields[key]
        section = field.annotation
    return field


def _known_keys(keys: Sequence[str]) -> list[str]:
    if keys[:2] == ["search", "space"] and len(keys) > 2:
        return ["low", "high", "scale", "values"]
    section = _field_of(keys).annotation if keys else Experiment
    return list(getattr(section, "model_fields", {}))


def _read_domain(name: object, raw: object) -> object:
    if name not in SEARCHABLE:
        near = difflib.get_close_matches(str(name), SEARCHABLE, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "can be: " + ", ".join(SEARCHABLE)
        raise ValueError(f"{name!r} cannot be searched; {hint}")
    if isinstance(raw, Section):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{name}: write {{low: …, high: …, scale: log}} or {{values: [...]}}, got {raw!r}"
        )
    kind = Values if "values" in raw else Range
    try:
        return kind.model_validate({key: _read_number(value) for key, value in raw.items()})
    except ValidationError as error:
        parts = [
            _explain_one(
                ["search", "space", str(name), *map(str, item["loc"])],
                item["type"],
                item["msg"],
                item.get("input"),
                item,
            )
            for item in error.errors(include_url=False)
        ]
        raise ValueError("; ".join(parts).replace(f"search.space.{name}", str(name))) from None


def _read_number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text because it has no dot; people mean the number."""
    if isinstance(value, list):
        return [_read_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _read_number(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _check_value(where: str, name: str, value: object) -> None:
    """A searched value obeys the rule that the same name has under `training`."""
    if name in INTEGERS and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{where} must be a whole number, got {value!r}")
    try:
        Training.model_validate({name: value})
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        text = _explain_one(["training", name], item["type"], item["msg"], value, item)
        raise ValueError(text.replace(f"training.{name}", where, 1)) from None


def _default_name(source: str) -> str:
    last = source.rstrip("/").rsplit("/", 1)[-1] or "pictures"
    last = re.sub(r"\.(zip|tar|tgz|tar\.\w+)$", "", last, flags=re.IGNORECASE)
    name = re.sub(r"[^A-Za-z0-9_. -]+", "-", last).strip("-. ")
    return name[:100] or "pictures"


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


def _deep_copy(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _deep_copy(value) if isinstance(value, Mapping) else _read_number(value)
        for key, value in raw.items()
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
