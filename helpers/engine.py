"""Token ids in, token ids out. The engine knows no text and no transport.

One thread owns the model. `Engine.submit` puts a prompt in line and returns its `Generation` at once;
the thread prefills the prompt once, keeps the attention cache, and from then on feeds the model one
token a step. Readers take the ids from their `Generation` as they come (``for`` or ``async for``), may
leave at any time, and find a failure of the model raised where they read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from typing import Any, AsyncIterator, Callable, Collection, Iterator, Sequence

import torch
from transformers import DynamicCache

from .errors import GenerationFailed, HelpersError, InvalidRequest, ServiceUnavailable

log = logging.getLogger(__name__)

PREFILL_CHUNK = 256
"""Prompt tokens that one step reads: a reader who leaves during a long prompt is noticed in between."""


class Generation:
    """One prompt in line, being answered, or done. Made by `Engine.submit`; read it once.

    Iterating yields token ids, the end-of-sequence token not among them, and raises
    `GenerationFailed` where the model did. Afterwards `finish_reason` tells why it ended.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        choose: Callable[[torch.Tensor], int],
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.max_tokens = max_tokens
        self.choose = choose
        self.completion_tokens = 0
        """Ids that were generated so far."""
        self.finish_reason: str | None = None
        """``stop`` (the model ended), ``length`` (`max_tokens`), ``cancelled``, ``error``; None before the end."""
        self.cancelled = False
        self._inbox: deque[int | HelpersError | None] = deque()
        self._arrived = threading.Event()
        self._wake: Callable[[], Any] = self._arrived.set

    def cancel(self) -> None:
        """Stop generating: the engine takes no further step for this prompt. May be called twice."""
        self.cancelled = True

    def __iter__(self) -> Iterator[int]:
        while True:
            self._arrived.wait()
            self._arrived.clear()
            while self._inbox:
                if (token_id := self._take()) is None:
                    return
                yield token_id

    async def __aiter__(self) -> AsyncIterator[int]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        arrived.set()  # whatever came before this line is in the inbox already
        while True:
            await arrived.wait()
            arrived.clear()
            while self._inbox:
                if (token_id := self._take()) is None:
                    return
                yield token_id

    def _take(self) -> int | None:
        item = self._inbox.popleft()
        if isinstance(item, HelpersError):
            raise item
        return item

    def _deliver(self, item: int | HelpersError | None) -> None:
        """Called by the engine's thread: a token id, a failure, or None for the end."""
        self._inbox.append(item)
        try:
            self._wake()
        except RuntimeError:  # the reader's event loop is closed: nobody reads any more
            self.cancel()

    def _end(self, reason: str, failure: HelpersError | None = None) -> None:
        if self.finish_reason is None:
            self.finish_reason = reason
            self._deliver(failure)


