"""Progress: the display while something runs, and the text that a notebook stores."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from eventually import until
from helpers.catalog import INSTALL_LAB
from helpers.progress import progress
from progress_cells import FAIL, MEASURE, WITHOUT_WIDGETS

nbclient = pytest.importorskip("nbclient", reason=INSTALL_LAB)
nbformat = pytest.importorskip("nbformat", reason=INSTALL_LAB)

LATER = r"(?!00:00)\d\d:\d\d"
"""Minutes and seconds, at least one second."""


class Watched(nbclient.NotebookClient):
    """Run a notebook, and make the file "seen" when it has shown its progress for a second."""

    shown = ""

    def process_message(self, message: Any, cell: Any, index: int) -> Any:
        if message["msg_type"] in ("comm_open", "comm_msg", "display_data", "update_display_data"):
            self.shown += json.dumps(message["content"], ensure_ascii=False).replace("\u2007", " ")
            if re.search(rf"with a cache.*\({LATER}\)", self.shown):
                (Path(self.resources["metadata"]["path"]) / "seen").touch()
        return super().process_message(message, cell, index)


def run_notebook(folder: Path, *cells: str) -> Watched:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = Watched(notebook, timeout=600, store_widget_state=False, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return client


def displayed(cell: Any) -> list[dict[str, str]]:
    return [output.data for output in cell.outputs if output.output_type == "display_data"]


@pytest.mark.main
def test_a_bar_of_widgets_moves_and_leaves_its_title(tmp_path: Path) -> None:
    client = run_notebook(tmp_path, MEASURE, FAIL)
    assert "FloatProgressModel" in client.shown
    assert '"max": 4.0' in client.shown and '"value": 3.0' in client.shown
    assert '"method": "update", "state": {"value": 3.0}' in client.shown
    measure, fail = client.nb.cells
    assert displayed(measure) == [{"text/plain": "Measuring"}]
    assert displayed(fail) == [{"text/plain": "Loading"}]
    assert [output.text for output in fail.outputs if "text" in output] == ["no room\n"]


@pytest.mark.main
def test_a_notebook_with_progress_compares_equal_when_it_runs_again(tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    client = run_notebook(tmp_path, MEASURE, FAIL)
    nbformat.write(client.nb, tmp_path / "stored.ipynb")
    strict = [sys.executable, "-m", "pytest", "-p", "no:randomly", "--nbval", "--nbval-current-env", "stored.ipynb"]
    compared = subprocess.run(strict, capture_output=True, text=True, cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout


@pytest.mark.main
def test_without_widgets_a_bar_of_text_moves_and_leaves_its_title(tmp_path: Path) -> None:
    client = run_notebook(tmp_path, WITHOUT_WIDGETS, MEASURE)
    assert "FloatProgressModel" not in client.shown
    assert re.search(rf"Measuring: with a cache \|█+[^|]*\| 75 % \({LATER}\)", client.shown)
    assert displayed(client.nb.cells[1]) == [{"text/plain": "Measuring"}]


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (4, rf"Measuring: with a cache \|[█#]+[^|]*\| 75 % \({LATER}"),
        (None, rf"Measuring: with a cache \({LATER}"),
    ],
)
def test_a_line_in_a_terminal_moves_and_disappears(tmp_path: Path, total: int | None, line: str) -> None:
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = MEASURE.replace("total=4", f"total={total}")
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=stderr) as running:
        os.close(stderr)
        shown = b""
        with contextlib.suppress(OSError):  # Linux raises it at the end, when no process has the terminal open
            while piece := os.read(terminal, 1000):
                shown += piece
                if re.search(line, shown.decode(errors="ignore")):
                    (tmp_path / "seen").touch()
    os.close(terminal)
    assert running.returncode == 0, shown.decode()
    *_, erased, rest = shown.decode().split("\r")
    assert rest == "" and set(erased) == {" "}


def test_a_log_holds_no_progress(tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_of_a_log_are_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress("Starting") as show:
        show("\x1b]0;title\x07")
        until(lambda: "Starting: \\x1b]0;title\\x07" in screen.getvalue(), "the line of the log")
    assert "\x07" not in screen.getvalue()


def test_a_program_without_stderr_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress("Starting") as show:
        show("something")
