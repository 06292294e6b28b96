from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from visiontuner.errors import UserMistake
from visiontuner.paths import cache_folder
from visiontuner.workflow import doctor
from visiontuner.workflow.doctor import Check, _schemas, check_store, pair_mismatch, run_checks


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_CONDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_all_checks_answer_in_order_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checks = run_checks(tmp_path / "cache", "sqlite:///mlflow.db")
    by_name = {check.name: check for check in checks}
    assert list(by_name)[:4] == ["python", "torch", "onnxruntime", "mlflow"]
    for name in ("python", "torch", "onnxruntime", "mlflow", "cache", "weights"):
        assert by_name[name].status == "ok", by_name[name]
    assert all("\n" not in check.detail + check.advice for check in checks)
    assert all(check.advice for check in checks if check.status == "error")
    assert list(tmp_path.iterdir()) == []


def test_check_that_breaks_is_a_warning_and_not_an_exception(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "check_torch", broken)
    monkeypatch.setattr(doctor, "check_onnxruntime", broken)
    torch = run_checks(tmp_path, "sqlite:///mlflow.db")[1]
    assert torch == Check(
        name="torch", status="warning", detail="could not look: RuntimeError: two lines"
    )


@pytest.mark.parametrize(
    ("torch", "torchvision", "fits"),
    [
        ("2.14.1", "0.29.1", True),
        ("2.14.1+cu130", "0.29.1+cu130", True),
        ("2.14.1+cpu", "0.29.1+cpu", True),
        ("2.14.1+cpu", "0.29.1+cu130", False),
        ("2.14.1+cpu", "0.29.1", False),
        ("2.13.0", "0.29.1", False),
        ("2.14.1", "0.28.0", False),
    ],
)
def test_torch_and_torchvision_are_a_pair_from_one_build(torch, torchvision, fits):
    assert (pair_mismatch(torch, torchvision) is None) == fits


def test_library_that_does_not_import_is_reported_with_its_last_line():
    seen = doctor._ask("import nowhere_to_be_found; answer = {}")
    assert seen == {"error": "ModuleNotFoundError: No module named 'nowhere_to_be_found'"}


def test_library_that_kills_its_process_is_survived():
    assert "-9" in doctor._ask("import os; os.kill(os.getpid(), 9)")["error"]


def test_library_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.5)
    assert "no answer" in doctor._ask("import time; time.sleep(60); answer = {}")["slow"]


def test_a_machine_that_is_busy_is_not_advised_to_reinstall(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.01)
    for check in (doctor.check_torch(), doctor.check_onnxruntime()):
        assert check.status == "warning"
        assert "no answer within" in check.detail
        assert check.advice == "Run `visiontuner doctor` again when this machine has less to do."


@pytest.mark.slow
def test_packages_in_a_folder_with_brackets_are_found(monkeypatch, tmp_path):
    folder = tmp_path / "lib [of ours]"
    folder.mkdir()
    found = importlib.util.find_spec("torchvision")
    (folder / "torchvision").symlink_to(Path(found.origin).parent)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    check = doctor.check_torch()
    assert check.status == "ok", check.detail


def test_old_python_is_named():
    check = doctor.check_python((3, 10, 4))
    assert (check.status, check.detail) == ("error", "3.10.4, visiontuner needs 3.11 or newer")


# Ray and the machine.


def test_ray_token_mode_without_a_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.check_ray().status == "error"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    check = doctor.check_ray()
    assert check.status == "ok"
    assert "s3cret" not in check.detail + check.advice


