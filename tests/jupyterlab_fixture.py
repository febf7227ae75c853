"""A JupyterLab in a browser, its notebooks, and pictures of them.

To look at what users see, name a folder for the pictures, in the light and the dark theme, wide and narrow:

    SCREENSHOTS=/tmp/pictures python -m pytest tests/test_jupyterlab.py -k 01_access
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from background_program import Program
from helpers.processes import port_to_listen_on

INSTALL = 'For the tests in a browser: pip install -c constraints.txt -e ".[model,lab,test]"'
NO_BROWSER = (
    "There is no Chromium for the tests in a browser. Debian: apt install chromium; "
    "elsewhere: python -m playwright install chromium"
)

ROOT = Path(__file__).parents[1]
MINUTE = 60_000
"""Milliseconds, as Playwright counts."""
LIMIT = 5 * MINUTE
"""The longest wait for anything."""

SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {
        "windowingMode": "none",  # renders all cells, not only the visible ones
        "scrollPastEnd": False,  # ends the page with the last cell
    },
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},  # asks no question about it
}

READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"

REPLACE_CELLS = """sources => {
    const {sharedModel} = jupyterapp.shell.currentWidget.content.model;
    sharedModel.transact(() => {
        sharedModel.deleteCellRange(0, sharedModel.cells.length);
        sharedModel.insertCells(0, sources.map(source => ({cell_type: "code", source, metadata: {}})));
    });
}"""

RUN_ALL_CELLS = "() => jupyterapp.commands.execute('notebook:run-all-cells')"

RUN_IN_KERNEL = """async code => {
    const {kernel} = jupyterapp.shell.currentWidget.sessionContext.session;
    const future = kernel.requestExecute({code, store_history: false});
    let text = "";
    future.onIOPub = ({content}) => text += content.text ?? content.traceback?.join("\\n") ?? "";
    await future.done;
    return text.trim();
}"""

CHANGE_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"

# How much of the page is scrolled out of sight, in pixels, after two frames have laid it out anew.
HIDDEN_HEIGHT = """async () => {
    for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
    const {scrollHeight, clientHeight} = document.querySelector(".jp-WindowedPanel-outer");
    return scrollHeight - clientHeight;
}"""


class NotebookPage:
    """A notebook that is open in a page of the browser, with a kernel."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def wait_for_kernel(self) -> None:
        self.page.wait_for_function(READY)

    def run_all_cells(self) -> None:
        """Choose "Run All Cells" in the menu."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def start(self, *cells: str) -> None:
        """Replace all cells by `cells`, and run them."""
        self.page.evaluate(REPLACE_CELLS, list(cells))
        self.run_all_cells()

    def run(self, *cells: str) -> None:
        """Replace all cells by `cells`, run them, and wait for the last one."""
        self.page.evaluate(REPLACE_CELLS, list(cells))
        assert self.page.evaluate(RUN_ALL_CELLS), "a cell failed"

    def execute(self, code: str) -> str:
        """Run code in the kernel, without a cell, and return what it prints, or its traceback."""
        return self.page.evaluate(RUN_IN_KERNEL, code)

    def value_of(self, expression: str) -> Any:
        """Return the value of a Python expression in the kernel, through JSON."""
        printed = self.execute(f"import json; print(json.dumps({expression}))")
        try:
            return json.loads(printed)
        except ValueError:
            raise AssertionError(printed) from None

    def save_and_reload(self) -> None:
        self.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        self.page.reload()
        self.wait_for_kernel()

    def close(self) -> None:
        """Shut the kernel down, and close the page."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()

    def take_pictures(self, name: str) -> None:
        """Save PNG files of the whole page to the folder that SCREENSHOTS names, if it names one."""
        if "SCREENSHOTS" not in os.environ:
            return
        folder = Path(os.environ["SCREENSHOTS"]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for theme in ("light", "dark"):
            self.page.evaluate(CHANGE_THEME, f"JupyterLab {theme.title()}")
            for width in (1300, 600):
                self._take_pictures(folder / f"{theme}-{width}", width)

    def _take_pictures(self, path: Path, width: int) -> None:
        height, hidden = 0, 800
        while hidden > 0:
            height += hidden
            self.page.set_viewport_size({"width": width, "height": height})
            hidden = self.page.evaluate(HIDDEN_HEIGHT)
        for piece, top in enumerate(range(0, height, 1600), 1):
            clip = {"x": 0, "y": top, "width": width, "height": min(1600, height - top)}
            self.page.screenshot(path=f"{path}-{piece:02}.png", clip=clip)


@dataclass
class JupyterLab:
    """A JupyterLab that shows `folder`, and a browser that is logged in to it."""

    browser: Any
    address: str
    folder: Path

    def new_notebook(self, name: str) -> NotebookPage:
        """Create an empty notebook, and open it."""
        import nbformat

        notebook = nbformat.v4.new_notebook()
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        return self.open(name, notebook)

    def open(self, name: str, notebook: Any) -> NotebookPage:
        """Save `notebook` in the folder, open it, and wait for its kernel."""
        import nbformat

        nbformat.write(notebook, self.folder / name)
        page = NotebookPage(self.browser.new_page())
        page.page.goto(f"{self.address}/lab/tree/{name}?reset")
        page.wait_for_kernel()
        page.page.evaluate("() => jupyterapp.shell.collapseLeft()")
        return page


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """Start JupyterLab and a browser for a module. An event loop runs meanwhile, so `asyncio.run` would raise."""
    pytest.importorskip("jupyterlab", reason=INSTALL)
    pytest.importorskip("playwright.sync_api", reason=INSTALL)
    with running_jupyterlab(tmp_path_factory.mktemp("jupyterlab")) as started:
        yield started


@contextmanager
def running_jupyterlab(home: Path, **options: Any) -> Iterator[JupyterLab]:
    """Start JupyterLab with its files in `home`, and a browser whose context has these options of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        program = chromium_in(driver)
        token, port = secrets.token_hex(), port_to_listen_on("127.0.0.1", 0)
        server = start_server(home, token, port)
        try:
            server.wait_for("is running at")
            chromium = driver.chromium.launch(executable_path=program)
            browser = chromium.new_context(**options)
            browser.set_default_timeout(LIMIT)
            log_in(browser, f"http://127.0.0.1:{port}", token)
            yield JupyterLab(browser, f"http://127.0.0.1:{port}", home / "notebooks")
            chromium.close()
        finally:
            stop_server(server)


def chromium_in(driver: Any) -> str:
    """Return the path of a Chromium: the system's, or Playwright's. Skip the test if there is neither."""
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    program = next(filter(None, programs), driver.chromium.executable_path)
    if not Path(program).exists():
        pytest.skip(NO_BROWSER)
    return program


def start_server(home: Path, token: str, port: int) -> Program:
    """Start a JupyterLab with settings of its own, which shows a copy of the notebooks."""
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".*"))
    own = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_TOKEN": token,  # in the environment, because all users can see arguments
    }
    return Program(
        *("-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        f"--ServerApp.root_dir={home / 'notebooks'}",
        log=home / "jupyterlab.log",
        env={**os.environ, **{name: str(value) for name, value in own.items()}},
    )


def log_in(browser: Any, address: str, token: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/login")
    page.fill("input[name=password]", token)
    page.press("input[name=password]", "Enter")
    page.wait_for_url("**/lab*")
    page.close()


def stop_server(server: Program) -> None:
    """Stop the server and its kernels."""
    family = server.family()
    server.process.terminate()
    try:
        server.process.wait(30)
    except subprocess.TimeoutExpired:  # JupyterLab 4.6 hangs if a kernel is just starting
        for process in family:
            process.kill()
        server.process.wait()
