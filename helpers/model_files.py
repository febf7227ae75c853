"""Find a model's files on this machine, and count their parameters without loading the weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from .catalog import BUNDLED, KNOWN_PARAMETERS, OR_BUNDLED
from .errors import ModelUnavailable
from .hub import Licence, Token, find_token, hub_access


def parameters_of(name_or_path: str, *, token: Token | None = None) -> int | None:
    """Return the number of parameters of a model, or None if the model must be loaded to count them.

    `name_or_path` is "smollm2", a local folder, or a Hub id; a Hub id is looked up in the local cache first.
    The shapes come from the headers of safetensors files; for ``.bin`` files the number is an estimate from their
    size. For checkpoints that are packed to 4 bit the number is too small. `token` defaults to `find_token()`.

    Raise `ModelUnavailable` if the folder or the model does not exist or is incomplete, if the user may not
    download it, or if the Hub does not answer.
    """
    if name_or_path == BUNDLED:
        return KNOWN_PARAMETERS[BUNDLED]
    if folder := local_folder(name_or_path) or cached_folder(name_or_path):
        return count_parameters(folder)
    if name_or_path in KNOWN_PARAMETERS:
        return KNOWN_PARAMETERS[name_or_path]
    access = hub_access(token or find_token(), name_or_path)
    if access.licence is not Licence.GRANTED:
        raise ModelUnavailable(f"Cannot download {name_or_path}: {access.finding}. {access.fix}")
    return access.parameters


CONTEXT_LENGTH = "max_position_embeddings"
"""The key of config.json for the number of tokens that a model can read."""


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    CONTEXT_LENGTH,
)


def is_llama_family(config: Mapping[str, Any]) -> bool:
    """Return whether `helpers.llama` can run a model with `config`, the content of its config.json."""
    rope_kind, rope = rope_of(config)
    kind = config.get("model_type")
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    return (
        kind in ("llama", "mistral", "qwen2", "qwen3")
        and all(config.get(key) for key in _SIZES)
        and (kind == "llama" or "num_key_value_heads" in config)  # the default depends on the kind
        and (kind != "qwen3" or "head_dim" in config)
        and config.get("hidden_act", "silu") == "silu"
        and rope_kind in ("default", "linear", "llama3", "yarn")
        and rope.get("partial_rotary_factor", 1) == 1
        and not (window and config.get("use_sliding_window", True))
        and not config.get("quantization_config")
        and config["num_attention_heads"] % (config.get("num_key_value_heads") or 1) == 0
        and head_size_of(config) % 16 == 0  # ONNX Runtime's GroupQueryAttention rotates only such heads
    )


def head_size_of(config: Mapping[str, Any]) -> int:
    """Return the size of an attention head in the Llama family."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the kind of a model's rotary embedding and its parameters, which older files write in another way."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") or rope.get("type") or "default", rope


def missing_weights(names: Sequence[str]) -> ModelUnavailable:
    """Return the error for a model whose files lack tensors with these names."""
    return ModelUnavailable(
        f"The model has no weights for {len(names)} of its tensors, such as {names[0]}. "
        "Download it again, or name one that is trained to generate text."
    )


def snapshot_folder(repo_id: str) -> Path | None:
    """Return the folder of `repo_id` in Hugging Face's cache, complete or not, or None."""
    try:
        config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
    except hub_errors.HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def cached_folder(repo_id: str) -> Path | None:
    """Return the folder of `repo_id` in Hugging Face's cache, or None if the cache does not hold the whole model."""
    folder = snapshot_folder(repo_id)
    try:
        return folder if folder and weight_files(folder) else None
    except ModelUnavailable:
        return None


def local_folder(name: str) -> Path | None:
    """Return the folder that `name` means, or None if it is a Hub id. An existing folder wins, as in transformers.

    Raise `ModelUnavailable` if `name` is a path without a folder, or a folder that is not a model.
    """
    _check_spelling(name)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ModelUnavailable(
            f"{name} is a file, not a folder. Name a folder that `save_pretrained` wrote, {OR_BUNDLED}"
        )
    if not folder.is_dir():
        if name.startswith((".", "/", "~", os.sep)) or folder.is_absolute() or not _can_be_on_hub(name):
            raise ModelUnavailable(f"There is no folder {name}. Check the path, {OR_BUNDLED}")
        return None
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(
            f"The folder {name} has no config.json, so it is not a model. "
            f"Name a folder that `save_pretrained` wrote, {OR_BUNDLED}"
        )
    return folder


def require_download_folder() -> None:
    """Raise `ModelUnavailable` if this process cannot write into the folder that downloads go to."""
    require_writable(Path(constants.HF_HUB_CACHE), "models of the Hub", "HF_HOME")


