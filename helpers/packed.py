"""What the engine runs: a model that reads tokens of many sequences in one forward pass, without padding.

The unread ids of all sequences are packed into one row, one chunk after the other. Attention is the only operation that
mixes tokens, so it handles each chunk separately, with the KV cache of its sequence. When a sequence is admitted or
finishes, no other one moves. `helpers.llama` and `helpers.packed_attention` are such models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ModelUnavailable
from .kv_cache import Ids, KVCache

NOT_FINITE_FIX = "Serve it with --precision bf16 or fp32, and download it again if that does not help."
"""What to do with a model whose logits are NaN or infinite: float16 overflows, or the weights are damaged."""


class PackedModel(Protocol):
    """A language model that can read many sequences in one forward pass."""

    num_embeddings: int
    """The number of token ids that the model can read: 0 to `num_embeddings` - 1."""

    def prepare(self) -> KVCache:
        """Make the model ready, and try it. Return the KV cache of a short prompt.

        The engine calls this once, in its own thread. Raise `ModelUnavailable` if the model cannot be served.
        """

    def logits(self, ids: Tensor, chunks: list[Chunk]) -> Tensor:
        """Return the logits after the last token of each chunk, (chunks, vocabulary).

        `ids`, (tokens,), are those of all chunks, one after the other. Each layer writes into the chunks' KV
        caches, whose `length` stays.
        """


class Chunk:
    """The n tokens that one sequence reads in a forward pass, after those that `cache` holds."""

    def __init__(self, cache: KVCache, n: int) -> None:
        self.cache, self.n = cache, n
        self._masks: dict[tuple[int | None, torch.device], Tensor | None] = {}

    @property
    def positions(self) -> range:
        """Return the positions of the tokens in their sequence."""
        return range(self.cache.length, self.cache.length + self.n)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Return a mask, (1, 1, n, length + n), of 0 for what a token attends to, and -inf for the rest.

        `window` is how far back a layer looks, or None. Return None if a single token attends to everything.
        """
        key = window, like.device
        if key not in self._masks:
            end = self.cache.length + self.n
            is_narrow = window is not None and window < end
            if self.n == 1 and not is_narrow:
                self._masks[key] = None
            else:
                hidden = torch.ones(self.n, end, dtype=torch.bool, device=like.device).triu(self.cache.length + 1)
                if window is not None and is_narrow:
                    hidden |= torch.ones_like(hidden).tril(self.cache.length - window)
                self._masks[key] = like.new_zeros(1, 1, self.n, end).masked_fill_(hidden, float("-inf"))
        return self._masks[key]


def positions_of(chunks: Sequence[Chunk]) -> Tensor:
    """Return the positions of all tokens in their sequences, (tokens,)."""
    return torch.tensor([position for chunk in chunks for position in chunk.positions])


def last_tokens(chunks: Sequence[Chunk]) -> Tensor:
    """Return the index of each chunk's last token among all tokens, (chunks,)."""
    return torch.tensor([chunk.n for chunk in chunks]).cumsum(0) - 1


@torch.inference_mode()
def forward_packed(model: PackedModel, batch: Sequence[tuple[KVCache, Ids]]) -> tuple[Tensor, list[int | None]]:
    """Run the model once: each sequence reads its next ids, one or more, after those that its KV cache holds.

    Return the logits after the last id of each sequence, (sequences, vocabulary), and the most likely id of each, or
    None if its logits contain NaN or infinity. If this raises, every KV cache is as long as before.
    """
    chunks = [Chunk(cache, len(ids)) for cache, ids in batch]
    logits = model.logits(torch.tensor([token_id for _, ids in batch for token_id in ids]), chunks)
    highest, indices = logits.max(dim=-1)  # faster than argmax; NaN is higher than any number
    most_likely = [  # an error on a GPU is raised here
        index if math.isfinite(value) else None for index, value in zip(indices.tolist(), highest.tolist(), strict=True)
    ]
    for chunk in chunks:
        chunk.cache.length += chunk.n
    return logits, most_likely


def require_finite(logits: Tensor, name: str, dtype: Any) -> None:
    """Raise `ModelUnavailable` if the logits, (prompts, vocabulary), of the model `name` are NaN or infinite."""
    if not logits.max(dim=-1).values.isfinite().all():
        raise ModelUnavailable(f"{name} computes logits that are NaN or infinite, in {dtype}. {NOT_FINITE_FIX}")
