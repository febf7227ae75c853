"""Each notebook in a real JupyterLab, in a real browser, run as a person runs it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from lab import INSTALL, MINUTE, ROOT, JupyterLab, run_all_cells, shut_down, take_pictures
from test_progress import MEASURE

nbformat = pytest.importorskip("nbformat", reason=INSTALL)

FINISHED = """() => {
    const {content, sessionContext} = jupyterapp.shell.currentWidget;
    const code = [...content.model.cells].filter(cell => cell.type === "code");
    const failed = ({outputs, sharedModel}) => !sharedModel.getSource().includes("NBVAL_RAISES_EXCEPTION")
        && Array.from({length: outputs.length}, (_, i) => outputs.get(i).type).includes("error");
    const idle = sessionContext.session?.kernel?.status === "idle", dialog = document.querySelector(".jp-Dialog");
    return dialog || idle && (code.every(cell => cell.executionCount) || code.some(failed));
}"""
"""All cells have run; or one failed, after which JupyterLab runs no other; or the kernel died, as a dialog tells."""

# Pictures from elsewhere, as the badge of Colab, are not there without a network.
DRAWN = """() => [...document.querySelectorAll('.jp-Notebook img:not([src^="https:"])')].every(img => img.complete)
    && !document.querySelector(".jp-Notebook").innerText.includes("Loading widget...")"""

CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map(cell => ({
    source: cell.model.sharedModel.getSource(),
    type: cell.model.type,
    count: cell.model.executionCount,
    outputs: cell.model.outputs?.toJSON() ?? [],
    text: cell.outputArea?.node.innerText,
    widths: [...cell.node.querySelectorAll('img:not([src^="https:"])')].map(img => img.naturalWidth),
}))"""
"""The cells: of the outputs what the notebook would store, their text in the page, and the widths of pictures."""


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_run_all_cells(jupyterlab: JupyterLab, path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    page = jupyterlab.open(path.name, notebook)
    run_all_cells(page)
    page.wait_for_function(FINISHED, polling=200, timeout=15 * MINUTE)
    page.wait_for_function(DRAWN)
    if folder := os.environ.get("SCREENSHOTS"):
        take_pictures(page, Path(folder) / path.stem)
    cells, dialogs = page.evaluate(CELLS), page.locator(".jp-Dialog").all_inner_texts()
    shut_down(page)

    assert not dialogs
    for cell in cells:
        assert 0 not in cell["widths"], ("A picture is broken", cell["source"])
    code = [cell for cell in cells if cell["type"] == "code"]
    for cell in code:
        for output in cell["outputs"]:
            marked = "NBVAL_RAISES_EXCEPTION" in cell["source"]
            assert marked or output["output_type"] != "error", (cell["source"], output["evalue"])
            assert output.get("name") != "stderr", (cell["source"], output["text"])
        pictures = [
            output
            for output in cell["outputs"]
            if "text/html" not in output.get("data", {}) and "image/" in str(list(output.get("data", {})))
        ]
        assert len(cell["widths"]) >= len(pictures), cell["source"]
        assert "Error displaying widget" not in cell["text"], cell["source"]
    assert [cell["count"] for cell in code] == list(range(1, len(code) + 1))


def test_a_progress_bar_moves_and_leaves_its_title(jupyterlab: JupyterLab) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(MEASURE)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    page = jupyterlab.open("progress.ipynb", notebook)
    output = page.locator(".jp-OutputArea")
    run_all_cells(page)
    output.locator(".progress-bar").wait_for()
    output.get_by_text("Measuring: with a cache").wait_for()
    output.get_by_text(re.compile(r"\(00:\d[1-9]\)")).wait_for()
    (jupyterlab.folder / "seen").touch()
    page.wait_for_function(FINISHED)
    output.locator(".progress-bar").wait_for(state="detached")
    assert output.inner_text().strip() == "Measuring"
    shut_down(page)
