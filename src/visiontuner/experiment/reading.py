"""Experiment files and overrides -> nested keys and values, not yet checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from visiontuner.errors import ExperimentError


def read_experiment(path: Path) -> dict[str, Any]:
    """The keys and values of an experiment file, not yet checked.

    Raises:
        ExperimentError: the file cannot be read, or is not YAML with keys and values.
    """
    try:
        # A subclass of SafeLoader: plain values only, and no key twice.
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise ExperimentError(
            f"Cannot read the experiment file {path}: {error.strerror}. "
            "Examples are in experiments/."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ExperimentError(f"{path} is not YAML: {_one_line(error)}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ExperimentError(f"{path} must hold keys and values, got {type(raw).__name__}.")
    return raw


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with each `a.b.c=value` (value in YAML) put in its place."""
    merged: dict[str, Any] = _deep_copy(raw)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not separator or not all(keys):
            raise ExperimentError(
                f"Cannot read the override {override!r}: write it as section.key=value, "
                "for example training.epochs=5."
            )
        try:
            value = read_number(yaml.safe_load(text))
        except yaml.YAMLError:
            raise ExperimentError(f"The value in {override!r} is not YAML.") from None
        place = merged
        for key in keys[:-1]:
            if isinstance(place.get(key), list):
                raise ExperimentError(
                    f"Cannot read the override {override!r}: {key} is a list; write all of it, "
                    f"{key}=[...]."
                )
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[keys[-1]] = value
    return merged


def read_number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text because it has no dot; people mean the number."""
    if isinstance(value, list):
        return [read_number(item) for item in value]
    if isinstance(value, dict):
        return {key: read_number(item) for key, item in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _deep_copy(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _deep_copy(value) if isinstance(value, Mapping) else read_number(value)
        for key, value in raw.items()
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML would keep the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # A key that is itself a list or a mapping has a list for its value.
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
