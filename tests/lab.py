"""A JupyterLab in a browser, for tests that do what a person does, and the pictures that they can take.

To look at what a class will see, name a folder for the pictures, in the light and the dark theme, wide and narrow:

    SCREENSHOTS=/tmp/pictures python -m pytest tests/test_jupyterlab.py -k 01_access
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from programs import Script

from helpers.processes import port_to_listen_on

INSTALL = 'To try the notebooks in a browser: pip install -c constraints.txt -e ".[model,lab,test]"'

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

CHANGE_THEME = "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})"

# In pixels, once the page is laid out anew.
HIDDEN_HEIGHT = """async () => {
    for (const _ of [1, 2]) await new Promise(requestAnimationFrame);
    const {scrollHeight, clientHeight} = document.querySelector(".jp-WindowedPanel-outer");
    return scrollHeight - clientHeight;
}"""


@dataclass
class JupyterLab:
    """A JupyterLab that shows `folder`, and a browser that is logged in to it."""

    browser: Any
    address: str
    folder: Path

    def open(self, name: str, notebook: Any) -> Any:
        """Save a notebook in the folder, and open it in a page of the browser, with a kernel that is ready."""
        import nbformat

        nbformat.write(notebook, self.folder / name)
        page = self.browser.new_page()
        page.goto(f"{self.address}/lab/tree/{name}?reset")
        wait_for_kernel(page)
        page.evaluate("() => jupyterapp.shell.collapseLeft()")
        return page


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """For a module: as long as Playwright runs, so does an event loop, and `asyncio.run` would be refused."""
    pytest.importorskip("jupyterlab", reason=INSTALL)
    playwright = pytest.importorskip("playwright.sync_api", reason=INSTALL)
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
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:  # JupyterLab 4.6 hangs where a kernel has just been starting
                server.process.kill()
                server.process.wait()


def wait_for_kernel(page: Any) -> None:
    page.wait_for_function(READY, timeout=MINUTE)


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
