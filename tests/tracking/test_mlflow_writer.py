import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from visiontuner.errors import TrackingError
from visiontuner.paths import MLFLOW_FILE
from visiontuner.tracking.run_plans import ProjectRun
from visiontuner.tracking.store import Store, TrackingRefused
from visiontuner.tracking.writer import MlflowWriter

NewSearch = Callable[..., Any]


@pytest.fixture
def store(
    tmp_path: Path, new_database: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Makes empty stores by name; their artifacts stay in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "mlflow") -> str:
        return new_database(tmp_path / f"{name}.db")

    return make


def write(folder: Path, uri: str, **options: Any) -> MlflowWriter:
    with MlflowWriter(folder, tracking_uri=uri, draw=options.pop("draw", False)) as writer:
        writer.catch_up(**options)
    return writer


def all_runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    ids = [e.experiment_id for e in client.search_experiments(view_type=ViewType.ALL)]
    return list(client.search_runs(ids, run_view_type=ViewType.ALL, max_results=5000))


def project_run(client: MlflowClient, experiment_id: str, **options: Any) -> ProjectRun:
    """A run as `mlflow run` opens it."""
    tags = {"mlflow.source.type": "PROJECT"}
    run = client.create_run(experiment_id, tags=tags, **options)
    return ProjectRun(run_id=run.info.run_id, experiment_id=experiment_id)


def contents(uri: str) -> dict[str, Any]:
    """Everything a store holds of a search, without the ids that differ from store to store."""
    client = MlflowClient(uri)
    held = {}
    runs = all_runs(uri)
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(runs), "a run is doubled"
    for run in runs:
        tags = dict(run.data.tags)
        parent = tags.pop("mlflow.parentRunId", None)
        tags.pop("visiontuner.best_run_id", None)
        history = {
            key: sorted(
                (m.step, m.timestamp, repr(m.value))
                for m in client.get_metric_history(run.info.run_id, key)
            )
            for key in run.data.metrics
        }
        held[run.info.run_name] = {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "tags": tags,
            "parent": names.get(parent),
            "params": run.data.params,
            "history": history,
            "artifacts": sorted(a.path for a in client.list_artifacts(run.info.run_id)),
            "figures": sorted(a.path for a in client.list_artifacts(run.info.run_id, "figures")),
            "inputs": [i.dataset.digest for i in run.inputs.dataset_inputs],
        }
    return held


def by_name(uri: str) -> dict[str, Run]:
    return {run.info.run_name: run for run in all_runs(uri)}


