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
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from backends import (
    Backend,
    Loop,
    LoopProcess,
    Service,
    TransformersServe,
    article_loop,
    bare_loop,
    llama_cpp_loop,
    load,
    load_llama_cpp,
    masked_bare_loop,
)
from helpers import catalog, memory, models, prompts
from measurements import ARTICLE, SERVICE, Arrivals, Run, Runs, by_length, ratio, ratios, table


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a benchmark. Lengths are in tokens."""

    rounds: int
    tokens: int
    """The length of each answer in the rounds."""
    clients: tuple[int, ...]
    """The numbers of clients that ask this service at once. The next three fields are for other backends."""
    bare_clients: tuple[int, ...]
    batching_clients: tuple[int, ...]
    queueing_clients: tuple[int, ...]
    article_tokens: int
    """The length of the long answers that the article's loop gives too."""
    long_tokens: int
    """The length of the long answers that only this service gives."""
    list_words: int
    """The number of words in each of the two long questions of the conversation."""
    turn_tokens: int
    """The length of each answer in the conversation."""
    cache_blocks: int | None = None
    """The KV cache of `transformers serve --continuous-batching`; None leaves its size to that program."""
    one_loop_process: bool = False
    """True if the loops share one process. They then have one start and one figure for the memory."""


FULL = Scale(
    rounds=5,
    tokens=64,
    clients=(1, 4, 8, 16, 32),
    bare_clients=(1, 4, 8, 16),
    batching_clients=(1, 8, 16),
    queueing_clients=(1, 8),
    article_tokens=256,
    long_tokens=1000,
    list_words=440,
    turn_tokens=24,
)
QUICK = Scale(
    rounds=1,
    tokens=16,
    clients=(1, 8),
    bare_clients=(1, 8),
    batching_clients=(8,),
    queueing_clients=(8,),
    article_tokens=24,
    long_tokens=64,
    list_words=60,
    turn_tokens=8,
    cache_blocks=64,
    one_loop_process=True,
)

_numbers = itertools.count(1)


def questions(n: int) -> list[str]:
    """Return `n` questions with long answers. All are new, so only the system prompt can be in a cache."""
    return [f"Story {next(_numbers)}: write a long tale of a lighthouse, a storm and a lost ship." for _ in range(n)]


def other_backends(model: str, precision: str, scale: Scale) -> list[Backend]:
    """Return the backends beside this service that can run `model` at `precision`, not yet started."""
    folder = models.source_of(model)

    def new_process() -> LoopProcess:
        return LoopProcess(load, folder, precision)

    shared = new_process() if scale.one_loop_process else None

    def loop(name: str, function: Callable[..., Arrivals], clients: Sequence[int]) -> Loop:
        return Loop(name, shared or new_process(), function, clients)

    backends: list[Backend] = [
        loop("bare loop", bare_loop, scale.bare_clients),
        loop("bare loop, with a mask", masked_bare_loop, scale.bare_clients),
        loop(ARTICLE, article_loop, (1,)),
    ]
    if dtype := {"fp32": "float32", "bf16": "bfloat16"}.get(precision):
        for batching, clients in ((True, scale.batching_clients), (False, scale.queueing_clients)):
            backends.append(
                TransformersServe(folder, dtype, clients, continuous_batching=batching, cache_blocks=scale.cache_blocks)
            )
    if model == catalog.BUNDLED and importlib.util.find_spec("llama_cpp"):
        backends.append(Loop("llama-cpp-python, Q4_1", LoopProcess(load_llama_cpp), llama_cpp_loop, (1, 8)))
    return backends


def start(backends: Sequence[Backend], stack: ExitStack) -> None:
    """Start all backends at the same time, and let `stack` close them."""
    for backend in reversed(backends):  # this service, the first, starts last: the others load meanwhile
        print(f"starting {backend.name}", flush=True)
        backend.start()
        stack.callback(backend.close)
    for backend in backends:
        backend.wait_until_ready()


