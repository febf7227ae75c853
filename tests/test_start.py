"""How the process of a service is started: which modules it finds, and what it needs of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import helpers
from helpers.errors import InvalidRequest, ModelUnavailable, ServiceUnavailable
from helpers.loading import start_loading
from helpers.options import EngineArgs
from helpers.service import _PROGRAM, Service, _environment, serve_script


@pytest.mark.parametrize("variables", [{}, {"PYTHONSAFEPATH": "1"}, {"PYTHONPATH": "other"}], ids=str)
def test_nothing_in_the_working_directory_shadows_this_package(variables: dict[str, str], tmp_path: Path) -> None:
    """This includes Python 3.10, which has no PYTHONSAFEPATH."""
    project, folder = tmp_path / "a 'project'", tmp_path / "working directory"
    package = project / "helpers"
    for path in (package, folder / "other"):
        path.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "entry.py").write_text("import sys, random\ndef main(): print(__file__, sys.argv[1:], sys.path[-1])\n")
    for name in ("helpers", "random", "other/helpers"):
        (folder / f"{name}.py").write_text("raise SystemExit('shadowed')")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(project=str(project), module="entry"), "serve", "--port"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**environment, **variables},
    )
    assert (done.stdout, done.stderr) == (f"{package / 'entry.py'} ['serve', '--port'] {project}\n", "")


def test_a_service_without_a_folder_for_its_log_says_which_variable_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/no-such-folder"])
    with pytest.raises(ServiceUnavailable, match=r"no folder for its log \(No usable temporary directory.*Set TMPDIR"):
        helpers.serve("smollm2", port=0)


@pytest.mark.parametrize("host", ["http://localhost", "localhost:12345", ""])
def test_a_service_with_an_invalid_host_is_refused(host: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a host"):
        helpers.serve("smollm2", host=host, port=0)


@pytest.mark.parametrize(("given", "used"), [("2", "1"), ("1", "1"), ("0", "0"), ("", "")])
def test_a_service_keeps_its_docstrings(given: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers reads them."""
    monkeypatch.setenv("PYTHONOPTIMIZE", given)
    assert _environment()["PYTHONOPTIMIZE"] == used


@pytest.mark.main
def test_python_without_docstrings_runs_no_service_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "helpers", "serve", "--port", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    assert "removes the docstrings that transformers needs. Start the service without it" in done.stderr


STOPPING = """
import sys, time
from pathlib import Path
from helpers import server
server.SECONDS_TO_STOP = 0.5
lifetime = server.Lifetime(None, Path(sys.argv[1]))
lifetime.ready.set()
print("tokenizing", flush=True)
while True:
    time.sleep(3600)
"""


@pytest.mark.main
def test_a_service_that_still_tokenizes_stops_in_time(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    log.touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STOPPING, str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as one:
        assert one.stdout.readline() == "tokenizing\n"
        one.terminate()
        assert one.communicate(timeout=300) == ("", "")
        assert one.returncode == 0
    assert not log.exists()


def test_a_model_that_does_not_load_in_its_thread_raises_where_it_is_awaited(torch: Any) -> None:
    loading = start_loading("/no/such/folder", "auto", EngineArgs())
    with pytest.raises(ModelUnavailable, match="/no/such/folder"):
        loading.result()


@pytest.mark.main
def test_a_model_loads_while_jina_is_imported() -> None:
    program = (
        "import sys\n"
        "from helpers import server\n"
        "def start(*arguments):\n"
        "    print({'jina', 'docarray'} & set(sys.modules))\n"
        "    sys.exit()\n"
        "server.start_loading = start\n"
        "server.run('smollm2', port=0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_script_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.py is not a file"):
        serve_script(tmp_path / "none.py", port=12345)


def test_a_fork_of_the_program_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "folder" / "service.log"
    log.parent.mkdir()
    log.touch()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    service = Service.__new__(Service)
    service.log, service.pid, service._process, service._owner = log, process.pid, process, os.getpid()
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: 1)
        service.stop()
    assert process.poll() is None
    assert log.exists()
    service.stop()
    assert process.poll() is not None
    assert not log.exists()


def run_script(folder: Path, *command: str) -> tuple[str, str, int]:
    """Return stdout, stderr and the status of a script that `helpers.script` runs, without a service."""
    program = (
        "import os, sys, threading; sys.path.insert(0, os.environ['PROJECT'])\n"
        "from helpers import script\n"
        "sys.argv = sys.argv[1:]\n"
        "script.run_as_python_does(sys.argv[0])"
    )
    environment = {**os.environ, "PROJECT": str(Path(helpers.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=folder, env=environment
    )
    return done.stdout, done.stderr, done.returncode


SCRIPT = """
import sys, os, pickle, beside, helpers
class Document:
    field: int
print(beside.NAME, helpers.NAME, __name__, __file__, sys.argv, sys.path[0], os.getcwd(), __package__, __spec__)
print(Document.__annotations__)  # Jina reads them
print(type(pickle.loads(pickle.dumps(Document()))) is Document, sys.modules["__main__"].Document is Document)
"""


@pytest.mark.main
@pytest.mark.parametrize(
    "spelling",
    [
        "link.py",
        *(
            pytest.param(path, marks=pytest.mark.long)
            for path in ("scripts/serve_it.py", "{folder}/scripts/serve_it.py")
        ),
    ],
)
def test_a_script_runs_as_python_runs_it(spelling: str, tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("beside", "helpers"):
        (folder / f"{name}.py").write_text(f"NAME = {name + ' of the script'!r}")
    (folder / "serve_it.py").write_text(SCRIPT)
    (tmp_path / "link.py").symlink_to("scripts/serve_it.py")
    command = [spelling.format(folder=tmp_path), "--port", "5"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert run_script(tmp_path, *command) == (done.stdout, done.stderr, 0)


@pytest.mark.main
def test_services_do_not_wait_for_each_other_when_they_start(tmp_path: Path) -> None:
    """Jina locks a file named after the class while an Executor's constructor runs."""
    pytest.importorskip("filelock")
    (tmp_path / "program.py").write_text(
        "import sys, filelock\n"
        "from pathlib import Path\n"
        "from helpers._jina import Executor, prepare_service\n"
        "prepare_service()\n"
        "class TokenStreamingExecutor(Executor):\n"
        "    def __init__(self, **options):\n"
        "        super().__init__(**options)\n"
        "locks = Path.home() / '.cache' / 'jina' / 'locks'\n"
        "locks.mkdir(parents=True)\n"
        "with filelock.FileLock(locks / 'TokenStreamingExecutor.lock'):\n"
        "    TokenStreamingExecutor()\n"
        "print('started')\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert (done.stdout, done.stderr) == ("started\n", "")


@pytest.mark.main
def test_a_process_of_a_service_keeps_the_proxy_exceptions_of_the_user(tmp_path: Path) -> None:
    program = (
        "import os; from helpers._jina import prepare_service, use_no_proxy_for\n"
        "prepare_service(); use_no_proxy_for('192.0.2.1')\n"
        "print(os.environ['no_grpc_proxy'], os.environ['no_proxy'], os.environ['JINA_OPTOUT_TELEMETRY'])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "no_proxy": ".example"}
    environment.pop("no_grpc_proxy", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == (".example,127.0.0.1,localhost,::1,192.0.2.1 .example 1\n", "")
