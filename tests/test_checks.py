"""`helpers.checks`: the table that says what decides which model runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fake_machine import fake_torch, install, uninstall_bundled, with_gpu, without_gpu
from helpers import checks
from helpers import hub as hub_module
from helpers.catalog import INSTALL, INSTALL_BUNDLED, LLAMA2
from helpers.checks import PACKAGES, CheckResult, check, format_table
from hub_stub import NO_HUB, TOKEN, HubStub, Repo, model_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A Hub on which alice has asked for Llama 2, everything installed, and a T4 (no bf16)."""
    with HubStub({TOKEN: "alice"}, {LLAMA2: Repo("granted")}) as stub:
        stub.connect(monkeypatch, home=tmp_path / "home", HF_TOKEN=TOKEN)
        monkeypatch.syspath_prepend(install(tmp_path / "installed"))
        monkeypatch.setattr(checks, "this_machine", lambda: with_gpu(15, bf16=False))
        monkeypatch.setattr(hub_module, "HUB_SECONDS", 60.0)
        yield stub


def rows(results: list[CheckResult]) -> dict[str, CheckResult]:
    """Return name → row, after checking what holds for every table."""
    assert all(result.fix for result in results if not result.ok)
    assert results[-1].name == "Model"
    assert TOKEN not in format_table(results)
    return {result.name: result for result in results}


def test_a_granted_licence_leads_to_llama_2(hub: HubStub) -> None:
    table = rows(check())
    assert all(row.ok for row in table.values())
    assert table["access token"].finding == "found: environment variable HF_TOKEN"
    assert table["account"].finding == "alice"
    assert table["Llama 2's licence"].finding == f"alice may download {LLAMA2}"
    assert table["GPU"].finding == "Tesla T4, 15.0 GB free of 16.0 GB"
    assert "free for the download of 13.5 GB" in table["disk"].finding
    assert table["Model"].finding.startswith(f"{LLAMA2} at int8: alice may download")


@pytest.mark.parametrize(
    ("state", "finding", "fix"),
    [
        ("pending", "alice asked for access to", "Wait for their answer"),
        ("never asked", "the weights of", "accept the licence and send the form"),
        ("rejected", "the authors of", "Read what https://huggingface.co/meta-llama"),
    ],
)
def test_a_licence_that_is_not_granted_leads_to_the_bundled_model(
    hub: HubStub, state: Any, finding: str, fix: str
) -> None:
    hub.repos[LLAMA2] = Repo(state)
    table = rows(check())
    licence = table["Llama 2's licence"]
    assert not licence.ok and licence.finding.startswith(finding) and fix in licence.fix
    assert table["account"].finding == "alice"
    assert table["Model"].ok and table["Model"].finding.startswith(f"smollm2 at fp32: {licence.finding}")
    assert "disk" not in table


