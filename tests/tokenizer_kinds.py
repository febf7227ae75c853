"""One tokenizer of Llama's kind, set up as three sorts of published files set it up."""

from __future__ import annotations

import json
from typing import Any


def llama_tokenizer_of(kind: str) -> Any:
    """Return the tokenizer of Llama's kind as three sorts of published files define it.

    `kind` is "legacy=False" (Llama-2-7b-chat-hf), "legacy=True" or "tokenizer.json as it is".
    """
    from tokenizers import Tokenizer, models, normalizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    from helpers.bundled import llama_tokenizer

    tokenizer = llama_tokenizer()
    if kind == "legacy=False":
        return tokenizer
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges, template = bpe["vocab"], list(map(tuple, bpe["merges"])), tokenizer.chat_template
    if kind == "tokenizer.json as it is":
        backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    else:
        tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=True, add_bos_token=True)
    tokenizer.chat_template = template
    return tokenizer
