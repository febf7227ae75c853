"""A lesson in a real JupyterLab, run from top to bottom as a user runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jupyterlab_fixture import LIMIT, ROOT, JupyterLab, NotebookPage

# All cells have run; or one failed, and JupyterLab ran none after it; or the kernel died, and a dialog says so.
FINISHED = """() => {
    const {content, sessionContext} = jupyterapp.shell.currentWidget;
    const code = [...content.model.cells].filter(cell => cell.type === "code");
    const failed = ({outputs, sharedModel}) => !sharedModel.getSource().includes("NBVAL_RAISES_EXCEPTION")
        && Array.from({length: outputs.length}, (_, i) => outputs.get(i).type).includes("error");
    const idle = sessionContext.session?.kernel?.status === "idle", dialog = document.querySelector(".jp-Dialog");
    return dialog || idle && (code.every(cell => cell.executionCount) || code.some(failed));
}"""

# Pictures from the web, such as Colab's badge, need a network. CodeMirror, which holds a cell's source, has empty
# pictures of its own around a very long line, such as a stored picture's.
DRAWN = """() => [...document.querySelectorAll('.jp-Notebook img:not([src^="https:"])')].every(img => img.complete)
    && !document.querySelector(".jp-Notebook").innerText.includes("Loading widget...")"""

# For each cell: the outputs that would be stored, their text in the page, and the widths of the pictures.
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map(cell => ({
    source: cell.model.sharedModel.getSource(),
    type: cell.model.type,
    count: cell.model.executionCount,
    outputs: cell.model.outputs?.toJSON() ?? [],
    text: cell.outputArea?.node.innerText,
    widths: [...cell.node.querySelectorAll('img:not([src^="https:"], .cm-widgetBuffer)')].map(img => img.naturalWidth),
}))"""


@dataclass
class LessonRun:
    """A lesson's `page` after "Run All Cells", its `cells` as they are there, and the texts of `dialogs`."""

    page: NotebookPage
    cells: list[dict[str, Any]]
    dialogs: list[str]

    def check(self) -> None:
        """Raise `AssertionError` if a cell failed, wrote to stderr, or is not shown as it should be."""
        assert not self.dialogs
        code = [cell for cell in self.cells if cell["type"] == "code"]
        assert [cell["count"] for cell in code] == list(range(1, len(code) + 1))
        for cell in self.cells:
            assert 0 not in cell["widths"], ("A picture is broken", cell["source"])
        for cell in code:
            raises = "NBVAL_RAISES_EXCEPTION" in cell["source"]
            for output in cell["outputs"]:
                assert raises or output["output_type"] != "error", (cell["source"], output["evalue"])
                assert output.get("name") != "stderr", (cell["source"], output["text"])
            pictures = [output for output in cell["outputs"] if is_picture(output.get("data", {}))]
            assert len(cell["widths"]) >= len(pictures), ("A picture is missing", cell["source"])
            assert "Error displaying widget" not in cell["text"], cell["source"]


def run_lesson(jupyterlab: JupyterLab, name: str) -> LessonRun:
    """Open the lesson without its stored outputs, run all cells, and take pictures if they are wanted."""
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    page = jupyterlab.open(f"{name}.ipynb", notebook)
    page.run_all_cells()
    wait_until_finished(page)
    page.page.wait_for_function(DRAWN)
    page.take_pictures(name)
    return LessonRun(page, page.page.evaluate(CELLS), page.page.locator(".jp-Dialog").all_inner_texts())


def wait_until_finished(page: NotebookPage) -> None:
    page.page.wait_for_function(FINISHED, polling=200, timeout=4 * LIMIT)


def is_picture(data: dict[str, Any]) -> bool:
    return "text/html" not in data and any(kind.startswith("image/") for kind in data)
