"""The notebooks: stored without outputs, and run from beginning to end."""

import json

import pytest
from pages import DOCS

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def by_name(file):
    return file.stem


def test_there_are_notebooks_and_pages_lead_to_them():
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert len(NOTEBOOKS) == 2 and all(f"(notebooks/{file.name})" in pages for file in NOTEBOOKS)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=by_name)
def test_no_outputs_are_stored(file):
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), file.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs(file, tmp_path):
    """With nbclient of the extra ``dev``."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, 4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") or output.get("data", {}).get("text/markdown", "") for output in shown)
    if file.stem == "purify":
        assert "RA" in text and (tmp_path / "outputs/notebook/purified/model.safetensors").is_file()
    else:
        assert "| noisy tuning 1 |" in text and "| twin without backdoor |" in text and "Failed cells" not in text
