"""Compare `helpers.simulation` with a real run on this machine, and measure what replicas and the gateway give.

    python benchmarks/load.py               about ten minutes on two cores
    python benchmarks/load.py --quick       fewer requests: two minutes

First it measures the step times of one service with one thread. Then requests arrive at two such services behind one
gateway, at three rates, and the same arrivals are simulated. Let nothing else run meanwhile. Writes `load.md` into the
folder of this file, or into `--output`.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import psutil

from backends import HOST, BehindGateway, Dialog, Gateway, Server, Service
from bench import COLOURS, PAUSE, PROJECT, machine, start
from helpers import catalog, models
from helpers.prefill import PREFILL_BUDGET
from helpers.processes import port_to_listen_on
from helpers.simulation import Arrival, poisson_arrivals, simulate
from helpers.sizing import StepTimes, max_rate
from measurements import Row, Run


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the measurement. Lengths are in tokens."""

    rounds: int
    requests: int
    """The number of requests at each rate."""
    dummy_requests: int
    """The number of requests that each client sends through the gateway to the service without a model."""


FULL = Scale(rounds=2, requests=160, dummy_requests=100)
QUICK = Scale(rounds=1, requests=30, dummy_requests=10)

LOADS = {"light": 0.3, "medium": 0.6, "near the knee": 0.85}
"""Load → requests/s, as a share of the highest rate that the simulation's figures allow two replicas."""
DECODING = (1, 2, 4, 8, 16, 32)
"""The numbers of sequences whose step times are measured."""
CLIENTS = 16
"""The clients at once that the rates of one and two services are measured with, and the gateway's own."""
TOKENS = 64
"""The length of each answer."""
WORDS = 20
"""The number of words in a question, beside its fixed text."""
MORE_WORDS = 120
"""The number of words by which a longer question exceeds it, to measure what a prompt token takes."""
FIRST_TOKENS = 12
"""The number of short and of longer questions, in each round, that measure what a prompt token takes."""
QUESTIONS = 20
"""The number of questions, in each round, that measure what a request takes outside the engine."""
SECONDS_BETWEEN = 0.7
"""The mean time between two of them."""
DUMMY_TOKENS = 200
"""The length of an answer of the service without a model."""

_numbers = itertools.count(1)


def dialogs(n: int, words: int = WORDS) -> list[Dialog]:
    """Return `n` dialogs that differ at their beginning, so nothing can be in a cache, and have long answers."""
    colours = " ".join(COLOURS[k % len(COLOURS)] for k in range(words))
    question = f"Read this list: {colours}. Write a long tale of a lighthouse and a lost ship."
    return [
        [
            {"role": "system", "content": f"{next(_numbers) + 10_000}. Tell long stories."},
            {"role": "user", "content": question},
        ]
        for _ in range(n)
    ]


class Replicas(BehindGateway):
    """`count` services of this checkout with `threads` threads each, behind one gateway."""

    def __init__(self, row: Row, *, count: int, threads: int, model: str) -> None:
        super().__init__(row, ())
        self.count, self._threads, self._source = count, threads, model

    def command(self) -> list[str]:
        # several services choose free ports by themselves
        services = ["--replicas", str(self.count)] if self.count > 1 else ["--port", str(port_to_listen_on(HOST, 0))]
        services += ["--http", f"{HOST}:{self.port}"]
        options = ["--model", self._source, "--precision", self.row.precision, "--max-queue-size", "1000"]
        return [sys.executable, "-m", "helpers", "serve", *services, *options]

    def start(self) -> None:  # type: ignore[override]
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        super().start(env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads)})

    def is_ready(self) -> bool:
        if not super().is_ready():
            return False
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        return sum(line.startswith("service_up{") and line.endswith(" 1.0") for line in lines) == self.count

    def prompt_tokens(self, dialog: Dialog) -> int:
        """Return the number of tokens of a dialog's prompt."""
        body = json.dumps({"model": self.model, "max_tokens": 1, "messages": dialog}).encode()
        address = f"http://{HOST}:{self.port}/v1/chat/completions"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return int(json.load(reply)["usage"]["prompt_tokens"])


class DummyService(Service):
    """A service without a model: `dummy_service.py`."""

    def command(self) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("dummy_service.py")), str(self.port)]


# --- What the simulation needs ----------------------------------------------------------------------


