"""Each notebook in a real JupyterLab, in a real browser, run as a person runs it.

To look at what a class will see, name a folder for pictures of each notebook after its run, in the light and the
dark theme, wide and narrow:

    SCREENSHOTS=/tmp/pictures python -m pytest tests/test_jupyterlab.py -k 01_access
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Script
from test_progress import MEASURE

from helpers.processes import port_to_listen_on

INSTALL = 'To try the notebooks in a browser: pip install -c constraints.txt -e ".[model,lab,test]"'
nbformat = pytest.importorskip("nbformat", reason=INSTALL)
pytest.importorskip("jupyterlab", reason=INSTALL)
playwright = pytest.importorskip("playwright.sync_api", reason=INSTALL)

ROOT = Path(__file__).parents[1]
MINUTE = 60_000  # milliseconds, as Playwright counts

SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {
        "windowingMode": "none",  # all cells are in the page, not only those that can be seen
        "scrollPastEnd": False,  # and nothing comes after them
    },
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},  # and no question about it
}

READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"

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

CHANGE_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"

# In pixels, once the page is laid out anew.
HIDDEN_HEIGHT = """async () => {
    for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
    const {scrollHeight, clientHeight} = document.querySelector(".jp-WindowedPanel-outer");
    return scrollHeight - clientHeight;
}"""

CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.map(cell => ({
    source: cell.model.sharedModel.getSource(),
    type: cell.model.type,
    count: cell.model.executionCount,
    outputs: cell.model.outputs?.toJSON() ?? [],
    text: cell.outputArea?.node.innerText,
    widths: [...cell.node.querySelectorAll('img:not([src^="https:"])')].map(img => img.naturalWidth),
}))"""
"""The cells: of the outputs what the notebook would store, their text in the page, and the widths of pictures."""


@dataclass
class JupyterLab:
    """A JupyterLab that shows `folder`, and a browser that is logged in to it."""

    browser: Any
    address: str
    folder: Path

    def open(self, name: str, notebook: Any) -> Any:
        """Save a notebook in the folder, and open it in a page of the browser, with a kernel that is ready."""
        nbformat.write(notebook, self.folder / name)
        page = self.browser.new_page()
        page.goto(f"{self.address}/lab/tree/{name}?reset")
        page.wait_for_function(READY, timeout=MINUTE)
        page.evaluate("() => jupyterapp.shell.collapseLeft()")
        return page


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """For a module: as long as Playwright runs, so does an event loop, and `asyncio.run` would be refused."""
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    with playwright.sync_playwright() as driver:
        program = next(filter(None, programs), driver.chromium.executable_path)
        if not Path(program).exists():
            pytest.skip(
                "There is no Chromium to try the notebooks in. Debian: apt install chromium; "
                "elsewhere: python -m playwright install chromium"
            )
        home = tmp_path_factory.mktemp("jupyterlab")
        (home / "config" / "labconfig").mkdir(parents=True)
        (home / "config" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
        shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".*"))
        token, port = secrets.token_hex(), port_to_listen_on("127.0.0.1", 0)
        own = {
            "JUPYTER_CONFIG_DIR": home / "config",
            "JUPYTER_RUNTIME_DIR": home / "runtime",
            "JUPYTERLAB_SETTINGS_DIR": home / "settings",
            "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
            "IPYTHONDIR": home / "ipython",
            "JUPYTER_TOKEN": token,  # by environment: arguments are seen by everybody
        }
        server = Script(
            *("-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
            f"--ServerApp.root_dir={home / 'notebooks'}",
            log=home / "jupyterlab.log",
            env={**os.environ, **{name: str(value) for name, value in own.items()}},
        )
        try:
            server.wait_for("is running at")
            chromium = driver.chromium.launch(executable_path=program)
            browser = chromium.new_context()
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/login")
            page.fill("input[name=password]", token)
            page.press("input[name=password]", "Enter")
            page.wait_for_url("**/lab*")
            page.close()
            yield JupyterLab(browser, f"http://127.0.0.1:{port}", home / "notebooks")
            chromium.close()
        finally:
            server.process.terminate()  # and its kernels with it
            server.process.wait()


def run_all_cells(page: Any) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def shut_down(page: Any) -> None:
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()


def take_pictures(page: Any, folder: Path) -> None:
    """PNG files of the whole page, cut into pieces that a screen can show."""
    folder.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        page.evaluate(CHANGE_THEME, f"JupyterLab {theme.title()}")
        for width in (1300, 600):
            height, hidden = 0, 800
            while hidden > 0:
                height += hidden
                page.set_viewport_size({"width": width, "height": height})
                hidden = page.evaluate(HIDDEN_HEIGHT)
            for piece, top in enumerate(range(0, height, 1600), 1):
                page.screenshot(
                    path=folder / f"{theme}-{width}-{piece:02}.png",
                    clip={"x": 0, "y": top, "width": width, "height": min(1600, height - top)},
                )


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
