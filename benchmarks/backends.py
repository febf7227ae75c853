"""The backends that are measured, behind one interface.

`Backend.answer` asks N dialogs at once and returns the arrival time of each token of each answer. All backends decode
greedily. A `Server` also streams single answers, so that one client can disturb others.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from helpers import client, prompts
from helpers.errors import ServiceUnavailable
from helpers.processes import kill, port_to_listen_on
from measurements import Arrivals, Row

Dialog = Sequence[prompts.Message]

HOST = "127.0.0.1"
CORES = str(os.cpu_count())


class Backend:
    """A program that answers dialogs.

    - `row`: its name, and the precision of the model.
    - `clients`: the numbers of clients that ask it at once.
    """

    row: Row
    clients: Sequence[int]

    def start(self) -> None:
        """Start the backend's process, and return before it is ready, so that several start together."""
        raise NotImplementedError

    def wait_until_ready(self) -> None:
        """Wait until the backend can answer. Raise `SystemExit` if it ends before that."""
        raise NotImplementedError

    def answer(self, dialogs: Sequence[Dialog], max_tokens: int) -> Arrivals:
        """Ask all dialogs at once, each for `max_tokens` tokens, and return the arrival times of the tokens."""
        raise NotImplementedError

    def pid(self) -> int:
        """Return the id of the backend's first process."""
        raise NotImplementedError

    def peak_memory(self) -> int:
        """Return the peak memory of its processes, in bytes (on Linux; elsewhere, their memory now)."""
        process = psutil.Process(self.pid())
        return sum(map(_peak, [process, *process.children(recursive=True)]))

    def close(self) -> None:
        """Stop the backend's processes. May be called twice."""
        raise NotImplementedError


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return process.memory_info().rss
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


class Interruption(NamedTuple):
    """What a long prompt did to the answers that were running when it arrived. All times are in seconds.

    `first_token`: its TTFT. `before` and `during`: the ITLs of the other answers before it arrived, and until its
    first token.
    """

    first_token: float
    before: list[float]
    during: list[float]


class Server(Backend):
    """A backend in a process that `command` starts, and that answers requests which arrive at any time."""

    def __init__(self, row: Row, clients: Sequence[int]) -> None:
        self.row, self.clients = row, clients

    def command(self) -> list[str]:
        """Return the words that start the server on `port`."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        raise NotImplementedError

    def stream(self, dialog: Dialog, max_tokens: int) -> Generator[None, None, None]:
        """Ask, and yield once for each token. Closing the generator cancels the answer."""
        raise NotImplementedError

    def start(self, **options: Any) -> None:
        self.port = port_to_listen_on(HOST, 0)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(self.command(), stdout=self._log, stderr=subprocess.STDOUT, **options)

    def wait_until_ready(self) -> None:
        while not self.is_ready():
            if (status := self._process.poll()) is not None:
                self._log.seek(0)
                log = self._log.read().decode(errors="replace")
                raise SystemExit(f"{self.row} ended with status {status} before it was ready:\n{log[-3000:]}")
            time.sleep(0.2)

    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        if self._process.poll() is None:
            process = psutil.Process(self._process.pid)
            family = [process, *process.children(recursive=True)]
            process.terminate()
            kill(psutil.wait_procs(family, timeout=5)[1])  # `transformers serve` may ignore SIGTERM
            self._process.wait()
        self._log.close()

    def answer(self, dialogs: Sequence[Dialog], max_tokens: int) -> Arrivals:
        all_ready = threading.Barrier(len(dialogs))

        def ask(dialog: Dialog) -> list[float]:
            all_ready.wait()
            started = time.perf_counter()
            return [time.perf_counter() - started for _ in self.stream(dialog, max_tokens)]

        with ThreadPoolExecutor(len(dialogs)) as threads:
            return list(threads.map(ask, dialogs))

    def interrupt(self, running: Sequence[Dialog], prompt: Dialog, *, after: int) -> Interruption:
        """Send `prompt` when each of the `running` answers has `after` tokens, and stop them at its first token."""
        all_times: list[list[float]] = [[] for _ in running]
        stop = threading.Event()

        def read(dialog: Dialog, times: list[float]) -> None:
            with contextlib.closing(self.stream(dialog, 1000)) as tokens:
                for _ in tokens:
                    times.append(time.perf_counter())
                    if stop.is_set():
                        return

        with ThreadPoolExecutor(len(running)) as threads:
            answers = [threads.submit(read, *pair) for pair in zip(running, all_times, strict=True)]
            try:
                while min(map(len, all_times)) < after and not any(answer.done() for answer in answers):
                    time.sleep(0.005)
                asked, answered = time.perf_counter(), None
                for _ in self.stream(prompt, 1):
                    answered = time.perf_counter()
            finally:
                stop.set()
        for answer in answers:
            answer.result()
        if answered is None:
            raise SystemExit(f"{self.row} gave no token after a long prompt.")
        gaps = [(new, new - old) for times in all_times for old, new in zip(times, times[1:], strict=False)]
        return Interruption(
            first_token=answered - asked,
            before=[gap for at, gap in gaps if at < asked],
            during=[gap for at, gap in gaps if at >= asked],
        )


class Service(Server):
    """The service of the checkout in `project`: this one or another. This checkout's client asks it over gRPC."""

    def __init__(self, row: Row, clients: Sequence[int], *, project: Path, model: str) -> None:
        super().__init__(row, clients)
        self._project, self._model = project, model

    def command(self) -> list[str]:
        options = ["--model", self._model, "--precision", self.row.precision, "--port", str(self.port)]
        return [sys.executable, "-m", "helpers", "serve", *options]

    def start(self, **options: Any) -> None:
        path = os.pathsep.join(filter(None, [str(self._project), os.environ.get("PYTHONPATH")]))
        super().start(cwd=self._project, env={**os.environ, "PYTHONPATH": path}, **options)

    def is_ready(self) -> bool:
        try:
            return bool(client.info(port=self.port))
        except ServiceUnavailable:
            return False

    def stream(self, dialog: Dialog, max_tokens: int) -> Generator[None, None, None]:
        answer = client.stream(dialog, max_tokens=max_tokens, port=self.port)
        seen = 0
        for _ in answer:  # yields no piece for a token whose character is incomplete
            yield from [None] * (answer.completion_tokens - seen)
            seen = answer.completion_tokens


