from pathlib import Path

import mlflow.db
import pytest

from visiontuner.tracking.client import Store, create_database


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_database_is_never_half_there(tmp_path, monkeypatch):
    """MLflow cannot open a database whose making was cut short: `table … already exists`."""

    def cut_short(uri: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.db.upgrade, "callback", cut_short)
        with pytest.raises(KeyboardInterrupt):
            Store(f"sqlite:///{tmp_path}/mlflow.db").call("search_experiments")
    assert names(tmp_path) == []

    monkeypatch.chdir(tmp_path)
    store = Store("sqlite:///mlflow.db")
    assert [e.name for e in store.call("search_experiments")] == ["Default"]
    assert names(tmp_path) == ["mlflow.db"]


@pytest.mark.parametrize(
    "uri", ["http://localhost:5000", "sqlite://", "sqlite:///:memory:", "databricks"]
)
def test_other_stores_are_left_alone(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_database(uri)
    assert names(tmp_path) == []


def test_a_database_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"mine")
    create_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == b"mine"


def test_the_second_database_is_a_copy_of_the_first_ones_empty_form(tmp_path, monkeypatch):
    places = [f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "second")]
    templates = tmp_path / "templates"
    Store(places[0], templates=templates).call("create_experiment", "only in the first")
    monkeypatch.setattr(mlflow.db.upgrade, "callback", pytest.fail)
    store = Store(places[1], templates=templates)
    assert [e.name for e in store.call("search_experiments")] == ["Default"]
    assert names(tmp_path) == ["first.db", "second.db", "templates"]
    assert len(names(templates)) == 1


def test_without_room_for_a_template_the_database_is_made_all_the_same(tmp_path):
    (tmp_path / "templates").write_text("no folder")
    store = Store(f"sqlite:///{tmp_path}/mlflow.db", templates=tmp_path / "templates")
    assert [e.name for e in store.call("search_experiments")] == ["Default"]
