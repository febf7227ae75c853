"""README, CONTRIBUTING and docs/ name only tasks, options, commands, functions and files that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import helpers
from helpers import errors
from helpers.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "notebooks/README.md",
]
COMMANDS = ("check", "ask", "chat", "serve", "gateway")
# of benchmarks/bench.py, transformers serve and vLLM
OF_OTHER_PROGRAMS = {"--quick", "--continuous-batching", "--enable-prompt-tokens-details"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def code_of(page: Path) -> list[str]:
    """The page's code: its blocks, fenced or indented, line by line, and its `spans`."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (\S.*)", text, re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", text)
    return ["\n".join(fenced), *indented, *spans]


def python_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the options that a command's help lists."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out)) - {"--help"}


def names_in(module: Path) -> set[str]:
    """Return the functions, classes, constants and methods of a file, as ``name`` and ``Class.name``."""
    names: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]
            names.update(f"{node.name}.{method.name}" for method in methods)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


@each_page
def test_every_task_of_make_that_a_page_names_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tasks = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for code in code_of(page):
        for task, variable in re.findall(r"(?<![\w/-])make ([a-z-]+)(?: ([A-Z_]+)=)?", code):
            assert task in tasks, f"{page.name}: make {task}"
            assert variable in makefile, f"{page.name}: make {task} {variable}="


@each_page
def test_every_command_and_option_that_a_page_names_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = set().union(*(options_of(command, capsys) for command in COMMANDS)) | OF_OTHER_PROGRAMS
    for code in code_of(page):
        for command in re.findall(r"python -m helpers (\w+)", code):
            assert command in COMMANDS, f"{page.name}: {code}"
        if "python -m helpers" in code or code.startswith("--"):
            unknown = set(re.findall(r"--[a-z][\w-]+", code)) - known - {"--help"}
            assert not unknown, f"{page.name}: {code}"


def test_the_command_line_page_has_every_option_and_every_command_of_the_chat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")
    options = set().union(*(options_of(command, capsys) for command in COMMANDS))
    commands = re.findall(r'^    "(/\w+)"', (ROOT / "helpers/chat.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    assert not [name for name in [*options, *commands] if f"`{name}" not in page]


def test_the_map_of_the_code_names_only_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Map of the code") : text.index("## Write")]
    rows = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    places = re.findall(r"`([a-z_/]+)\.([A-Za-z_]+(?:\.\w+)?)`", rows)
    assert len(places) > 30
    for module, name in places:
        assert name in names_in(ROOT / "helpers" / f"{module}.py"), f"{module}.{name}"


@each_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for code in code_of(page):
        for name in re.findall(r"(?:helpers|benchmarks|scripts|tests|docs|notebooks)/[\w./-]+", code):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


@each_page
def test_every_name_of_the_package_that_a_page_uses_exists(page: Path) -> None:
    for code in code_of(page):
        for name in re.findall(r"(?<![\w./-])helpers\.([A-Za-z]\w*)", code):
            is_module = any((ROOT / "helpers" / f"{name}{end}").exists() for end in (".py", "/__init__.py"))
            assert is_module or name in helpers.__all__, f"{page.name}: helpers.{name}"


def test_the_python_pages_programs_compile_and_import_what_exists() -> None:
    programs = python_of(ROOT / "docs/python.md")
    assert programs
    for program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers."):
                defined = names_in(ROOT / f"{(node.module or '').replace('.', '/')}.py")
                assert {alias.name for alias in node.names} <= defined


def test_the_python_page_has_every_kind_of_error() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HelpersError)]
    assert len(kinds) > 3
    assert not [kind.__name__ for kind in kinds if kind is not errors.HelpersError and f"`{kind.__name__}`" not in page]


@each_page
def test_no_page_names_a_folder_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.~])/(?:root|home|Users|work)/", page.read_text(encoding="utf-8"))
