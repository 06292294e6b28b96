"""Experiment files and overrides -> nested keys and values, not yet checked.

PyYAML reads YAML 1.1, in which 1:30 is 90, 010 is 8, 1e-4 is text and 2024-05-01 no text. Here a
number is what everybody reads as one; what only YAML 1.1 takes for a number is refused.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from visiontuner.errors import ExperimentError

# pydantic's findings about an experiment file as one line: key, rule, value, nearest known key.


# pydantic's own names of union branches, which no user ever wrote.
_BRANCHES = ("Range", "Values", "float", "int", "str")

_BOUNDS = {
    "greater_than": ">",
    "greater_than_equal": ">=",
    "less_than": "<",
    "less_than_equal": "<=",
}
_BOUND_KEYS = {">": "gt", ">=": "ge", "<": "lt", "<=": "le"}
_WORDS = {
    "model_type": "must hold keys and values",
    "dict_type": "must hold keys and values",
    "string_type": "must be text (put it in quotes)",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
}


def told(message: str) -> PydanticCustomError:
    """An error whose message names its key itself, for validators to raise."""
    # Braces would be read as places to fill in, so the text goes in as one.
    return PydanticCustomError("told", "{text}", {"text": message})


def explain(error: ValidationError, root: type[BaseModel], prefix: Sequence[str] = ()) -> str:
    """All findings in one line; `prefix` is where in `root` the checked part sits."""
    parts: dict[str, str] = {}
    for item in error.errors(include_url=False):
        keys = [*prefix, *(str(k) for k in item["loc"] if k not in _BRANCHES)]
        # Each branch of a union complains about the same key: the first one is enough.
        identity = _join(keys) if item["type"] != "told" else item["msg"]
        parts.setdefault(identity, _explain_one(keys, item, root))
    return "; ".join(dict.fromkeys(parts.values()))


def nearest(word: object, known: Sequence[str]) -> str:
    """`did you mean …?`, or what there is."""
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "known: " + ", ".join(known)


def _explain_one(keys: list[str], item: Any, root: type[BaseModel]) -> str:
    kind, value, where = item["type"], item.get("input"), _join(keys)
    if kind == "told":
        return str(item["msg"])
    if kind == "value_error":
        text = item["msg"].removeprefix("Value error, ")
        return f"{where}: {text}" if where else text
    if kind == "missing":
        return f"{where} is missing"
    if kind == "extra_forbidden":
        return f"unknown key {where}; {_meant(keys, root)}"
    return f"{where} {_rule(kind, keys, item, root)}, got {value!r}"


def _meant(keys: Sequence[str], root: type[BaseModel]) -> str:
    """The key of that very name in another section, or else the nearest one in its own."""
    elsewhere = sorted(_places(keys[-1], root), key=lambda place: place.count("."))
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return nearest(keys[-1], _known_keys(keys[:-1], root))


def _places(name: str, section: Any) -> Iterator[str]:
    """Dotted names of the keys in a section and those below it that are called so."""
    for key, field in getattr(section, "model_fields", {}).items():
        if key == name:
            yield key
        for place in _places(name, _section_of(field.annotation)):
            yield f"{key}.{place}"


def _rule(kind: str, keys: list[str], item: Any, root: type[BaseModel]) -> str:
    if kind in _BOUNDS:
        sign = _BOUNDS[kind]
        return f"must be {sign} {item['ctx'][_BOUND_KEYS[sign]]:.15g}"
    field = _field_of(keys, root)
    if kind == "finite_number":
        # A NaN breaks the lower bound as well; the bound is the rule people know.
        if isinstance(item["input"], float) and math.isnan(item["input"]):
            for constraint in getattr(field, "metadata", ()):
                if getattr(constraint, "gt", None) is not None:
                    return f"must be > {constraint.gt:g}"
        return "must be a finite number"
    if kind == "literal_error":
        return f"must be one of {item['ctx']['expected']}"
    if kind == "string_pattern_mismatch" and field is not None and field.description:
        return f"must {field.description}"
    message = str(item["msg"])
    return _WORDS.get(kind, message[0].lower() + message[1:])


def _join(keys: Sequence[str]) -> str:
    """`["search", "first", "0"]` -> `search.first[0]`."""
    tail = "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in keys[1:])
    return (keys[0] if keys else "") + tail


def _field_of(keys: Sequence[str], root: type[BaseModel]) -> Any:
    section: Any = root
    field = None
    for key in keys:
        fields: Mapping[str, Any] = getattr(section, "model_fields", {})
        if key not in fields:
            return None
        field = fields[key]
        section = _section_of(field.annotation)
    return field


def _section_of(annotation: Any) -> Any:
    """`Stages | None` -> `Stages`."""
    sections = [part for part in get_args(annotation) if hasattr(part, "model_fields")]
    return sections[0] if sections else annotation


def _known_keys(keys: Sequence[str], root: type[BaseModel]) -> list[str]:
    section: Any = root
    if keys:
        field = _field_of(keys, root)
        # A domain of the search space is one of two shapes.
        section = _section_of(field.annotation) if field else None
    return list(getattr(section, "model_fields", ("low", "high", "scale", "values")))


def read_experiment(path: Path) -> dict[str, Any]:
    """The keys and values of an experiment file, not yet checked.

    Raises:
        ExperimentError: the file cannot be read, or is not YAML with keys and values.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(
            f"Cannot read the experiment file {path}: {error.strerror}. "
            "Examples are in experiments/."
        ) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ExperimentError(
            f"{path} is not UTF-8 (byte {byte:#04x}): save it as UTF-8."
        ) from None
    except _UnclearNumber as error:
        raise ExperimentError(f"{path}, line {error.line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ExperimentError(f"{path} is not YAML: {_one_line(error)}") from None
    if raw is None or raw == {}:
        raise ExperimentError(
            f"{path} is empty: it says nothing about data, model or training. Begin with one of "
            "experiments/, or leave the file out for the quickstart."
        )
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
            value = parse_yaml(text)
        except _UnclearNumber as error:
            raise ExperimentError(
                f"Cannot read the override {override!r}: {error.problem}"
            ) from None
        except (yaml.YAMLError, ValueError):
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


def parse_yaml(text: str | bytes) -> Any:
    """Plain values, no key twice, and numbers as everybody reads them.

    Raises:
        yaml.YAMLError: it is not YAML, or holds what only YAML 1.1 takes for a number.
    """
    return yaml.load(text, _ExperimentLoader)


def write_yaml(value: object) -> str:
    """What `parse_yaml` and any other reader of YAML take for the same values."""
    return yaml.dump(value, Dumper=_ExperimentDumper, sort_keys=False, allow_unicode=True)


def _deep_copy(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _deep_copy(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_UNCLEAR_TAG = "!unclear-number"
_YAML_TAG = "tag:yaml.org,2002:"
# The first that fits a plain scalar decides; what fits none is text.
_PLAIN_SCALARS = (
    (
        _UNCLEAR_TAG,
        r"[-+]?(?:0[0-9_]+|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+"  # 010, 0x10
        r"|(?=[0-9.]+_)[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?"  # 1_000
        r"|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)",  # 1:30
    ),
    (f"{_YAML_TAG}int", r"[-+]?[0-9]+"),
    (
        f"{_YAML_TAG}float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
    (f"{_YAML_TAG}null", r"~|null|Null|NULL|"),
    (f"{_YAML_TAG}bool", r"(?i:yes|no|true|false|on|off)"),
    (f"{_YAML_TAG}merge", r"<<"),
)


def _with_plain_numbers(cls: Any) -> Any:
    for tag, pattern in _PLAIN_SCALARS:
        cls.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), None)
    return cls


class _UnclearNumber(yaml.constructor.ConstructorError):
    """A number to YAML 1.1, and another one or none to a person."""

    @property
    def line(self) -> int:
        return int(self.problem_mark.line) + 1 if self.problem_mark else 1


@_with_plain_numbers
class _ExperimentLoader(yaml.SafeLoader):
    """SafeLoader with plain numbers, dates as text, and an error for two equal keys."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - typed as an instance's, and none of YAML 1.1's

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

    def refuse_unclear_number(self, node: yaml.ScalarNode) -> None:
        text = node.value
        try:
            kind = self.construct_yaml_float if "." in text else self.construct_yaml_int
            meaning = f"{kind(node)} to YAML 1.1"
        except ValueError:  # 08 is not even octal
            meaning = "unclear to YAML 1.1"
        raise _UnclearNumber(
            None,
            None,
            f"{text} is {meaning}. Write the number plainly, a duration as 90s or 30m, text in "
            f"quotes: '{text}'.",
            node.start_mark,
        )


@_with_plain_numbers
class _ExperimentDumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which `_ExperimentLoader` would take for a number."""


_ExperimentLoader.add_constructor(_UNCLEAR_TAG, _ExperimentLoader.refuse_unclear_number)
