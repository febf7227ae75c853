"""The backends that are measured, behind one interface.

`Backend.answer` asks N questions at once and returns the arrival time of each token of each answer. The questions are
sent as messages, with the article's system prompt, and all backends decode greedily.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

import helpers
from helpers import bundled, models, prompts
from helpers.processes import port_to_listen_on
from measurements import SERVICE, Arrivals


def dialog(question: str) -> list[prompts.Message]:
    """Return `question` as a dialog, after the article's system prompt."""
    return [{"role": "system", "content": prompts.SYSTEM_PROMPT}, {"role": "user", "content": question}]


class Backend:
    """A program that answers questions. `clients`: the numbers of clients that ask it at once."""

    name: str
    clients: Sequence[int]

    def start(self) -> None:
        """Start the backend's process. Most backends return before it is ready, so that several start together."""
        raise NotImplementedError

    def wait_until_ready(self) -> None:
        """Wait until the backend can answer. Raise `SystemExit` if it ends before that."""

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        """Ask all questions at once, each for `max_tokens` tokens, and return the arrival times of the tokens."""
        raise NotImplementedError

    def pid(self) -> int:
        """Return the id of the backend's first process."""
        raise NotImplementedError

    def peak_memory(self) -> int:
        """Return the peak memory of its processes, in bytes (on Linux; elsewhere, their memory now)."""
        processes = [psutil.Process(self.pid()), *psutil.Process(self.pid()).children(recursive=True)]
        return sum(map(_peak, processes))

    def close(self) -> None:
        """Stop the backend's processes. May be called twice."""
        raise NotImplementedError


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _ask_at_once(questions: Sequence[str], stream: Callable[[str], Iterator[Any]]) -> Arrivals:
    """Stream the answers to all questions, each in its own thread. `stream` yields once for each token."""
    arrivals: Arrivals = [[] for _ in questions]
    failures: list[BaseException] = []
    all_ready = threading.Barrier(len(questions) + 1)

    def ask(question: str, times: list[float]) -> None:
        all_ready.wait()
        try:
            for _ in stream(question):
                times.append(time.perf_counter())
        except BaseException as failure:
            failures.append(failure)

    clients = [threading.Thread(target=ask, args=pair) for pair in zip(questions, arrivals, strict=True)]
    for client in clients:
        client.start()
    all_ready.wait()
    started = time.perf_counter()
    for client in clients:
        client.join()
    if failures:
        raise failures[0]
    return [[at - started for at in times] for times in arrivals]


class Service(Backend):
    """This tutorial's service, over gRPC."""

    name = SERVICE

    def __init__(self, model: str, precision: str, clients: Sequence[int]) -> None:
        self.clients = clients
        self._loading = (model, precision)

    def start(self) -> None:
        """Start the service and wait until it is ready."""
        self.service = helpers.serve(*self._loading, port=0)

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        def stream(question: str) -> Iterator[None]:
            answer = self.service.stream(dialog(question), max_tokens=max_tokens)
            seen = 0
            for _ in answer:
                yield from [None] * (answer.completion_tokens - seen)
                seen = answer.completion_tokens

        return _ask_at_once(questions, stream)

    def pid(self) -> int:
        return self.service.pid

    def close(self) -> None:
        self.service.stop()


