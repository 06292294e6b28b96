from typing import Any

from ray.tune.search import Searcher

from visiontuner.experiment.schema import Experiment
from visiontuner.journal import SearchRecord
from visiontuner.search.plan import make_plan
from visiontuner.search.run import PlanSearcher


def experiment(trials: int, algorithm: str = "random", **search: Any) -> Experiment:
    search = {"trials": trials, "algorithm": algorithm, **search}
    return Experiment.parse({"name": "x", "search": search})


def handed_out(searcher: PlanSearcher) -> list[dict[str, Any]]:
    handed: list[dict[str, Any]] = []
    while (config := searcher.suggest(f"ray{len(handed)}")) != Searcher.FINISHED:
        assert isinstance(config, dict)
        handed.append(config)
    return handed


def test_the_searcher_hands_out_the_plan_once_and_then_ends():
    chosen = experiment(3)
    plan = make_plan(chosen, SearchRecord())
    searcher = PlanSearcher(plan, chosen, SearchRecord())
    assert handed_out(searcher) == [p.to_config() for p in plan.known]
    assert searcher.suggest("later") == Searcher.FINISHED


def test_optuna_is_told_how_trials_ended():
    """Suggestions gather around the one good trial: the results did reach Optuna."""
    chosen = experiment(
        60, "optuna", first=[], space={"learning_rate": {"low": 1e-4, "high": 0.1, "scale": "log"}}
    )
    running = SearchRecord.of(
        [{"event": "search_started", "search_id": "s", "experiment": chosen.model_dump()}]
    )
    searcher = PlanSearcher(make_plan(chosen, running), chosen, running)
    rates = []
    for number in range(60):
        config = searcher.suggest(f"ray{number}")
        assert config is not None
        rate = config["configuration"]["learning_rate"]
        rates.append(rate)
        head = {"trial_id": config["trial_id"], "attempt": 1, "time": 0.0}
        value = 1.0 if 0.005 < rate < 0.02 else 0.0
        running.apply({"event": "trial_started", **head, "configuration": {"learning_rate": rate}})
        metrics = {"validation_accuracy": value}
        running.apply({"event": "epoch", **head, "step": 1, "metrics": metrics})
        searcher.on_trial_complete(f"ray{number}")
    good = [0.005 < rate < 0.02 for rate in rates]
    assert sum(good[30:]) > 15  # one in five by chance


def test_a_trial_that_ray_never_asked_for_is_passed_over():
    chosen = experiment(3, "optuna")
    searcher = PlanSearcher(make_plan(chosen, SearchRecord()), chosen, SearchRecord())
    searcher.on_trial_complete("unknown", error=True)


def test_a_failed_trial_of_optuna_is_told_as_failed():
    chosen = experiment(3, "optuna")
    searcher = PlanSearcher(make_plan(chosen, SearchRecord()), chosen, SearchRecord())
    for number in range(3):
        searcher.suggest(f"ray{number}")
        searcher.on_trial_complete(f"ray{number}", error=True)
    assert searcher.suggest("ray3") == Searcher.FINISHED
