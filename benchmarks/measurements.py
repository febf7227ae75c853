"""The benchmark's figures, computed from the times at which tokens arrived. Standard library only.

"tokens/s" counts the tokens of all clients together, from the moment when all ask until the last token. "decode"
counts only the time during which every client gets tokens. TTFT is the time to the first token, ITL (inter-token
latency) the time between two tokens of one client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

SERVICE = "this service"
ARTICLE = "the article's loop"

Arrivals = list[list[float]]
"""For each client, the arrival times of its tokens, in seconds since all clients asked."""


@dataclass(frozen=True)
class Run:
    """The arrival times of one run. Each client got at least one token."""

    arrivals: Arrivals

    @property
    def rate(self) -> float:
        """Return tokens/s of all clients together."""
        return sum(map(len, self.arrivals)) / max(times[-1] for times in self.arrivals)

    @property
    def decode_rate(self) -> float:
        """Return tokens/s while every client gets tokens, or `rate` if there is no such time, as in a queue."""
        begin, end = max(times[0] for times in self.arrivals), min(times[-1] for times in self.arrivals)
        tokens = sum(begin < time <= end for times in self.arrivals for time in times)
        return tokens / (end - begin) if tokens else self.rate

    @property
    def first_tokens(self) -> list[float]:
        """Return the TTFT of each client, in seconds."""
        return [times[0] for times in self.arrivals]

    @property
    def gaps(self) -> list[float]:
        """Return the ITLs of all clients, in seconds."""
        return [after - before for times in self.arrivals for before, after in zip(times, times[1:], strict=False)]


Runs = dict[tuple[str, int], list[Run]]
"""For each backend's name and number of clients, the run of each round."""


def p99(values: Sequence[float]) -> float:
    """Return the value that 99 % of `values` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def by_length(runs: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """Yield (tokens so far, seconds for one more) over the answers of single clients.

    Each point is the median over 50 tokens, or over a quarter of an answer that is shorter than 200, and then over
    the runs.
    """
    shortest = min(len(run.gaps) for run in runs)
    step = min(50, max(1, shortest // 4))
    for begin in range(0, shortest - step + 1, step):
        yield begin + step // 2, median(median(run.gaps[begin : begin + step]) for run in runs)


def ratio(ours: Sequence[Run], theirs: Sequence[Run], figure: str = "rate") -> float:
    """Return our `figure`, the name of a property of `Run`, divided by theirs: the median of the rounds' ratios."""
    return median(getattr(our, figure) / getattr(their, figure) for our, their in zip(ours, theirs, strict=True))


def ratios(runs: Runs) -> Iterator[str]:
    """Yield a sentence for each comparison of this service with another backend at the same number of clients."""
    for clients in (1, 8, 16):
        bare = [name for name, n in runs if name.startswith("bare") and n == clients]
        if bare and (SERVICE, clients) in runs:
            best = max(bare, key=lambda name: median(run.decode_rate for run in runs[name, clients]))
            value = ratio(runs[SERVICE, clients], runs[best, clients], "decode_rate")
            yield f"{clients} client(s), decode: {SERVICE} ÷ {best} = {value:.2f}"
    for name, clients in runs:
        is_server = name not in (SERVICE, ARTICLE) and not name.startswith("bare")
        if is_server and (SERVICE, clients) in runs:
            value = ratio(runs[SERVICE, clients], runs[name, clients])
            yield f"{clients} client(s), tokens/s: {SERVICE} ÷ {name} = {value:.2f}"


def table(runs: Runs, peak_memory: dict[str, int]) -> str:
    """Return a Markdown table, a row for each backend and number of clients. `peak_memory`: bytes, by backend."""
    lines = [
        "| | clients | tokens/s | decode | TTFT, s: median | p99 | ITL, ms: median | p99 | peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, clients), rounds in runs.items():
        firsts = [first for run in rounds for first in run.first_tokens]
        gaps = [gap for run in rounds for gap in run.gaps]
        lines.append(
            f"| {name} | {clients} "
            f"| {median(run.rate for run in rounds):.1f} | {median(run.decode_rate for run in rounds):.1f} "
            f"| {median(firsts):.2f} | {p99(firsts):.2f} | {1000 * median(gaps):.0f} | {1000 * p99(gaps):.0f} "
            f"| {peak_memory[name] / 1e9:.1f} |"
        )
    return "\n".join(lines)
