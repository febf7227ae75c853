"""Find out what this machine offers a model: Python, RAM, a GPU, and bitsandbytes.

This module does not import torch. A child process asks torch about the GPU, so the caller does not wait for the import
and holds no CUDA context, which would not survive a fork.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use. Memory is in bytes.

    - ``bf16``: the GPU computes in bfloat16 natively (NVIDIA since Ampere; a T4 only emulates it).
    """

    name: str
    total: int
    free: int
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """The facts about a machine that decide which model it can run. Memory is in bytes.

    - ``gpu_note``: a clause that says why `gpu` is None.
    - ``quantises``: bitsandbytes is installed, so int8 and nf4 are possible.
    """

    python: str
    ram_total: int
    ram_available: int
    gpu: Gpu | None
    gpu_note: str = "no GPU was found"
    quantises: bool = True


def this_machine() -> Machine:
    """Return the facts about this machine. This takes some seconds if torch must be asked about a GPU.

    If a container has a memory limit (cgroup v2), the limit counts as its RAM. If torch sees several GPUs,
    the first one counts. An Apple GPU does not count: the model runs on the CPU.
    """
    quantises = installed_version("bitsandbytes") is not None
    return Machine(platform.python_version(), *ram(), *_gpu(), quantises)


def ram(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Return the total and the available RAM for this process, in bytes.

    The kernel's documentation defines the files: https://docs.kernel.org/admin-guide/cgroup-v2.html
    """
    memory = psutil.virtual_memory()
    limit_file = cgroup / "memory.max"
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    if limit == "max" or int(limit) >= memory.total:
        return memory.total, memory.available
    used = int((cgroup / "memory.current").read_text())
    rows = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    page_cache = int(rows.get("inactive_file", 0))  # the kernel frees it under pressure
    return int(limit), min(memory.available, max(0, int(limit) - used + page_cache))


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> tuple[Gpu | None, str]:
    """Return the GPU and "", or None and the reason."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return None, "Apple's GPU is not used here"
    torch = importlib.util.find_spec("torch")
    if torch and _is_built_for_gpus(torch) and (answer := _output([sys.executable, "-c", _ASK_TORCH], seconds=120)):
        return Gpu(**json.loads(answer)), ""
    seen = _gpu_from_nvidia_smi()
    if seen is None:
        return None, "no GPU was found"
    if torch is None:
        return seen, ""
    return None, f"the installed torch ({installed_version('torch')}) cannot use the {seen.name}"


def _is_built_for_gpus(torch: ModuleSpec) -> bool:
    """Return whether torch's ``version.py`` names CUDA or ROCm. This avoids the seconds that `import torch` takes."""
    folders = torch.submodule_search_locations
    built = runpy.run_path(str(Path(folders[0]) / "version.py")) if folders else {}
    return bool(built.get("cuda") or built.get("hip"))


_ASK_TORCH = """
import json, torch
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = torch.cuda.get_device_name(0)
    print(json.dumps({"name": name, "total": total, "free": free, "bf16": bf16}))
"""


def _gpu_from_nvidia_smi() -> Gpu | None:
    """Return the first GPU of ``nvidia-smi``, or None if a value is missing.

    Some boards report ``[N/A]`` as their memory, and a board that MIG divides ``[Insufficient Permissions]``.
    """
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    rows = _output(["nvidia-smi", query, "--format=csv,noheader,nounits"], seconds=20)
    row = re.match(r"([^,\n]+), *(\d+), *(\d+), *(\d+\.\d+)\s*$", rows, re.MULTILINE)
    if row is None:
        return None
    name, total_mib, free_mib, capability = row.groups()
    return Gpu(name.strip(), int(total_mib) * 2**20, int(free_mib) * 2**20, float(capability) >= 8.0)


def _output(command: list[str], *, seconds: float) -> str:
    """Return the command's stdout, or "" if it does not exist, fails, or takes longer than `seconds`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
