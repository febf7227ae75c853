"""What `make colab` does: rebuilds Colab's environment on this machine, and runs the notebooks in it.

The notebooks run as on Colab: from an empty working directory, with no tutorial installed. Their first cell
clones the repository's address, which git is told to find in a copy of this folder, committed or not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from install import ROOT, project_name

BUILD_SECONDS = 60  # what takes longer is a large C++ program; none is needed here
FREEZE = ROOT / "colab" / "freeze-py313.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
ENVIRONMENT = CACHE / "streaming-llama2" / "colab"


def main() -> None:
    """Rebuild, run, compare; exit with 1 where a package was changed or a notebook failed."""
    if sys.version_info[:2] != (3, 13):
        sys.exit("Colab's Python is 3.13, this one is not. Name one: make colab PYTHON=/path/to/python3.13")
    pins = re.findall(r"^[^#\s]\S*", FREEZE.read_text(), re.MULTILINE)
    print(f"[1/3] rebuilding Colab's {len(pins)} packages in {ENVIRONMENT}, some 20 GB", flush=True)
    substituted = rebuild(pins)
    print(f"      {len(pins) - len(substituted)} are as on Colab. These {len(substituted)} are not:")
    for pin, why in sorted(substituted.items(), key=lambda item: item[0].lower()):
        print(f"      {pin}: {why}")

    print("[2/3] running the notebooks, whose first cell installs what is lacking", flush=True)
    before = freeze()
    with tempfile.TemporaryDirectory() as folder:
        failures = run_notebooks(Path(folder))
    after = freeze()

    print("[3/3] comparing the packages with those that were there before")
    changed = sorted(before - after)
    added = sorted(after - before)
    print(f"      {len(before) - len(changed)} of {len(before)} are unchanged; {len(added)} were added:")
    print("      " + " ".join(line for line in added if "==" in line))
    if changed:
        failures.append(f"These were changed or removed: {', '.join(changed)}.")
    print(f"{ENVIRONMENT} is yours to look at, and to delete.")
    if failures:
        sys.exit("\n".join(failures))


def rebuild(pins: Sequence[str]) -> dict[str, str]:
    """Install the pins, each by itself. Returns those that could not be had, and why."""
    subprocess.run(["uv", "venv", "--quiet", "--clear", f"--python={sys.executable}", ENVIRONMENT], check=True)
    cuda = [pin for pin in pins if "+" in pin]
    why: dict[str, str] = {}
    for pin in without_wheel([pin for pin in pins if pin not in cuda]):
        if refusal := build(pin):
            why[pin] = refusal
    backend = cuda[0].partition("+")[2]
    if uv_pip("install", "--no-deps", f"--torch-backend={backend}", *cuda).returncode:
        why |= {pin: "from PyPI, with its CUDA: torch's own index was not reached" for pin in cuda}
        overrides = ENVIRONMENT / "overrides.txt"
        overrides.write_text("\n".join(line for line in freeze() if not line.startswith("cuda-")))
        done = uv_pip("install", f"--override={overrides}", *(pin.partition("+")[0] for pin in cuda))
        if done.returncode:
            sys.exit(f"torch could not be installed. uv says:\n{done.stderr}")
    has = {project_name(line): line.partition("==")[2] for line in freeze()}
    for name, version in (pin.split("==") for pin in set(pins) - why.keys()):
        if (instead := has[project_name(name)]) != version:
            why[f"{name}=={version}"] = f"{instead} in its place, for PyPI's torch"
    return why


def without_wheel(pins: Sequence[str]) -> list[str]:
    """Install those that have a wheel, all at once if that goes, else by halves. Returns the others."""
    if not uv_pip("install", "--no-deps", "--no-build", *pins).returncode:
        if len(pins) > 20:  # a sign of life
            print(f"      installed {pins[0]} and {len(pins) - 1} more", flush=True)
        return []
    half = len(pins) // 2
    return without_wheel(pins[:half]) + without_wheel(pins[half:]) if half else list(pins)


def build(pin: str) -> str:
    """Install a package that has no wheel. Returns "", or why that did not go."""
    line = pip_line("install", "--no-deps", pin)
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True) as uv:
        try:
            _, said = uv.communicate(timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(uv.pid, signal.SIGKILL)  # the compilers too
            return f"no wheel is there, and building one takes longer than {BUILD_SECONDS} s"
    if uv.returncode == 0:
        return ""
    if "Failed to build" in said:
        return "no wheel is there, and building one fails here"
    return "PyPI has nothing of it that can be installed"


def run_notebooks(folder: Path) -> list[str]:
    """Run every notebook in a kernel of the environment, as Colab does. Returns which failed."""
    (address,) = re.findall('^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    repository, content, done = folder / "repository", folder / "content", folder / "done"
    commit_copy(repository)
    content.mkdir()
    kept = {k: v for k, v in os.environ.items() if not re.match("PYTHON|VIRTUAL_ENV|UV", k)}
    environment = {
        **kept,
        "PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "COLAB_RELEASE_TAG": "rebuilt",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }
    failures = []
    for notebook in sorted((repository / "notebooks").rglob("*.ipynb")):
        name = str(notebook.relative_to(repository))
        shutil.copy(notebook, content / "opened.ipynb")
        started = time.monotonic()
        command = [python(), "-m", "nbconvert", "--to=notebook", "--execute", "--allow-errors"]
        command += [f"--output-dir={done}", "opened.ipynb"]
        run = subprocess.run(command, cwd=content, env=environment, capture_output=True, text=True)
        failure = run.stderr.strip().splitlines()[-1] if run.returncode else first_error(done / "opened.ipynb")
        print(f"      {name} {'failed' if failure else 'ran'}, {time.monotonic() - started:.0f} s", flush=True)
        if failure:
            print(failure, flush=True)
            failures.append(f"{name} failed.")
    return failures


def first_error(notebook: Path) -> str:
    """The first error in the outputs that its cell does not announce, as text; "" where there is none.

    Prints what the first cell, which installs, has printed.
    """
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    for output in cells[0]["outputs"]:
        for line in "".join(output.get("text", "")).splitlines():
            print(f"        {line}")
    for cell in cells:
        source = "".join(cell["source"])
        for output in cell["outputs"]:
            if output["output_type"] == "error" and "NBVAL_RAISES_EXCEPTION" not in source:
                return f"{source}\n{output['ename']}: {output['evalue']}"
    return ""


def commit_copy(repository: Path) -> None:
    """Copy what git tracks here, and what it would, into a new repository of one commit."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, repository / name)
    author = ["-c", "user.name=make colab", "-c", "user.email=nobody@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "A copy"]):
        subprocess.run(["git", *words], cwd=repository, check=True)


def python() -> str:
    return str(ENVIRONMENT / "bin" / "python")


def freeze() -> set[str]:
    """The lines of ``uv pip freeze``."""
    return set(uv_pip("freeze").stdout.splitlines())


def uv_pip(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(pip_line(command, *words), capture_output=True, text=True)


def pip_line(command: str, *words: str) -> list[str]:
    return ["uv", "pip", command, f"--python={python()}", *words]


if __name__ == "__main__":
    main()