def test_a_user_without_a_home_has_no_ray_token_and_is_asked_for_a_cache(monkeypatch):
    """As in a container that was started with a user id of its own."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # as for an id without a name
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.check_ray().status == "error"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert doctor.check_ray().status == "ok"
    with pytest.raises(UserMistake, match="VISIONTUNER_CACHE"):
        cache_folder()


def test_rays_sockets_without_a_folder_are_an_error(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    check = doctor.check_ray()
    assert check.status == "error"
    assert check.advice == "Name another: `export TMPDIR=FOLDER`."


def test_ray_variables_are_named_without_their_values(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://secret.example:10001")
    check = doctor.check_ray()
    assert check.status == "warning"
    assert "RAY_ADDRESS" in check.detail
    assert "secret" not in check.detail


def test_little_shared_memory_names_dockers_flag(monkeypatch, tmp_path):
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
    check = doctor.check_shared_memory(tmp_path)
    assert check.status == "warning"
    assert "67 MB free" in check.detail
    assert "--shm-size" in check.advice


def test_system_without_shared_memory_folder_is_fine(tmp_path):
    assert doctor.check_shared_memory(tmp_path / "none").status == "ok"


@pytest.mark.parametrize(
    ("available", "status"),
    [(999_999_999, "error"), (2_000_000_000, "warning"), (3_000_000_000, "ok")],
)
def test_memory_levels(available, status):
    assert doctor.check_memory(available).status == status


def test_disk_names_the_tightest_folder(monkeypatch, tmp_path):
    usage = doctor.shutil.disk_usage(tmp_path)
    small = tmp_path / "small"
    small.mkdir()

    def disk_usage(folder):
        return usage._replace(free=2 * 10**9 if folder == small else 9 * 10**9)

    monkeypatch.setattr(doctor.shutil, "disk_usage", disk_usage)
    check = doctor.check_disk([tmp_path, small])
    assert check.status == "warning"
    assert check.detail == f"2.0 GB free at {small}"
    # A folder that is not there yet is judged by the disk it will be on.
    assert doctor.check_disk([tmp_path / "not" / "yet"]).status == "ok"


def test_cache_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check = doctor.check_cache(tmp_path / "file" / "cache")
    assert check.status == "error"
    assert "VISIONTUNER_CACHE" in check.advice


@pytest.mark.parametrize(
    ("there", "status", "words"),
    [
        ((), "warning", "--env-manager local"),
        (("uv",), "warning", "--env-manager uv"),
        (("conda",), "ok", ""),
    ],
)
def test_environment_managers(monkeypatch, tmp_path, there, status, words):
    for name in there:
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.check_environment_managers()
    assert check.status == status
    assert words in check.advice


# MLflow's store.


def database(path: Path, revision: str | None, tables: Sequence[str] = ()) -> str:
    with sqlite3.connect(path) as connection:
        for table in tables:
            connection.execute(f"CREATE TABLE {table} (x TEXT)")
        if revision is not None:
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
    connection.close()
    return f"sqlite:///{path}"


def test_revisions_are_read_as_mlflow_itself_reads_them():
    import mlflow.store.db_migrations
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", mlflow.store.db_migrations.__path__[0])
    scripts = ScriptDirectory.from_config(config)
    known, newest = _schemas()
    assert newest == scripts.get_current_head()
    assert known == {script.revision for script in scripts.walk_revisions()}


@pytest.mark.parametrize(
    ("revision", "status", "words"),
    [
        (None, "ok", "sqlite at"),
        ("newest", "ok", "sqlite at"),
        ("451aebb31d03", "error", "older MLflow"),
        ("ffffffffffff", "error", "newer MLflow"),
    ],
)
def test_sqlite_schema(tmp_path, revision, status, words):
    revision = _schemas()[1] if revision == "newest" else revision
    tables = ("experiments", "runs") if revision else ("of_another_program",)
    uri = database(tmp_path / "my runs.db", revision, tables)
    before = (tmp_path / "my runs.db").read_bytes()
    check = check_store(uri)
    assert check.status == status
    assert words in check.detail
    assert (tmp_path / "my runs.db").read_bytes() == before


@pytest.mark.parametrize(
    ("revision", "tables"),
    [(None, ["experiments", "runs", "metrics"]), ("451aebb31d03", ["experiments"])],
)
def test_a_database_that_mlflow_did_not_finish(tmp_path, revision, tables):
    check = check_store(database(tmp_path / "mlflow.db", revision, tables))
    assert check.status == "error"
    assert "lacks tables" in check.detail
    assert "Move the file away" in check.advice


def test_file_that_is_no_database(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but longer than a header of 100 bytes" * 3)
    check = check_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert check.status == "error"
    assert "no usable database" in check.detail


def test_database_in_a_missing_folder(tmp_path):
    check = check_store(f"sqlite:///{tmp_path}/missing/mlflow.db")
    assert check.status == "error"
    assert "mkdir -p" in check.advice


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:///data/mlruns"])
def test_file_store_is_refused(uri):
    check = check_store(uri)
    assert check.status == "error"
    assert "sqlite:///mlflow.db" in check.advice


def test_unknown_store():
    assert "no such store" in check_store("gopher://host/").detail


@pytest.fixture
def serve():
    """Start a server with one answer for `/version` and one for MLflow's API."""
    servers = []

    def start(version, api=(200, "{}")):
        class Handler(BaseHTTPRequestHandler):
            def _answer(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = version if self.path == "/version" else api
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST = _answer  # noqa: N815

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ((200, version("mlflow")), "ok", "runs MLflow"),
        ((200, "3.0.1"), "ok", "runs MLflow 3.0.1, this is"),
        ((200, "2.22.0"), "error", "runs MLflow 2.22.0"),
        ((404, ""), "ok", "does not tell its version"),
        ((200, "<html>hello</html>"), "ok", "does not tell its version"),
    ],
)
def test_server_is_asked_for_its_version(serve, answer, status, words):
    check = check_store(serve(answer) + "/")
    assert check.status == status
    assert words in check.detail


HOST = "Invalid Host header - possible DNS rebinding attack detected"
DENIED = json.dumps({"error_code": "PERMISSION_DENIED", "message": "ask Ada for the role editor"})


@pytest.mark.parametrize(
    ("api", "words"),
    [
        ((401, "You are not authenticated."), ["401", "You are not authenticated.", "USERNAME"]),
        ((403, HOST), ["403", HOST, "--allowed-hosts"]),
        ((403, DENIED), ["403", "ask Ada for the role editor", "USERNAME"]),
        ((404, "<html>no such page</html>"), ["no such page"]),
        ((200, "<html>a shop</html>"), ["a shop"]),
    ],
)
def test_server_is_really_asked_and_its_own_words_are_told(serve, api, words):
    check = check_store(serve((200, version("mlflow")), api))
    assert check.status == "error"
    assert all(word in check.detail for word in words), check.detail


def test_server_that_is_away(free_port):
    check = check_store(f"http://user:s3cret@127.0.0.1:{free_port}")
    assert check.status == "error"
    assert "does not answer" in check.detail
    assert "s3cret" not in check.detail
    assert "sync" in check.advice


def test_database_whose_driver_is_missing(serve):
    address = serve((200, "")).removeprefix("http://")
    check = check_store(f"mssql+nosuchdriver://user:s3cret@{address}/mlflow")
    assert check.status == "error"
    assert "s3cret" not in check.detail + check.advice
    check = check_store(f"postgresql+psycopg2://user:s3cret@{address}/mlflow")
    assert check.detail.endswith("needs the package psycopg2-binary")
    assert check.advice == "`pip install psycopg2-binary`."


def test_database_server_that_is_away(free_port):
    check = check_store(f"postgresql+psycopg2://user:s3cret@127.0.0.1:{free_port}/mlflow")
    assert check.status == "error"
    assert "s3cret" not in check.detail


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
