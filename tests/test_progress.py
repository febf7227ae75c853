"""What somebody who waits sees, and what a notebook keeps of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from test_notebooks import each_notebook

nbclient = pytest.importorskip("nbclient", reason='pip install -c constraints.txt -e ".[lab,test]"')
nbformat = pytest.importorskip("nbformat", reason='pip install -c constraints.txt -e ".[lab,test]"')

NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None  # as where it is not installed"

MEASURE = """
import time
from pathlib import Path
from helpers.progress import progress

with progress("Measuring", total=4) as show:
    show("with a cache", done=3)
    while not Path("seen").exists():  # and meanwhile nothing is reported
        time.sleep(0.01)
"""

FAIL = """
try:
    with progress("Loading") as show:
        show("the weights")
        raise MemoryError("no room")
except MemoryError as error:
    print(error)
"""


class Watched(nbclient.NotebookClient):
    """Runs a notebook, and once it has shown for a second what is done, makes the file that it waits for."""

    shown = ""

    def process_message(self, message: Any, cell: Any, index: int) -> Any:
        if message["msg_type"] in ("comm_open", "comm_msg", "display_data", "update_display_data"):
            self.shown += json.dumps(message["content"], ensure_ascii=False).replace("\u2007", " ")
            if re.search(r"with a cache.*\(00:0[1-9]\)", self.shown):
                (Path(self.resources["metadata"]["path"]) / "seen").touch()
        return super().process_message(message, cell, index)


@pytest.mark.parametrize("widgets", [True, False], ids=["widgets", "text"])
def test_a_notebook_shows_that_it_is_alive_and_stores_the_title_alone(tmp_path: Path, widgets: bool) -> None:
    cells = ["" if widgets else NO_WIDGETS, MEASURE, FAIL]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells if cell])
    client = Watched(
        notebook, timeout=120, store_widget_state=False, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert ("FloatProgressModel" in client.shown) is widgets
    if widgets:
        assert '"max": 4.0' in client.shown and '"value": 3.0' in client.shown
        assert '"method": "update", "state": {"value": 3.0}' in client.shown
    else:
        assert re.search(r"Measuring: with a cache \|█+[^|]*\| 75 % \(00:0[1-9]\)", client.shown)

    *_, measure, fail = notebook.cells
    (measured,) = measure.outputs
    assert (measured.output_type, measured.data) == ("display_data", {"text/plain": "Measuring"})
    failed, told = fail.outputs
    assert (failed.output_type, failed.data) == ("display_data", {"text/plain": "Loading"})
    assert (told.name, told.text) == ("stdout", "no room\n")

    stored = tmp_path / "stored.ipynb"
    nbformat.write(notebook, stored)
    strict = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", str(stored)]
    compared = subprocess.run(strict, capture_output=True, text=True, cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout


@pytest.mark.parametrize(
    ("total", "line"),
    [(4, r"Measuring: with a cache \|[█#]+[^|]*\| 75 % \(00:0[1-9]"), (None, r"Measuring: with a cache \(00:0[1-9]")],
)
def test_a_terminal_shows_a_line_that_goes(tmp_path: Path, total: int | None, line: str) -> None:
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    script = MEASURE.replace("total=4", f"total={total}")
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=stderr) as running:
        os.close(stderr)
        seen, end = b"", time.monotonic() + 60
        while not re.search(line, seen.decode(errors="ignore")) and time.monotonic() < end:
            seen += os.read(terminal, 1000)
        (tmp_path / "seen").touch()
        with contextlib.suppress(OSError):  # Linux's word for the end of a terminal that nobody writes to any more
            while piece := os.read(terminal, 1000):
                seen += piece
    os.close(terminal)
    assert running.returncode == 0
    assert re.search(line, seen.decode())
    *_, wiped, rest = seen.decode().split("\r")
    assert rest == "" and set(wiped) == {" "}


def test_a_log_is_not_filled_with_it(tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@each_notebook
def test_no_notebook_stores_widgets_that_only_a_kernel_could_show(notebook: Path) -> None:
    assert "jupyter.widget-" not in notebook.read_text()
