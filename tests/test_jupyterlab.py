"""The lessons in a real JupyterLab, in a real browser."""

from __future__ import annotations

import re

import pytest

from jupyterlab_fixture import JupyterLab
from lesson_run import run_lesson, wait_until_finished
from progress_cells import MEASURE

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    "name",
    [
        "01_access",
        "02_prompting",
        pytest.param("03_streaming", marks=pytest.mark.xdist_group("port-12345")),
        "04_conversation",
        "05_service",
    ],
)
def test_a_lesson_runs_from_top_to_bottom(jupyterlab: JupyterLab, name: str) -> None:
    lesson = run_lesson(jupyterlab, name)
    lesson.page.close()
    lesson.check()
    if name == "04_conversation":
        (box,) = [cell for cell in lesson.cells if cell["source"].endswith("\nbox")]
        assert "The capital of France" in box["text"] and "Regenerate" in box["text"]


def test_a_progress_bar_moves_and_leaves_its_title(jupyterlab: JupyterLab) -> None:
    notebook = jupyterlab.new_notebook("progress.ipynb")
    output = notebook.page.locator(".jp-OutputArea")
    notebook.start(MEASURE)
    output.locator(".progress-bar").wait_for()
    output.get_by_text("Measuring: with a cache").wait_for()
    output.get_by_text(re.compile(r"\((?!00:00)\d\d:\d\d\)")).wait_for()
    (jupyterlab.folder / "seen").touch()
    wait_until_finished(notebook)
    output.locator(".progress-bar").wait_for(state="detached")
    assert output.inner_text().strip() == "Measuring"
    notebook.close()
