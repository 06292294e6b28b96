"""The sections of an experiment file: which pictures, which network, how it is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from visiontuner.explain import nearest, told

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


class Data(Section):
    """Which pictures: `source` is a folder, an archive (path or URL), or `digits`."""

    source: Annotated[str, Field(min_length=1)] = "digits"
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="be 64 hexadecimal digits"
    )
    limit_per_class: PositiveInt | None = None
    on_bad_image: Literal["skip", "fail"] = "skip"


class Model(Section):
    """Which pretrained network, and how much of it is trained."""

    backbone: Annotated[str, Field(min_length=1)] = "efficientnet_lite0"
    weights: Annotated[str, Field(min_length=1)] = "default"
    image_size: Annotated[int, Field(ge=16, le=2048)] | None = None
    train: Literal["head", "last_stage", "all"] = "head"


class Augmentation(Section):
    """Random changes to a training picture; those of validation and test are never changed.

    `crop_scale` is the smallest share of the picture's area that a random crop takes, 1 for the
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
        """Whether a training picture is the same in every epoch, as evaluation reads it."""
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
    augmentation: Augmentation | None = None
    micro_batch_size: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    backbone_learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    freeze_batch_norm: bool = False

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
