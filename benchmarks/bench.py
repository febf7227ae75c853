"""Measure this service beside other backends, on this machine, in one run.

    make bench                              everything: about half an hour on two cores
    make bench BENCH_ARGS=--quick           fewer and shorter runs: at most three minutes

A machine's speed changes while it runs. So all backends start first, each round asks them in a random order,
and the results are medians of the rounds and ratios between backends: a number alone says little. Writes
`results.md` and two pictures into the folder of this file, or into `--output`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import gguf_files
import helpers
from backends import (
    DTYPES,
    Backend,
    Dialog,
    Gateway,
    LlamaCppPythonServer,
    LlamaServer,
    Loop,
    LoopProcess,
    Server,
    Service,
    TransformersServe,
    article_loop,
    bare_loop,
    llama_cpp_loop,
    load,
    load_llama_cpp,
)
from helpers import bundled, catalog, memory, models, prompts
from measurements import (
    ARTICLE,
    BASELINE,
    GATEWAY,
    SERVICE,
    Prefill,
    Row,
    Run,
    Runs,
    by_length,
    prefill_table,
    rates_table,
    ratio,
    ratios_table,
)

PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a benchmark. Lengths are in tokens."""

    rounds: int
    tokens: int
    """The length of each answer in the rounds."""
    clients: tuple[int, ...]
    """The numbers of clients that ask at once, of a backend that answers them together."""
    queueing_clients: tuple[int, ...]
    """The same, of a backend that answers one after the other."""
    prompt_words: int
    """The number of words in the long prompt."""
    article_tokens: int
    """The length of the long answers that the article's loop gives too."""
    long_tokens: int
    """The length of the long answers that only this service gives."""
    list_words: int
    """The number of words in each of the two long questions of the conversation."""
    turn_tokens: int
    """The length of each answer in the conversation."""


FULL = Scale(
    rounds=5,
    tokens=64,
    clients=(1, 8, 32),
    queueing_clients=(1, 8),
    prompt_words=800,
    article_tokens=256,
    long_tokens=1000,
    list_words=440,
    turn_tokens=24,
)
QUICK = Scale(
    rounds=1,
    tokens=16,
    clients=(1, 8),
    queueing_clients=(1,),
    prompt_words=200,
    article_tokens=24,
    long_tokens=64,
    list_words=60,
    turn_tokens=8,
)

FORMATS = {"fp32": "F32", "int8": "Q8_0"}
"""Precision → llama.cpp's format with the same number of bits."""
SLOTS = 8
"""The number of sequences that llama.cpp's server runs at once."""
OTHERS = 4
"""The number of answers that a long prompt disturbs."""
FIRST_TOKENS = 20
"""The number of pairs, in each round, that compare the time to the first token."""
PAUSE = 0.3
"""Seconds before each measurement. A backend's threads may spin for 0.2 s after their last work."""
INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),  # on ARM
)
LEGEND = (
    "int8 is Q8_0 for llama.cpp. llama.cpp's server has "
    f"{SLOTS} slots; llama-cpp-python and plain `transformers serve` answer one request after the other. "
    "The bare loop and the article's loop share a process."
)

COLOURS = ("red", "green", "blue", "black", "white")

_numbers = itertools.count(1)


def stories(n: int) -> list[Dialog]:
    """Return `n` dialogs with long answers. All are new, so only the system prompt can be in a cache."""
    return [
        [
            {"role": "system", "content": prompts.SYSTEM_PROMPT},
            {"role": "user", "content": f"Story {next(_numbers)}: write a long tale of a lighthouse and a lost ship."},
        ]
        for _ in range(n)
    ]


