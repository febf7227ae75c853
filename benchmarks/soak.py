"""Send requests of every kind for a long time, and report lost answers and growing resources.

    python benchmarks/soak.py [--minutes 30] [--crowd 200]

First a crowd of clients arrives within ten seconds. Each must get its complete answer, the same as it gets alone,
or a `QueueFull`. Then, until the time is up, clients ask short and long questions, hold conversations, cancel
answers, read slowly, or send invalid requests. Every complete answer is compared with the answer that the same
question gets alone. Prints the service's memory, threads and files each minute, and at the end the lost answers
and the resources that have grown since the first sixth of the time. The exit status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil

import helpers
from helpers.errors import InvalidRequest, QueueFull, from_wire
from helpers.schemas import ChatDocument, ModelOutputDocument
from helpers.transport import Call

SUBJECTS = ("tea", "rivers", "clocks", "bees", "maps", "salt", "ice", "paper", "wolves", "bread", "glass", "wind")
QUESTIONS = [f"Tell me about {subject} in some detail." for subject in SUBJECTS]
LIST = " ".join(f"Item {n} of the list is {SUBJECTS[n % len(SUBJECTS)]}." for n in range(60))
LONG_QUESTION = f"{LIST} How many items are there?"
LENGTHS = (8, 30, 80)


class State(NamedTuple):
    """The resources of the service's process. `memory` is in MB."""

    memory: int
    threads: int
    files: int
    connections: int

    def __str__(self) -> str:
        return f"{self.memory} MB, {self.threads} threads, {self.files} files, {self.connections} connections"

    def growth_since(self, before: State) -> list[str]:
        """Return a sentence for each value that has grown by more than its normal fluctuation."""
        margins = State(memory=100, threads=8, files=8, connections=8)
        return [
            f"{name} grew from {old} to {new}"
            for name, new, old, margin in zip(self._fields, self, before, margins, strict=True)
            if new > old + margin
        ]


