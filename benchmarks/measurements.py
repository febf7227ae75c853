"""The benchmark's figures and tables, computed from the times at which tokens arrived. Standard library only.

tokens/s counts the tokens of all clients together, from the moment when all ask until the last token. TTFT is the
time to the first token, ITL (inter-token latency) the time between two tokens of one client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

SERVICE = "this service"
GATEWAY = "this service over HTTP"
BASELINE = "the baseline"
ARTICLE = "the article's loop"


class Row(NamedTuple):
    """The name of a backend, and the precision of the model that it runs: a row of the tables."""

    name: str
    precision: str

    def __str__(self) -> str:
        return f"{self.name} at {self.precision}"


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
    def first_tokens(self) -> list[float]:
        """Return the TTFT of each client, in seconds."""
        return [times[0] for times in self.arrivals]

    @property
    def gaps(self) -> list[float]:
        """Return the ITLs of all clients, in seconds."""
        return [after - before for times in self.arrivals for before, after in zip(times, times[1:], strict=False)]


Runs = dict[tuple[Row, int], list[Run]]
"""For each row and number of clients, the run of each round."""


@dataclass(frozen=True)
class Prefill:
    """The cold prompt of one round: its TTFT without other clients, and its TTFT and all ITLs of clients whose answers
    were running when it arrived, before that moment and until its first token. All times are in seconds."""

    alone: float
    beside: float
    before: list[float]
    during: list[float]


def by_length(runs: Sequence[Run]) -> Iterator[tuple[int, float]]:
    """Yield (tokens so far, seconds for one more) over the answers of single clients.

    Each point is the median over 50 tokens, or over a quarter of an answer that is shorter than 200, and then over
    the runs.
    """
    shortest = min(len(run.gaps) for run in runs)
    step = min(50, max(1, shortest // 4))
    for begin in range(0, shortest - step + 1, step):
        yield begin + step // 2, median(median(run.gaps[begin : begin + step]) for run in runs)


def ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> float:
    """Return our tokens/s divided by theirs: the median of the rounds' ratios."""
    return median(our.rate / their.rate for our, their in zip(ours, theirs, strict=True))


def rates_table(runs: Runs, peak_memory: dict[Row, int]) -> str:
    """Return a Markdown table with a line for each row of `runs`, sorted by precision. `peak_memory`: bytes."""
    clients, rows = _clients(runs), _rows(runs)

    def cells(row: Row, figure: Callable[[list[Run]], str]) -> list[str]:
        return [figure(runs[row, n]) if (row, n) in runs else "" for n in clients]

    def rate(rounds: list[Run]) -> str:
        return f"{median(run.rate for run in rounds):.1f}"

    def first_token(rounds: list[Run]) -> str:
        return f"{median(first for run in rounds for first in run.first_tokens):.2f}"

    def gap(rounds: list[Run]) -> str:
        return f"{1000 * median(gap for run in rounds for gap in run.gaps):.1f}"

    first, *more = clients
    titles = [
        title for figure in ("tokens/s", "TTFT, s", "ITL, ms") for title in (f"{figure}: {first}", *map(str, more))
    ]
    return _table(
        ["", "precision", *titles, "peak memory, GB"],
        [
            [*row, *cells(row, rate), *cells(row, first_token), *cells(row, gap), f"{peak_memory[row] / 1e9:.1f}"]
            for row in sorted(rows, key=lambda row: [row.precision for row in rows].index(row.precision))
        ],
    )


def ratios_table(runs: Runs) -> str:
    """Return a Markdown table of this service's tokens/s divided by those of each backend at the same precision, and
    by those of the baseline."""
    clients, lines = _clients(runs), []
    for ours in _rows(runs):
        for theirs in _rows(runs):
            is_peer = theirs.precision == ours.precision or theirs.name == BASELINE
            if ours.name == SERVICE and theirs.name != SERVICE and is_peer:
                cells = [
                    f"{ratio(runs[ours, n], runs[theirs, n]):.2f}" if {(ours, n), (theirs, n)} <= runs.keys() else ""
                    for n in clients
                ]
                lines.append([str(ours), str(theirs), *cells])
    return _table(["tokens/s of", "÷ tokens/s of", *(f"clients: {n}" for n in clients)], lines)


def prefill_table(prefills: dict[Row, list[Prefill]], tokens: int, others: int) -> str:
    """Return a Markdown table about a cold prompt of `tokens` tokens, alone and beside `others` running answers."""
    lines = []
    for row, rounds in prefills.items():
        before = [gap for one in rounds for gap in one.before]
        during = [gap for one in rounds for gap in one.during]
        lines.append(
            [
                *row,
                f"{median(tokens / one.alone for one in rounds):.0f}",
                f"{median(one.alone for one in rounds):.2f}",
                f"{median(one.beside for one in rounds):.2f}",
                *(f"{1000 * seconds:.0f}" for seconds in (median(before), median(during), max(during))),
            ]
        )
    titles = ["tokens/s", "TTFT, s", f"TTFT beside {others} answers, s"]
    return _table(["", "precision", *titles, "their ITL, ms: before", "meanwhile", "longest"], lines)


def _clients(runs: Runs) -> list[int]:
    return sorted({n for _, n in runs})


def _rows(runs: Runs) -> list[Row]:
    return list(dict.fromkeys(row for row, _ in runs))


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: two columns of text, and then columns of numbers."""
    rule = ["---", "---", *["--:"] * (len(titles) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, rule, *lines])