def require_writable(folder: Path, content: str, variable: str) -> None:
    """Create `folder`, or raise `ModelUnavailable` if this process cannot write into it.

    `content` says what the folder is for, and `variable` is the environment variable that moves it.
    """
    reason = ""
    if folder.parts[0].startswith("~"):
        reason = "the home folder of this user is not known"
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or type(error).__name__
    if reason:
        raise ModelUnavailable(
            f"Cannot write into {folder}, the folder for {content} ({reason}). "
            f"Set {variable} to a folder that you may write into."
        )


def _check_spelling(name: str) -> None:
    """Raise `ModelUnavailable` if `name` is empty, or contains bytes that Python could not decode."""
    if not name.strip():
        raise ModelUnavailable(f"The name of the model is empty. Name a folder or a model of the Hub, {OR_BUNDLED}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ModelUnavailable(
            f"Python decoded the name {ascii(name)} with the wrong encoding. "
            "Set PYTHONUTF8=1 and start again; if that does not help, rename the folder."
        ) from None


def _can_be_on_hub(name: str) -> bool:
    from huggingface_hub.utils import validate_repo_id  # `import huggingface_hub` does not import its utils

    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError:
        return False
    return True


def check_files(folder: Path) -> None:
    """Raise `ModelUnavailable` if the configuration, the tokenizer or an index is damaged, or is a git-lfs pointer."""
    for name in _JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    if (folder / "tokenizer.model").is_file():
        _check_not_a_pointer(folder / "tokenizer.model")


_JSON_FILES = (
    "config.json",
    "generation_config.json",  # transformers silently ignores a damaged one
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raise `ModelUnavailable` if it is cut off or damaged."""
    _check_not_a_pointer(file)
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ModelUnavailable(_damaged(file))
    return content


def _damaged(file: Path) -> str:
    return f"{file} is damaged or cut off. {_download_again(file)}"


def _download_again(path: Path) -> str:
    """Return how to download a file or folder again. Hugging Face's cache would reuse a damaged file."""
    cached = next((folder for folder in (path, *path.parents) if folder.name.startswith("models--")), None)
    return f"Delete the folder {cached}, and start again." if cached else "Download the model again."


def safetensors_files(folder: Path) -> list[Path]:
    """Return the model's weight files, or [] if they are not safetensors. Raise what `weight_files` raises."""
    files = weight_files(folder)
    return files if all(file.suffix == ".safetensors" for file in files) else []


def weight_files(folder: Path) -> list[Path]:
    """Return the model's weight files, in transformers' order of preference.

    Raise `ModelUnavailable` if there are none or one is missing.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            _check_not_a_pointer(folder / single)
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            parts = [folder / part for part in sorted(_parts(index))]
            if missing := [part.name for part in parts if not part.is_file()]:
                raise ModelUnavailable(f"{folder} is incomplete: {missing[0]} is missing. {_download_again(folder)}")
            for part in parts:
                _check_not_a_pointer(part)
            return parts
    raise ModelUnavailable(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in parts. "
        f"{_download_again(folder)}"
    )


def _parts(index: Path) -> set[str]:
    """Return the names of the files that an index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelUnavailable(f"{index} lists no files. {_download_again(index)}")
    return set(map(str, weight_map.values()))


def _check_not_a_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelUnavailable(
                f"{file} is only a git-lfs pointer, not the file itself. Run `git lfs pull` in {file.parent}."
            )


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in a folder's weights. Raise `ModelUnavailable` if they are incomplete."""
    files = weight_files(folder)
    if files[0].suffix == ".safetensors":
        return sum(map(_count_safetensors, files))
    config = read_json(folder / "config.json")
    width = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    return sum(file.stat().st_size for file in files) // width


def safetensors_header(file: Path) -> tuple[Any, int]:
    """Return what a safetensors file says about its tensors, and the byte at which they begin.

    Raise `ModelUnavailable` if the header is damaged.
    """
    try:
        header = huggingface_hub.parse_local_safetensors_file_metadata(file)
    except hub_errors.SafetensorsParsingError:
        raise ModelUnavailable(_damaged(file)) from None
    with file.open("rb") as opened:
        return header, 8 + int.from_bytes(opened.read(8), "little")


def _count_safetensors(file: Path) -> int:
    """Return the number of parameters in a file. Raise `ModelUnavailable` if the file is cut off."""
    header, begin = safetensors_header(file)
    end = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
    if file.stat().st_size != begin + end:
        raise ModelUnavailable(_damaged(file))
    return sum(header.parameter_count.values())
