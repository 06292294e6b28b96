"""Versions of registered models: which one a text names, and where its classifier lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlflow.entities.model_registry import ModelVersion

from visiontuner.errors import TrackingError, UserMistake
from visiontuner.serving.registry import CHALLENGER

CHAMPION = "champion"

_PREFIX = "models:/"


class Mlflow(Protocol):
    """Whom to ask: `tracking.client.Store`; its errors are `TrackingError`s in one line."""

    tracking_uri: str

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any: ...
    def download(self, artifact_uri: str, folder: Path) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A registered model, and a version by number or alias; the newest if neither is given."""

    name: str
    version: str | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """`NAME`, `NAME/VERSION` or `NAME@ALIAS`, each also with `models:/` in front.

        Raises:
            UserMistake: it is none of these.
        """
        plain = text.removeprefix(_PREFIX).strip("/")
        name, slash, version = plain.partition("/")
        name, at, alias = (name, "", "") if slash else plain.partition("@")
        if not name or ":" in plain or (slash and not version.isdecimal()) or (at and not alias):
            raise UserMistake(
                f"{text!r} is no model. Name one as NAME, NAME/VERSION, NAME@ALIAS or "
                "models:/NAME/VERSION."
            )
        return cls(name=name, version=version or None, alias=alias or None)


def find_version(mlflow: Mlflow, reference: ModelReference) -> ModelVersion:
    """The version that is meant; without number and alias the newest.

    Raises:
        UserMistake: there is no such model, version or alias.
        TrackingError: MLflow is away or refuses.
    """
    name, held = reference.name, aliases(mlflow, reference.name)
    number = reference.version
    if reference.alias:
        number = held.get(reference.alias)
        if number is None:
            known = ", ".join(sorted(held)) or "none"
            raise UserMistake(f"Model {name!r} has no alias {reference.alias!r}; it has: {known}.")
    if number is None:
        # The alias follows the newest version; who set it by hand means that one.
        pointed = get_version(mlflow, name, held[CHALLENGER]) if CHALLENGER in held else None
        found = pointed or _newest(mlflow, name)
    else:
        found = get_version(mlflow, name, number)
    if found is None:
        raise UserMistake(
            f"Model {name!r} has no version {number}; its versions: {_listed(mlflow, name)}."
            if number
            else f"Model {name!r} has no version yet; `visiontuner tune` registers one."
        )
    return found


def get_version(mlflow: Mlflow, name: str, number: str) -> ModelVersion | None:
    """One version with its aliases; None if it is not there or deleted."""
    try:
        version: ModelVersion = mlflow.call("get_model_version", name, str(number))
    except TrackingError as error:
        if is_missing(error):
            return None
        raise
    return version


def aliases(mlflow: Mlflow, name: str) -> dict[str, str]:
    """Version numbers by alias; an alias may point to a version that was deleted.

    Raises:
        UserMistake: there is no such model.
    """
    try:
        model = mlflow.call("get_registered_model", name)
    except TrackingError as error:
        if is_missing(error):
            raise UserMistake(
                f"MLflow has no model {name!r}. It has: {_listed_models(mlflow)}. "
                "`visiontuner tune` registers one."
            ) from None
        raise
    return {alias: str(number) for alias, number in model.aliases.items()}


def versions_of_run(mlflow: Mlflow, run_id: str) -> list[ModelVersion]:
    """What was registered from a run, oldest first."""
    found = mlflow.call("search_model_versions", f"run_id = '{run_id}'")
    return sorted(found, key=lambda v: (v.name, int(v.version)))


def logged_model_id(version: ModelVersion) -> str | None:
    """The id of the logged model behind a version; None for one that came another way."""
    source = str(version.source or "")
    behind = source.removeprefix(_PREFIX) if source.startswith(f"{_PREFIX}m-") else None
    return version.model_id or behind


def is_missing(error: TrackingError) -> bool:
    """Whether MLflow answered that there is no such thing."""
    return getattr(error.__cause__, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _newest(mlflow: Mlflow, name: str) -> ModelVersion | None:
    numbers = _numbers(mlflow, name)
    return get_version(mlflow, name, str(numbers[-1])) if numbers else None


def _numbers(mlflow: Mlflow, name: str) -> list[int]:
    quote = '"' if "'" in name else "'"
    found = mlflow.call("search_model_versions", f"name = {quote}{name}{quote}")
    return sorted(int(version.version) for version in found)


def _listed(mlflow: Mlflow, name: str) -> str:
    return ", ".join(map(str, _numbers(mlflow, name))) or "none"


def _listed_models(mlflow: Mlflow) -> str:
    names = [model.name for model in mlflow.call("search_registered_models", max_results=6)]
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "none"
