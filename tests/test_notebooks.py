"""What the notebooks promise, and what a kernel, whose event loop already runs, must not spoil."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_one_clean_run(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source
            assert output.get("name") != "stderr", source
            assert not re.search(r"/(root|home|Users|tmp|work)/|hf_\w{20,}", json.dumps(output)), source


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exemption_is_justified_in_its_cell(notebook: Path) -> None:
    for cell in code_cells(notebook):
        lines = "".join(cell["source"]).splitlines()
        for line, following in zip(lines, [*lines[1:], ""]):
            if "NBVAL_" in line:
                assert following.startswith("# ") and len(following) > 20, line


def test_sync_async_and_the_articles_client_share_a_kernel_quietly(tiny_service: Any) -> None:
    """In a kernel's running loop, mixed: no exception, and not a word on stderr."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbformat nbclient ipykernel")
    cells = [
        f"import helpers; port = {tiny_service.port}",
        "print(helpers.ask('Hello', max_tokens=20, port=port))",
        "async for piece in helpers.stream('Hello', max_tokens=20, port=port):\n    print(piece, end='')",
        "print(await helpers.aask('Hello', max_tokens=20, port=port))",
        "from jina import Client\n"
        "from helpers.schemas import ModelOutputDocument, PromptDocument\n"
        "client = Client(port=port, protocol='grpc', asyncio=True)\n"
        "prompt = PromptDocument(prompt='Hello', max_tokens=20)\n"
        "async for doc in client.stream_doc(on='/stream', inputs=prompt, return_type=ModelOutputDocument):\n"
        "    print(doc.generated_text, end='')",
        "for piece in helpers.stream('Hello', max_tokens=20, port=port):\n    print(piece, end='')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert {output.name for output in outputs} == {"stdout"}
    expected = tiny_service.ask("Hello", max_tokens=20).text
    by_chat = ["".join(o.text for o in notebook.cells[n].outputs).rstrip("\n") for n in (1, 2, 3, 5)]
    assert by_chat == [expected.rstrip("\n")] * 4
    raw = tiny_service.ask(prompt="Hello", max_tokens=20).text
    assert "".join(output.text for output in notebook.cells[4].outputs) == raw
