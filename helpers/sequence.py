"""The two sides of a request: a `Sequence` inside the engine, and a `TokenStream` for the client.

The engine's thread puts token ids into the stream; the client takes them out in any other thread or event loop.
The stream does not refer to the sequence, so an unread answer holds no KV cache.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import HelpersError

if TYPE_CHECKING:
    from torch import Tensor

    from .kv_cache import KVCache


class TokenStream:
    """The answer to one request. `Engine.submit` returns it; iterate over it once.

    Iterating, with ``for`` or ``async for``, yields token ids, without the end-of-sequence token, and raises
    `GenerationFailed` if the model failed.
    """

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        """``stop`` (the model ended the answer), ``length`` (`max_tokens` reached), ``cancelled`` or ``error``.

        None until the answer ends."""
        self.cancelled = False
        self.logprobs: list[list[tuple[int, float]]] = []
        """`helpers.sampling.token_logprobs` of each token so far, if the request asks for them."""
        self.cached_tokens = 0
        """How many tokens of the prompt the prefix cache held. Final when the first token arrives."""
        self.queue_seconds = 0.0
        """How long the request waited until it was admitted. Final when the first token arrives."""
        self._items: deque[int | HelpersError | None] = deque()
        self._arrived = threading.Event()
        self._wake: Callable[[], Any] = self._arrived.set

    def cancel(self) -> None:
        """Stop the generation: the engine takes no further step for it. May be called twice."""
        self.cancelled = True

    def __iter__(self) -> Iterator[int]:
        while True:
            self._arrived.wait()
            self._arrived.clear()
            while self._items:
                if (token_id := self._take()) is None:
                    return
                yield token_id

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        arrived.set()  # earlier tokens are in the queue already
        while True:
            await arrived.wait()
            arrived.clear()
            while self._items:
                if (token_id := self._take()) is None:
                    return
                yield token_id

    def _take(self) -> int | None:
        item = self._items.popleft()
        if isinstance(item, HelpersError):
            raise item
        return item

    def put(self, item: int | HelpersError | None) -> None:
        """Hand the client a token id, an error, or None for the end. The engine calls this in its own thread."""
        self._items.append(item)
        try:
            self._wake()
        except RuntimeError:  # the client's event loop is closed, so nothing reads the stream any more
            self.cancel()

    def end(self, reason: str, error: HelpersError | None = None) -> None:
        """End the stream, with `error` if there is one. The engine calls this. A second call does nothing."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.put(error)


class Sequence:
    """A prompt and its answer so far, with everything that the engine needs to continue it.

    - `ids`: the token ids of the prompt, then those of the answer.
    - `sampler`: `helpers.sampling.make_sampler`, or None for greedy decoding.
    - `logprobs`: how many of the most likely tokens to report beside each token, or None for no log-probabilities.
    - `stream`: where the client reads the answer.
    - `cache`: the KV cache, from the sequence's first step until it finishes.
    - `added_at`, `admitted_at`: when it began to wait and to run, in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        sampler: Callable[[Tensor], int] | None,
        logprobs: int | None = None,
    ) -> None:
        self.ids = list(prompt_ids)
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.logprobs = logprobs
        self.stream = TokenStream()
        self.cache: KVCache | None = None
        self.added_at = self.admitted_at = 0.0
        self._prompt_tokens = len(prompt_ids)

    @property
    def max_total_tokens(self) -> int:
        """Return the maximum number of tokens for which the sequence needs memory."""
        return self._prompt_tokens + self.max_tokens

    @property
    def completion_tokens(self) -> int:
        """Return the number of generated tokens."""
        return len(self.ids) - self._prompt_tokens

    @property
    def unread_ids(self) -> list[int]:
        """Return the ids that the KV cache does not hold yet: the rest of the prompt, or the latest token."""
        return self.ids[self.cache.length if self.cache else 0 :]
