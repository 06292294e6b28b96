"""pydantic's findings about an experiment file as one line: key, rule, value, nearest known key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

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
