"""Greedy answers to one prompt alone: of a model as the engine runs it, and of transformers' own `generate`."""

from __future__ import annotations

from typing import Any


def packed_answer(model: Any, prompt: list[int], n: int) -> list[int]:
    """Return the n ids that a `PackedModel` continues `prompt` with. It must be prepared."""
    from helpers.kv_cache import KVCache
    from helpers.packed import forward_packed

    cache, unread, answer = KVCache(len(prompt) + n), prompt, []
    for _ in range(n):
        _, (token_id,) = forward_packed(model, [(cache, unread)])
        assert token_id is not None
        answer.append(token_id)
        unread = [token_id]
    return answer


def generated_answer(model: Any, prompt: list[int], n: int) -> list[int]:
    """Return the ids, n at most, that `generate` continues `prompt` with. `model` is one of transformers."""
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return output[0, len(prompt) :].tolist()
