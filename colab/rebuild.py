"""Run `make colab` (needs uv, PyPI and 20 GB) after a change of constraints.txt, and when Colab is updated.

It rebuilds Colab's environment from freeze-py313.txt and runs the notebooks in it. After an update of Colab, first
replace that file's lines by the NAME==VERSION lines of the pip freeze in github.com/googlecolab/backend-info.

The notebooks run as on Colab: in an empty working directory, without an installed tutorial. Their first cell clones
the repository's address; git's configuration maps it to a copy of this folder with all uncommitted changes.
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

BUILD_SECONDS = 60  # a longer build is a large C++ program, and the notebooks need none
FREEZE = ROOT / "colab" / "freeze-py313.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
ENVIRONMENT = CACHE / "streaming-llama2" / "colab"


def main() -> None:
    """Rebuild, run, compare; exit with 1 if a package was changed or a notebook failed."""
    if sys.version_info[:2] != (3, 13):
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"This is Python {version}, and Colab has 3.13. Name one: make colab PYTHON=/path/to/python3.13")
    pins = re.findall(r"^[^#\s]\S*", FREEZE.read_text(), re.MULTILINE)
    print(f"[1/3] rebuilding Colab's {len(pins)} packages in {ENVIRONMENT}, some 20 GB", flush=True)
    substituted = rebuild(pins)
    print(f"      {len(pins) - len(substituted)} are as on Colab. These {len(substituted)} differ:")
    for pin, why in sorted(substituted.items(), key=lambda item: item[0].lower()):
        print(f"      {pin}: {why}")

    print("[2/3] running the notebooks; their first cell installs what Colab lacks", flush=True)
    before = freeze()
    with tempfile.TemporaryDirectory() as folder:
        failures = run_notebooks(Path(folder))
    after = freeze()

    print("[3/3] comparing the installed packages before and after")
    changed = sorted(before - after)
    added = sorted(after - before)
    print(f"      {len(before) - len(changed)} of {len(before)} are unchanged; {len(added)} were added:")
    print("      " + " ".join(line for line in added if "==" in line))
    if changed:
        failures.append(f"These were changed or removed: {', '.join(changed)}.")
    print(f"Look at {ENVIRONMENT}, or delete it.")
    if failures:
        sys.exit("\n".join(failures))


def rebuild(pins: Sequence[str]) -> dict[str, str]:
    """Install the pins, each without its dependencies. Return those that could not be installed, and why."""
    subprocess.run(["uv", "venv", "--quiet", "--clear", f"--python={sys.executable}", ENVIRONMENT], check=True)
    cuda = [pin for pin in pins if "+" in pin]
    why: dict[str, str] = {}
    for pin in without_wheel([pin for pin in pins if pin not in cuda]):
        if refusal := build(pin):
            why[pin] = refusal
    backend = cuda[0].partition("+")[2]
    if uv_pip("install", "--no-deps", f"--torch-backend={backend}", *cuda).returncode:
        why |= dict.fromkeys(cuda, "PyPI's CUDA build: torch's own index is not reachable")
        overrides = ENVIRONMENT / "overrides.txt"
        overrides.write_text("\n".join(line for line in freeze() if not line.startswith("cuda-")))
        done = uv_pip("install", f"--override={overrides}", *(pin.partition("+")[0] for pin in cuda))
        if done.returncode:
            sys.exit(f"torch could not be installed. uv says:\n{done.stderr}")
    has = {project_name(line): line.partition("==")[2] for line in freeze()}
    for name, version in (pin.split("==") for pin in set(pins) - why.keys()):
        if (instead := has[project_name(name)]) != version:
            why[f"{name}=={version}"] = f"{instead} instead, which PyPI's torch needs"
    return why


def without_wheel(pins: Sequence[str]) -> list[str]:
    """Install the pins that have a wheel: all at once if possible, else by halves. Return the others."""
    if not uv_pip("install", "--no-deps", "--no-build", *pins).returncode:
        if len(pins) > 20:  # progress
            print(f"      installed {pins[0]} and {len(pins) - 1} more", flush=True)
        return []
    half = len(pins) // 2
    return without_wheel(pins[:half]) + without_wheel(pins[half:]) if half else list(pins)


def build(pin: str) -> str:
    """Install a package that has no wheel. Return why that failed, or ""."""
    line = pip_line("install", "--no-deps", pin)
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True) as uv:
        try:
            _, said = uv.communicate(timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(uv.pid, signal.SIGKILL)  # the compilers too
            return f"it has no wheel, and its build takes longer than {BUILD_SECONDS} s"
    if uv.returncode == 0:
        return ""
    if "Failed to build" in said:
        return "it has no wheel, and its build fails here"
    return "PyPI has no version that can be installed"


def run_notebooks(folder: Path) -> list[str]:
    """Run every notebook in a kernel of the environment, as Colab does. Return one sentence per failure."""
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
    """Return the first error in the outputs that its cell does not expect, with the cell's source, or "".

    Print the output of the first cell, which installs.
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
    """Copy all files that git does not ignore into a new repository of one commit."""
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
    """Return the lines of ``uv pip freeze``."""
    return set(uv_pip("freeze").stdout.splitlines())


def uv_pip(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(pip_line(command, *words), capture_output=True, text=True)


def pip_line(command: str, *words: str) -> list[str]:
    return ["uv", "pip", command, f"--python={python()}", *words]


if __name__ == "__main__":
    main()
