"""The epochs after which ASHA compares trials, for who stops them and for who is stopped."""

from __future__ import annotations

from dataclasses import dataclass

from visiontuner.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """Asynchronous successive halving (Li et al. 2018): of its trials, one in three goes on.

    With 20 epochs, trials are compared after 2, 6 and 18.

    Args:
        first: epochs before a trial may be stopped.
        last: epochs of the longest trial.
    """

    first: int
    last: int
    factor: int = 3

    @classmethod
    def of(cls, experiment: Experiment) -> Rungs | None:
        """Those of a search; None where every trial runs to its end."""
        if experiment.search.scheduler == "none":
            return None
        domain = experiment.search.space.get("epochs")
        values = getattr(domain, "values", None) or (getattr(domain, "high", None),)
        epochs = int(max(values)) if domain is not None else experiment.training.epochs
        return cls(first=max(1, epochs // 9), last=epochs)

    def __contains__(self, epoch: int) -> bool:
        rung = self.first
        while rung < epoch:
            rung *= self.factor
        return rung == epoch <= self.last