class OpenAIServer(Server):
    """A server with OpenAI's API over HTTP."""

    model = "model"
    """The name of the model in a request."""
    ready_path = "/health"
    """The path that replies with status 200 when the server is ready."""

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", self.ready_path)
            return connection.getresponse().status == 200
        return False

    def stream(self, dialog: Dialog, max_tokens: int) -> Generator[None, None, None]:
        options = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        body = json.dumps({**options, "messages": dialog})
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port)) as connection:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.row}: {response.status} {response.read(500)!r}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    yield None


class BehindGateway(OpenAIServer):
    """A server whose OpenAI API is this checkout's gateway. It names its model itself."""

    ready_path = "/ready"

    def wait_until_ready(self) -> None:
        super().wait_until_ready()
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/v1/models") as reply:
            self.model = json.load(reply)["data"][0]["id"]


class Gateway(BehindGateway):
    """The gateway of this checkout, in front of `service`, which must be started before."""

    def __init__(self, row: Row, clients: Sequence[int], *, service: Service) -> None:
        super().__init__(row, clients)
        self._service = service

    def command(self) -> list[str]:
        service = ["--service", f"{HOST}:{self._service.port}"]
        return [sys.executable, "-m", "helpers", "gateway", *service, "--port", str(self.port)]


class TransformersServe(OpenAIServer):
    """`transformers serve`.

    With continuous batching, its KV cache gets `BLOCKS` blocks of 256 tokens, enough for all clients of the
    benchmark. By default it takes 60 % of the machine's memory.
    """

    BLOCKS = 128

    def __init__(self, precision: str, clients: Sequence[int], *, folder: str, batching: bool) -> None:
        super().__init__(Row("transformers serve" + batching * " --continuous-batching", precision), clients)
        self.model, self._batching = folder, batching

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model]
        words += ["--host", HOST, "--port", str(self.port), "--device", "auto", "--dtype", DTYPES[self.row.precision]]
        if self._batching:
            words += ["--continuous-batching", "--attn-implementation", "sdpa", "--cb-num-blocks", str(self.BLOCKS)]
        return words


class LlamaServer(OpenAIServer):
    """llama.cpp's own server, with `slots` sequences at once, each with a context of 4096 tokens."""

    def __init__(self, row: Row, clients: Sequence[int], *, program: str, file: Path, slots: int) -> None:
        super().__init__(row, clients)
        self._program, self._file, self._slots = program, file, slots

    def command(self) -> list[str]:
        size = ["--parallel", str(self._slots), "--ctx-size", str(4096 * self._slots), "--threads", CORES]
        return [self._program, "--model", str(self._file), "--host", HOST, "--port", str(self.port), *size]


