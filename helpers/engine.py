"""Token ids in, token ids out: the thread that owns the model. The engine knows no text and no transport.

`Engine.submit` puts a prompt into the queue and returns its `TokenStream` at once. Between two steps, the scheduler
removes cancelled sequences, admits waiting ones, and decides what each running one reads next. A step (`_step`) runs
the model once for all of them, because that takes little longer than for one. It then samples the next token of each
sequence and puts it into the sequence's stream.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from concurrent.futures import Future

from torch import Tensor

from .errors import GenerationFailed, HelpersError, InvalidRequest, QueueFull, ServiceUnavailable
from .kv_cache import cache_capacity
from .options import EngineArgs, SamplingParams
from .packed import NOT_FINITE_FIX, PackedModel, forward_packed
from .sampling import make_sampler, token_logprobs
from .scheduler import Chunk, Scheduler
from .sequence import Sequence, TokenStream

log = logging.getLogger(__name__)

_ASK_AGAIN = "The answer is not complete. Ask again, and look into the service's log if it fails again."


class Engine:
    """Generates with one model for many requests at once.

    - `model`: from now on only the engine may call it.
    - `eos_token_ids`: the ids that end an answer. They are not part of it.
    - `context_length`: the tokens that the model can read, prompt and answer together.
    - `args`: the limits.

    Raise `ModelUnavailable` if the model's `prepare` does, and `InvalidRequest` if
    `cache_memory` is too small for any request.
    """

    def __init__(
        self, model: PackedModel, *, eos_token_ids: Collection[int], context_length: int, args: EngineArgs | None = None
    ) -> None:
        self.model = model
        self.eos_token_ids = frozenset(eos_token_ids)
        self.args = args or EngineArgs()
        self.context_length = min(context_length, self.args.context_length or context_length)
        """The tokens that a prompt and its answer may take together."""
        if self.args.context_length and self.args.context_length > context_length:
            log.warning(
                "context_length is %d, but the model reads at most %d tokens, so the context window has %d tokens",
                self.args.context_length,
                context_length,
                context_length,
            )
        self.cache_capacity: int
        """The number of tokens that all KV caches together may hold."""
        self.scheduler: Scheduler
        self.steps = 0
        """The number of times that the model has run."""
        self._changed = threading.Condition()
        self._closed = False
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> TokenStream:
        """Put a prompt of at least one token into the queue, and return its stream at once.

        Raise `InvalidRequest` if prompt and answer together exceed `context_length`, or if the model has no embedding
        for an id. Raise `QueueFull`, or `ServiceUnavailable` if the engine is closed.
        """
        self._check_length(len(prompt_ids), params.max_tokens)
        self._check_ids(prompt_ids)
        sequence = Sequence(
            prompt_ids, max_tokens=params.max_tokens, sampler=make_sampler(params), logprobs=params.logprobs
        )
        with self._changed:
            self.check_queue()
            self.scheduler.add(sequence)
            self._changed.notify()
        return sequence.stream

    def check_queue(self, pending: int = 0) -> None:
        """Raise `QueueFull` or `ServiceUnavailable` if `submit` would do so for any prompt, after `pending` others."""
        if self._closed:
            raise ServiceUnavailable("The model has been shut down. Start the service again.")
        running, waiting = self.running, self.waiting + pending
        if running + waiting >= self.args.max_num_seqs + self.args.max_queue_size:
            requests = "request is" if running == 1 else "requests are"
            raise QueueFull(
                f"The queue is full: {running} {requests} running and {waiting} waiting. "
                f"Ask again in {self.scheduler.seconds_until_next_finish()} s."
            )

    @property
    def running(self) -> int:
        """Return the number of running requests."""
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Return the number of waiting requests. Cancelled ones do not count."""
        return sum(not sequence.stream.cancelled for sequence in tuple(self.scheduler.waiting))

    def close(self) -> None:
        """End all streams as ``cancelled``, and stop the thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens < 1:
            raise InvalidRequest("The prompt is empty. Send at least one character.")
        if prompt_tokens + max_tokens > self.context_length:
            raise InvalidRequest(
                f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: together more than the "
                f"{self.context_length} tokens of the context window. Shorten the prompt or ask for fewer tokens."
            )

    def _check_ids(self, prompt_ids: list[int]) -> None:
        """Raise `InvalidRequest` for an id without an embedding. On a GPU, it would make all later requests fail."""
        end = self.model.num_embeddings
        unknown = next((token_id for token_id in prompt_ids if not 0 <= token_id < end), None)
        if unknown is not None:
            raise InvalidRequest(
                f"The prompt has the token id {unknown}, but the model only knows 0 to {end - 1}: its "
                "tokenizer has more tokens than the model. Leave out the text of this token."
            )

    def _run(self, ready: Future[None]) -> None:
        """Take steps in the engine's thread until the engine is closed or fails."""
        try:
            self._prepare()
        except Exception as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._wait_for_work():
                self._step(self.scheduler.schedule())
            self._end_all("cancelled")
        except Exception as error:
            log.critical("the engine failed", exc_info=error)
            failure = GenerationFailed(f"The engine failed ({type(error).__name__}: {error}). {_ASK_AGAIN}")
            self._end_all("error", failure)

    def _prepare(self) -> None:
        """Try the model, measure the memory for its KV cache, and create the scheduler.

        This runs in the engine's thread. If a second thread runs a model of transformers too, OpenMP counts more
        threads than cores, lets its workers sleep between operations, and every step takes twice as long.
        """
        trial = self.model.prepare()
        bytes_per_token = sum(trial.bytes_per_token.values())
        if self.args.cache_memory is None:
            self.cache_capacity = cache_capacity(trial, context_length=self.context_length)
        else:
            self.cache_capacity = self.args.cache_memory // bytes_per_token
        if self.cache_capacity < 2:
            raise InvalidRequest(
                f"There is memory for a KV cache of {self.cache_capacity} tokens, at {bytes_per_token:,} bytes each. "
                "Give cache_memory enough bytes for all prompts and answers that run at once."
            )
        if self.cache_capacity < self.context_length:
            log.warning(
                "the KV cache holds %d of the %d tokens of the context window", self.cache_capacity, self.context_length
            )
            self.context_length = self.cache_capacity
        self.scheduler = Scheduler(max_num_seqs=self.args.max_num_seqs, cache_capacity=self.cache_capacity)

    def _wait_for_work(self) -> bool:
        """Remove cancelled sequences and admit waiting ones, until one is running. Return False if closed."""
        with self._changed:
            while not self._closed:
                for sequence in self.scheduler.remove_cancelled():
                    sequence.stream.end("cancelled")
                self.scheduler.admit()
                if self.scheduler.running:
                    return True
                self._changed.wait()
        return False

    def _step(self, batch: list[Chunk]) -> None:
        """Run the model once for `batch`, and sample the next token of each sequence whose ids have all been read."""
        self.steps += 1
        try:
            logits, most_likely = forward_packed(self.model, [(chunk.cache, chunk.ids) for chunk in batch])
        except Exception as error:
            log.error("a step for %d sequences failed", len(batch), exc_info=error)
            failure = error.with_traceback(None)  # the traceback would keep the step's tensors in memory
        else:
            for chunk, row, token_id in zip(batch, logits, most_likely, strict=True):
                if not chunk.sequence.unread_ids:
                    self._sample_next(chunk.sequence, row, token_id)
            return
        has_freed_memory = self.scheduler.prefix_cache.evict(0)  # the step may have run out of memory
        if len(batch) == 1 and not has_freed_memory:
            self._fail(batch[0].sequence, failure)
        else:  # retry one by one, so that only the failing request fails
            for chunk in batch:
                self._step([chunk])

    def _sample_next(self, sequence: Sequence, logits: Tensor, most_likely: int | None) -> None:
        """Sample the next token, and put it into the stream unless it ends the answer.

        `most_likely` is None if the logits contain NaN or infinity. The request then fails.
        """
        if most_likely is None:
            log.error("the logits of a request are NaN or infinite")
            self._fail(sequence, ArithmeticError("its logits are NaN or infinite"), fix=NOT_FINITE_FIX)
            return
        try:
            token_id = sequence.sampler(logits) if sequence.sampler else most_likely
            ends = token_id in self.eos_token_ids
            if sequence.logprobs is not None and not ends:
                sequence.stream.logprobs.append(token_logprobs(logits, token_id, sequence.logprobs))
        except Exception as error:
            log.error("sampling failed", exc_info=error)
            self._fail(sequence, error)
            return
        if ends:
            self._finish(sequence, "stop")
            return
        sequence.ids.append(token_id)
        sequence.stream.put(token_id)
        if sequence.completion_tokens == sequence.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: str, error: HelpersError | None = None) -> None:
        self.scheduler.finish(sequence)
        sequence.stream.end(reason, error)

    def _fail(self, sequence: Sequence, error: Exception, *, fix: str = _ASK_AGAIN) -> None:
        """Finish `sequence` with an error. Drop its KV cache: the model may have run out of memory."""
        sequence.cache = None
        after = f"after {sequence.completion_tokens} tokens ({type(error).__name__}: {error})"
        self._finish(sequence, "error", GenerationFailed(f"The model failed {after}. {fix}"))

    def _end_all(self, reason: str, error: HelpersError | None = None) -> None:
        with self._changed:
            self._closed = True
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                sequence.stream.end(reason, error)
