"""What a job costs: at most, so far, and for each trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visiontuner.errors import UserMistake

SHORTEST_RUN_SECONDS = 600
"""Less is spent on starting machines and installing packages."""

# At its limit a job has 120 s to end in order (botocore, StoppingCondition); then SageMaker uploads
# what it keeps. Both are billed; three minutes for the upload are a guess.
ENDING_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a cluster costs: US dollars for one instance for an hour, on demand; None: unknown."""

    per_hour: float | None
    instances: int

    def of(self, seconds: float) -> float | None:
        """US dollars for so long."""
        return None if self.per_hour is None else self.per_hour * self.instances * seconds / 3600


def billed_seconds(*, max_run_seconds: float, warm_pool_seconds: float) -> float:
    """Of each machine at most, as far as is known beforehand."""
    return max_run_seconds + ENDING_SECONDS + warm_pool_seconds


def limit_seconds(
    price: Price, *, max_run_seconds: float, warm_pool_seconds: float, max_cost: float | None
) -> int:
    """How long a job may run: as long as was said, and no longer than the money lasts.

    The money also pays for the end of the job and for the warm pool.

    Raises:
        UserMistake: there is a limit in money and no price, or it is too low for any search.
    """
    if max_cost is None:
        return int(max_run_seconds)
    if price.per_hour is None:
        raise UserMistake(
            "--max-cost needs the price of an instance, and AWS's price list does not say it; "
            "tell it with --price."
        )
    hourly = price.per_hour * price.instances
    beside = billed_seconds(max_run_seconds=0, warm_pool_seconds=warm_pool_seconds)
    affordable = max_cost * 3600 / hourly - beside if hourly else max_run_seconds
    if affordable < SHORTEST_RUN_SECONDS:
        also = " and the warm pool" if warm_pool_seconds else ""
        least = SHORTEST_RUN_SECONDS // 60
        raise UserMistake(
            f"--max-cost {max_cost:g} lasts {max(0, affordable) / 60:.0f} min at ${hourly:.2f} an "
            f"hour, beside the job's end{also}; a search needs {least} at least. "
            "Allow more, or choose a cheaper --instance-type."
        )
    return int(min(max_run_seconds, affordable))


def shares(seconds: Mapping[str, float], cost: float) -> dict[str, float]:
    """A search's cost over its trials, by their seconds; together they are the whole cost.

    Start-up and idle machines are paid as well: each trial bears them by its length.
    """
    total = sum(seconds.values())
    return {name: cost * part / total if total else 0.0 for name, part in seconds.items()}


def dollars(amount: float | None) -> str:
    """For a person."""
    return "not known" if amount is None else f"${amount:,.2f}"
