"""The notebooks' files: frame, outputs, links, pictures, glossary, the cell for Colab; and clients in one kernel."""

from __future__ import annotations

import base64
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from nbconvert.filters import markdown2html
from PIL import Image

import media
from helpers.catalog import INSTALL_LAB

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if path.parent.name != ".ipynb_checkpoints")
LESSONS = [notebook for notebook in NOTEBOOKS if notebook.parent.name == "notebooks"]
PROJECT = (ROOT / "pyproject.toml").read_text()
REPOSITORY = re.findall('^Repository = "(https://github.com/.+)"', PROJECT, re.MULTILINE)[0]
IN_COLAB = REPOSITORY.replace("github.com", "colab.research.google.com/github")

# A line that exempts a cell from the comparison of outputs, and the comment below it that says why.
EXEMPTION = re.compile(r"^# (NBVAL_\w+)\n# .{20,}", re.MULTILINE)
EXEMPTIONS = {"NBVAL_IGNORE_OUTPUT", "NBVAL_RAISES_EXCEPTION"}

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)

# A line that says only whether something is true. A lesson shows the thing itself.
BARE_BOOLEAN = re.compile(r"^(?:.*: ?)?[(\[]*(?:(?:True|False)(?:, )?)+[)\]]*$", re.MULTILINE)

# The last part of each lesson.
ENDING = (
    r"^(?:## |> \*\*)In short\b",
    r"^## Questions$",
    r"^## Exercises$",
    r"^## Further reading$",
    r"^## Where to go next$",
)


def cells_of(notebook: Path, kind: str = "") -> list[dict[str, Any]]:
    """Return the cells of a kind, by default all, each with its source as one string under "text"."""
    cells = json.loads(notebook.read_text())["cells"]
    return [{**cell, "text": "".join(cell["source"])} for cell in cells if kind in cell["cell_type"]]


def shown(output: dict[str, Any]) -> str:
    """Return all text of an output: what it prints, and every form of a result except pictures."""
    data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
    return json.dumps([output.get(key) for key in ("text", "ename", "evalue", "traceback")] + [data])


class Page(HTMLParser):
    """The `images` of an HTML text as (alternative text, source), its `links`, and the `anchors` that links name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.images.append((has.get("alt", ""), has.get("src", "")))
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        if "id" in has:
            self.anchors.add(anchor(has["id"]))


def anchor(name: str) -> str:
    """Return a heading's name in a link. JupyterLab keeps capitals and punctuation, GitHub does not."""
    return re.sub(r"[^\w-]", "", unquote(name)).lower()


