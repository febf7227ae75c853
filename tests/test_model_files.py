"""`helpers.model_files`: how many parameters a model has, on this machine and on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers.catalog import BUNDLED, LLAMA2
from helpers.errors import ModelUnavailable
from helpers.model_files import cached_folder, parameters_of
from hub_stub import COMMIT, TOKEN, HubStub, Repo, model_folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with HubStub({TOKEN: "alice"}) as stub:
        stub.connect(monkeypatch, home=tmp_path / "home", HF_TOKEN=TOKEN)
        yield stub


# --- Local models ---------------------------------------------------------------------------------


def test_known_sizes_follow_from_the_architectures() -> None:
    def llama(vocabulary: int, width: int, inner: int, layers: int, kv: int, *, tied: bool) -> int:
        layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
        return vocabulary * width * (1 if tied else 2) + layers * layer + width

    assert parameters_of(LLAMA2) == llama(32000, 4096, 11008, 32, 4096, tied=False)
    assert parameters_of(BUNDLED) == llama(49152, 576, 1536, 30, 192, tied=True)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_local_folder_is_counted_by_its_headers(tmp_path: Path, parts: int) -> None:
    assert parameters_of(str(model_folder(tmp_path / "model", parts=parts))) == 10 * parts


@pytest.mark.parametrize(("config", "expected"), [("{}", 500), ('{"torch_dtype": "float32"}', 250)])
def test_bin_files_are_estimated_by_their_size(tmp_path: Path, config: str, expected: int) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\0" * 1000)
    assert parameters_of(str(tmp_path)) == expected


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere/at/all"])
def test_a_path_without_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^There is no folder {name}. Check the path, or use the bundled"):
        parameters_of(name)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json, so it is not a model\."):
        parameters_of(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (model_folder(tmp_path / "model") / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="has no weights"):
        parameters_of(str(tmp_path / "model"))


def test_a_folder_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    (model_folder(tmp_path / "model", parts=2) / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"is incomplete: model-1-of-2\.safetensors is missing"):
        parameters_of(str(tmp_path / "model"))


def test_weights_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    weights = model_folder(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(ModelUnavailable, match="damaged or cut off"):
        parameters_of(str(tmp_path / "model"))


# --- Models of the Hub ----------------------------------------------------------------------------


def test_before_a_download_the_hub_is_asked(hub: HubStub) -> None:
    hub.repos = {"org/small": Repo(parameters={"F16": 20}), "org/untold": Repo()}
    assert parameters_of("org/small") == 20
    assert parameters_of("org/untold") is None


@pytest.mark.parametrize(
    ("repo_id", "finding", "fix"),
    [
        ("org/pending", "alice asked for access to org/pending", "Wait for their answer"),
        ("org/nowhere", "the Hub has no model org/nowhere", "Check the spelling, or use the bundled model: --model"),
    ],
)
def test_a_model_that_may_not_be_downloaded_is_refused(hub: HubStub, repo_id: str, finding: str, fix: str) -> None:
    hub.repos = {"org/pending": Repo("pending")}
    with pytest.raises(ModelUnavailable, match=f"^Cannot download {repo_id}: {finding}.*. {fix}") as error:
        parameters_of(repo_id)
    assert error.value.__cause__ is None and error.value.__context__ is None  # it could quote the token


def test_after_a_download_the_files_are_counted_offline(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos = {"org/small": Repo("granted", folder=model_folder(tmp_path / "small", parts=2))}
    huggingface_hub.snapshot_download("org/small")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert parameters_of("org/small") == 20
    with pytest.raises(ModelUnavailable, match=r"HF_HUB_OFFLINE is set.*--model smollm2"):
        parameters_of("org/other")
    assert hub.requests == []


def test_a_download_brings_each_file_and_sends_no_token_to_the_storage(hub: HubStub, tmp_path: Path) -> None:
    original = model_folder(tmp_path / "small", parts=2)
    hub.repos = {"org/small": Repo("granted", folder=original)}
    huggingface_hub.snapshot_download("org/small")
    copy = cached_folder("org/small")
    assert copy == tmp_path / "home" / "hub" / "models--org--small" / "snapshots" / COMMIT
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in original.iterdir()
    }
    from_storage = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert from_storage and {request.token for request in from_storage} == {None}


def test_an_incomplete_download_does_not_count_as_cached(hub: HubStub, tmp_path: Path) -> None:
    hub.repos = {LLAMA2: Repo("granted", folder=model_folder(tmp_path / "llama", parts=2))}
    huggingface_hub.snapshot_download(LLAMA2, ignore_patterns=["model-1-*"])
    assert cached_folder(LLAMA2) is None
    huggingface_hub.snapshot_download(LLAMA2)
    assert cached_folder(LLAMA2) is not None


def test_a_name_that_no_model_can_have_is_not_cached() -> None:
    assert cached_folder("no such name!") is None
