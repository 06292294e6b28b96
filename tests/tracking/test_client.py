import subprocess
import sys
from pathlib import Path

import mlflow.db
import pytest
import sqlalchemy

from visiontuner.tracking.store import Store, TrackingRefused, create_database, sqlite_file


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


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("sqlite:///runs.db", "runs.db"),
        ("sqlite+pysqlite:///runs.db", "runs.db"),
        ("sqlite:///runs.db?timeout=20", "runs.db"),
        ("sqlite:///my%20runs.db", "my runs.db"),
        ("sqlite:///100%25.db", "100%.db"),
        ("sqlite:///what%3F.db", "what?.db"),
        ("sqlite:///a#b.db", "a#b.db"),
        ("sqlite:///file:my%2520runs.db?mode=rwc&uri=true", "my runs.db"),
        ("sqlite:///file:runs?mode=memory&uri=true", None),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("https://host/sqlite:///runs.db", None),
    ],
)
def test_a_uri_names_the_file_that_sqlalchemy_opens(uri, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sqlite_file(uri) == (None if name is None else tmp_path / name)
    if name is not None:
        engine = sqlalchemy.create_engine(uri)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("CREATE TABLE t (x INT)"))
        engine.dispose()
        assert names(tmp_path) == [name]


def test_what_is_no_database_uri_is_refused():
    with pytest.raises(TrackingRefused, match="no database URI"):
        Store("sqlite:/mlflow.db")


@pytest.mark.slow
def test_three_searches_at_once_make_one_database(tmp_path):
    """MLflow alone leaves a database that lacks tables when several processes make it at once."""
    folder = tmp_path / "100% mine?"
    folder.mkdir()
    ask = """
from visiontuner.tracking.store import Store
print([e.name for e in Store("sqlite:///my%20runs.db?timeout=20").call("search_experiments")])
"""
    searches = [
        subprocess.Popen(
            [sys.executable, "-c", ask],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    told = [search.communicate(timeout=240) for search in searches]
    assert [out for out, _ in told] == ["['Default']\n"] * 3, told
    assert len(names(folder)) == 1


@pytest.mark.parametrize(
    ("uri", "package"),
    [
        ("postgresql+psycopg2://me:s3cret@localhost/db", "psycopg2-binary"),
        ("postgresql+psycopg://me:s3cret@localhost/db", "'psycopg[binary]'"),
        ("mysql://me:s3cret@localhost/db", "mysqlclient"),
    ],
)
def test_a_database_without_its_driver_names_the_package(uri, package):
    with pytest.raises(TrackingRefused) as caught:
        Store(uri).call("search_experiments", max_results=1)
    assert str(caught.value).endswith(f": `pip install {package}`.")
    assert "s3cret" not in str(caught.value)
