"""Whether MLflow's store can take a search: its kind, its schema, and the server's version."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import socket
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import requests

from visiontuner.errors import TrackingError
from visiontuner.text import without_secrets

Status = Literal["ok", "warning", "error"]

NETWORK_SECONDS = 3.0
DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at; `advice` is empty where nothing needs doing."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def check_store(tracking_uri: str) -> Check:
    """Look at the store without changing it: an address that does not answer costs 3 seconds."""
    kind = tracking_uri.partition(":")[0].partition("+")[0].lower()
    shown = without_secrets(tracking_uri)
    if kind == "sqlite":
        return _check_sqlite(tracking_uri)
    if kind in ("http", "https"):
        return _check_server(tracking_uri, shown)
    if kind in DATABASES:
        return _check_database(tracking_uri, shown, DATABASES[kind])
    if kind == "databricks":
        return _check("warning", f"{shown}: never tried with visiontuner", "Try a small search.")
    if kind == "file" or "://" not in tracking_uri:
        return _check(
            "error",
            f"{shown} is a folder, which MLflow {_client()} no longer takes as a store",
            "Use a database, `export MLFLOW_TRACKING_URI=sqlite:///mlflow.db`; "
            "`mlflow migrate-filestore --help` moves old runs.",
        )
    return _check(
        "error",
        f"{shown}: MLflow knows no such store",
        "Use sqlite:///mlflow.db, or the http:// address of a server.",
    )


def _check_sqlite(uri: str) -> Check:
    from visiontuner.tracking.client import sqlite_file

    path = sqlite_file(uri)
    if path is None:
        return _check("error", f"{uri} is in memory only", "Use sqlite:///mlflow.db.")
    if not path.exists():
        return _check_new_file(path)
    if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
        return _check("error", f"cannot write {path}", "Name another file of yours.")
    found = _schema_in(path)
    if isinstance(found, Check):
        return found
    known, newest = _schemas()
    if found == newest or found is None:
        return _check("ok", f"sqlite at {path}, MLflow {_client()}")
    if found in known:
        return _check(
            "error",
            f"{path} was made by an older MLflow than {_client()}",
            f"Copy the file, then `mlflow db upgrade sqlite:///{path}`.",
        )
    return _check(
        "error",
        f"{path} was made by a newer MLflow than {_client()}",
        "Update MLflow here, or name another database.",
    )


def _check_new_file(path: Path) -> Check:
    if not path.absolute().parent.is_dir():
        return _check("error", f"{path.parent} does not exist", f"`mkdir -p {path.parent}`.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        return _check("error", f"cannot write {path}", "Work in a folder of yours.")
    return _check("ok", f"sqlite at {path} (will be made), MLflow {_client()}")


def _schema_in(path: Path) -> str | Check | None:
    """The database's revision, None for an empty one, or what is wrong."""
    try:
        # Read only: looking must neither migrate nor lock.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1)
        try:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
            rows = []
            if "alembic_version" in tables:
                rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
            if bool(rows) != ({"experiments", "runs"} <= tables):
                return _half_made(path)
            return str(rows[0][0]) if rows else None
        finally:
            connection.close()
    except sqlite3.Error as error:
        return _check("error", f"{path} is no usable database: {error}", "Name another file.")


def _half_made(path: Path) -> Check:
    return _check(
        "error",
        f"{path} lacks tables: something ended MLflow while it made them",
        "Move the file away; MLflow makes a new one.",
    )


def _schemas() -> tuple[set[str], str]:
    """The revisions the installed MLflow knows and its newest, read without importing it."""
    spec = importlib.util.find_spec("mlflow")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("mlflow is not installed")
    folder = Path(spec.origin).parent / "store" / "db_migrations" / "versions"
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    known = set(re.findall(r"""^revision\b[^=\n]*=\s*["'](\w+)""", text, re.MULTILINE))
    earlier = set(re.findall(r"""^down_revision\b[^=\n]*=\s*["'](\w+)""", text, re.MULTILINE))
    return known, next(iter(known - earlier))


def _check_server(uri: str, shown: str) -> Check:
    try:
        answer = requests.get(uri.rstrip("/") + "/version", timeout=NETWORK_SECONDS)
    except requests.RequestException as error:
        return _check(
            "error",
            f"{shown} does not answer ({type(error).__name__})",
            "Start it (`mlflow server`), or search anyway and `visiontuner sync FOLDER` later.",
        )
    from visiontuner.tracking.client import Store

    try:
        # Who may read the version may not have the right credentials, or the right host name.
        Store(uri, advice="Check the address.").call("search_experiments", max_results=1)
    except TrackingError as error:
        return _check("error", str(error), "A search would go on; `visiontuner sync` needs it.")
    version = answer.text.strip()[:20]
    if answer.status_code != 200 or not re.match(r"\d+\.\d+", version):
        return _check("ok", f"{shown} answers; it does not tell its version")
    # Within one major version MLflow's own promise holds: the API is the same.
    if version.partition(".")[0] != _client().partition(".")[0]:
        return _check(
            "error",
            f"{shown} runs MLflow {version}, this is {_client()}",
            "Bring both to the same major version.",
        )
    if version != _client():
        return _check("ok", f"{shown} runs MLflow {version}, this is {_client()}")
    return _check("ok", f"{shown} runs MLflow {version}")


def _check_database(uri: str, shown: str, default_port: int) -> Check:
    parts = urlsplit(uri)
    host, port = parts.hostname or "localhost", parts.port or default_port
    try:
        socket.create_connection((host, port), timeout=NETWORK_SECONDS).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return _check(
            "error", f"{shown}: {host}:{port} does not answer ({reason})", "Start the database."
        )
    return _ask_database(uri, shown)


def _ask_database(uri: str, shown: str) -> Check:
    """Sign in and look for MLflow's schema; nothing is made."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(uri)
        try:
            with engine.connect() as connection:
                tables = sqlalchemy.inspect(connection).get_table_names()
                query = sqlalchemy.text("SELECT version_num FROM alembic_version")
                found = connection.scalar(query) if "alembic_version" in tables else None
        finally:
            engine.dispose()
    except ModuleNotFoundError as error:
        return _check("error", f"{shown} needs the package {error.name}", "Install it.")
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = without_secrets(" ".join(str(error).split("(Background")[0].split())[:200])
        return _check("error", f"{shown} refuses: {reason}", "Check the address and the user.")
    known, newest = _schemas()
    if found in (None, newest):
        return _check("ok", f"{shown} answers, MLflow {_client()}")
    if found in known:
        return _check(
            "error",
            f"{shown} was made by an older MLflow than {_client()}",
            "Back it up, then `mlflow db upgrade` with this address.",
        )
    return _check(
        "error",
        f"{shown} was made by a newer MLflow than {_client()}",
        "Update MLflow here, or name another database.",
    )


def _client() -> str:
    return importlib.metadata.version("mlflow")


def _check(status: Status, detail: str, advice: str = "") -> Check:
    return Check(name="mlflow", status=status, detail=detail, advice=advice)
