"""A command that is printed as a next step can be pasted: it names its subject and its store."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from visiontuner.cli.main import main
from visiontuner.text import next_command

# What needs no subject.
ALONE = ("backbones", "doctor", "endpoints", "jobs")
BEGINNING = re.compile(
    r"visiontuner ((tune|train)( --on sagemaker)?(`|$)|tune --experiment|query --help)"
)


@pytest.fixture(autouse=True)
def _default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_subject_is_quoted_for_the_shell() -> None:
    folder = Path("my searches/it's $HOME; rm -rf x")
    command = next_command("evaluate", folder)
    assert shlex.split(command) == ["visiontuner", "evaluate", str(folder)]
    assert next_command("promote", "models:/dogs/3") == "visiontuner promote models:/dogs/3"


def test_another_store_than_the_default_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///my runs.db")
    store = "MLFLOW_TRACKING_URI='sqlite:///my runs.db'"
    assert next_command("promote", "dogs") == f"{store} visiontuner promote dogs"
    assert next_command("prepare", "--data", "x") == "visiontuner prepare --data x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert next_command("promote", "dogs") == "visiontuner promote dogs"


def test_the_stores_password_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:SECRET@db.example.org/runs?sslkey=K")
    command = next_command("sync", "searches/x")
    assert command == 'MLFLOW_TRACKING_URI="$MLFLOW_TRACKING_URI" visiontuner sync searches/x'


def test_a_search_without_tracking_goes_on_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    resumed = next_command("tune", "--resume", "searches/x")
    assert resumed == "MLFLOW_TRACKING_URI=none visiontuner tune --resume searches/x"
    assert next_command("sync", "searches/x") == "visiontuner sync searches/x"


def test_no_printed_command_is_composed_elsewhere_or_leaves_its_subject_open(
    repository: Path,
) -> None:
    """Without a subject most commands take the newest search, which may be another one."""
    verbs = "|".join(sorted(set(main.list_commands(None)) - set(ALONE)))  # type: ignore[arg-type]
    written = re.compile(rf"visiontuner ({verbs})\b(?!( --[\w-]+( [a-z]+)?)* [A-Z]{{3,}}\b)")
    found = [
        f"{path.name}: {text}"
        for path in sorted((repository / "src").rglob("*.py"))
        for text in _texts(path)
        if written.search(text) and not BEGINNING.search(text)
    ]
    assert found == []


def _texts(path: Path) -> Iterator[str]:
    """Every string of a module but docstrings; the parts of an f-string one by one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value