def measure_rounds(backends: Sequence[Backend], scale: Scale) -> Runs:
    """Ask every backend in every round, in a random order."""
    todo = [(backend, clients) for backend in backends for clients in backend.clients]
    runs: Runs = {(backend.name, clients): [] for backend, clients in todo}
    order = random.Random(0)
    for backend in backends:
        backend.answer(questions(1), 4)  # warms up
    for n in range(scale.rounds):
        for backend, clients in order.sample(todo, len(todo)):
            run = Run(backend.answer(questions(clients), scale.tokens))
            runs[backend.name, clients].append(run)
            print(f"round {n + 1}: {backend.name}, {clients}: {run.rate:.1f} tokens/s", flush=True)
    return runs


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
        answers.service.append(Run(service.answer(questions(1), scale.long_tokens)))
        answers.article.append(Run(article.answer(questions(1), scale.article_tokens)))
        answers.service_as_short.append(Run(service.answer(questions(1), scale.article_tokens)))
        rates = [answers.article[-1].rate, answers.service_as_short[-1].rate]
        print(f"long answers, round {n + 1}: {rates[0]:.1f} and {rates[1]:.1f} tokens/s", flush=True)
    return answers


def measure_third_turn(service: Service, scale: Scale) -> str:
    """Compare the TTFT of a conversation's third turn with that of the same dialog, sent to a service that does not
    have it in its cache. Return the result as a sentence."""
    colours = ("red", "green", "blue", "black", "white")
    text = " ".join(f"{colours[n % 5]} {n}" for n in range(scale.list_words // 2))
    turns = (f"Read this list. {text}", f"And this one. {text}", "Which colour came first?")
    warm, cold, size = [], [], 0
    for _ in range(scale.rounds):
        talk = service.service.conversation(_new_system_prompt(), max_tokens=scale.turn_tokens)
        for question in turns:
            talk.ask(question)
        warm.append(talk.answer.time_to_first_token)
        same = [{"role": "system", "content": _new_system_prompt()}, *talk.messages[1:-1]]
        answer = service.service.ask(same, max_tokens=scale.turn_tokens)
        cold.append(answer.time_to_first_token)
        size = answer.prompt_tokens
    return (
        f"TTFT of a conversation's third turn, {size} tokens: {median(warm):.2f} s; "
        f"of the same text sent cold: {median(cold):.2f} s; ratio {median(warm) / median(cold):.2f}"
    )


def _new_system_prompt() -> str:
    """Return a system prompt that differs from all others at its very beginning."""
    return f"{next(_numbers)}. {prompts.SYSTEM_PROMPT}"


def machine() -> str:
    """Return, in a line, the processor and the versions."""
    names = ("torch", "transformers", "jina")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, short answers, fewer clients")
    parser.add_argument("--rounds", type=int, help=f"default: {FULL.rounds}; with --quick: {QUICK.rounds}")
    parser.add_argument("--model", default=catalog.BUNDLED, help="a Hub id, a folder, or smollm2 (the default)")
    parser.add_argument("--precision", default="fp32", choices=list(memory.PRECISIONS), help="default: fp32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the folder for the results")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the results."""
    options = _options()
    import pictures  # only here: each loop's process imports this file too, and needs no matplotlib

    scale = QUICK if options.quick else FULL
    if options.rounds:
        scale = dataclasses.replace(scale, rounds=options.rounds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # closes the backends
    with ExitStack() as stack:
        service = Service(models.source_of(options.model), options.precision, scale.clients)
        backends = [service, *other_backends(options.model, options.precision, scale)]
        start(backends, stack)
        article = next(backend for backend in backends if backend.name == ARTICLE)
        runs = measure_rounds(backends, scale)
        long_answers = measure_long_answers(service, article, scale)
        third_turn = measure_third_turn(service, scale)
        peak_memory = {backend.name: backend.peak_memory() for backend in backends}

    facts = [*ratios(runs), *long_answers.facts(scale), third_turn]
    summary = (
        f"{options.model} at {options.precision}, {scale.tokens} new tokens for each client, "
        f"medians of {scale.rounds} rounds.\n{machine()}.\n\n"
        + table(runs, peak_memory)
        + "\n\n"
        + "".join(f"- {fact}\n" for fact in facts)
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text(f"# What `make bench` measured\n\n{summary}", encoding="utf-8")
    pictures.draw_rates(runs, options.output / "rates.png")
    pictures.draw_costs(long_answers.service, long_answers.article, options.output / "costs.png")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
