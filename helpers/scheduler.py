"""Decide which sequences run, and which ids each of them reads in the next step: first come, first served.

The scheduler knows sequences and their KV caches. It knows no model, no text and no thread: `helpers.engine` calls it
between two steps. A sequence waits after `add`, runs after `admit`, reads what `schedule` returns, and leaves with
`finish` or `remove_cancelled`.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass

from .kv_cache import KVCache, PrefixCache, PrefixMatch, common_prefix_length
from .prefill import BLOCK, share_budget
from .sequence import Sequence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """The ids that `sequence` reads in the next step, after those that its KV cache holds."""

    sequence: Sequence
    ids: list[int]

    @property
    def cache(self) -> KVCache:
        """Return the sequence's KV cache. The chunk holds no reference, so a failed sequence frees its memory."""
        assert self.sequence.cache is not None
        return self.sequence.cache


class Scheduler:
    """The queue of `waiting` sequences, the `running` sequences, and the prefix cache.

    - `max_num_seqs`: the maximum number of sequences that run at once.
    - `cache_capacity`: the number of tokens that all KV caches together, those of the prefix cache too, may hold. A
      running sequence counts with its prompt and its `max_tokens`.
    """

    def __init__(self, *, max_num_seqs: int, cache_capacity: int) -> None:
        self.max_num_seqs, self.cache_capacity = max_num_seqs, cache_capacity
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefix_cache = PrefixCache()
        self._durations: deque[float] = deque(maxlen=max_num_seqs)  # seconds that the latest finished ones ran

    def add(self, sequence: Sequence) -> None:
        """Append `sequence` to the queue."""
        sequence.added_at = time.monotonic()
        self.waiting.append(sequence)

    def can_admit(self, sequence: Sequence) -> bool:
        """Return whether `sequence` can run beside the running ones. The prefix cache makes room for it."""
        reserved = sum(running.max_total_tokens for running in self.running)
        return len(self.running) < self.max_num_seqs and reserved + sequence.max_total_tokens <= self.cache_capacity

    def admit(self) -> None:
        """Move as many sequences as can run from the front of the queue to the running ones."""
        while self.waiting and self.can_admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.admitted_at = time.monotonic()
            sequence.stream.queue_seconds = sequence.admitted_at - sequence.added_at
            self.running.append(sequence)

    def remove_cancelled(self) -> list[Sequence]:
        """Remove the cancelled sequences, and return them."""
        running = [sequence for sequence in self.running if sequence.stream.cancelled]
        waiting = [sequence for sequence in self.waiting if sequence.stream.cancelled]
        for sequence in running:
            self.finish(sequence)
        for sequence in waiting:
            self.waiting.remove(sequence)
        return running + waiting

    def schedule(self) -> list[Chunk]:
        """Return the ids that each running sequence reads next: its latest token, or a chunk of its prompt."""
        decode: list[Chunk] = []
        prefill: list[Chunk] = []
        for n, sequence in enumerate(self.running):
            if sequence.cache is None:
                match = self._longest_prefix(sequence)
                if self._should_wait(sequence, match, ahead=self.running[:n]):
                    continue
                sequence.cache = self._new_cache(sequence, match)
                sequence.stream.cached_tokens = sequence.cache.length
            chunk = Chunk(sequence, sequence.unread_ids)
            (decode if len(chunk.ids) == 1 else prefill).append(chunk)
        shares = share_budget([len(chunk.ids) for chunk in prefill])
        return decode + [Chunk(prefill[n].sequence, prefill[n].ids[:share]) for n, share in shares.items() if share]

    def finish(self, sequence: Sequence) -> None:
        """Remove `sequence` from the running ones. The prefix cache keeps its KV cache."""
        self.running.remove(sequence)
        self._durations.append(time.monotonic() - sequence.admitted_at)
        cache, sequence.cache = sequence.cache, None
        if cache is not None and cache.length >= BLOCK:
            self.prefix_cache.add(sequence.ids[: cache.length], cache)

    def seconds_until_next_finish(self) -> int:
        """Estimate the seconds, at least 1, until a running sequence finishes, from the latest durations."""
        running = tuple(self.running)
        durations = tuple(self._durations) or [time.monotonic() - sequence.admitted_at for sequence in running]
        return math.ceil(sum(durations) / max(1, len(durations)) / max(1, len(running))) or 1

    def _longest_prefix(self, sequence: Sequence) -> PrefixMatch:
        """Return the longest prefix of the prompt, in whole blocks, that any other sequence has read."""
        prompt = sequence.ids[:-1]  # the last token is read in any case, for its logits
        matches = [self.prefix_cache.lookup(prompt)]
        for other in self.running:
            if other.cache is not None:
                length = min(common_prefix_length(prompt, other.ids), other.cache.length)
                matches.append(PrefixMatch(length, other.cache))
        longest = max(matches, key=lambda match: match.length)
        return PrefixMatch(length, longest.cache) if (length := longest.length // BLOCK * BLOCK) else PrefixMatch()

    def _should_wait(self, sequence: Sequence, match: PrefixMatch, *, ahead: list[Sequence]) -> bool:
        """Return whether a sequence `ahead` is about to read more of the same prompt than `match` holds."""
        prompt, worth_it = sequence.ids[:-1], match.length + BLOCK
        return any(common_prefix_length(prompt, other.ids) >= worth_it for other in ahead)

    def _new_cache(self, sequence: Sequence, match: PrefixMatch) -> KVCache:
        """Make room for the KV cache of `sequence`, and return it, with the prefix that `match` found.

        Move the prefix if all blocks of the found cache belong to it (the previous turn of a conversation), or if the
        cache was evicted to make room. Otherwise, copy the prefix.
        """
        found, capacity = match.cache, sequence.max_total_tokens
        if found is not None:
            self.prefix_cache.touch(found)
            if match.length == found.length // BLOCK * BLOCK:
                self.prefix_cache.remove(found)
        in_use = [other for other in self.running if other.cache is not None]
        self.prefix_cache.evict(self.cache_capacity - capacity - sum(other.max_total_tokens for other in in_use))
        try:
            if found is None:
                return KVCache(capacity)
            if found in self.prefix_cache or any(other.cache is found for other in in_use):
                return found.copy_prefix(match.length, capacity=capacity)
            return found.move_prefix(match.length, capacity=capacity)
        except RuntimeError as error:  # too little memory after all, so the prefix is read again
            log.warning("%s", error)
            return KVCache(capacity)
