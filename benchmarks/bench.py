"""This service beside others, on this machine, in one run.

    make bench                              everything: about half an hour on two cores
    make bench BENCH_ARGS=--quick           less of everything: about two minutes

The machine's speed changes while it runs. So everybody is started first, each round asks everybody in an order
of its own, and what counts are the medians of the rounds and the ratios between them; a number alone says little.
Writes `results.md` and two pictures into the folder of this file, or into `--output`.

Tokens/s are those of all readers together, from the moment when all ask to the last token; "decode" counts only
the time in which all of them are being answered. TTFT is the time to the first token, ITL (inter-token
latency) the time between two tokens of one reader.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import random
import signal
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from contenders import (
    Arrivals,
    Contender,
    InProcess,
    Service,
    TransformersServe,
    article,
    bare_masked,
    bare_unmasked,
    llama_cpp,
    load,
    load_llama_cpp,
)

import helpers
from helpers import access, models

median = statistics.median
_numbers = itertools.count(1)


def questions(n: int) -> list[str]:
    """Long to answer, and never asked before: nobody has anything of them in a cache but the system prompt."""
    return [f"Story {next(_numbers)}: write a long tale of a lighthouse, a storm and a lost ship." for _ in range(n)]


@dataclass(frozen=True)
class Run:
    """What the readers of one run saw."""

    arrivals: Arrivals

    @property
    def rate(self) -> float:
        """Tokens/s in all."""
        return sum(map(len, self.arrivals)) / max(came[-1] for came in self.arrivals)

    @property
    def decode_rate(self) -> float:
        """Tokens/s while all are being answered; where that never is, as in a queue, tokens/s in all."""
        begin, end = max(came[0] for came in self.arrivals), min(came[-1] for came in self.arrivals)
        within = sum(begin < at <= end for came in self.arrivals for at in came)
        return within / (end - begin) if within else self.rate

    @property
    def firsts(self) -> list[float]:
        return [came[0] for came in self.arrivals]

    @property
    def gaps(self) -> list[float]:
        return [after - before for came in self.arrivals for before, after in zip(came, came[1:])]


Runs = dict[tuple[str, int], list[Run]]
"""By contender and number of readers, the rounds."""


def measure(contenders: Sequence[Contender], *, rounds: int, tokens: int) -> Runs:
    todo = [(contender, readers) for contender in contenders for readers in contender.readers]
    runs: Runs = {(contender.name, readers): [] for contender, readers in todo}
    order = random.Random(0)
    for contender in contenders:
        contender.answer(questions(1), 8)  # warms up
    for n in range(rounds):
        for contender, readers in order.sample(todo, len(todo)):
            run = Run(contender.answer(questions(readers), tokens))
            runs[contender.name, readers].append(run)
            print(f"round {n + 1}: {contender.name}, {readers}: {run.rate:.1f} tokens/s", flush=True)
    return runs


# --- Beyond the rounds: long answers, long conversations --------------------------------------------


def long_answers(
    service: Service, loop: Contender, *, rounds: int, whole: int, tokens: int
) -> tuple[list[Run], list[Run], list[Run]]:
    """Answers of `whole` tokens from the service, and of `tokens` from the loop and from the service."""
    runs: tuple[list[Run], list[Run], list[Run]] = ([], [], [])
    for n in range(rounds):
        runs[0].append(Run(service.answer(questions(1), whole)))
        runs[1].append(Run(loop.answer(questions(1), tokens)))
        runs[2].append(Run(service.answer(questions(1), tokens)))
        print(f"long answers, round {n + 1}: {runs[1][-1].rate:.1f} and {runs[2][-1].rate:.1f} tokens/s", flush=True)
    return runs


def by_length(runs: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """(tokens so far, seconds for one more): medians over 50 tokens, or all where there are fewer, and over the runs."""
    shortest = min(len(run.gaps) for run in runs)
    step = min(50, shortest)
    for begin in range(0, shortest - step + 1, step):
        yield begin + step // 2, median(median(run.gaps[begin : begin + step]) for run in runs)


def third_turn(service: Service, *, rounds: int, words: int) -> tuple[float, float, int]:
    """Medians of the TTFT of a conversation's third turn, and of the same dialog sent to a service that has not
    seen it; the dialog's tokens."""
    text = " ".join(f"{'red green blue black white'.split()[n % 5]} {n}" for n in range(words // 2))
    questions = (f"Read this list. {text}", f"And this one. {text}", "Which colour came first?")
    warm, cold, size = [], [], 0
    for _ in range(rounds):
        talk = service.service.conversation(_never_seen(), max_tokens=24)
        for question in questions:
            talk.ask(question)
        warm.append(talk.answer.time_to_first_token)
        same = [{"role": "system", "content": _never_seen()}, *talk.messages[1:-1]]
        answer = service.service.ask(same, max_tokens=24)
        cold.append(answer.time_to_first_token)
        size = answer.prompt_tokens
    return median(warm), median(cold), size


def _never_seen() -> str:
    """A system prompt that differs from all others at its very beginning."""
    return f"{next(_numbers)}. {helpers.prompts.SYSTEM_PROMPT}"


# --- What is written --------------------------------------------------------------------------------


def table(runs: Runs, peaks: dict[str, int]) -> str:
    lines = [
        "| | readers | tokens/s | decode | TTFT, s: median | p99 | ITL, ms: median | p99 | peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, readers), rounds in runs.items():
        firsts = [first for run in rounds for first in run.firsts]
        gaps = [gap for run in rounds for gap in run.gaps]
        lines.append(
            f"| {name} | {readers} "
            f"| {median(r.rate for r in rounds):.1f} | {median(r.decode_rate for r in rounds):.1f} "
            f"| {median(firsts):.2f} | {p99(firsts):.2f} | {1000 * median(gaps):.0f} | {1000 * p99(gaps):.0f} "
            f"| {peaks[name] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def ratio(runs: Runs, readers: int, other: str, figure: str = "rate") -> str:
    """This service's `figure` by another's: the median of the rounds' ratios."""
    pairs = zip(runs["this service", readers], runs[other, readers])
    return f"{median(getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs):.2f}"


def ratios(runs: Runs) -> Iterator[str]:
    for readers in (1, 8, 16):
        bare = [name for name, n in runs if name.startswith("bare") and n == readers]
        if bare and ("this service", readers) in runs:
            best = max(bare, key=lambda name: median(run.decode_rate for run in runs[name, readers]))
            yield f"{readers} reader(s), decode: this service ÷ {best} = {ratio(runs, readers, best, 'decode_rate')}"
    for name, readers in runs:
        if name not in ("this service", "the article's loop") and not name.startswith("bare"):
            if ("this service", readers) in runs:
                yield f"{readers} reader(s), tokens/s: this service ÷ {name} = {ratio(runs, readers, name)}"


def draw_rates(runs: Runs, file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    markers = itertools.cycle("os^Dv*P")
    for name in dict.fromkeys(name for name, _ in runs):
        points = [(n, median(run.rate for run in rounds)) for (other, n), rounds in runs.items() if other == name]
        width = 3 if name == "this service" else 1.5
        axes.plot(*zip(*points), marker=next(markers), linewidth=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({n for _, n in runs}), map(str, ticks))
    axes.set(xlabel="readers at once", ylabel="tokens/s of all readers together", ylim=0)
    _save(figure, axes, file)


def draw_costs(ours: Sequence[Run], loop: Sequence[Run], file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for runs, name, style in ((loop, "the article's loop", "s--"), (ours, "this service", "o-")):
        points = list(by_length(runs))
        axes.plot([n for n, _ in points], [1000 * seconds for _, seconds in points], style, label=name)
    axes.set(xlabel="tokens generated so far", ylabel="ms for one more token", ylim=0)
    _save(figure, axes, file)


def _save(figure: pyplot.Figure, axes: pyplot.Axes, file: Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def machine() -> str:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, short answers, fewer readers")
    parser.add_argument("--rounds", type=int, help="how often everybody is asked (default: 5; quick: 1)")
    parser.add_argument("--model", default=access.EMBEDDED, help="a Hub id, a folder, or smollm2 (the default)")
    parser.add_argument("--precision", default="fp32", choices=list(access.PRECISIONS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    quick = options.quick
    rounds = options.rounds or (1 if quick else 5)
    tokens, long, longest = (16, 32, 100) if quick else (64, 256, 1000)

    folder = models.source_of(options.model)
    loading = (folder, options.precision)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so nobody is left running
    with ExitStack() as stack:

        def start(contender: Contender) -> Contender:
            stack.callback(contender.close)
            return contender

        service = Service(*loading, (1, 8, 16) if quick else (1, 4, 8, 16, 32))
        start(service)
        loop = start(InProcess("the article's loop", load, article, (1,), *loading))
        some = (1, 8) if quick else (1, 4, 8, 16)
        everybody = [
            service,
            start(InProcess("bare loop", load, bare_unmasked, some, *loading)),
            start(InProcess("bare loop, with a mask", load, bare_masked, some, *loading)),
            loop,
        ]
        if options.precision in ("fp32", "bf16"):
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
            for batching in (True, False):
                few = (1, 8, 16) if batching and not quick else (8,) if quick else (1, 8)
                everybody.append(start(TransformersServe(folder, dtype, few, continuous_batching=batching)))
        if options.model == access.EMBEDDED and importlib.util.find_spec("llama_cpp"):
            everybody.append(start(InProcess("llama-cpp-python, Q4_1", load_llama_cpp, llama_cpp, (1, 8))))

        runs = measure(everybody, rounds=rounds, tokens=tokens)
        ours, theirs, same = long_answers(service, loop, rounds=min(rounds, 2), whole=longest, tokens=long)
        warm, cold, size = third_turn(service, rounds=rounds, words=60 if quick else 440)
        peaks = {contender.name: contender.peak_memory() for contender in everybody}

    costs = [seconds for _, seconds in by_length(ours)]
    whole_answer = median(b.rate / a.rate for a, b in zip(theirs, same))
    facts = [
        *ratios(runs),
        f"time for one token of an answer of {long}: the article's loop ÷ this service = {whole_answer:.1f}",
        f"a token's cost over an answer of {min(len(run.gaps) for run in ours) + 1} tokens, of this service: at most "
        f"{max(costs) / costs[0]:.2f} times that at its beginning",
        f"TTFT of a conversation's third turn, {size} tokens: {warm:.2f} s; "
        f"of the same text sent cold: {cold:.2f} s; ratio {warm / cold:.2f}",
    ]
    summary = (
        f"{options.model} at {options.precision}, {tokens} new tokens for each reader, "
        f"medians of {rounds} rounds.\n{machine()}.\n\n"
        + table(runs, peaks)
        + "\n\n"
        + "\n".join(f"- {fact}" for fact in facts)
        + "\n"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.md").write_text(f"# What `make bench` measured\n\n{summary}")
    draw_rates(runs, options.output / "rates.png")
    draw_costs(ours, theirs, options.output / "costs.png")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