def test_every_state_has_its_status_and_tag(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    states = ["completed", "stopped_early", "failed", "interrupted"]
    for number, state in enumerate(states, 1):
        search.trial(number, state=state, error="loss is NaN" if state == "failed" else None)
    search.start(5)
    write(search.folder, uri)
    runs = by_name(uri)
    found = [runs[f"t{n:04d}"].info.status for n in range(1, 6)]
    assert found == ["FINISHED", "FINISHED", "FAILED", "KILLED", "RUNNING"]
    assert [runs[f"t{n:04d}"].data.tags["visiontuner.state"] for n in range(1, 6)] == [
        *states,
        "running",
    ]
    assert runs["t0003"].data.tags["visiontuner.error"] == "loss is NaN"
    assert "best_validation_accuracy" not in runs["t0003"].data.metrics


def test_runs_carry_the_journals_own_times_steps_and_values(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.start(1)
    search.epoch(1, 1, train_loss=math.nan, gradient_norm=math.inf)
    search.epoch(1, 2)
    search.end(1)
    search.finish()
    write(search.folder, uri)
    trial, client = by_name(uri)["t0001"], MlflowClient(uri)
    # The clock moves one second an event: started is the third.
    assert trial.info.start_time == 1_700_000_003_000
    assert trial.info.end_time == 1_700_000_006_000
    history = client.get_metric_history(trial.info.run_id, "validation_loss")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (1, 1_700_000_004_000, 1.2),
        (2, 1_700_000_005_000, 0.6),
    ]
    first = client.get_metric_history(trial.info.run_id, "gradient_norm")[0]
    assert math.isnan(first.value)
    assert trial.data.params == {"learning_rate": "0.001001", "batch_size": "64"}


def test_the_parent_holds_the_experiment_the_data_and_the_searchs_own_curve(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(training={"epochs": 5}), store()
    search.begin()
    for number in (1, 3, 2):
        search.trial(number)
    search.finish()
    write(search.folder, uri)
    client, parent = MlflowClient(uri), by_name(uri)["images-20261122"]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["training.epochs"] == "5"
    assert parent.data.params["experiment.seed"] == "7"
    assert all("." in key for key in parent.data.params)
    assert client.get_experiment(parent.info.experiment_id).name == "images"
    assert parent.inputs.dataset_inputs[0].dataset.digest == "ab" * 16 + "abab"
    best = client.get_metric_history(parent.info.run_id, "best_validation_accuracy")
    assert [(m.step, m.value) for m in best] == [(1, 0.53), (2, 0.59), (3, 0.59)]
    assert parent.data.tags["visiontuner.best_trial"] == "t0003"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len(children) == 3


def test_an_address_is_logged_without_password_and_signature(
    new_search: NewSearch, store: Any, tmp_path: Path
) -> None:
    signed = "https://me:hunter2@example.org/{}?X-Amz-Signature=hunter2"
    search = new_search(
        data={"source": signed.format("p.zip")}, model={"weights": signed.format("w.pth")}
    )
    uri = store()
    search.begin()
    search.trial(1)
    search.finish()
    write(search.folder, uri)
    parent = by_name(uri)["images-20261122"]
    assert parent.data.params["data.source"] == "https://***@example.org/p.zip?X-Amz-Signature=***"
    assert (
        parent.data.params["model.weights"] == "https://***@example.org/w.pth?X-Amz-Signature=***"
    )
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]


def test_replaying_changes_nothing(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.trial(1)
    search.trial(2, state="stopped_early")
    search.finish()
    write(search.folder, uri)
    before = contents(uri)
    write(search.folder, uri)
    (search.folder / MLFLOW_FILE).unlink()
    write(search.folder, uri)
    assert contents(uri) == before


def test_following_line_by_line_equals_one_replay(new_search: NewSearch, store: Any) -> None:
    search, live, late = new_search(), store("live"), store("late")
    writer = MlflowWriter(search.folder, tracking_uri=live, draw=False)
    for step in _a_life_with_a_kill(search):
        step()
        writer.catch_up()
    writer.close()
    write(search.folder, late)
    assert contents(live) == contents(late)


def test_a_second_server_gets_all_of_it(new_search: NewSearch, store: Any) -> None:
    search, first, second = new_search(), store("first"), store("second")
    search.begin()
    search.trial(1)
    search.finish()
    write(search.folder, first)
    write(search.folder, second)
    assert contents(first) == contents(second)


def test_a_retried_trial_continues_its_run(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    for step in _a_life_with_a_kill(search):
        step()
    write(search.folder, uri)
    trial = by_name(uri)["t0002"]
    history = MlflowClient(uri).get_metric_history(trial.info.run_id, "validation_loss")
    assert [m.step for m in history] == [1, 2, 3]
    assert trial.info.status == "FINISHED"
    assert trial.data.tags["visiontuner.attempt"] == "2"


def test_losses_of_single_steps_are_points_at_the_optimizers_steps(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.start(1)
    search.epoch(1, 1, step_losses=[(2, 0.9), (4, math.inf)])
    write(search.folder, uri)
    # Killed, and run again: what the first attempt reported stays, the rest is added.
    search.append("search_resumed", code={}, machine={})
    search.start(1, attempt=2)
    search.epoch(1, 1, attempt=2, step_losses=[(2, 0.8), (4, 0.7)])
    search.epoch(1, 2, attempt=2, step_losses=[(6, 0.6), (8, 0.5)])
    search.end(1, attempt=2)
    search.finish()
    for _ in range(2):
        write(search.folder, uri)
    run_id = by_name(uri)["t0001"].info.run_id
    history = MlflowClient(uri).get_metric_history(run_id, "train_loss_step")
    assert [(m.step, m.timestamp, str(m.value)) for m in history] == [
        (2, 1_700_000_004_000, "0.9"),
        (4, 1_700_000_004_000, "nan"),
        (6, 1_700_000_008_000, "0.6"),
        (8, 1_700_000_008_000, "0.5"),
    ]


def test_a_resumed_search_shows_its_dead_trial_as_killed(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.start(1)
    search.epoch(1, 1)
    write(search.folder, uri)
    assert by_name(uri)["t0001"].info.status == "RUNNING"
    write(search.folder, uri, search_is_over=True)
    assert by_name(uri)["t0001"].info.status == "KILLED"
    assert by_name(uri)["images-20261122"].info.status == "KILLED"
    search.append("search_resumed", code={}, machine={})
    search.start(1, attempt=2)
    write(search.folder, uri)
    assert by_name(uri)["t0001"].info.status == "RUNNING"
    assert by_name(uri)["images-20261122"].info.status == "RUNNING"


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.slow
def test_a_kill_at_any_call_changes_nothing_in_the_end(
    new_search: NewSearch, store: Any, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    search = new_search()
    search.begin()
    search.trial(1, epochs=2)
    search.trial(2, epochs=1, state="failed", error="loss is NaN")
    search.append("search_ended", state="completed", best_trial="t0001")
    whole = store("whole")
    calls = write(search.folder, whole).store.calls
    expected = contents(whole)
    original = Store.call
    for fatal in range(1, calls + 1):
        uri = store(f"killed-{fatal}")
        (search.folder / MLFLOW_FILE).unlink(missing_ok=True)

        def call(self: Store, method: str, /, *args: Any, _n: int = fatal, **kwargs: Any) -> Any:
            if self.calls + 1 == _n and not after:
                raise Killed
            result = original(self, method, *args, **kwargs)
            if self.calls == _n and after:
                raise Killed
            return result

        monkeypatch.setattr(Store, "call", call)
        with pytest.raises(Killed):
            write(search.folder, uri)
        monkeypatch.setattr(Store, "call", original)
        write(search.folder, uri)
        assert contents(uri) == expected, f"killed at call {fatal}"


def test_an_adopted_run_becomes_the_parent_and_keeps_its_name_and_status(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    client = MlflowClient(uri)
    experiment = client.create_experiment("chosen by mlflow run")
    project = project_run(client, experiment, run_name="mlflow-run")
    adopted = project.run_id
    client.log_param(adopted, "seed", "'7'")  # an entry point's parameter, quoted by MLflow
    search.begin()
    search.trial(1)
    search.finish()
    with MlflowWriter(search.folder, tracking_uri=uri, project_run=project, draw=False) as writer:
        assert writer.catch_up().complete
        assert writer.parent_run_id == adopted
    parent = client.get_run(adopted)
    assert (parent.info.run_name, parent.info.status) == ("mlflow-run", "RUNNING")
    assert parent.data.params["seed"] == "'7'"
    assert by_name(uri)["t0001"].info.experiment_id == experiment
    # Later, without `mlflow run`, the run is ours to end.
    write(search.folder, uri)
    assert client.get_run(adopted).info.status == "FINISHED"


def test_a_search_resumed_under_mlflow_run_keeps_its_first_parent(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.trial(1)
    first = write(search.folder, uri).parent_run_id
    client = MlflowClient(uri)
    second = project_run(client, "0")
    search.append("search_resumed", code={}, machine={})
    search.finish()
    with MlflowWriter(search.folder, tracking_uri=uri, project_run=second, draw=False) as writer:
        writer.catch_up()
        assert writer.parent_run_id == first
    resumed = client.get_run(second.run_id)
    assert resumed.data.tags["visiontuner.kind"] == "resume"
    assert resumed.info.status == "RUNNING"


def _finished(client: MlflowClient, run_id: str) -> None:
    client.set_terminated(run_id)


def _deleted(client: MlflowClient, run_id: str) -> None:
    client.delete_run(run_id)


def _of_another_search(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, "visiontuner.search_id", "search-0")


def _with_a_tag_of_ours(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, "visiontuner.test_looks", "1")


def _opened_by_a_notebook(client: MlflowClient, run_id: str) -> None:
    client.set_tag(run_id, "mlflow.source.type", "NOTEBOOK")


NOT_OURS = {
    _finished: "FINISHED, not RUNNING",
    _deleted: "deleted",
    _of_another_search: "belongs to another search",
    _with_a_tag_of_ours: "belongs to another search",
    _opened_by_a_notebook: "`mlflow run` did not open it",
}


@pytest.mark.parametrize("begun_before", [False, True])
@pytest.mark.parametrize("spoil", NOT_OURS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_run_that_mlflow_run_did_not_open_for_this_search_stays_as_it_is(
    new_search: NewSearch,
    store: Any,
    spoil: Callable[[MlflowClient, str], None],
    begun_before: bool,
) -> None:
    search, uri = new_search(), store()
    client = MlflowClient(uri)
    project = project_run(client, client.create_experiment("chosen by mlflow run"))
    spoil(client, project.run_id)
    before = client.get_run(project.run_id).to_dictionary()
    search.begin()
    search.trial(1)
    if begun_before:
        write(search.folder, uri)
    search.finish()
    notices: list[str] = []
    with MlflowWriter(
        search.folder, tracking_uri=uri, project_run=project, draw=False, notice=notices.append
    ) as writer:
        writer.catch_up()
        assert writer.catch_up().complete
    assert client.get_run(project.run_id).to_dictionary() == before
    (notice,) = notices
    assert project.run_id in notice
    assert NOT_OURS[spoil] in notice
    parent = client.get_run(writer.parent_run_id)
    assert (parent.info.run_name, parent.info.status) == ("images-20261122", "FINISHED")
    assert by_name(uri)["t0001"].data.tags["mlflow.parentRunId"] == parent.info.run_id


@pytest.mark.parametrize(
    ("run_id", "experiment_id", "told"),
    [
        (None, "0", "not in the experiment of MLFLOW_EXPERIMENT_ID"),
        (None, None, "not in the experiment of MLFLOW_EXPERIMENT_ID"),
        ("0" * 32, "1", "no such run"),
        ("no id at all", "1", "Invalid value"),
    ],
)
def test_a_run_elsewhere_is_not_adopted(
    new_search: NewSearch, store: Any, run_id: str | None, experiment_id: str | None, told: str
) -> None:
    search, uri = new_search(), store()
    client = MlflowClient(uri)
    opened = project_run(client, client.create_experiment("chosen by mlflow run"))
    project = ProjectRun(run_id=run_id or opened.run_id, experiment_id=experiment_id)
    search.begin()
    search.finish()
    notices: list[str] = []
    with MlflowWriter(
        search.folder, tracking_uri=uri, project_run=project, draw=False, notice=notices.append
    ) as writer:
        assert writer.catch_up().complete
    assert told in notices[0]
    assert not client.get_run(opened.run_id).data.params
    assert writer.parent_run_id not in (None, opened.run_id)


def test_a_search_that_goes_on_in_the_same_mlflow_run_keeps_its_run(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    client = MlflowClient(uri)
    project = project_run(client, "0")
    for finish in (search.begin, search.finish):  # two processes of one entry point
        finish()
        notices: list[str] = []
        with MlflowWriter(
            search.folder, tracking_uri=uri, project_run=project, draw=False, notice=notices.append
        ) as writer:
            writer.catch_up()
        assert writer.parent_run_id == project.run_id
        assert notices == []
    assert client.get_run(project.run_id).info.status == "RUNNING"  # `mlflow run` ends it


def test_figures_are_logged_with_the_runs_they_show(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.trial(1)
    search.trial(2)
    search.finish()
    writer = write(search.folder, uri, draw=True)
    held = contents(uri)
    assert held["t0001"]["figures"] == ["figures/curves.png"]
    assert set(held["images-20261122"]["figures"]) == {
        "figures/all_curves.png",
        "figures/best_so_far.png",
        "figures/learning_rate_batch_size.png",
        "figures/learning_rate_batch_size.csv",
        "figures/parallel_coordinates.png",
    }
    assert "report.html" in held["images-20261122"]["artifacts"]
    assert "report.html" not in held["t0001"]["artifacts"]
    page = (search.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4
    assert str(writer.parent_run_id) in page
    assert "Completed: 2 of" in page
    assert writer.seconds_figures > 0


@pytest.mark.slow
def test_numbers_do_not_wait_for_artifacts_that_cannot_be_stored(
    new_search: NewSearch, store: Any, tmp_path: Path
) -> None:
    """Everything else is there, the runs say what they lack, and a later writing adds it."""
    search, uri, whole = new_search(), store(), store("whole")
    (tmp_path / "artifacts").touch()  # a file where there should be a folder
    MlflowClient(uri).create_experiment("images", str(tmp_path / "artifacts"))
    search.begin()
    search.trial(1)
    search.trial(2, epochs=1, state="failed", error="loss is NaN")
    for number in range(3, 8):
        search.trial(number)
    with MlflowWriter(search.folder, tracking_uri=uri) as writer:
        progress = writer.catch_up()
        assert "the artifacts of 7 runs" in str(progress.problem)
        search.finish()
        progress = writer.catch_up()
    assert not progress.complete
    assert "All numbers are in MLflow, but not the artifacts of 8 runs." in str(progress.problem)
    write(search.folder, whole, draw=True)
    held, expected = contents(uri), contents(whole)
    for name, run in held.items():
        assert "Not a directory" in run["tags"].pop("visiontuner.missing_artifacts")
        assert (run["artifacts"], run["figures"]) == ([], [])
        for kind in ("status", "times", "tags", "parent", "params", "history", "inputs"):
            assert run[kind] == expected[name][kind]

    (tmp_path / "artifacts").unlink()
    with MlflowWriter(search.folder, tracking_uri=uri) as writer:
        assert writer.catch_up().complete
    assert contents(uri) == expected


def test_artifacts_are_tried_again_when_the_search_ends(
    new_search: NewSearch, store: Any, tmp_path: Path
) -> None:
    search, uri = new_search(), store()
    (tmp_path / "artifacts").touch()
    MlflowClient(uri).create_experiment("images", str(tmp_path / "artifacts"))
    search.begin()
    search.trial(1)
    with MlflowWriter(search.folder, tracking_uri=uri) as writer:
        assert writer.catch_up().problem is not None
        (tmp_path / "artifacts").unlink()
        search.trial(2)
        search.finish()
        assert writer.catch_up().complete
    held = contents(uri)
    assert held["t0001"]["figures"] == held["t0002"]["figures"] == ["figures/curves.png"]
    assert "experiment.yaml" in held["images-20261122"]["artifacts"]
    assert not any("visiontuner.missing_artifacts" in run["tags"] for run in held.values())


def test_of_many_trials_the_first_the_best_and_the_long_ones_get_a_figure(
    new_search: NewSearch, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visiontuner.tracking.run_plans.MOST_CURVES_OF_SHORT", 2)
    search, uri = new_search(), store()
    search.begin()
    for number, best in enumerate((0.5, 0.6, 0.4, 0.8, 0.7), start=1):
        search.trial(number, best_value=best)
    search.trial(6, epochs=12, best_value=0.1)  # a second each
    search.finish()
    write(search.folder, uri, draw=True)
    drawn = {name for name, held in contents(uri).items() if held["figures"]}
    assert drawn == {"t0001", "t0002", "t0004", "t0006", "images-20261122"}


@pytest.mark.slow
def test_figures_wait_while_the_search_runs_and_points_do_not(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.trial(1)
    search.trial(2)
    with MlflowWriter(search.folder, tracking_uri=uri) as writer:
        assert not writer.catch_up(figure_seconds=0.0).complete
        held = contents(uri)
        assert [held[name]["figures"] for name in ("t0001", "t0002")] == [[], []]
        assert held["t0002"]["status"] == "RUNNING"
        assert held["t0002"]["tags"]["visiontuner.state"] == "completed"
        assert len(held["t0002"]["history"]["train_loss"]) == 3
        writer.catch_up(figure_seconds=1e-6)
        ended = {name: held["status"] for name, held in contents(uri).items()}
        assert (ended["t0001"], ended["t0002"]) == ("FINISHED", "RUNNING")
        search.finish()
        assert writer.catch_up(figure_seconds=0.0).complete
    held = contents(uri)
    assert held["t0002"]["figures"] == ["figures/curves.png"]
    assert held["t0002"]["status"] == "FINISHED"


@pytest.mark.slow
def test_many_trials_take_three_calls_each_at_most(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    for number in range(1, 41):
        search.trial(number, epochs=1)
    search.finish()
    writer = write(search.folder, uri)
    assert len(all_runs(uri)) == 41
    assert writer.store.calls <= 3 * 40 + 20
    again = write(search.folder, uri)
    assert again.store.calls <= 4


def test_the_memory_file_names_the_runs_and_no_password(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    search.trial(1)
    writer = write(search.folder, uri)
    memory = json.loads((search.folder / MLFLOW_FILE).read_text())
    assert memory["runs"] == {"t0001": by_name(uri)["t0001"].info.run_id} == writer.run_ids
    assert memory["parent_run_id"] == by_name(uri)["images-20261122"].info.run_id


def test_only_one_process_writes_a_search(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    with MlflowWriter(search.folder, tracking_uri=uri, draw=False) as writer:
        writer.catch_up()
        with pytest.raises(TrackingError, match="Another process is writing"):
            write(search.folder, uri)
    write(search.folder, uri)


def test_a_deleted_run_is_refused_with_the_way_back(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    run_id = write(search.folder, uri).parent_run_id
    MlflowClient(uri).delete_run(str(run_id))
    with pytest.raises(TrackingRefused, match=f"mlflow runs restore --run-id {run_id}"):
        write(search.folder, uri)


def test_a_deleted_experiment_is_refused_with_the_way_back(
    new_search: NewSearch, store: Any
) -> None:
    search, uri = new_search(), store()
    client = MlflowClient(uri)
    experiment_id = client.create_experiment("images")
    client.delete_experiment(experiment_id)
    search.begin()
    with pytest.raises(TrackingRefused, match="mlflow experiments restore"):
        write(search.folder, uri)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "./mlruns"])
def test_a_file_store_is_refused(new_search: NewSearch, uri: str) -> None:
    with pytest.raises(TrackingRefused, match="set MLFLOW_TRACKING_URI to sqlite"):
        write(new_search().folder, uri)


def test_a_database_in_a_missing_folder_is_refused_at_once(new_search: NewSearch) -> None:
    with pytest.raises(TrackingRefused, match="does not exist"):
        write(new_search().folder, "sqlite:////nowhere/at/all/mlflow.db")


def test_a_deadline_that_has_passed_calls_nothing(new_search: NewSearch, store: Any) -> None:
    search, uri = new_search(), store()
    search.begin()
    with MlflowWriter(search.folder, tracking_uri=uri, draw=False) as writer:
        with pytest.raises(TrackingError, match="time for writing"):
            writer.catch_up(deadline=0.0)
        assert writer.store.calls == 0
        writer.catch_up()
    assert len(all_runs(uri)) == 1


def _a_life_with_a_kill(search: Any) -> Iterator[Callable[[], None]]:
    """A search whose second trial is killed in its second epoch and runs again."""
    yield search.begin
    yield lambda: search.trial(1)
    yield lambda: search.start(2)
    yield lambda: search.epoch(2, 1)
    yield lambda: search.epoch(2, 2)
    yield lambda: search.append("search_resumed", code={}, machine={})
    yield lambda: search.start(2, attempt=2)
    for step in (1, 2, 3):
        yield lambda step=step: search.epoch(2, step, attempt=2)  # type: ignore[misc]
    yield lambda: search.append(
        "finding",
        trial_id="t0002",
        attempt=2,
        rule="overfitting",
        severity="warning",
        step=3,
        evidence="",
        advice="",
    )
    yield lambda: search.end(2, attempt=2)
    yield search.finish