@each_notebook
def test_the_stored_outputs_are_those_of_one_run_without_errors(notebook: Path) -> None:
    cells = cells_of(notebook, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        raises = "NBVAL_RAISES_EXCEPTION" in cell["text"]
        for output in cell["outputs"]:
            assert raises or output["output_type"] != "error", cell["text"]
            assert output.get("name") != "stderr", cell["text"]


@each_notebook
def test_no_local_path_and_no_token_is_stored(notebook: Path) -> None:
    for cell in cells_of(notebook):
        outputs = "".join(map(shown, cell.get("outputs", [])))
        assert not re.search(r"(?<![\w.])/(root|home|Users|tmp|var|usr|opt)/|[A-Z]:\\\\", outputs), cell["text"]
        assert str(ROOT) not in outputs and str(Path.home()) not in outputs, cell["text"]
        assert not re.search(r"\b(hf_|sk-)[A-Za-z0-9]{20,}", outputs + cell["text"]), "a token"


@each_notebook
def test_a_comment_gives_the_reason_for_each_exemption(notebook: Path) -> None:
    for cell in cells_of(notebook, "code"):
        exempted = re.findall(r"NBVAL_\w+", cell["text"])
        assert exempted == EXEMPTION.findall(cell["text"]), cell["text"]
        assert set(exempted) <= EXEMPTIONS, cell["text"]
        assert not cell["metadata"].get("tags"), "an exemption as a tag, which readers do not see"


@each_notebook
def test_outputs_show_things_and_not_whether_something_is_true(notebook: Path) -> None:
    for cell in cells_of(notebook, "code"):
        for output in cell["outputs"]:
            text = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
            assert not BARE_BOOLEAN.search(text), cell["text"]


@each_lesson
def test_a_lesson_ends_with_recap_questions_exercises_and_further_reading(lesson: Path) -> None:
    text = "\n\n".join(cell["text"] for cell in cells_of(lesson, "markdown"))
    places = [[found.start() for found in re.finditer(part, text, re.MULTILINE)] for part in ENDING]
    assert [len(found) for found in places] == [1] * len(ENDING), list(zip(ENDING, places, strict=True))
    assert places == sorted(places)
    recap, questions, exercises, reading, after = (found[0] for found in places)
    assert re.search(r"^> ", text[recap:questions], re.MULTILINE), "the recap is no blockquote"
    assert 6 <= len(re.findall(r"^\d+\. ", text[questions:exercises], re.MULTILINE)) <= 10
    assert len(re.findall(r"^\*\*\d\.\d\*\*", text[exercises:reading], re.MULTILINE)) >= 3
    assert "](https://" in text[reading:after]


@each_notebook
def test_no_text_between_dollar_signs_turns_into_a_formula(notebook: Path) -> None:
    for cell in cells_of(notebook, "markdown"):
        assert "$" not in re.sub(r"```.*?```|`[^`]*`", "", cell["text"], flags=re.DOTALL)


@each_notebook
def test_every_picture_has_an_alternative_text(notebook: Path) -> None:
    for cell in cells_of(notebook):
        html = markdown2html(cell["text"]) if cell["cell_type"] == "markdown" else ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            html += "".join(data.get("text/html", "")) + markdown2html("".join(data.get("text/markdown", "")))
            for kind in data:
                alt = output["metadata"].get(kind, {}).get("alt", "")
                assert len(alt) >= 20 or not kind.startswith("image/"), f"no alt text: {cell['text']}"
        for alt, source in Page(html).images:
            assert alt.strip(), f"no alt text: {source[:80]}"


@pytest.mark.parametrize(
    "page",
    [*NOTEBOOKS, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.md")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_within_the_repository_have_a_target(page: Path) -> None:
    notebook = page.suffix == ".ipynb"
    markdown = [cell["text"] for cell in cells_of(page, "markdown")] if notebook else [page.read_text()]
    html = Page("\n".join(map(markdown2html, markdown)))
    for target in [*html.links, *(source for _, source in html.images)]:
        path, _, heading = target.partition("#")
        if ours := re.match(rf"(?:{REPOSITORY}|{IN_COLAB})/(?:blob|tree|raw)/main/(.*)", path):
            assert (ROOT / ours[1]).exists(), f"{target} does not exist"
        elif not re.match(r"\w+:", path):
            assert (page.parent / unquote(path)).exists(), f"{target} does not exist"
        assert path or anchor(heading) in html.anchors, f"{target} names no heading"


def glossary() -> dict[str, str]:
    """Return the glossary's entries: anchor → term and text."""
    entries = re.split(r"^## ", (ROOT / "notebooks/glossary.md").read_text(), flags=re.MULTILINE)[1:]
    return {anchor(entry.partition("\n")[0].replace(" ", "-")): entry for entry in entries}


def test_every_term_has_its_glossary_entry_which_links_back_to_the_lesson() -> None:
    entries = glossary()
    assert [*entries] == sorted(entries)
    introduced = []
    for lesson in LESSONS:
        text = "\n".join(cell["text"] for cell in cells_of(lesson, "markdown"))
        assert set(re.findall(r"glossary\.md#([\w-]+)", text)) <= set(entries)
        introduced += [(term, lesson.name) for term in re.findall(r"\[\*\*[^]]+\*\*\]\(glossary\.md#([\w-]+)\)", text)]
    linked = [(term, lesson) for term, entry in entries.items() for lesson in re.findall(r"\]\(([\w.]+)\)", entry)]
    assert sorted(introduced) == sorted(linked)


def test_the_lessons_hold_the_pictures_of_the_folder_and_all_of_them() -> None:
    images = ROOT / "notebooks/images"
    shown = set()
    for notebook in NOTEBOOKS:
        for cell in cells_of(notebook, "markdown"):
            assert "](images/" not in cell["text"], f"{notebook.name}: run `make media MEDIA=embed`"
            for name, content in re.findall(r'data-file="(\w+)" [^>]*;base64,([^"]+)"', cell["text"]):
                same = base64.b64decode(content) == (images / f"{name}.png").read_bytes()
                assert same, f"{notebook.name}, {name}: run `make media MEDIA=embed`"
                shown.add(name)
    assert shown == {picture.stem for picture in images.glob("*.png")}
    assert {picture.stem for picture in images.glob("*.svg")} <= shown


def test_every_diagram_is_drawn_from_its_present_source() -> None:
    for svg in (ROOT / "notebooks/images").glob("*.svg"):
        with Image.open(svg.with_suffix(".png")) as picture:
            assert picture.text["Source"] == media.digest(svg), f"{svg.name}: run `make media MEDIA='diagrams embed'`"
        text = svg.read_text()
        assert "<title" in text and "<desc" in text and "<script" not in text and "@import" not in text


@each_notebook
def test_cells_are_short(notebook: Path) -> None:
    lines = [len(cell["text"].splitlines()) for cell in cells_of(notebook, "code")]
    assert statistics.median(lines) <= 6 and max(lines) <= 25, lines


@each_notebook
def test_a_badge_opens_the_notebook_in_colab(notebook: Path) -> None:
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    badge = f"[![Open in Colab]({image})]({IN_COLAB}/blob/main/{notebook.relative_to(ROOT).as_posix()})"
    assert badge in cells_of(notebook)[0]["text"].splitlines()
    if notebook.parent.name == "notebooks":
        assert badge in (ROOT / "README.md").read_text()


def test_the_first_cell_is_the_same_everywhere_and_prints_nothing_here() -> None:
    first = [cells_of(notebook, "code")[0] for notebook in NOTEBOOKS]
    assert len({cell["text"] for cell in first}) == 1
    assert not any(cell["outputs"] for cell in first)
    assert f" {REPOSITORY} tutorial\n" in first[0]["text"]
    (script,) = re.findall(r'run_path\("tutorial/(.*?)"', first[0]["text"])
    assert (ROOT / script).is_file()


@each_notebook
def test_no_widget_is_stored_because_only_a_kernel_could_show_it(notebook: Path) -> None:
    assert "jupyter.widget-" not in notebook.read_text()


CLIENTS = {
    "ask": "print(helpers.ask('Hello', max_tokens=20, port=port))",
    "async for": """
async for piece in helpers.stream('Hello', max_tokens=20, port=port):
    print(piece, end='')""",
    "aask": "print(await helpers.aask('Hello', max_tokens=20, port=port))",
    "the article's client": """
from jina import Client
from helpers.schemas import ModelOutputDocument, PromptDocument
client = Client(port=port, protocol='grpc', asyncio=True)
prompt = PromptDocument(prompt='Hello', max_tokens=20)
async for doc in client.stream_doc(on='/stream', inputs=prompt, return_type=ModelOutputDocument):
    print(doc.generated_text, end='')""",
    "for": """
for piece in helpers.stream('Hello', max_tokens=20, port=port):
    print(piece, end='')""",
}


def test_sync_async_and_the_articles_client_share_a_kernel_without_a_word_on_stderr(tiny_service: Any) -> None:
    nbformat = pytest.importorskip("nbformat", reason=INSTALL_LAB)
    nbclient = pytest.importorskip("nbclient", reason=INSTALL_LAB)
    cells = [f"import helpers; port = {tiny_service.port}", *CLIENTS.values()]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert {output.name for cell in notebook.cells for output in cell.outputs} == {"stdout"}
    printed = {
        client: "".join(output.text for output in cell.outputs).rstrip("\n")
        for client, cell in zip(CLIENTS, notebook.cells[1:], strict=True)
    }
    raw = tiny_service.ask(prompt="Hello", max_tokens=20).text
    answer = tiny_service.ask("Hello", max_tokens=20).text
    assert printed.pop("the article's client") == raw.rstrip("\n")
    assert set(printed.values()) == {answer.rstrip("\n")}
