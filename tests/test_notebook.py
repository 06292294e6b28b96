"""The notebook runs top to bottom from a clean kernel, and is stored with what it showed."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

import visiontuner

# The stand-in for AWS; conftest files of two folders do not see each other.
_specification = importlib.util.spec_from_file_location(
    "stand_in_for_notebook", Path(__file__).parent / "aws" / "conftest.py"
)
assert _specification is not None
assert _specification.loader is not None
_conftest = importlib.util.module_from_spec(_specification)
sys.modules[_specification.name] = _conftest  # dataclasses look their module up
_specification.loader.exec_module(_conftest)
stand_in = _conftest.stand_in
aws = _conftest.aws

pytestmark = [
    pytest.mark.slow,
    # Jupyter's own: its kernel listens on loopback, and closes its sockets late.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq"),
    pytest.mark.filterwarnings("ignore:.*without encryption:UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def notebook(repository: Path) -> Any:
    return nbformat.read(repository / "notebooks" / "train_and_deploy.ipynb", as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_stored_with_its_outputs_and_nobodys_folders(notebook: Any) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    text = nbformat.writes(notebook)
    # An absolute path to what the notebook or its environment wrote; colours of a terminal.
    assert not re.search(
        r"(?<![\w.:/])/\w[\w./-]*/(searches|mlflow\.db|\.venv|site-packages)", text
    )
    assert "\\u001b" not in text
    assert len(text) < 1_500_000


def test_it_imports_nothing_but_what_is_public(notebook: Any) -> None:
    cells = [TransformerManager().transform_cell(c.source) for c in code_cells(notebook)]
    nodes = list(ast.walk(ast.parse("\n".join(cells))))  # magics have become calls
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["import visiontuner as vt"]
    used = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vt"
    }
    assert {"prepare", "tune", "promote", "deploy"} <= used <= set(visiontuner.__all__)
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    assert not [node for node in nodes if isinstance(node, defined)]


def execute(notebook: Any, folder: Path) -> str:
    """From a clean kernel in a folder; what it printed and showed, as text."""
    client = NotebookClient(
        nbformat.reads(nbformat.writes(notebook), as_version=4),
        timeout=500,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    ran = client.execute()
    outputs = [output for cell in code_cells(ran) for output in cell.outputs]
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs]
    return "".join([*(output.get("text", "") for output in outputs), *shown])


@pytest.mark.timeout(600)
def test_it_runs_from_a_clean_kernel(
    notebook: Any, tmp_path: Path, shared_cache: Path, aws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder, as a person would who has only the package and the notebook."""
    import mlflow.version

    aws.put_image(tag=mlflow.version.VERSION)
    aws.put_role("endpoints")
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')  # one worker a search is enough
    said = execute(notebook, tmp_path)
    assert "learning_rate_too_high" in said
    assert "16/16" in said
    evaluated = sorted(tmp_path.glob("searches/*/evaluation/report.json"))
    assert len(evaluated) == 2  # the search, and the training with its best values
    assert all((report.parent.parent / "report.html").is_file() for report in evaluated)
    assert (tmp_path / "mlflow.db").is_file()
    assert "mlflow deployments create -t sagemaker:/eu-west-1" in said
    assert "InService" in said
    assert set(map(tuple, aws.holds().values())) == {()}


def test_without_a_stand_in_or_an_account_nothing_is_deployed(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    cells = code_cells(notebook)
    last = [cell for cell in cells if "deploying" in cell.source]
    assert len(last) == 4
    alone = nbformat.v4.new_notebook(cells=[cells[0], *last], metadata=notebook.metadata)
    assert "Skipped: AWS_ENDPOINT_URL names no stand-in" in execute(alone, tmp_path)