class LlamaCppPythonServer(OpenAIServer):
    """llama-cpp-python's server, which answers one request after the other."""

    ready_path = "/v1/models"

    def __init__(self, row: Row, clients: Sequence[int], *, file: Path) -> None:
        super().__init__(row, clients)
        self._file = file

    @staticmethod
    def is_installed() -> bool:
        """Return whether it can be started: its packages are an extra of llama-cpp-python."""
        needed = ("llama_cpp", "uvicorn", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context")
        return all(map(importlib.util.find_spec, needed))

    def command(self) -> list[str]:
        words = [sys.executable, "-m", "llama_cpp.server", "--model", str(self._file), "--n_ctx", "4096"]
        # by default, a new request ends the one that is being answered
        words += ["--n_threads", CORES, "--interrupt_requests", "false"]
        return [*words, "--host", HOST, "--port", str(self.port)]


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
    """A loop in `process`, without any server around it."""

    def __init__(
        self, row: Row, clients: Sequence[int], *, process: LoopProcess, loop: Callable[..., Arrivals]
    ) -> None:
        self.row, self.clients = row, clients
        self._process, self._loop = process, loop

    def start(self) -> None:
        self._pid = self._process.submit(os.getpid)

    def wait_until_ready(self) -> None:
        self._pid.result()

    def answer(self, dialogs: Sequence[Dialog], max_tokens: int) -> Arrivals:
        return self._process.submit(self._loop, dialogs, max_tokens).result()

    def pid(self) -> int:
        return self._pid.result()

    def close(self) -> None:
        self._process.close()


# --- Functions for a LoopProcess --------------------------------------------------------------------

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""The precisions at which transformers runs any model without further packages → torch's names for them."""

_loaded: Any = None


def load(folder: str, dtype: str) -> None:
    """Load the model and its tokenizer with transformers, on a GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    global _loaded
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    _loaded = model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def article_loop(dialogs: Sequence[Dialog], max_tokens: int) -> Arrivals:
    """Answer one dialog as the article does: for each token, `generate` reads the whole text again."""
    started, times = time.perf_counter(), []
    model, tokenizer = _loaded
    inputs = {"input_ids": [prompts.token_ids(dialogs[0], tokenizer)]}
    inputs = tokenizer.pad(inputs, return_tensors="pt").to(model.device)
    for _ in range(max_tokens):
        output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        tokenizer.decode(output[0][-1], skip_special_tokens=True)
        times.append(time.perf_counter() - started)
        inputs = {"input_ids": output, "attention_mask": output.new_ones(output.shape)}
    return [times]


def bare_loop(dialogs: Sequence[Dialog], max_tokens: int) -> Arrivals:
    """Answer all dialogs as one batch, with transformers' own model and cache.

    All prompts are cut to the length of the shortest, so no row is padded, and there is no attention mask.
    """
    import torch
    from transformers import DynamicCache

    model, tokenizer = _loaded
    started, times = time.perf_counter(), []
    ids = [prompts.token_ids(dialog, tokenizer) for dialog in dialogs]
    rows = torch.tensor([row[-min(map(len, ids)) :] for row in ids], device=model.device)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            rows = logits[:, -1].argmax(-1, keepdim=True)
            rows.tolist()  # a client gets its ids on the CPU
            times.append(time.perf_counter() - started)
    return [times] * len(dialogs)


def load_llama_cpp(file: str) -> None:
    """Load a GGUF file into llama.cpp."""
    from llama_cpp import Llama

    global _loaded
    _loaded = Llama(file, n_ctx=4096, n_threads=os.cpu_count(), verbose=False)


def llama_cpp_loop(dialogs: Sequence[Dialog], max_tokens: int) -> Arrivals:
    """Answer the dialogs one after the other: llama-cpp-python's own interface has no batches."""
    started, arrivals = time.perf_counter(), []
    for dialog in dialogs:
        chunks = _loaded.create_chat_completion(dialog, max_tokens=max_tokens, temperature=0, stream=True)
        arrivals.append(
            [time.perf_counter() - started for chunk in chunks if chunk["choices"][0]["delta"].get("content")]
        )
    return arrivals
