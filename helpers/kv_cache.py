"""The KV cache of each sequence, and the prefix cache: KV caches of finished sequences, for reuse.

This module knows token ids and tensors, but no model and no request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import hardware

Ids = Sequence[int]


class KVCache:
    """The keys and values of one sequence's first `length` tokens, in memory for `capacity` tokens.

    Each layer holds both in one tensor, of shape (1, heads, capacity, ...): the model decides how a token's key and
    value lie in it. The tensor never moves, so storing a token costs the same at any length.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, Tensor] = {}

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Store the keys and values of n more tokens, (1, heads, n, ...). Return all, (1, heads, length + n, ...).

        `length` does not change. The caller adds n to it when every layer has stored its own.
        """
        if layer not in self._layers:
            self._layers[layer] = new.new_empty(*new.shape[:2], self.capacity, *new.shape[3:])
        stored, n = self._layers[layer], new.shape[2]
        stored.narrow(2, self.length, n).copy_(new)
        return stored.narrow(2, 0, self.length + n)

    def require_room(self, n: int) -> None:
        """Raise `IndexError` if `n` more tokens do not fit."""
        if self.length + n > self.capacity:
            raise IndexError(f"{self.length} and {n} tokens do not fit into a KV cache for {self.capacity}.")

    def reserve(self, layer: int, *, heads: int, size: int) -> Tensor:
        """Return a layer's memory, (1, heads, capacity, size) in fp32, for a model that stores tokens itself."""
        if layer not in self._layers:
            shape = 1, heads, self.capacity, size
            self._layers[layer] = torch.empty(shape, dtype=torch.float32, device="cpu")
        return self._layers[layer]

    def copy_prefix(self, length: int, *, capacity: int) -> KVCache:
        """Return a copy of the first `length` tokens, in memory for `capacity` tokens."""
        return _copied(self._layers.items(), length, capacity)

    def move_prefix(self, length: int, *, capacity: int) -> KVCache:
        """Return the same as `copy_prefix`, but leave nothing here. Only one layer is in memory twice at a time."""
        self.length = 0
        return _copied((self._layers.popitem() for _ in range(len(self._layers))), length, capacity)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def bytes_per_token(self) -> dict[torch.device, int]:
        """Return the bytes for each token, by device. A model may be spread over several devices."""
        sizes: dict[torch.device, int] = {}
        for stored in self._layers.values():
            sizes[stored.device] = sizes.get(stored.device, 0) + stored.nbytes // self.capacity
        return sizes


def _copied(layers: Iterable[tuple[int, Tensor]], length: int, capacity: int) -> KVCache:
    """Return a KV cache with a copy of the first `length` tokens of each layer."""
    copy = KVCache(capacity)
    for layer, stored in layers:
        copy.append(layer, stored.narrow(2, 0, length))
    copy.length = length
    return copy


@dataclass(frozen=True)
class PrefixMatch:
    """A KV cache whose first `length` tokens are the first ones of a prompt too; 0 and None if there is none."""

    length: int = 0
    cache: KVCache | None = None


class PrefixCache:
    """KV caches of finished sequences, for prompts that begin with the same tokens.

    Such a prompt is the next turn of a conversation, or another question under the same system prompt. The least
    recently used cache is evicted first.
    """

    MAX_ENTRIES = 256
    """The limit exists because a new prompt is compared with every entry."""

    def __init__(self) -> None:
        self._entries: list[tuple[Ids, KVCache]] = []  # the most recently used is the last

    def __iter__(self) -> Iterator[tuple[Ids, KVCache]]:
        return iter(self._entries)

    def __contains__(self, cache: KVCache) -> bool:
        return any(kept is cache for _, kept in self._entries)

    @property
    def capacity(self) -> int:
        """Return the number of tokens for which the caches take memory."""
        return sum(cache.capacity for _, cache in self._entries)

    def add(self, ids: Ids, cache: KVCache) -> None:
        """Add `cache`, which holds the tokens `ids`. It replaces all caches that hold a prefix of `ids`."""
        self._entries = [entry for entry in self._entries if common_prefix_length(entry[0], ids) < len(entry[0])]
        self._entries.append((ids, cache))
        del self._entries[: -self.MAX_ENTRIES]

    def lookup(self, ids: Ids) -> PrefixMatch:
        """Return the longest prefix of `ids` that a cache holds."""
        matches = (PrefixMatch(common_prefix_length(ids, kept), cache) for kept, cache in self._entries)
        return max(matches, key=lambda match: match.length, default=PrefixMatch())

    def touch(self, cache: KVCache) -> None:
        """Make `cache` the most recently used one, if it is in the prefix cache."""
        self._entries.sort(key=lambda entry: entry[1] is cache)  # stable: only this entry moves, to the end

    def remove(self, cache: KVCache) -> bool:
        """Remove `cache`. Return whether it was in the prefix cache."""
        before = len(self._entries)
        self._entries = [entry for entry in self._entries if entry[1] is not cache]
        return len(self._entries) < before

    def evict(self, max_capacity: int) -> bool:
        """Remove the least recently used caches until the rest takes memory for at most `max_capacity` tokens.

        Return whether any cache was removed.
        """
        before = len(self._entries)
        while self._entries and self.capacity > max_capacity:
            del self._entries[0]
        return len(self._entries) < before


def common_prefix_length(some: Ids, others: Ids) -> int:
    """Return the length of the longest common prefix."""
    same, end = 0, min(len(some), len(others))
    while same < end:  # by bisection: comparing slices is much faster than comparing ids in a loop
        middle = (same + end + 1) // 2
        if some[same:middle] == others[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same


def cache_capacity(trial: KVCache, *, context_length: int) -> int:
    """Return how many tokens all KV caches may hold if the user sets no limit. `trial` shows the bytes per token.

    The limit is 80 % of the free memory of each GPU. In RAM, which other programs need too, it is 2 GiB or one
    full context, whichever is more, but at most half of the free memory.
    """

    def tokens_on(device: torch.device, bytes_per_token: int) -> int:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free * 4 // 5 // bytes_per_token
        _, free = hardware.ram()
        return min(free // 2, max(2 * 2**30, context_length * bytes_per_token)) // bytes_per_token

    return min(tokens_on(device, size) for device, size in trial.bytes_per_token.items())
