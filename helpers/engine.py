"""Token ids in, token ids out. The engine knows no text and no transport.

One thread owns the model and steps all live prompts together, because a run of the model for many costs
little more than a run for one. `Engine.submit` puts a prompt in line and returns its `Generation` at once.
Between two steps prompts join (`_join`) and leave (`_leave`); in a step (`_step`) each that is being
answered reads its latest token, and those that are new read a piece of their prompt. Readers take the
ids from their `Generation` as they come (``for`` or ``async for``), may leave at any time, and find a
failure of the model raised where they read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, AsyncIterator, Callable, Collection, Iterator, Sequence

import torch

from .errors import GenerationFailed, HelpersError, InvalidRequest, ServiceBusy, ServiceUnavailable
from .kv_cache import Kept, KeyValues, common_beginning, prepare, run, spare_tokens

log = logging.getLogger(__name__)

PREFILL_CHUNK = 128
"""Prompt tokens that one step reads, of all new prompts together: all of the only one, half for the first of several. More would be hardly quicker by the token
(on a CPU), and the readers who are being answered wait for it between two of their tokens."""

WORTH_SHARING = 16
"""Tokens at the beginning of a prompt that are worth taking from another's memory, or waiting a step for while
another is reading the same. Fewer are read again."""

MAX_LIVE = 32
"""Readers who are answered at once. On two CPU cores a run for 32 takes about three times as long as one for one."""
MAX_WAITING = 64


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
        sample: Callable[[torch.Tensor], int] | None,
    ) -> None:
        self.ids = list(prompt_ids)
        """The prompt, and what was generated so far."""
        self.past: KeyValues | None = None
        """What the model remembers of `ids`: all but those that the next step feeds it."""
        self.max_tokens = max_tokens
        self.room = len(self.ids) + max_tokens
        """Tokens for which memory is needed at most."""
        self.sample = sample
        self.completion_tokens = 0
        """How many of `ids` were generated."""
        self.finish_reason: str | None = None
        """``stop`` (the model ended), ``length`` (`max_tokens`), ``cancelled``, ``error``; None before the end."""
        self.cancelled = False
        self.joined = 0.0
        """When its turn came, in seconds of `time.monotonic`."""
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
    """Generates for one `transformers` causal language model, for many readers at once.

    - `model`: on its device, in evaluation mode. It is the engine's from now on: not to be called elsewhere.
    - `eos_token_ids`: the ids that end an answer; they are not part of it.
    - `context_length`: how many tokens prompt and answer may take together. Where `cache_memory` holds
      fewer, so many.
    - `cache_memory`: bytes for keys and values, of the prompts that are being answered (each with room for its
      `max_tokens`) and of ended ones that are kept for those that begin alike. By default
      `helpers.kv_cache.spare_tokens` says for how many there is room.
    - `max_live` prompts are answered at once, and `max_waiting` more may stand in line.

    Raises `ModelUnavailable` for a model that `helpers.kv_cache.prepare` refuses, `InvalidRequest` for limits
    under which nobody could be answered.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Collection[int],
        context_length: int,
        max_live: int = MAX_LIVE,
        max_waiting: int = MAX_WAITING,
        cache_memory: int | None = None,
    ) -> None:
        check_limits(max_live, max_waiting, context_length)
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_live, self.max_waiting = max_live, max_waiting
        self.steps = 0
        """How many times the model was run for a prompt since the start."""
        self._line: deque[Generation] = deque()
        self._live: list[Generation] = []
        self._kept = Kept()
        self._seconds: deque[float] = deque(maxlen=max_live)  # that the latest to leave were live
        self._changed = threading.Condition()
        self._closed = False
        ready: Future[KeyValues] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        trial = ready.result()
        if cache_memory is None:
            self.cache_tokens = spare_tokens(trial, window=context_length)
        else:
            self.cache_tokens = cache_memory // sum(trial.bytes_per_token.values())
        self.context_length = min(context_length, self.cache_tokens)
        if self.cache_tokens < 2:
            self.close()
            raise InvalidRequest(
                f"There is room for the keys and values of {self.cache_tokens} tokens, at "
                f"{sum(trial.bytes_per_token.values()):,} bytes each: give cache_memory enough for all the prompts "
                "and answers that are to be there at once."
            )
        if self.context_length < context_length:
            log.warning("the memory for keys and values holds %d of a window's %d tokens", self.cache_tokens, context_length)

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
        model's window together; `ServiceBusy` where the line is full; `ServiceUnavailable` once the engine
        is closed.
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
            prompt_ids, max_tokens=max_tokens, sample=_sampler(temperature, top_p, seed)
        )
        with self._changed:
            self.check_place()
            self._line.append(generation)
            self._changed.notify()
        return generation

    def check_place(self, coming: int = 0) -> None:
        """Raise what `submit` would raise for any prompt, if `coming` others came before it: `ServiceBusy` or
        `ServiceUnavailable`."""
        if self._closed:
            raise ServiceUnavailable(
                "The model has been shut down and takes no more prompts. Start the service again."
            )
        if self.live + self.waiting + coming >= self.max_live + self.max_waiting:
            raise ServiceBusy(
                f"The service is busy: it answers {self.live} readers, and {self.waiting + coming} more stand in line, "
                f"which is as many as may. Try again in {self._seconds_to_a_place()} s."
            )

    @property
    def live(self) -> int:
        """How many prompts are being answered now."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """How many prompts stand in line; those whose readers have left do not."""
        return sum(not generation.cancelled for generation in tuple(self._line))

    def close(self) -> None:
        """End all generations as ``cancelled`` and stop the thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _seconds_to_a_place(self) -> int:
        """In how many seconds the next may leave, by how long the latest took, or those that are there have."""
        live = tuple(self._live)
        seconds = tuple(self._seconds) or [time.monotonic() - generation.joined for generation in live]
        return math.ceil(sum(seconds) / max(1, len(seconds)) / max(1, len(live))) or 1

    def _run(self, ready: Future[KeyValues]) -> None:
        try:
            # in this thread too: with two that run torch, OpenMP takes them for more than the machine has
            # cores, no longer lets its threads wait awake, and each run takes twice as long
            ready.set_result(prepare(self.model))
        except Exception as error:
            ready.set_exception(error)
            return
        try:
            while self._join():
                if feeds := self._plan():
                    self._step(feeds)
            self._end_all("cancelled")
        except Exception as error:
            log.critical("the engine failed", exc_info=error)
            self._end_all("error", GenerationFailed(f"The engine failed ({type(error).__name__}: {error}). {_AGAIN}"))

    def _end_all(self, reason: str, failure: HelpersError | None = None) -> None:
        with self._changed:
            self._closed = True
            for generation in [*self._live, *self._line]:
                generation._end(reason, failure)

    def _join(self) -> bool:
        """Between two steps: those whose readers left go, and the first in line come, as far as there is
        room. Waits until there is somebody to answer; False once the engine is closed."""
        with self._changed:
            while not self._closed:
                for generation in [g for g in self._live if g.cancelled]:
                    self._leave(generation, "cancelled")
                for generation in [g for g in self._line if g.cancelled]:
                    self._line.remove(generation)
                    generation._end("cancelled")
                while self._line and self._has_room_for(self._line[0]):
                    self._live.append(self._line.popleft())
                    self._live[-1].joined = time.monotonic()
                if self._live:
                    return True
                self._changed.wait()
        return False

    def _has_room_for(self, generation: Generation) -> bool:
        """Whether it may be answered now, beside the others. What is kept of ended ones makes room for it, but last
        of all what it can use itself."""
        free = self.cache_tokens - sum(live.room for live in self._live) - generation.room
        if free < 0 or len(self._live) == self.max_live:
            return False
        shared, source = self._longest_known(generation)
        self._kept.used(source)
        if source and shared == source.length and self._kept.take(source):  # of the turn before this one
            try:
                source.grow(generation.room)
                generation.past = source
            except RuntimeError as error:  # no memory after all: it will be read again
                log.warning("%s", error)
        self._kept.shrink(free)
        return True

    def _plan(self) -> list[tuple[Generation, list[int]]]:
        """Who reads what in the next step: the token just generated, or the next piece of a prompt. Whoever came
        first gets most of what a step reads of prompts, and nobody nothing."""
        feeds: list[tuple[Generation, list[int]]] = []
        reading: list[tuple[Generation, list[int]]] = []
        for n, generation in enumerate(self._live):
            if generation.past is None and not self._begin(generation, ahead=self._live[:n]):
                continue
            ids = generation.ids[generation.past.length :]
            (feeds if len(ids) == 1 else reading).append((generation, ids))
        budget = PREFILL_CHUNK
        for n, (generation, ids) in enumerate(reading, start=1):
            piece = ids[: budget if n == len(reading) else max(1, budget // 2)]
            budget = max(1, budget - len(piece))
            feeds.append((generation, piece))
        return feeds

    def _begin(self, generation: Generation, *, ahead: list[Generation]) -> bool:
        """Give a new one its memory, with as much of its prompt as any other sequence has read already.

        False if it shall wait for a step, because one of those `ahead` is to read what it could use.
        """
        shared, source = self._longest_known(generation)
        if any(common_beginning(generation.ids[:-1], other.ids) >= shared + WORTH_SHARING for other in ahead):
            return False
        generation.past = KeyValues(generation.room)
        if source:
            try:
                generation.past = source.beginning(shared, capacity=generation.room)
            except RuntimeError as error:  # no memory for a copy: it will be read again
                log.warning("%s", error)
        return True

    def _longest_known(self, generation: Generation) -> tuple[int, KeyValues | None]:
        """How much of its prompt any other sequence has read, and the keys and values of the one that has most;
        (0, None) where it is not worth sharing."""
        prompt = generation.ids[:-1]  # the last one is read in any case: its logits are needed
        known = [*self._kept, *((other.ids[: other.past.length], other.past) for other in self._live if other.past)]
        found: list[tuple[int, KeyValues | None]] = [(common_beginning(prompt, ids), past) for ids, past in known]
        longest = max(found, key=lambda one: one[0], default=(0, None))
        return longest if longest[0] >= WORTH_SHARING else (0, None)

    def _step(self, feeds: list[tuple[Generation, list[int]]]) -> None:
        """Run the model once for all of `feeds`, and hand each its next token, if its prompt is read."""
        self.steps += 1
        try:
            logits, likeliest = run(self.model, [(generation.past, ids) for generation, ids in feeds])
        except Exception as error:
            log.error("a step for %d failed", len(feeds), exc_info=error)
            failure = error.with_traceback(None)  # which holds on to the step's memory
        else:
            for (generation, _), row, token_id in zip(feeds, logits, likeliest):
                if generation.past.length == len(generation.ids):
                    try:
                        self._continue(generation, generation.sample(row) if generation.sample else token_id)
                    except Exception as error:
                        log.error("the choice of a token failed", exc_info=error)
                        self._fail(generation, error)
            return
        freed = self._kept.shrink(0)  # it may have been the memory
        if len(feeds) == 1 and not freed:
            return self._fail(feeds[0][0], failure)
        for feed in feeds:  # one by one: those who are not to blame go on
            self._step([feed])

    def _continue(self, generation: Generation, token_id: int) -> None:
        if token_id in self.eos_token_ids:
            return self._leave(generation, "stop")
        generation.ids.append(token_id)
        generation.completion_tokens += 1
        generation._deliver(token_id)
        if generation.completion_tokens == generation.max_tokens:
            self._leave(generation, "length")

    def _fail(self, generation: Generation, error: Exception) -> None:
        generation.past = None
        failure = GenerationFailed(
            f"The model failed after {generation.completion_tokens} tokens ({type(error).__name__}: {error}). {_AGAIN}"
        )
        self._leave(generation, "error", failure)

    def _leave(self, generation: Generation, reason: str, failure: HelpersError | None = None) -> None:
        self._live.remove(generation)
        self._seconds.append(time.monotonic() - generation.joined)
        generation._end(reason, failure)
        past, generation.past = generation.past, None  # whoever still reads the answer does not hold its memory
        if past is not None and past.length >= WORTH_SHARING:
            self._kept.add(generation.ids[: past.length], past)


_AGAIN = (
    "What came before is not a whole answer; ask again, and look into the service's log if it happens again."
)


def check_limits(max_live: int, max_waiting: int, context_length: int | None = None) -> None:
    """Raise `InvalidRequest` for limits under which nobody could be answered."""
    if max_live < 1 or max_waiting < 0:
        raise InvalidRequest(
            f"max_live is {max_live} and max_waiting {max_waiting}: at least 1 is to be answered at once, "
            "and at least 0 may wait."
        )
    if context_length is not None and context_length < 2:
        raise InvalidRequest(
            f"context_length is {context_length}: at least one token of a prompt and one of its answer are to fit."
        )


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
            f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: together more than the "
            f"{context_length} tokens for which there is room, in the model's window and in the memory for its keys "
            "and values. Shorten the prompt or ask for fewer tokens."
        )


def _sampler(temperature: float, top_p: float, seed: int | None) -> Callable[[torch.Tensor], int] | None:
    """A function from logits, shape (vocab,), to the next token's id; None where that is always the likeliest."""
    if temperature == 0:
        return None

    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    def sample(logits: torch.Tensor) -> int:
        probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
        if top_p < 1:
            likely = probabilities.topk(min(1024, len(probabilities)))  # enough, as a rule, and to sort all takes long
            enough = likely.values.sum() >= top_p
            probabilities, ids = likely if enough else probabilities.sort(descending=True)
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.where(before < top_p, 0.0)
            return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return sample