class TransformersServe(Backend):
    """`transformers serve`, over HTTP.

    `cache_blocks`: the size of the KV cache for continuous batching, in blocks of 256 tokens. By default it takes
    60 % of the machine's memory, and filling it with zeros takes seconds.
    """

    def __init__(
        self,
        folder: str,
        dtype: str,
        clients: Sequence[int],
        *,
        continuous_batching: bool,
        cache_blocks: int | None = None,
    ) -> None:
        self.name = "transformers serve" + continuous_batching * " --continuous-batching"
        self.clients = clients
        self._model = folder
        self._options = ["--dtype", dtype, "--device", "auto"]
        if continuous_batching:
            self._options += ["--continuous-batching", "--attn-implementation", "sdpa"]
            if cache_blocks is not None:
                self._options += ["--cb-num-blocks", str(cache_blocks)]

    def start(self) -> None:
        self._port = port_to_listen_on("127.0.0.1", 0)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self._model]
        command += ["--host", "127.0.0.1", "--port", str(self._port), *self._options]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        while not self._is_healthy():
            if self._process.poll() is not None:
                self._log.seek(0)
                raise SystemExit(f"{self.name} did not start:\n{self._log.read().decode(errors='replace')[-3000:]}")
            time.sleep(0.2)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        def stream(question: str) -> Iterator[None]:
            options = {"model": self._model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
            body = json.dumps({**options, "messages": dialog(question)})
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            with contextlib.closing(connection):
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                if response.status != 200:
                    raise SystemExit(f"{self.name}: {response.status} {response.read(500)!r}")
                for line in response:
                    if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                        yield None

        return _ask_at_once(questions, stream)

    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()  # with --continuous-batching it may ignore SIGTERM
        self._process.wait()
        self._log.close()


class LoopProcess:
    """A process that calls `load(*arguments)` once and then runs loops. Several `Loop`s may share it."""

    def __init__(self, load: Callable[..., None], *arguments: str) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=load, initargs=arguments
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call `function` in the process, after everything that was submitted before."""
        return self._pool.submit(function, *arguments)

    def close(self) -> None:
        """End the process when all submitted calls are done. May be called twice."""
        self._pool.shutdown()


class Loop(Backend):
    """A loop in `process`, without any service around it."""

    def __init__(self, name: str, process: LoopProcess, loop: Callable[..., Arrivals], clients: Sequence[int]) -> None:
        self.name, self.clients = name, clients
        self._process, self._loop = process, loop

    def start(self) -> None:
        self._pid = self._process.submit(os.getpid)

    def wait_until_ready(self) -> None:
        self._pid.result()

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        return self._process.submit(self._loop, questions, max_tokens).result()

    def pid(self) -> int:
        return self._pid.result()

    def close(self) -> None:
        self._process.close()


# --- Functions for a LoopProcess --------------------------------------------------------------------

_loaded: Any = None


def load(model: str, precision: str) -> None:
    """Load the model that the loops below run."""
    global _loaded
    _loaded = models.load(model, precision)


def article_loop(questions: Sequence[str], max_tokens: int) -> Arrivals:
    """Answer one question as the article does: for each token, `generate` reads the whole text again."""
    started, times = time.perf_counter(), []
    tokenizer, model = _loaded.tokenizer, _loaded.model
    inputs = {"input_ids": [prompts.token_ids(dialog(questions[0]), tokenizer)]}
    inputs = tokenizer.pad(inputs, return_tensors="pt").to(model.device)
    for _ in range(max_tokens):
        output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        tokenizer.decode(output[0][-1], skip_special_tokens=True)
        times.append(time.perf_counter() - started)
        inputs = {"input_ids": output, "attention_mask": output.new_ones(output.shape)}
    return [times]


def _bare_loop(questions: Sequence[str], max_tokens: int, *, masked: bool) -> Arrivals:
    """Answer all questions as one batch, with transformers' own model and cache.

    All prompts are cut to the length of the shortest, so no row is padded. With `masked`, the model gets an
    attention mask anyway, and then runs different kernels.
    """
    import torch
    from transformers import DynamicCache

    model = _loaded.model
    started, times = time.perf_counter(), []
    ids = [prompts.token_ids(dialog(question), _loaded.tokenizer) for question in questions]
    rows = torch.tensor([row[-min(map(len, ids)) :] for row in ids], device=model.device)
    mask = torch.ones_like(rows)
    mask[0, 0] = 0  # transformers drops a mask that hides nothing
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for _ in range(max_tokens):
            masking = {"attention_mask": mask} if masked else {}
            logits = model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1, **masking).logits
            rows = logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(rows)], dim=1)
            rows.tolist()  # a client gets its ids on the CPU
            times.append(time.perf_counter() - started)
    return [times] * len(questions)


def bare_loop(questions: Sequence[str], max_tokens: int) -> Arrivals:
    """Answer all questions as one batch, without an attention mask."""
    return _bare_loop(questions, max_tokens, masked=False)


def masked_bare_loop(questions: Sequence[str], max_tokens: int) -> Arrivals:
    """Answer all questions as one batch, with an attention mask."""
    return _bare_loop(questions, max_tokens, masked=True)


def load_llama_cpp() -> None:
    """Load the bundled model's GGUF file into llama.cpp."""
    from llama_cpp import Llama

    global _loaded
    _loaded = Llama(str(bundled.bundled_gguf()), n_ctx=2048, n_threads=os.cpu_count(), verbose=False)


def llama_cpp_loop(questions: Sequence[str], max_tokens: int) -> Arrivals:
    """Answer the questions one after the other: llama-cpp-python's own interface has no batches."""
    started, arrivals = time.perf_counter(), []
    for question in questions:
        chunks = _loaded.create_chat_completion(dialog(question), max_tokens=max_tokens, temperature=0, stream=True)
        arrivals.append(
            [time.perf_counter() - started for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
        )
    return arrivals