class Soak:
    """Clients of one service, and a record of their requests: `seen` by kind, and `lost` with the reasons."""

    def __init__(self, service: helpers.service.Service) -> None:
        self.service = service
        self.seen: Counter[str] = Counter()
        self.lost: list[str] = []
        questions = [*QUESTIONS, LONG_QUESTION]
        self.expected = {question: service.ask(question, max_tokens=max(LENGTHS)) for question in questions}

    def record(self, kind: str, problem: str = "") -> None:
        """Count a request of this kind, and note its problem if there is one."""
        self.seen[kind] += 1
        if problem:
            self.lost.append(f"{kind}: {problem}")

    def compare(self, kind: str, answer: helpers.Answer, question: str, max_tokens: int) -> None:
        """Record whether `answer` is the one that the question gets alone, up to `max_tokens`."""
        expected = self.expected[question]
        is_full_length = max_tokens == max(LENGTHS)
        same = answer.text == expected.text if is_full_length else expected.text.startswith(answer.text)
        complete = answer.completion_tokens == min(max_tokens, expected.completion_tokens)
        self.record(kind, "" if same and complete else f"not the answer alone to {question[-40:]!r}: {answer!r}")

    def one_client(self, chance: random.Random) -> None:
        """Act as one client, of a kind that `chance` chooses."""
        kind = chance.choice([self.ask, self.ask, self.converse, self.cancel, self.read_slowly, self.send_invalid])
        try:
            kind(chance)
        except QueueFull:
            self.record("queue full")
        except Exception as error:
            self.record(kind.__name__, f"{type(error).__name__}: {error}")

    def ask(self, chance: random.Random) -> None:
        """Ask a question, for a short or a long answer."""
        question, length = chance.choice([*self.expected]), chance.choice(LENGTHS)
        self.compare("ask", self.service.ask(question, max_tokens=length), question, length)

    def converse(self, chance: random.Random) -> None:
        """Hold a conversation of three turns."""
        talk = self.service.conversation(max_tokens=30)
        for question in chance.sample(QUESTIONS, 3):
            talk.ask(question)
        self.record("converse", "" if len(talk.messages) == 6 else "a turn is missing")

    def cancel(self, chance: random.Random) -> None:
        """Leave an answer before it is complete."""
        stop_at = chance.randint(0, 20)
        for n, _ in enumerate(self.service.stream(chance.choice(QUESTIONS), max_tokens=120)):
            if n >= stop_at:
                break
        self.record("cancel")

    def read_slowly(self, chance: random.Random) -> None:
        """Read an answer more slowly than it is generated."""
        question = chance.choice(QUESTIONS)
        answer = self.service.stream(question, max_tokens=40)
        for _ in answer:
            time.sleep(0.2)
        self.compare("read slowly", answer, question, 40)

    def send_invalid(self, chance: random.Random) -> None:
        """Send a request that the service must refuse, past the checks of our own client."""
        wrong: dict[str, Any] = chance.choice(
            [{"max_tokens": 0}, {"temperature": 9.0}, {"max_tokens": 10**6}, {"seed": -1}]
        )
        request = ChatDocument(messages=[{"role": "user", "content": "Hello"}], **{"max_tokens": 1, **wrong})
        call = Call("/chat", request, ModelOutputDocument, self.service.host, self.service.port)
        refusal = from_wire(call.document().error or "")
        if isinstance(refusal, QueueFull):
            raise refusal
        refused = isinstance(refusal, InvalidRequest)
        self.record("send invalid", "" if refused else f"{wrong} was not refused: {refusal!r}")

    def crowd(self, size: int) -> None:
        """Act as `size` clients. Each asks at a random moment within ten seconds."""

        def arrive(number: int) -> None:
            chance = random.Random(number)
            time.sleep(chance.uniform(0, 10))
            try:
                self.ask(chance)
            except QueueFull:
                self.record("queue full")
            except Exception as error:
                self.record("ask", f"{type(error).__name__}: {error}")

        with ThreadPoolExecutor(size) as clients:
            list(clients.map(arrive, range(size)))

    def run(self, seconds: float, clients: int) -> None:
        """Run `clients` clients at once for `seconds` seconds, and print a line each minute."""
        end = time.monotonic() + seconds

        def one_after_the_other(number: int) -> None:
            chance = random.Random(1000 + number)
            while time.monotonic() < end:
                self.one_client(chance)

        threads = [threading.Thread(target=one_after_the_other, args=(n,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            print(f"{self.state()}; {dict(self.seen)}; lost {len(self.lost)}", flush=True)
            next_line = time.monotonic() + 60
            for thread in threads:
                thread.join(max(0.0, next_line - time.monotonic()))

    def state(self) -> State:
        """Return the current resources of the process that runs the model."""
        process = psutil.Process(self.service.pid)
        return State(
            round(process.memory_info().rss / 1e6),
            process.num_threads(),
            process.num_fds(),
            len(process.net_connections()),
        )


def main() -> int:
    """Run the crowd and then the mixed clients. Return 1 if anything was lost or has grown, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="after the crowd (default: 30)")
    parser.add_argument("--crowd", type=int, default=200, help="clients in the crowd (default: 200)")
    parser.add_argument("--clients", type=int, default=12, help="clients at once after the crowd (default: 12)")
    parser.add_argument("--model", default="smollm2", help="a Hub id, a folder, or smollm2 (the default)")
    options = parser.parse_args()
    with helpers.serve(options.model, "fp32", port=0, cache_memory=300_000_000) as service:
        soak = Soak(service)
        soak.crowd(options.crowd)
        print(f"after the crowd: {soak.state()}; {dict(soak.seen)}; lost {len(soak.lost)}", flush=True)
        soak.run(10 * options.minutes, options.clients)  # fills the prefix cache up to its limit
        before = soak.state()
        soak.run(50 * options.minutes, options.clients)
        time.sleep(2)  # connections that were closed just now take a moment to disappear
        info = service.info()
        soak.lost += soak.state().growth_since(before)
        print(f"at the end: {soak.state()}; running {info.running}, waiting {info.waiting}; {dict(soak.seen)}")
    print(*soak.lost[:20] or ["nothing was lost, and nothing has grown"], sep="\n")
    return bool(soak.lost)


if __name__ == "__main__":
    sys.exit(main())
