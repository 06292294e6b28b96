"""The notebook runs top to bottom from a clean kernel, and is stored with what it showed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

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
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    text = nbformat.writes(notebook)
    # An absolute path to what the notebook or its environment wrote; colours of a terminal.
    assert not re.search(
        r"(?<![\w.:/])/\w[\w./-]*/(searches|mlflow\.db|\.venv|site-packages)", text
    )
    assert "\\u001b" not in text
    assert len(text) < 1_500_000


@pytest.mark.timeout(600)
def test_it_runs_from_a_clean_kernel(
    notebook: Any, tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder, as a person would who has only the package and the notebook."""
    monkeypatch.setenv("VISIONTUNER_CACHE", str(shared_cache))
    client = NotebookClient(
        nbformat.reads(nbformat.writes(notebook), as_version=4),
        timeout=500,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    ran = client.execute()
    said = "".join(output.get("text", "") for cell in code_cells(ran) for output in cell.outputs)
    assert "learning_rate_too_high" in said
    assert "16/16" in said
    (evaluated,) = tmp_path.glob("searches/*/evaluation/report.json")
    assert (evaluated.parent.parent / "report.html").is_file()
    assert (tmp_path / "mlflow.db").is_file()