@pytest.mark.parametrize("fault", ["hang", "drop", "html", 500, "unknown token"])
def test_the_check_ends_if_the_hub_does_not_answer(hub: HubStub, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "unknown token":
        hub.users = {"another": "bob"}
    else:
        hub.faults = {"": fault}
    if fault == "hang":
        monkeypatch.setattr(hub_module, "HUB_SECONDS", 0.2)
    table = rows(check())
    reason = "does not accept this token" if fault == "unknown token" else "gave no usable answer about"
    assert reason in table["Llama 2's licence"].finding
    assert not table["account"].ok and table["account"].fix == "See the next row."
    assert table["Model"].ok and "so the bundled SmolLM2-135M-Instruct runs (on the GPU)" in table["Model"].finding


def test_an_account_that_is_asked_for_too_often_is_not_an_obstacle(hub: HubStub) -> None:
    with hub.failing("whoami", 429):
        table = rows(check())
    assert not table["account"].ok and "Try again later" in table["account"].fix
    assert table["Model"].finding.startswith(LLAMA2)


@pytest.mark.parametrize(("form", "problem"), [("{}\fx", "contains characters"), ('"{}"', "is in quotation marks")])
def test_a_malformed_token_is_reported_and_not_sent(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch, form: str, problem: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", form.format(TOKEN))
    table = rows(check())
    token = table["access token"]
    assert not token.ok and token.finding.startswith(f"found: environment variable HF_TOKEN, but it {problem}")
    assert token.fix.startswith("Store it again without spaces and quotation marks")
    assert f"cannot be sent (it {problem}" in table["Llama 2's licence"].finding
    assert f"(environment variable HF_TOKEN) {problem}" in table["Model"].finding
    assert hub.requests == []


def test_a_mirror_that_gives_llama_2_without_a_token_needs_none(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.repos[LLAMA2] = Repo(folder=model_folder(tmp_path / "model"))
    hub.faults = {"/api/": 404}
    table = rows(check())
    assert not table["access token"].ok and table["Llama 2's licence"].ok
    assert table["Model"].finding.startswith(f"{LLAMA2} at int8: this account may download")


@pytest.mark.usefixtures("hub")
def test_a_model_whose_files_cannot_be_stored_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for machine, variable in ((with_gpu(15), "HF_HOME"), (without_gpu(16), "XDG_CACHE_HOME")):
        monkeypatch.setattr(checks, "this_machine", lambda machine=machine: machine)
        model = rows(check())["Model"]
        assert not model.ok and "but its files cannot be stored" in model.finding
        assert model.fix.startswith(f"Cannot write into {tmp_path}/file/")
        assert f"Set {variable} to a folder" in model.fix


@pytest.mark.usefixtures("hub")
def test_a_clone_of_llama_2_needs_no_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model_folder(tmp_path / LLAMA2)
    monkeypatch.chdir(tmp_path)
    table = rows(check())
    assert "disk" not in table and table["Model"].finding.startswith(f"{LLAMA2} at int8: at int8 it fits")


@pytest.mark.usefixtures("hub")
def test_missing_packages_are_reported_with_their_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda package: None)
    table = rows(check())
    for name in [*PACKAGES, "Model"]:
        assert not table[name].ok and table[name].fix == INSTALL


@pytest.mark.usefixtures("hub")
def test_without_any_model_the_last_row_says_how_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "this_machine", lambda: without_gpu(16))
    uninstall_bundled(monkeypatch)
    table = rows(check())
    assert table["bundled model"].fix == INSTALL_BUNDLED
    assert not table["Model"].ok and table["Model"].finding == "none can run"
    assert INSTALL_BUNDLED in table["Model"].fix


@pytest.mark.usefixtures("hub")
def test_a_disk_without_room_for_llama_2_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**9}))
    disk = rows(check())["disk"]
    assert not disk.ok and "HF_HOME" in disk.fix


def test_the_check_reads_the_environment_and_needs_no_token_gpu_or_network(tmp_path: Path) -> None:
    folders = [fake_torch(tmp_path / "torch", cuda=None), install(tmp_path / "installed"), ROOT]
    environment = NO_HUB.environment(home=tmp_path, PATH="", PYTHONPATH=os.pathsep.join(map(str, folders)))
    code = "from helpers.checks import check, format_table; print(format_table(check()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 96
    words = " ".join(done.stdout.split())
    assert "[ok] jina 9.9" in words
    assert "[--] access token none was found -> Create an access token" in words
    assert "[ok] Model smollm2 at int8: no GPU was found, so the bundled SmolLM2-135M-Instruct runs" in words
    assert done.stderr == ""


def test_a_table_is_aligned_and_puts_each_fix_under_its_finding() -> None:
    results = [CheckResult(True, "RAM", "1.0 GB", "not shown"), CheckResult(False, "a GPU", "none", "Buy " * 30)]
    table = format_table(results).splitlines()
    assert table[:2] == ["[ok] RAM    1.0 GB", "[--] a GPU  none"]
    assert table[2].startswith(" " * 12 + "-> Buy") and table[3].startswith(" " * 15 + "Buy")
    assert all(len(row) <= 96 for row in table)
