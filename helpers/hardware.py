"""Find out what this machine offers a model: Python, RAM, a GPU, and bitsandbytes.

This module does not import torch. A child process asks torch about the GPU, so the caller does not wait for the import
and holds no CUDA context, which would not survive a fork.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
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
    - ``quantises``: bitsandbytes is installed. nf4 needs it, and so does int8, except for the Llama family on a CPU.
    - ``fast_int8``: the CPU is an x86, on which int8 was measured: it is faster there than fp32.
    """

    python: str
    ram_total: int
    ram_available: int
    gpu: Gpu | None
    gpu_note: str = "no GPU was found"
    quantises: bool = True
    fast_int8: bool = True


def this_machine() -> Machine:
    """Return the facts about this machine. This takes some seconds if torch must be asked about a GPU.

    The RAM is at most the lowest of the `memory_limits`. If torch sees several GPUs, the first one counts. An Apple GPU
    does not count: the model runs on the CPU.
    """
    quantises = installed_version("bitsandbytes") is not None
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return Machine(platform.python_version(), *ram(), *_gpu(), quantises, is_x86)


def ram(root: Path = Path("/")) -> tuple[int, int]:
    """Return the total and the available RAM for this process, in bytes, within its `memory_limits`."""
    memory = psutil.virtual_memory()
    limits = [(limit, free) for limit, free in memory_limits(root) if limit < memory.total]
    total = min([memory.total, *(limit for limit, _ in limits)])
    return total, min([memory.available, *(max(0, free) for _, free in limits)])


def cores() -> int:
    """Return how many threads should compute: OMP_NUM_THREADS, or the physical cores that this process may use.

    Of an Apple chip only the fast cores count, as torch counts them: the slow ones would hold up the others.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if chosen.isdecimal() and int(chosen):
        return int(chosen)
    if (
        sys.platform == "darwin"
        and (fast := _output(["sysctl", "-n", "hw.perflevel0.physicalcpu"], seconds=5)).isdecimal()
    ):
        return int(fast)
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def memory_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield each limit on this process's memory, and how much of it is free, in bytes.

    The limits are those of its cgroups (a container, Slurm, systemd; versions 1 and 2) and of all groups above them,
    and those of ``ulimit -v`` and ``ulimit -d``. `root` is the folder that contains ``proc`` and ``sys``.
    """
    for folder in _memory_cgroups(root):
        for limit_file, usage_file, page_cache in _CGROUP_FILES:
            limit, used = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and used is not None:
                rows = dict(row for line in _lines(folder / "memory.stat") if len(row := line.split()) == 2)
                yield limit, limit - used + int(rows.get(page_cache, 0))
    if sys.platform == "linux":
        this = psutil.Process()
        memory = this.memory_info()
        for resource, size in ((psutil.RLIMIT_AS, memory.vms), (psutil.RLIMIT_DATA, memory.data)):
            limit = this.rlimit(resource)[0]
            if limit != psutil.RLIM_INFINITY:
                yield limit, limit - size


_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""A limit, what is used of it, and the row of ``memory.stat`` with the page cache that the kernel frees under pressure.

The kernel's documentation: https://docs.kernel.org/admin-guide/cgroup-v2.html and
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""


def _memory_cgroups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory cgroups and of all groups above them.

    A mount may show only a part of the tree, as in a container. The paths of the groups begin at the tree's root:
    https://man7.org/linux/man-pages/man7/cgroups.7.html and proc_pid_mountinfo.5.html
    """
    groups = [parts for line in _lines(root / "proc/self/cgroup") if len(parts := line.split(":", 2)) == 3]
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, device = line.partition(" - ")
        if len(device.split()) < 2 or len(mount.split()) < 5:
            continue  # of another form, in a sandbox
        kind, options = device.split()[0], device.split()[-1].split(",")
        if kind == "cgroup2":
            paths = [path for number, _, path in groups if number == "0"]
        elif kind == "cgroup" and "memory" in options:
            paths = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
        else:
            continue
        mount_root, folder = mount.split()[3:5]
        top = root / folder.lstrip("/")
        for path in paths:
            inside = path.startswith(mount_root)  # False if the process is in a group that the mount does not show
            group = top / path.removeprefix(mount_root).lstrip("/") if inside else top
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _lines(file: Path) -> list[str]:
    """Return the lines of a kernel file, or [] if it cannot be read."""
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _number(file: Path) -> int | None:
    """Return the number in a kernel file, or None if there is no file or no number ("max" means no limit)."""
    return next((int(line) for line in _lines(file) if line.strip().isdecimal()), None)


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


def gpu_indices() -> list[str]:
    """Return the entry of CUDA_VISIBLE_DEVICES for each GPU, or [] if torch can use none."""
    if _gpu()[0] is None:
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    found = chosen or _output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], seconds=20) or "0"
    return re.findall(r"[^,\s]+", found)


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
