"""Load a model and its tokenizer by name, at a precision. `helpers.model_choice` decides what can run.

A name is a Hub id (``meta-llama/Llama-2-7b-chat-hf``), the path of a local folder, or ``smollm2``, the bundled
model, which needs no account.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundled import bundled_folder
from .catalog import BUNDLED, OR_BUNDLED
from .errors import HelpersError, ModelUnavailable
from .model_choice import Choice, choose


@dataclass(frozen=True)
class ChatModel:
    """A loaded model, with what the engine and the executor need to know about it.

    - ``model``: a `transformers` causal language model, on its device, in evaluation mode.
    - ``context_length``: tokens that a prompt and its answer may take together.
    - ``eos_token_ids``: the ids that end an answer.
    """

    name: str
    precision: str
    model: Any
    tokenizer: Any
    context_length: int
    eos_token_ids: frozenset[int]

    @property
    def device(self) -> str:
        return str(self.model.device)


def load(model: str = "auto", precision: str = "auto") -> ChatModel:
    """Load `model` at `precision` (``fp32``, ``bf16``, ``int8``, ``nf4``); `model_choice.choose` resolves ``auto``.

    Downloads and loading show their progress on stderr. bitsandbytes quantises to ``int8`` and ``nf4`` while the
    weights load, on a GPU and on the CPU.

    Raise `InvalidRequest` for an unknown precision. Raise `ModelUnavailable` before anything is downloaded if the
    model does not exist, may not be downloaded or does not fit; and later if its files do not load.
    """
    choice, source = None, ""
    try:
        choice = choose(model, precision)
        source = source_of(choice.model)
        return _load(choice, source)
    except HelpersError:
        raise
    except Exception as error:  # transformers, safetensors, bitsandbytes: each raises its own classes
        name, at = (choice.model, f" at {choice.precision}") if choice else (model, "")
        raise ModelUnavailable(
            f"{name} did not load{at} ({_reason(error)}). Try another --precision, {OR_BUNDLED}"
        ) from (error if Path(source).is_dir() else None)  # an error of the Hub's client may quote a header


def source_of(model: str) -> str:
    """Return the argument for `from_pretrained`: the folder of the bundled model, or the name itself.

    Raise `ModelUnavailable` if the bundled model is not installed.
    """
    return str(bundled_folder()) if model == BUNDLED else model


def _reason(error: Exception) -> str:
    """Return a library's message without addresses, because the address of a download may contain its key."""
    return re.sub(r"https?://\S+", "<address>", f"{type(error).__name__}: {error}")


def _load(choice: Choice, source: str) -> ChatModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        device_map="auto" if choice.device == "cuda" else "cpu",  # "auto": accelerate, as in the article
        **_precision_options(choice.precision),
    ).eval()
    declared = model.generation_config.eos_token_id
    eos = {*([declared] if isinstance(declared, int) else declared or []), tokenizer.eos_token_id}
    return ChatModel(
        name=choice.model,
        precision=choice.precision,
        model=model,
        tokenizer=tokenizer,
        context_length=_context_length(model.config),
        eos_token_ids=frozenset(eos - {None}),
    )


def _context_length(config: Any) -> int:
    """Return the context length in tokens. For "longrope" (Phi 3) it is the original one: a longer sequence
    changes the rotation of all its positions, so its KV cache would have to be computed again."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return config.max_position_embeddings


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
