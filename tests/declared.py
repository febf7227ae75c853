"""The declarations of pyproject.toml and the pins of constraints.txt, for the tests of packaging and of Colab."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT: dict[str, Any] = SETTINGS["project"]
PACKAGES: dict[str, Any] = SETTINGS["tool"]["setuptools"]
GROUPS: dict[str, list[str]] = SETTINGS["dependency-groups"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DECLARED = {"": PROJECT["dependencies"], **EXTRAS}
REPOSITORY: str = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")


def pins(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return name → version for the lines of constraints.txt that apply in a marker environment (default: here)."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                name = canonicalize_name(pin.name)
                assert name not in found, f"{name} is pinned twice"
                (exact,) = pin.specifier
                assert exact.operator == "==", f"{line} is not exact"
                found[name] = exact.version
    return found


def imports(folder: str) -> dict[str, str]:
    """Return the top-level names of other projects that a folder's code imports → a file that does."""
    files = sorted((ROOT / folder).rglob("*.py"))
    scripts = (path.stem for folder in ("scripts", "tests") for path in (ROOT / folder).glob("*.py"))
    # tomllib: in the standard library since Python 3.11; older ones use tomli
    ours = {"helpers", "tests", "install", "rebuild", "tomllib", *scripts, *(path.stem for path in files)}
    found: dict[str, str] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
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
