"""Find a model's files on this machine, and count their parameters without loading the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from .catalog import KNOWN_PARAMETERS, OR_BUNDLED
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
    if name_or_path in KNOWN_PARAMETERS:
        return KNOWN_PARAMETERS[name_or_path]
    if folder := local_folder(name_or_path) or cached_folder(name_or_path):
        return _count(folder)
    access = hub_access(token or find_token(), name_or_path)
    if access.licence is not Licence.GRANTED:
        raise ModelUnavailable(f"Cannot download {name_or_path}: {access.finding}. {access.fix}")
    return access.parameters


def cached_folder(repo_id: str) -> Path | None:
    """Return the folder of `repo_id` in Hugging Face's cache, or None if the cache does not hold the whole model."""
    try:
        config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
        if not isinstance(config, str):
            return None
        weight_files(Path(config).parent)
    except (hub_errors.HFValidationError, ModelUnavailable):
        return None
    return Path(config).parent


def local_folder(name: str) -> Path | None:
    """Return the folder that `name` means, or None if it is a Hub id. An existing folder wins, as in transformers.

    Raise `ModelUnavailable` if `name` is a path without a folder, or a folder without a ``config.json``.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~", os.sep)) or folder.is_absolute():
            raise ModelUnavailable(f"There is no folder {name}. Check the path, {OR_BUNDLED}")
        return None
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(
            f"The folder {name} has no config.json, so it is not a model. "
            f"Name a folder that `save_pretrained` wrote, {OR_BUNDLED}"
        )
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the model's weight files, in transformers' order of preference.

    Raise `ModelUnavailable` if there are none or one is missing.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            parts = [folder / part for part in set(json.loads(index.read_text())["weight_map"].values())]
            if missing := [part.name for part in parts if not part.is_file()]:
                raise ModelUnavailable(f"{folder} is incomplete: {missing[0]} is missing. Download the model again.")
            return parts
    raise ModelUnavailable(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in parts. "
        "Download the model again."
    )


def _count(folder: Path) -> int:
    files = weight_files(folder)
    if files[0].suffix == ".safetensors":
        return sum(map(_count_safetensors, files))
    config = json.loads((folder / "config.json").read_text())
    width = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    return sum(file.stat().st_size for file in files) // width


def _count_safetensors(file: Path) -> int:
    try:
        return sum(huggingface_hub.parse_local_safetensors_file_metadata(file).parameter_count.values())
    except hub_errors.SafetensorsParsingError:
        raise ModelUnavailable(f"{file} is damaged or cut off. Download the model again.") from None
