"""The notebooks of docs/notebooks, executed as their readers do."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
LIMIT_S = 900


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra 'test')")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra 'test')")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]), prepend=":")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    # Cells end with assertions on what was learned; an error in any of them fails here.
    client = nbclient.NotebookClient(
        notebook, timeout=LIMIT_S, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output["data"] for output in outputs if "data" in output]
    # A run shows itself as HTML, and the progress is plain text.
    assert any(
        "runs/" in data.get("text/html", "") and "done" in data["text/html"] for data in shown
    )
    text = "".join(output.get("text", "") for output in outputs)
    assert "[2/2]" in text
    assert "\x1b[" not in text


def test_notebooks_are_committed_without_outputs():
    import json

    for path in FOLDER.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), path.name
