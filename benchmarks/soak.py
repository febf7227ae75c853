"""Many readers of every kind for a long time: is anything lost, and does anything grow?

    python benchmarks/soak.py [--minutes 30] [--crowd 200]

First a crowd: so many readers arrive within ten seconds. Each has to get its whole answer, the same as it gets
alone, or to be told that the service is busy. Then, until the time is up, readers come who ask short and long
questions, hold conversations, leave in the middle, read slowly, or send what is no request. Every answer that
is complete is compared with what the same question gets alone. Prints the service's memory, threads and files
each minute, and in the end what was lost and what has grown since the first sixth of the time; exit status 1 if
anything.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil

import helpers
from helpers.errors import InvalidRequest, ServiceBusy

SUBJECTS = ("tea", "rivers", "clocks", "bees", "maps", "salt", "ice", "paper", "wolves", "bread", "glass", "wind")
QUESTIONS = [f"Tell me about {subject} in some detail." for subject in SUBJECTS]
LONG = " ".join(f"Item {n} of the list is {SUBJECTS[n % len(SUBJECTS)]}." for n in range(60))
LENGTHS = (8, 30, 80)


class State(NamedTuple):
    """What the service's process has. Memory goes up and down by some 10 MB with what is being answered, and a
    closed connection takes a moment to go: so much more than before counts as growth."""

    memory: int
    """MB."""
    threads: int
    files: int
    connections: int

    def __str__(self) -> str:
        return f"{self.memory} MB, {self.threads} threads, {self.files} files, {self.connections} connections"

    def growth_since(self, before: State) -> list[str]:
        margins = State(memory=100, threads=8, files=8, connections=8)
        return [
            f"{name} grew from {old} to {new}"
            for name, new, old, margin in zip(self._fields, self, before, margins)
            if new > old + margin
        ]


class Soak:
    """One service, what is expected of it, and what came of it."""

    def __init__(self, service: helpers.service.Service) -> None:
        self.service = service
        self.seen: Counter[str] = Counter()
        self.lost: list[str] = []
        self.expected = {q: service.ask(q, max_tokens=max(LENGTHS)) for q in self._all_questions()}
        # at the length of a shorter answer, its text is the beginning of the longer one

    @staticmethod
    def _all_questions() -> list[str]:
        return [*QUESTIONS, f"{LONG} How many items are there?"]

    def note(self, kind: str, problem: str = "") -> None:
        self.seen[kind] += 1
        if problem:
            self.lost.append(f"{kind}: {problem}")

    def check(self, kind: str, answer: helpers.client.Answer, question: str, max_tokens: int) -> None:
        expected = self.expected[question]
        whole = answer.text == expected.text if max_tokens == max(LENGTHS) else expected.text.startswith(answer.text)
        tokens = min(max_tokens, expected.completion_tokens)
        right = whole and answer.completion_tokens == tokens
        self.note(kind, "" if right else f"another answer than alone to {question[-40:]!r}: {answer!r}")

    def reader(self, chance: random.Random) -> None:
        """One reader of a kind that chance decides."""
        kind = chance.choice([self.asks, self.asks, self.converses, self.leaves, self.is_slow, self.is_malformed])
        try:
            kind(chance)
        except ServiceBusy:
            self.note("busy")
        except Exception as error:
            self.note(kind.__name__, f"{type(error).__name__}: {error}")

    def asks(self, chance: random.Random) -> None:
        question, n = chance.choice([*self.expected]), chance.choice(LENGTHS)
        self.check("asks", self.service.ask(question, max_tokens=n), question, n)

    def converses(self, chance: random.Random) -> None:
        talk = self.service.conversation(max_tokens=30)
        for question in chance.sample(QUESTIONS, 3):
            talk.ask(question)
        self.note("converses", "" if len(talk.messages) == 6 else "a turn is missing")

    def leaves(self, chance: random.Random) -> None:
        stop_at = chance.randint(0, 20)
        for n, _ in enumerate(self.service.stream(chance.choice(QUESTIONS), max_tokens=120)):
            if n >= stop_at:
                break
        self.note("leaves")

    def is_slow(self, chance: random.Random) -> None:
        question = chance.choice(QUESTIONS)
        answer = self.service.stream(question, max_tokens=40)
        for _ in answer:
            time.sleep(0.2)
        self.check("is slow", answer, question, 40)

    def is_malformed(self, chance: random.Random) -> None:
        wrong = chance.choice(
            [{"max_tokens": 0}, {"temperature": 9.0}, {"max_tokens": 10**6}, {"seed": -1}]
        )
        try:
            self.service.ask("Hello", **wrong)
        except InvalidRequest:
            self.note("is malformed")
        else:
            self.note("is malformed", f"{wrong} was answered")

    def crowd(self, size: int) -> None:
        """`size` readers, each at a moment of its own within ten seconds."""

        def arrive(number: int) -> None:
            chance = random.Random(number)
            time.sleep(chance.uniform(0, 10))
            try:
                self.asks(chance)
            except ServiceBusy:
                self.note("busy")
            except Exception as error:
                self.note("asks", f"{type(error).__name__}: {error}")

        with ThreadPoolExecutor(size) as readers:
            list(readers.map(arrive, range(size)))

    def run(self, seconds: float, readers: int) -> None:
        """So many readers at any time."""
        end = time.monotonic() + seconds

        def one_after_the_other(number: int) -> None:
            chance = random.Random(1000 + number)
            while time.monotonic() < end:
                self.reader(chance)

        threads = [threading.Thread(target=one_after_the_other, args=(n,)) for n in range(readers)]
        for thread in threads:
            thread.start()
        for minute in range(int(seconds // 60) + 1):
            print(f"minute {minute}: {self.state()}; {dict(self.seen)}; lost {len(self.lost)}", flush=True)
            for thread in threads:
                thread.join(max(0.0, min(60 * (minute + 1), seconds) - (seconds - (end - time.monotonic()))))
        for thread in threads:
            thread.join()

    def state(self) -> State:
        (process,) = psutil.Process(self.service.pid).children()
        return State(
            round(process.memory_info().rss / 1e6),
            process.num_threads(),
            process.num_fds(),
            len(process.net_connections()),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--crowd", type=int, default=200)
    parser.add_argument("--readers", type=int, default=12)
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    with helpers.serve(options.model, "fp32", port=0, cache_memory=300_000_000) as service:
        soak = Soak(service)
        soak.crowd(options.crowd)
        print(f"after the crowd: {soak.state()}; {dict(soak.seen)}; lost {len(soak.lost)}", flush=True)
        soak.run(10 * options.minutes, options.readers)  # by then what is kept has come up to its bound
        before = soak.state()
        soak.run(50 * options.minutes, options.readers)
        time.sleep(2)
        info = service.info()
        soak.lost += soak.state().growth_since(before)
        print(f"at the end: {soak.state()}; live {info.live}, waiting {info.waiting}; {dict(soak.seen)}")
    print(*soak.lost[:20] or ["nothing was lost, and nothing has grown"], sep="\n")
    return bool(soak.lost)


if __name__ == "__main__":
    sys.exit(main())
