"""`helpers.model_files`: how many parameters a model has, on this machine and on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from helpers.catalog import BUNDLED, LLAMA2
from helpers.errors import ModelUnavailable
from helpers.model_files import cached_folder, check_files, local_folder, parameters_of
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


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = model_folder(tmp_path / "models" / "x")
    assert local_folder("~/models/x") == folder
    assert parameters_of("~/models/x") == 10


PATHS = ["/no/such/folder", "./nowhere", "~/nowhere/at/all", "a/b/c", "https://huggingface.co/org/small", "a folder"]


@pytest.mark.parametrize("name", PATHS)
def test_a_path_without_a_folder_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^There is no folder {name}. Check the path, or use the bundled"):
        parameters_of(name)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json, so it is not a model\."):
        parameters_of(str(tmp_path))


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(ModelUnavailable, match=r"^The name of the model is empty\."):
        parameters_of(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelUnavailable, match=f"^{tmp_path}/model.gguf is a file, not a folder. Name a folder"):
        parameters_of(str(tmp_path / "model.gguf"))


def test_a_name_that_python_could_not_decode_is_refused_with_the_variable() -> None:
    """Python decodes an argument in UTF-8 to such a name if the locale is C."""
    with pytest.raises(ModelUnavailable, match=r"name './mod\\udcc3\\udca8le' with .* Set PYTHONUTF8=1") as error:
        parameters_of("./modèle".encode().decode("ascii", "surrogateescape"))
    assert str(error.value).isascii()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b2c\nsize 13476839424\n"


@pytest.mark.parametrize("parts", [1, 2])
def test_git_lfs_pointers_instead_of_weights_are_refused(tmp_path: Path, parts: int) -> None:
    folder = model_folder(tmp_path / "model", parts=parts)
    weights = max(folder.glob("*.safetensors"))
    weights.write_text(POINTER)
    with pytest.raises(ModelUnavailable, match=f"^{weights} is only a .* Run `git lfs pull` in {folder}.$"):
        parameters_of(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_instead_of_a_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelUnavailable, match=f"^{folder / name} is only a git-lfs pointer, not the file itself"):
        check_files(folder)


def test_files_that_the_model_does_not_need_may_be_pointers_or_damaged(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    for name in ("consolidated.00.pth", "pytorch_model.bin", "trainer_state.json", "tf_model.h5"):
        (folder / name).write_text(POINTER)
    check_files(folder)
    assert parameters_of(str(folder)) == 10


JSON_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ['{"a": 1', "", "[]", "null", "\0\0", "<html>"])
def test_a_damaged_json_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = model_folder(tmp_path / "model", parts=2)
    (folder / name).write_text(content)
    with pytest.raises(ModelUnavailable, match=f"^{folder / name} is damaged or cut off. Download the model again.$"):
        check_files(folder)


@pytest.mark.parametrize("content", ['{"weight_map"', "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_its_list_is_named(tmp_path: Path, content: str) -> None:
    index = model_folder(tmp_path / "model", parts=2) / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ModelUnavailable, match=f"^{index} .*Download the model again"):
        parameters_of(str(tmp_path / "model"))


def test_a_damaged_file_in_the_cache_is_reported_with_the_folder_to_delete(tmp_path: Path) -> None:
    """Hugging Face's client would reuse the damaged file."""
    cached = tmp_path / "models--org--small"
    folder = model_folder(cached / "snapshots" / COMMIT)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=rf"is damaged or cut off\. Delete the folder {cached}, and start again"):
        check_files(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (model_folder(tmp_path / "model") / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="has no weights"):
        parameters_of(str(tmp_path / "model"))


def test_a_folder_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    (model_folder(tmp_path / "model", parts=2) / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"is incomplete: model-1-of-2\.safetensors is missing"):
        parameters_of(str(tmp_path / "model"))


@pytest.mark.parametrize("kept", [0, 7, 20, -1])
def test_weights_that_are_cut_off_are_refused(tmp_path: Path, kept: int) -> None:
    weights = model_folder(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
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
