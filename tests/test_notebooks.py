"""The notebooks of examples/notebooks run, and are committed with what they print and draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> bool:
    return "print(" in "".join(cell["source"])


def test_there_are_two() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"replacing_a_loss", "what_starves"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_it_ran(path: Path) -> None:
    found = cells(path)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1)), "run make notebooks"
    for cell in found:
        kinds = {kind for output in cell["outputs"] for kind in (output["output_type"], *output.get("data", ()))}
        assert "error" not in kinds
        assert not printed(cell) or "stream" in kinds
        assert "subplots(" not in "".join(cell["source"]) or "image/png" in kinds
    assert path.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    """In a kernel of its own; what it claims it asserts."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in str(output)]
    assert drawn