class Engine:
    """Generates for one `transformers` causal language model, one prompt after the other.

    - `model`: on its device, in evaluation mode.
    - `eos_token_ids`: the ids that end an answer; they are not part of it.
    - `context_length`: how many tokens prompt and answer may take together.
    """

    def __init__(self, model: Any, *, eos_token_ids: Collection[int], context_length: int) -> None:
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.context_length = context_length
        self.steps = 0
        """How many times the model was run since the start."""
        self._line: deque[Generation] = deque()
        self._live: Generation | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generation:
        """Put a prompt in line: ids of shape (length,), at least one. Returns at once.

        `temperature` 0 is greedy; otherwise tokens are sampled from the likeliest that together reach
        `top_p`, by a random generator of this prompt's own, started with `seed`.

        Raises `InvalidRequest` for values out of range, and where prompt and answer do not fit the
        model's window together; `ServiceUnavailable` once the engine is closed.
        """
        check_request(
            len(prompt_ids),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            context_length=self.context_length,
        )
        generation = Generation(
            prompt_ids, max_tokens=max_tokens, choose=_chooser(temperature, top_p, seed)
        )
        with self._changed:
            if self._closed:
                raise ServiceUnavailable(
                    "The model has been shut down and takes no more prompts. Start the service again."
                )
            self._line.append(generation)
            self._changed.notify()
        return generation

    @property
    def live(self) -> int:
        """How many prompts are being answered now."""
        return int(self._live is not None)

    @property
    def waiting(self) -> int:
        """How many prompts stand in line; one whose reader has left counts until its turn comes."""
        return len(self._line)

    def close(self) -> None:
        """End all generations as ``cancelled`` and stop the thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (generation := self._next()) is not None:
            try:
                reason = self._answer(generation)
            except Exception as error:
                log.exception("the model raised after %d tokens", generation.completion_tokens)
                failure = GenerationFailed(
                    f"The model failed after {generation.completion_tokens} tokens "
                    f"({type(error).__name__}: {error}). What came before is not a whole answer; "
                    "ask again, and look into the service's log if it happens again."
                )
                generation._end("error", failure)
            else:
                generation._end(reason)
        for generation in self._line:
            generation._end("cancelled")

    def _next(self) -> Generation | None:
        """The first in line whose reader is still there; None when the engine is to stop."""
        with self._changed:
            self._live = None
            while not self._closed:
                if not self._line:
                    self._changed.wait()
                elif (generation := self._line.popleft()).cancelled:
                    generation._end("cancelled")
                else:
                    self._live = generation
                    return generation
        return None

    @torch.inference_mode()
    def _answer(self, generation: Generation) -> str:
        """Run the model until the answer ends; the reason why it did."""
        cache = DynamicCache(config=self.model.config)
        prompt = torch.tensor([generation.prompt_ids], device=self.model.device)
        *beginning, last = prompt.split(PREFILL_CHUNK, dim=1)
        for chunk in beginning:
            if generation.cancelled or self._closed:
                return "cancelled"
            self._step(chunk, cache)
        ids = last
        while True:
            if generation.cancelled or self._closed:
                return "cancelled"
            token_id = generation.choose(self._step(ids, cache))
            if token_id in self.eos_token_ids:
                return "stop"
            generation.completion_tokens += 1
            generation._deliver(token_id)
            if generation.completion_tokens == generation.max_tokens:
                return "length"
            ids = torch.tensor([[token_id]], device=self.model.device)

    def _step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Run the model over `ids` of shape (1, n); the logits after the last of them, shape (vocab,)."""
        self.steps += 1
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1]


def check_request(
    prompt_tokens: int,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    context_length: int,
) -> None:
    """Raise `InvalidRequest`, with the numbers, for a request that no answer can be generated for."""
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}; ask for at least 1 token.")
    if not (math.isfinite(temperature) and 0 <= temperature <= 2):
        raise InvalidRequest(
            f"temperature is {temperature}; it goes from 0 (always the likeliest token) to 2."
        )
    if not 0 < top_p <= 1:
        raise InvalidRequest(f"top_p is {top_p}; it is a probability, above 0 and at most 1.")
    if seed is not None and not 0 <= seed < 2**31:
        raise InvalidRequest(f"seed is {seed}; it is a whole number from 0 to 2**31 - 1.")
    if prompt_tokens < 1:
        raise InvalidRequest("The prompt is empty. Send at least one character.")
    if prompt_tokens + max_tokens > context_length:
        raise InvalidRequest(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: together more than "
            f"the {context_length} tokens of the model's window. Shorten the prompt or ask for fewer tokens."
        )


def _chooser(temperature: float, top_p: float, seed: int | None) -> Callable[[torch.Tensor], int]:
    """A function from logits, shape (vocab,), to the next token's id."""
    if temperature == 0:
        return lambda logits: int(logits.argmax())

    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    def sample(logits: torch.Tensor) -> int:
        probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
        if top_p < 1:
            probabilities, ids = probabilities.sort(descending=True)
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.where(before < top_p, 0.0)
            return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return sample
