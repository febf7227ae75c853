"""Who is measured: everything that can answer questions, behind one method.

`Contender.answer` asks N questions at once and tells when each token of each answer came. The questions
are put as messages, with the article's system prompt; all answer greedily.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import psutil

import helpers
from helpers import models, prompts
from helpers.processes import port_to_listen_on

Arrivals = list[list[float]]
"""For each answer, when its tokens came: seconds since all questions were asked."""


def dialog(question: str) -> list[prompts.Message]:
    return [{"role": "system", "content": prompts.SYSTEM_PROMPT}, {"role": "user", "content": question}]


class Contender:
    """Something that answers. `readers`: how many at once it is asked by."""

    name: str
    readers: Sequence[int]

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        raise NotImplementedError

    def pid(self) -> int:
        raise NotImplementedError

    def peak_memory(self) -> int:
        """Bytes that its processes held at their highest, where the system tells (Linux); else those of now."""
        processes = [psutil.Process(self.pid()), *psutil.Process(self.pid()).children(recursive=True)]
        return sum(map(_peak, processes))

    def close(self) -> None:
        pass


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def _at_once(questions: Sequence[str], read: Callable[[str], Iterator[Any]]) -> Arrivals:
    """Read the answers to all questions, each in a thread of its own."""
    arrivals: Arrivals = [[] for _ in questions]
    failures: list[BaseException] = []
    everybody = threading.Barrier(len(questions) + 1)

    def one(question: str, came: list[float]) -> None:
        everybody.wait()
        try:
            for _ in read(question):
                came.append(time.perf_counter())
        except BaseException as failure:
            failures.append(failure)

    readers = [threading.Thread(target=one, args=pair) for pair in zip(questions, arrivals)]
    for reader in readers:
        reader.start()
    everybody.wait()
    started = time.perf_counter()
    for reader in readers:
        reader.join()
    if failures:
        raise failures[0]
    return [[at - started for at in came] for came in arrivals]


class Service(Contender):
    """This tutorial's service, over gRPC."""

    name = "this service"

    def __init__(self, model: str, precision: str, readers: Sequence[int]) -> None:
        self.readers = readers
        self.service = helpers.serve(model, precision, port=0)

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        def read(question: str) -> Iterator[None]:
            answer = self.service.stream(dialog(question), max_tokens=max_tokens)
            seen = 0
            for _ in answer:
                yield from [None] * (answer.completion_tokens - seen)
                seen = answer.completion_tokens

        return _at_once(questions, read)

    def pid(self) -> int:
        return self.service.pid

    def close(self) -> None:
        self.service.stop()


class TransformersServe(Contender):
    """`transformers serve`, over HTTP."""

    def __init__(self, folder: str, dtype: str, readers: Sequence[int], *, continuous_batching: bool) -> None:
        self.name = "transformers serve" + continuous_batching * " --continuous-batching"
        self.readers = readers
        self.model = folder
        self.port = port_to_listen_on("127.0.0.1", 0)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", dtype, "--device", "auto"]
        if continuous_batching:
            command += ["--continuous-batching", "--attn-implementation", "sdpa"]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        while not self._answers():
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(f"{self.name} did not start:\n{self.log.read().decode(errors='replace')[-3000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        def read(question: str) -> Iterator[None]:
            body = {"model": self.model, "messages": dialog(question), "stream": True, "temperature": 0}
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            with contextlib.closing(connection):
                connection.request(
                    "POST",
                    "/v1/chat/completions",
                    json.dumps({**body, "max_tokens": max_tokens}),
                    {"Content-Type": "application/json"},
                )
                response = connection.getresponse()
                if response.status != 200:
                    raise SystemExit(f"{self.name}: {response.status} {response.read(500)!r}")
                for line in response:
                    if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                        yield None

        return _at_once(questions, read)

    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        self.process.kill()  # with --continuous-batching it may not end when it is asked to
        self.process.wait()
        self.log.close()


class InProcess(Contender):
    """A loop in a process of its own, without any service around it."""

    def __init__(
        self, name: str, load: Callable[..., None], loop: Callable[..., Arrivals], readers: Sequence[int], *loading: str
    ) -> None:
        self.name, self.readers, self._loop = name, readers, loop
        self._process = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=load, initargs=loading
        )

    def answer(self, questions: Sequence[str], max_tokens: int) -> Arrivals:
        return self._process.submit(self._loop, questions, max_tokens).result()

    def pid(self) -> int:
        return next(iter(self._process._processes))

    def close(self) -> None:
        self._process.shutdown()


_loaded: Any = None


def load(model: str, precision: str) -> None:
    global _loaded
    _loaded = models.load(model, precision)


def article(questions: Sequence[str], max_tokens: int) -> Arrivals:
    """The article's loop: for each token, `generate` reads the whole text again."""
    started, came = time.perf_counter(), []
    tokenizer, model = _loaded.tokenizer, _loaded.model
    input = {"input_ids": [prompts.token_ids(dialog(questions[0]), tokenizer)]}
    input = tokenizer.pad(input, return_tensors="pt").to(model.device)
    for _ in range(max_tokens):
        output = model.generate(**input, max_new_tokens=1, do_sample=False)
        tokenizer.decode(output[0][-1], skip_special_tokens=True)
        came.append(time.perf_counter() - started)
        input = {"input_ids": output, "attention_mask": output.new_ones(output.shape)}
    return [came]


def bare(questions: Sequence[str], max_tokens: int, *, masked: bool) -> Arrivals:
    """A batch of rows in step, with the model and the cache as transformers has them.

    The prompts are cut to the shortest, so that no row is padded; `masked` gives the model an attention mask all
    the same, and it then takes another way through its kernels.
    """
    import torch
    from transformers import DynamicCache

    model = _loaded.model
    started, came = time.perf_counter(), []
    ids = [prompts.token_ids(dialog(question), _loaded.tokenizer) for question in questions]
    rows = torch.tensor([row[-min(map(len, ids)) :] for row in ids], device=model.device)
    mask = torch.ones_like(rows)
    mask[0, 0] = 0  # one token that is not looked at, or the mask would be dropped as needless
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model(
                input_ids=rows,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **({"attention_mask": mask} if masked else {}),
            ).logits[:, -1]
            rows = logits.argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(rows)], dim=1)
            rows.tolist()  # as a reader would get them
            came.append(time.perf_counter() - started)
    return [came] * len(questions)


def bare_unmasked(questions: Sequence[str], max_tokens: int) -> Arrivals:
    return bare(questions, max_tokens, masked=False)


def bare_masked(questions: Sequence[str], max_tokens: int) -> Arrivals:
    return bare(questions, max_tokens, masked=True)


def load_llama_cpp(*_: str) -> None:
    import os

    from llama_cpp import Llama

    global _loaded
    _loaded = Llama(str(models.embedded_gguf()), n_ctx=2048, n_threads=os.cpu_count(), verbose=False)


def llama_cpp(questions: Sequence[str], max_tokens: int) -> Arrivals:
    """One reader after the other: the library has no batches in its own interface."""
    started, arrivals = time.perf_counter(), []
    for question in questions:
        chunks = _loaded.create_chat_completion(dialog(question), max_tokens=max_tokens, temperature=0, stream=True)
        arrivals.append(
            [time.perf_counter() - started for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
        )
    return arrivals
