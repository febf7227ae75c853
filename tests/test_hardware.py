"""`helpers.hardware`: RAM within a container's limit, and the GPU that torch can use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_machine import GB, fake_nvidia_smi, fake_torch, install
from helpers import hardware
from helpers.hardware import Gpu, installed_version, ram, this_machine

ROOT = Path(__file__).parent.parent
A100_ROW = "NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0"
A100 = Gpu("NVIDIA A100-SXM4-40GB", 40960 * 2**20, 40000 * 2**20, True)
T4 = Gpu("Tesla T4", 16 * GB, 15 * GB, False)


# --- RAM ------------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path) -> Callable[..., Path]:
    """Write what the kernel shows of cgroups: ``system(process's groups, mounts, folder={file: text})``."""

    def write(groups: str, mounts: list[str], **folders: dict[str, str]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        lines = [f"3{n} 2{n} 0:2{n} {mount}" for n, mount in enumerate(mounts)]
        (tmp_path / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")
        for folder, files in folders.items():
            (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "sys/fs/cgroup" / folder / name).write_text(f"{text}\n")
        return tmp_path

    return write


V2 = "/ /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "/ /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER = "/ /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"
TMPFS = "/ /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755"


def v2(limit: object, used: int = 0, page_cache: int = 0, high: object = "max") -> dict[str, str]:
    stat = f"anon 1\ninactive_file {page_cache}\nactive_file 7"
    return {"memory.max": f"{limit}", "memory.high": f"{high}", "memory.current": f"{used}", "memory.stat": stat}


def v1(limit: int, used: int = 0, page_cache: int = 0) -> dict[str, str]:
    stat = f"inactive_file 1\ntotal_inactive_file {page_cache}"
    return {"memory.limit_in_bytes": f"{limit}", "memory.usage_in_bytes": f"{used}", "memory.stat": stat}


def test_without_a_limit_the_whole_ram_counts(system: Any, tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert ram(tmp_path)[0] == total
    unlimited = {".": v2("max"), "a": v2(total * 2), "memory": v1(9223372036854771712)}
    assert ram(system("4:memory:/\n0::/a\n", [V2, V1], **unlimited))[0] == total


@pytest.mark.parametrize(
    ("groups", "mounts", "folders"),
    [
        pytest.param("0::/\n", [V2], {".": v2(300000, 250000, 150000)}, id="a container, version 2"),
        pytest.param(
            "0::/system.slice/run-1.scope\n",
            [V2],
            {"system.slice": v2("max"), "system.slice/run-1.scope": v2(300000, 250000, 150000)},
            id="systemd-run",
        ),
        pytest.param(
            "0::/user.slice/jupyter-anna.service\n",
            [V2],
            {"user.slice": v2("max"), "user.slice/jupyter-anna.service": v2("max", 250000, 150000, high=300000)},
            id="systemd, MemoryHigh",
        ),
        pytest.param(
            "0::/slurm/job_1/step_0/task_0\n",
            [V2],
            {"slurm/job_1": v2(300000, 250000, 150000), "slurm/job_1/step_0/task_0": v2("max", 9)},
            id="a job of Slurm: the limit is of a group above",
        ),
        pytest.param(
            "9:cpu,cpuacct:/other\n4:memory:/slurm/uid_0/job_1\n",
            [TMPFS, OTHER, V1],
            {"memory": v1(2**63 - 4096), "memory/slurm/uid_0/job_1": v1(300000, 250000, 150000), "cpu": v1(5)},
            id="version 1",
        ),
        pytest.param(
            "4:memory:/docker/0a1b\n0::/docker/0a1b\n",
            [TMPFS, V1.replace("/ ", "/docker/0a1b ", 1)],
            {"memory": v1(300000, 250000, 150000)},
            id="a container of version 1, mounted from its group",
        ),
        pytest.param(
            "4:memory:/a\n0::/b\n",
            [TMPFS, V1, "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
            {"memory/a": v1(300000, 250000, 150000), "unified/b": {}},
            id="both versions",
        ),
        pytest.param("0::/../elsewhere\n", [V2], {".": v2(300000, 250000, 150000)}, id="a group outside the container"),
        pytest.param(
            "0::/a/b\n", [V2], {"a": v2(900000, 700000), "a/b": v2(300000, 100000)}, id="the one above is fuller"
        ),
    ],
)
def test_the_lowest_limit_of_the_process_and_the_groups_above_counts(
    system: Any, groups: str, mounts: list[str], folders: dict[str, dict[str, str]]
) -> None:
    assert ram(system(groups, mounts, **folders)) == (300000, 200000)


@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux enforces these limits.")
@pytest.mark.parametrize("option", ["-v", "-d"])
def test_a_limit_of_the_shell_counts(option: str) -> None:
    code = "from helpers.hardware import ram; print(*ram())"
    shell = f"ulimit {option} 4000000 && exec '{sys.executable}' -c '{code}'"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    total, available = map(int, done.stdout.split())
    assert total == 4000000 * 1024 and available < total


# --- The GPU --------------------------------------------------------------------------------------


@pytest.fixture
def use_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a `fake_torch` the only one that this process and its children find, beside an A100."""
    smi = fake_nvidia_smi(tmp_path / "smi", A100_ROW)
    monkeypatch.setenv("PATH", str(smi), prepend=os.pathsep)
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    def use(**torch: Any) -> None:
        folder = fake_torch(tmp_path / "torch", **torch)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return use


def test_the_gpu_is_what_torch_reports(use_torch: Any) -> None:
    use_torch(cuda="12.8")
    assert (this_machine().gpu, this_machine().gpu_note) == (T4, "")


@pytest.mark.parametrize("torch", [{"cuda": None}, {"cuda": "12.8", "available": False}])
def test_a_gpu_that_torch_cannot_use_does_not_count(use_torch: Any, torch: dict[str, Any]) -> None:
    use_torch(**torch)
    here = this_machine()
    assert here.gpu is None
    assert "cannot use the NVIDIA A100" in here.gpu_note


def test_torch_is_not_imported_to_ask_about_the_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; from helpers.hardware import this_machine\n"
        "assert this_machine().gpu.name == 'Tesla T4' and 'torch' not in sys.modules"
    )
    paths = os.pathsep.join([str(fake_torch(tmp_path, cuda="12.8")), str(ROOT)])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True)


def test_without_torch_nvidia_smi_names_the_gpu(use_torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert this_machine().gpu == A100


def test_without_torch_and_nvidia_smi_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (this_machine().gpu, this_machine().gpu_note) == (None, "no GPU was found")


@pytest.mark.parametrize(
    "row",
    [
        "NVIDIA GB10, [N/A], [N/A], 12.1",
        "NVIDIA A100-SXM4-40GB, [Insufficient Permissions], [Insufficient Permissions], 8.0",
        "NVIDIA A100, MIG 1g.5gb, [Insufficient Permissions], [Insufficient Permissions], 8.0",
        "NVIDIA A100, MIG 1g.5gb, 4864, 4861, 8.0",
        "NVIDIA A100-SXM4-40GB, 40960, 40000, [N/A]",
        "NVIDIA A100-SXM4-40GB",
        "No devices were found",
        "",
    ],
)
def test_a_row_of_nvidia_smi_without_its_numbers_is_not_a_gpu(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(fake_nvidia_smi(tmp_path / "smi", row)))
    assert this_machine().gpu is None


# --- Packages -------------------------------------------------------------------------------------


def test_a_distribution_has_a_version_or_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, ["bitsandbytes"]))
    assert installed_version("bitsandbytes") == "9.9" and this_machine().quantises
    assert installed_version("no-such-package") is None


# --- Cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chosen", "expected"), [("3", 3), ("5,2", 5), ("", 4), ("0", 4), ("many", 4), (None, 4)])
def test_the_environment_chooses_the_threads_or_the_physical_cores_do(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8 if logical else 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert hardware.cores() == expected


def test_a_process_that_may_use_fewer_cores_uses_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5}, raising=False)
    assert hardware.cores() == 2
