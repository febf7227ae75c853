"""`helpers.hardware`: RAM within a container's limit, and the GPU that torch can use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_machine import GB, fake_nvidia_smi, fake_torch, install
from helpers import hardware
from helpers.hardware import Gpu, installed_version, ram, this_machine

ROOT = Path(__file__).parent.parent
A100_ROW = "NVIDIA A100-SXM4-40GB, 40960, 40000, 8.0"
A100 = Gpu("NVIDIA A100-SXM4-40GB", 40960 * 2**20, 40000 * 2**20, True)
T4 = Gpu("Tesla T4", 16 * GB, 15 * GB, False)


# --- RAM ------------------------------------------------------------------------------------------


def test_without_a_limit_the_whole_ram_counts(tmp_path: Path) -> None:
    total = ram(tmp_path)[0]
    for limit in ("max", str(total * 2)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert ram(tmp_path)[0] == total


def test_a_containers_limit_counts_if_it_is_lower(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("250000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\ninactive_file 150000\n")
    assert ram(tmp_path) == (300000, 200000)


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