def step_seconds(server: Server, sequences: int, clients: int) -> float:
    """Return the median time between two tokens while `sequences` answers decode on each service, for `clients` in all.

    Counts only the time when all of them decode.
    """
    time.sleep(PAUSE)
    arrivals = server.answer(dialogs(clients, words=1), 48 + sequences)
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    gaps = [new - old for times in arrivals for old, new in itertools.pairwise(times) if begin <= old and new <= end]
    if not gaps:
        raise SystemExit(f"{server.row}: the answers of {clients} clients did not overlap. Run it again.")
    return median(gaps)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Step times of one service that runs alone, and of two that run at once, and the `overhead` of two in seconds."""

    alone: StepTimes
    together: StepTimes
    overhead: float
    prompt_tokens: int

    def table(self) -> str:
        """Return the step times as a Markdown table."""
        lines = [f"| a step, ms | {' | '.join(f'{n} decode' for n in DECODING)} | each prompt token |"]
        lines.append("| --- " + "| --: " * (len(DECODING) + 1) + "|")
        for name, times in (("one service", self.alone), ("two services at once", self.together)):
            cells = [f"{1000 * times.decode[n]:.1f}" for n in DECODING]
            lines.append(f"| {name} | {' | '.join(cells)} | {1000 * times.prompt_token:.2f} |")
        return "\n".join(lines)


def run(server: Server, arrivals: Sequence[Arrival]) -> tuple[list[Arrival], list[float]]:
    """Send a request at the time of each arrival. Return the arrivals with the lengths of the real answers, and the
    TTFTs in seconds."""
    asked = dialogs(len(arrivals))
    began = time.perf_counter() + 1

    def ask(arrival: Arrival, dialog: Dialog) -> tuple[Arrival, float]:
        time.sleep(max(0.0, began + arrival.seconds - time.perf_counter()))
        sent = time.perf_counter()
        times = [time.perf_counter() - sent for _ in server.stream(dialog, arrival.completion_tokens)]
        return dataclasses.replace(arrival, completion_tokens=len(times)), times[0]

    with ThreadPoolExecutor(len(arrivals)) as threads:
        answered = list(threads.map(ask, arrivals, asked))
    return [arrival for arrival, _ in answered], [ttft for _, ttft in answered]


def measure_steps(server: Replicas, rounds: int, few: int, many: int) -> StepTimes:
    """Return the step times of a server's services, which all run at once. The prompts have `few` tokens, and with
    `MORE_WORDS` `many`."""
    times: dict[int, list[float]] = {n: [] for n in DECODING}
    short, long = list[float](), list[float]()
    for _ in range(rounds):
        for n in DECODING:
            times[n].append(step_seconds(server, n, n * server.count))
            print(f"{server.row}: a step for {n}: {1000 * times[n][-1]:.1f} ms", flush=True)
        for _ in range(FIRST_TOKENS):
            short += Run(server.answer(dialogs(server.count), 1)).first_tokens
            long += Run(server.answer(dialogs(server.count, WORDS + MORE_WORDS), 1)).first_tokens
    decode = {n: median(seconds) for n, seconds in times.items()}
    more_steps = math.ceil(many / PREFILL_BUDGET) - math.ceil(few / PREFILL_BUDGET)
    prompt_token = (median(long) - median(short) - more_steps * decode[1]) / (many - few)
    return StepTimes(decode=decode, prompt_token=prompt_token)


def measure(one: Replicas, two: Replicas, rounds: int) -> Measured:
    """Measure the step times of one service and of two, and the overhead.

    The overhead is measured beside a running answer of each service: the work for a new request waits for its steps.
    """
    few, many = one.prompt_tokens(*dialogs(1)), one.prompt_tokens(*dialogs(1, WORDS + MORE_WORDS))
    alone, together = measure_steps(one, rounds, few, many), measure_steps(two, rounds, few, many)
    seconds = rounds * QUESTIONS * SECONDS_BETWEEN
    running = Arrival(seconds=0, prompt_tokens=few, completion_tokens=math.ceil(seconds / together.decode[1]))
    questions = poisson_arrivals(
        rate=1 / SECONDS_BETWEEN, count=rounds * QUESTIONS, prompt_tokens=few, completion_tokens=1, seed=1000
    )
    arrivals, real = run(two, [running] * two.count + questions)
    simulated = simulate(arrivals, replicas=two.count, step_times=alone, together=together)
    late = [ttft - timing.ttft for ttft, timing in zip(real, simulated, strict=True)][two.count :]
    return Measured(alone=alone, together=together, overhead=max(0.0, median(late)), prompt_tokens=few)


# --- The real run and the simulated one -------------------------------------------------------------


def percentile_95(values: Sequence[float]) -> float:
    """Return the value that 5 % of the values exceed."""
    return quantiles(values, n=20)[-1]


def compare(two: Replicas, measured: Measured, requests: int) -> str:
    """Run each load, simulate it, and return a Markdown table."""
    lengths = {"prompt_tokens": measured.prompt_tokens, "completion_tokens": TOKENS}
    limit = two.count * max_rate(measured.together, **lengths)
    lines = [
        "| load | requests/s | TTFT median, s: simulated | real | ratio | p95, s: simulated | real | ratio |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for seed, (load, share) in enumerate(LOADS.items()):
        planned = poisson_arrivals(rate=share * limit, count=requests, seed=seed, **lengths)
        arrivals, real = run(two, planned)
        simulated = [
            timing.ttft
            for timing in simulate(
                arrivals,
                replicas=two.count,
                step_times=measured.alone,
                together=measured.together,
                overhead=measured.overhead,
            )
        ]
        cells = []
        pairs = [(median(simulated), median(real)), (percentile_95(simulated), percentile_95(real))]
        for ours, theirs in pairs:
            cells.append(f"{ours:.3f} | {theirs:.3f} | {ours / theirs:.2f}")
        lines.append(f"| {load} | {share * limit:.2f} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


# --- One service and two, and the gateway alone -----------------------------------------------------


def measure_rates(servers: Sequence[Replicas], rounds: int) -> str:
    """Return a Markdown table of the tokens/s of each server with `CLIENTS` clients, asked in a random order."""
    rates: dict[str, list[float]] = {str(server.row): [] for server in servers}
    order = random.Random(0)
    for _ in range(rounds):
        for server in order.sample(servers, len(servers)):
            time.sleep(PAUSE)
            rates[str(server.row)].append(Run(server.answer(dialogs(CLIENTS), TOKENS)).rate)
            print(f"{server.row}: {rates[str(server.row)][-1]:.1f} tokens/s", flush=True)
    first = rates[str(servers[0].row)]
    lines = ["|  | tokens/s | ÷ the first |", "| --- | --: | --: |"]
    for name, values in rates.items():
        ratio = median(ours / theirs for ours, theirs in zip(values, first, strict=True))
        lines.append(f"| {name} | {median(values):.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def measure_gateway(gateway: Gateway, requests: int) -> list[str]:
    """Return, as lines of a Markdown list, what the gateway gives in front of a service that answers at once."""
    facts = []
    for tokens, each in ((1, requests), (DUMMY_TOKENS, max(2, requests // 20))):
        process = psutil.Process(gateway.pid())
        body = json.dumps(
            {
                "model": gateway.model,
                "max_tokens": tokens,
                "stream": True,
                "messages": [{"role": "user", "content": "Hello"}],
            }
        )

        def ask(_: int, body: str = body, tokens: int = tokens, each: int = each) -> None:
            with closing(http.client.HTTPConnection(HOST, gateway.port)) as connection:
                for _ in range(each):
                    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                    reply = connection.getresponse().read()
                    if reply.count(b'"content":" word"') != tokens or not reply.endswith(b"data: [DONE]\n\n"):
                        raise SystemExit(f"The gateway gave an incomplete answer: {reply[-500:]!r}")

        before, began = sum(process.cpu_times()[:2]), time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(ask, range(CLIENTS)))
        seconds, used = time.perf_counter() - began, sum(process.cpu_times()[:2]) - before
        count = CLIENTS * each
        facts.append(
            f"- answers of {tokens} token{'s' * (tokens > 1)}: {count / seconds:.0f} requests/s, "
            f"{count * tokens / seconds:.0f} tokens/s; CPU time of the gateway: {1000 * used / count:.2f} ms for a "
            f"request, {1000 * used / count / tokens:.3f} ms for a token, {used / seconds:.0%} of a core"
        )
        print(facts[-1], flush=True)
    return facts


def main() -> None:
    """Measure, compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and fewer requests")
    parser.add_argument("--model", default=catalog.BUNDLED, help="a Hub id, a folder, or smollm2 (the default)")
    parser.add_argument("--precision", default="int8", help="of the services (default: int8)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the folder for the results")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # closes the servers
    model, here = models.source_of(options.model), machine()

    def replicas(name: str, count: int, threads: int) -> Replicas:
        return Replicas(Row(name, options.precision), count=count, threads=threads, model=model)

    one = replicas("1 service with 1 thread", 1, 1)
    two = replicas("2 services with 1 thread each", 2, 1)
    wide = replicas("1 service with 2 threads", 1, 2)
    dummy = DummyService(Row("dummy", ""), (), project=PROJECT, model="")
    gateway = Gateway(Row("gateway", ""), (), service=dummy)
    with ExitStack() as stack:
        start([one, two, wide, dummy, gateway], stack)
        for server in (one, two, wide):
            server.answer(dialogs(CLIENTS), 8)  # warms up
        measured = measure(one, two, scale.rounds)
        table = compare(two, measured, scale.requests)
        rates = measure_rates([one, two, wide], scale.rounds)
        ceiling = measure_gateway(gateway, scale.dummy_requests)
    summary = (
        f"""\
{options.model} at {options.precision}; prompts of {measured.prompt_tokens} tokens, answers of {TOKENS}.

{here}.

Step times of services with one thread each, behind a gateway. Outside the engine, the first token takes
{1000 * measured.overhead:.1f} ms, beside one running answer of each service.

{measured.table()}

{scale.requests} requests at each rate, which arrive at two services with one thread each, and the same arrivals in
`helpers.simulation.simulate`. The clients and the gateway run on the same cores.

{table}

{CLIENTS} clients at once, medians of {scale.rounds} rounds:

{rates}

The gateway in front of a service without a model, with {CLIENTS} clients on the same cores:

"""
        + "\n".join(ceiling)
        + "\n"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "load.md").write_text(f"# What `benchmarks/load.py` measured\n\n{summary}", encoding="utf-8")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
