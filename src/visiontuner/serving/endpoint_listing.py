"""Which endpoints are ours, and what they serve."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from visiontuner.aws import Aws
from visiontuner.errors import UserMistake
from visiontuner.serving.deployment import MODEL_TAG, PRICE_TAG, TTL_TAG, ttl_hours
from visiontuner.serving.endpoint_parts import Parts, endpoint_tags, if_there, tags_of
from visiontuner.serving.endpoint_states import describe

_MLFLOWS_TAG = "model_uri"
_VERSION = re.compile(r"[^/:@]+/\d+")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One endpoint of ours, as `visiontuner endpoints` lists it.

    Args:
        age_hours: since it was created.
        ttl_hours: how long it was meant to live; None: not said.
        cost: US dollars since then; None: the price was not known, or it is paid by use.
        unreadable: tags that say neither, as someone set them by hand.
    """

    name: str
    state: str
    model: str
    age_hours: float
    ttl_hours: float | None = None
    cost: float | None = None
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def overdue(self) -> bool:
        """Whether it has lived longer than it was meant to."""
        return self.ttl_hours is not None and self.age_hours > self.ttl_hours


def list_endpoints(aws: Aws, now: datetime | None = None) -> list[Endpoint]:
    """Those that visiontuner deployed in this region, oldest first."""
    found = []
    for entry in aws.pages("sagemaker", "list_endpoints", "Endpoints", SortBy="CreationTime"):
        if MODEL_TAG not in tags_of(aws, entry["EndpointArn"]):
            continue
        tags = what_serves(aws, entry["EndpointName"])
        hours = ((now or datetime.now(UTC)) - entry["CreationTime"]).total_seconds() / 3600
        found.append(_read(entry["EndpointName"], entry["EndpointStatus"], hours, tags))
    return sorted(found, key=lambda endpoint: -endpoint.age_hours)


def _read(name: str, state: str, hours: float, tags: Mapping[str, str]) -> Endpoint:
    """One odd tag must not hide the endpoints."""
    said: dict[str, float | None] = {}
    for tag, read in ((TTL_TAG, ttl_hours), (PRICE_TAG, _price)):
        with suppress(UserMistake, ValueError):
            said[tag] = read(tags[tag]) if tags.get(tag) else None
    price = said.get(PRICE_TAG)
    return Endpoint(
        name=name,
        state=state,
        model=tags[MODEL_TAG],
        age_hours=hours,
        ttl_hours=said.get(TTL_TAG),
        cost=None if price is None else price * hours,
        unreadable={tag: tags[tag] for tag in (TTL_TAG, PRICE_TAG) if tag not in said},
    )


def _price(text: str) -> float:
    """US dollars an hour.

    Raises:
        ValueError: it is no price.
    """
    price = float(text)
    if not 0 <= price < math.inf:
        raise ValueError(text)
    return price


def deployed_model(aws: Aws, name: str) -> str:
    """`NAME/VERSION` of the model that an endpoint serves.

    Raises:
        UserMistake: there is no such endpoint, or its tags do not say.
    """
    describe(aws, name)
    model = what_serves(aws, name).get(MODEL_TAG, "")
    if not _VERSION.fullmatch(model):
        raise UserMistake(
            f"Endpoint {name!r} does not say which version of a registered model it serves"
            + (f", but {model!r}." if model else ".")
        )
    return model


def what_serves(aws: Aws, name: str) -> dict[str, str]:
    """An endpoint's tags, and over them those of the SageMaker model that it serves.

    MLflow's own update tags its model, and leaves the endpoint's tags as they were. Without ours
    MLflow still says which model it is.
    """
    models = Parts.in_use(aws, name).models
    if len(models) != 1:
        return endpoint_tags(aws, name)
    described = if_there(aws, "describe_model", ModelName=next(iter(models)))
    own = tags_of(aws, described["ModelArn"]) if described else {}
    if MODEL_TAG not in own and _MLFLOWS_TAG in own:
        own[MODEL_TAG] = own[_MLFLOWS_TAG].removeprefix("models:/")
    return endpoint_tags(aws, name) | own