def coloured_list(words: int) -> str:
    """Return a text of `words` words."""
    return "Read this list. " + " ".join(f"{COLOURS[n % 5]} {n}" for n in range(words // 2))


def cold_prompt(words: int) -> Dialog:
    """Return a dialog with a question of about `words` words, of which nothing can be in a cache."""
    question = f"{coloured_list(words)} Write a tale about these colours."
    return [{"role": "system", "content": new_system_prompt()}, {"role": "user", "content": question}]


def new_system_prompt() -> str:
    """Return a system prompt that differs from all others at its very beginning."""
    return f"{next(_numbers)}. {prompts.SYSTEM_PROMPT}"


def transformers_backends(folder: str, precision: str, scale: Scale) -> Iterator[Backend]:
    """Yield the article's loop, a bare loop and `transformers serve`, with one process for both loops."""
    loops = LoopProcess(load, folder, DTYPES[precision])
    yield Loop(Row("bare loop", precision), scale.clients, process=loops, loop=bare_loop)
    yield Loop(Row(ARTICLE, precision), (1,), process=loops, loop=article_loop)
    yield TransformersServe(precision, scale.clients, folder=folder, batching=True)
    yield TransformersServe(precision, scale.queueing_clients, folder=folder, batching=False)


def llama_cpp_backends(original: Path, precisions: Sequence[str], scale: Scale, folder: Path) -> Iterator[Backend]:
    """Yield what is installed of llama.cpp, with the model of `original` as it is, in 4 bit, and at `precisions`.

    Write the files for the precisions into `folder`.
    """
    server = shutil.which("llama-server")
    in_process = importlib.util.find_spec("llama_cpp") is not None
    if not server and not in_process:
        return
    for precision in [*(one for one in precisions if one in FORMATS), "Q4_1"]:
        file, suffix = original, ""
        if format := FORMATS.get(precision):
            file, suffix = folder / f"{format}.gguf", f", {format}"
            gguf_files.convert(original, file, format)
        if in_process:
            process = LoopProcess(load_llama_cpp, str(file))
            yield Loop(Row(f"llama-cpp-python{suffix}", precision), (1,), process=process, loop=llama_cpp_loop)
        if server:
            row = Row(f"llama-server{suffix}", precision)
            yield LlamaServer(row, scale.clients, program=server, file=file, slots=SLOTS)
        elif LlamaCppPythonServer.is_installed():
            row = Row(f"llama-cpp-python's server{suffix}", precision)
            yield LlamaCppPythonServer(row, scale.queueing_clients, file=file)


def all_backends(options: argparse.Namespace, scale: Scale, folder_for_gguf: Path) -> Iterator[Backend]:
    """Yield this service at each precision, and then the other backends that can run the model, not yet started."""
    folder = models.source_of(options.model)
    first, *_ = options.precisions
    for precision in options.precisions:
        service = Service(Row(SERVICE, precision), scale.clients, project=PROJECT, model=folder)
        yield service
        yield Gateway(Row(GATEWAY, precision), scale.clients, service=service)
    if options.baseline:
        yield Service(Row(BASELINE, first), scale.clients, project=options.baseline.resolve(), model=folder)
    others: list[Backend] = []
    if first in DTYPES:
        others += transformers_backends(folder, first, scale)
    if options.model == catalog.BUNDLED:
        others += llama_cpp_backends(bundled.bundled_gguf(), options.precisions, scale, folder_for_gguf)
    yield from (other for other in others if any(word in str(other.row) for word in options.only))


def start(backends: Sequence[Backend], stack: ExitStack) -> None:
    """Start all backends at the same time, and let `stack` close them."""
    for backend in backends:
        print(f"starting {backend.row}", flush=True)
        backend.start()
        stack.callback(backend.close)
    for backend in backends:
        backend.wait_until_ready()


def measure_rounds(backends: Sequence[Backend], scale: Scale) -> Runs:
    """Ask every backend in every round, in a random order."""
    todo = [(backend, clients) for backend in backends for clients in backend.clients]
    runs: Runs = {(backend.row, clients): [] for backend, clients in todo}
    order = random.Random(0)
    for backend in backends:
        backend.answer(stories(max(backend.clients)), 4)  # warms up, and fills the caches with the system prompt
    for n in range(scale.rounds):
        for backend, clients in order.sample(todo, len(todo)):
            time.sleep(PAUSE)
            run = Run(backend.answer(stories(clients), scale.tokens))
            runs[backend.row, clients].append(run)
            print(f"round {n + 1}: {backend.row}, {clients}: {run.rate:.1f} tokens/s", flush=True)
    return runs


def measure_prefill(servers: Sequence[Server], scale: Scale) -> tuple[int, dict[Row, list[Prefill]]]:
    """Send a long prompt to each server, alone and beside `OTHERS` answers, in up to three rounds, in a random order.

    Return the length of the prompt in tokens, and the results. The first server is this service.
    """
    prefills: dict[Row, list[Prefill]] = {server.row: [] for server in servers}
    order = random.Random(0)
    for n in range(min(scale.rounds, 3)):
        for server in order.sample(servers, len(servers)):
            time.sleep(PAUSE)
            (alone,) = Run(server.answer([cold_prompt(scale.prompt_words)], 1)).first_tokens
            beside, before, during = server.interrupt(stories(OTHERS), cold_prompt(scale.prompt_words), after=16)
            prefills[server.row].append(Prefill(alone, beside, before, during))
            print(f"long prompt, round {n + 1}: {server.row}: {alone:.2f} s, beside others {beside:.2f} s", flush=True)
    size = helpers.ask(cold_prompt(scale.prompt_words), max_tokens=1, port=servers[0].port).prompt_tokens
    return size, prefills


@dataclass(frozen=True)
class LongAnswers:
    """Runs of one client: this service over `long_tokens`, then the article's loop and this service over
    `article_tokens`."""

    service: list[Run]
    article: list[Run]
    service_as_short: list[Run]

    def facts(self, scale: Scale) -> list[str]:
        """Return the results of the runs, in sentences."""
        factor = ratio(self.service_as_short, self.article)
        costs = [seconds for _, seconds in by_length(self.service)]
        length = min(len(run.gaps) for run in self.service) + 1
        return [
            f"time for one token of an answer of {scale.article_tokens}: {ARTICLE} ÷ {SERVICE} = {factor:.1f}",
            f"a token's cost over an answer of {length} tokens, of {SERVICE}: at most "
            f"{max(costs) / costs[0]:.2f} times that at its beginning",
        ]


def measure_long_answers(service: Backend, article: Backend, scale: Scale) -> LongAnswers:
    """Ask for long answers, one client at a time."""
    answers = LongAnswers([], [], [])
    for n in range(min(scale.rounds, 2)):
        answers.service.append(Run(service.answer(stories(1), scale.long_tokens)))
        answers.article.append(Run(article.answer(stories(1), scale.article_tokens)))
        answers.service_as_short.append(Run(service.answer(stories(1), scale.article_tokens)))
        rates = [answers.article[-1].rate, answers.service_as_short[-1].rate]
        print(f"long answers, round {n + 1}: {rates[0]:.1f} and {rates[1]:.1f} tokens/s", flush=True)
    return answers


def measure_added_time(service: Service, gateway: Gateway, scale: Scale) -> str:
    """Compare the TTFT of one client over HTTP with that over gRPC, in turn. Return the result as a sentence."""
    added = []
    for _ in range(FIRST_TOKENS * scale.rounds):
        (direct,) = Run(service.answer(stories(1), 1)).first_tokens
        (over_http,) = Run(gateway.answer(stories(1), 1)).first_tokens
        added.append(over_http - direct)
    return f"TTFT over HTTP minus TTFT over gRPC: {1000 * median(added):.1f} ms, the median of {len(added)} pairs"


def measure_third_turn(service: Server, scale: Scale) -> str:
    """Compare the TTFT of a conversation's third turn with that of the same dialog, sent to a service that does not
    have it in its cache. Return the result as a sentence."""
    turns = [coloured_list(scale.list_words), coloured_list(scale.list_words), "Which colour came first?"]
    warm, cold, size = [], [], 0
    for _ in range(scale.rounds):
        talk = helpers.Conversation(new_system_prompt(), max_tokens=scale.turn_tokens, port=service.port)
        for question in turns:
            talk.ask(question)
        warm.append(talk.answer.time_to_first_token)
        same = [{"role": "system", "content": new_system_prompt()}, *talk.messages[1:-1]]
        answer = helpers.ask(same, max_tokens=scale.turn_tokens, port=service.port)
        cold.append(answer.time_to_first_token)
        size = answer.prompt_tokens
    return (
        f"TTFT of a conversation's third turn, {size} tokens: {median(warm):.2f} s; "
        f"of the same text sent cold: {median(cold):.2f} s; ratio {median(warm) / median(cold):.2f}"
    )


def machine() -> str:
    """Return, in a line, the processor, its instruction sets for deep learning, and the versions."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line] if info.exists() else []
    facts = {name.strip(): value.strip() for name, value in lines}
    processor = facts.get("model name") or platform.processor() or platform.machine()
    has = set(facts.get("flags", facts.get("Features", "")).split())  # Features: on ARM
    sets = ", ".join(name for name in INSTRUCTION_SETS if name in has) or "unknown"
    names = ("torch", "onnxruntime", "transformers", "jina", "llama_cpp_python")
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in names
        if importlib.util.find_spec(name.removesuffix("_python"))
    ]
    return (
        f"{processor}, {os.cpu_count()} cores; instruction sets: {sets}; torch uses "
        f"{torch.backends.cpu.get_cpu_capability()}. Python {platform.python_version()}, {', '.join(versions)}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, short answers, fewer clients")
    parser.add_argument("--rounds", type=int, help=f"default: {FULL.rounds}; with --quick: {QUICK.rounds}")
    parser.add_argument("--model", default=catalog.BUNDLED, help="a Hub id, a folder, or smollm2 (the default)")
    parser.add_argument(
        "--precisions", nargs="+", default=["fp32", "int8"], choices=list(memory.PRECISIONS),
        help="of this service (default: fp32 int8). The other backends run at the same ones if they can",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", type=Path, metavar="FOLDER",
        help="another checkout of this project, whose service is measured too, at the first precision",
    )  # fmt: skip
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        default=[""],
        help="of the other backends, only those with a WORD in their names",
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the folder for the results")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the results."""
    options = _options()
    import pictures  # only here: each loop's process imports this file too, and needs no matplotlib

    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = dataclasses.replace(scale, rounds=options.rounds)
    here = machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # closes the backends
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        backends = list(all_backends(options, scale, folder))
        start(backends, stack)
        service, *_ = (backend for backend in backends if isinstance(backend, Service))
        gateway = next(backend for backend in backends if isinstance(backend, Gateway))
        article = next((backend for backend in backends if backend.row.name == ARTICLE), None)
        runs = measure_rounds(backends, scale)
        servers = [backend for backend in backends if isinstance(backend, (Service, LlamaServer))]
        prompt_tokens, prefills = measure_prefill(servers, scale)
        added_time = measure_added_time(service, gateway, scale)
        third_turn = measure_third_turn(service, scale)
        long_answers = measure_long_answers(service, article, scale) if article else None
        peak_memory = {backend.row: backend.peak_memory() for backend in backends}

    facts = [*(long_answers.facts(scale) if long_answers else []), third_turn, added_time]
    summary = f"""\
{options.model}, {scale.tokens} new tokens for each client, medians of {scale.rounds} rounds. {LEGEND}

{here}.

{rates_table(runs, peak_memory)}

{ratios_table(runs)}

A cold prompt of {prompt_tokens} tokens, alone and beside {OTHERS} running answers:

{prefill_table(prefills, prompt_tokens, OTHERS)}

""" + "".join(f"- {service.row}: {fact}\n" for fact in facts)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text(f"# What `make bench` measured\n\n{summary}", encoding="utf-8")
    pictures.draw_rates(runs, options.output / "rates.png")
    if long_answers:
        pictures.draw_costs(long_answers.service, long_answers.article, options.output / "costs.png")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
