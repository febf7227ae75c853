"""The benchmark's two pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from measurements import ARTICLE, SERVICE, Run, Runs, by_length


def draw_rates(runs: Runs, file: Path) -> None:
    """Draw tokens/s against the number of clients, a line for each backend."""
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    markers = itertools.cycle("os^Dv*P")
    for name in dict.fromkeys(name for name, _ in runs):
        points = [(n, median(run.rate for run in rounds)) for (other, n), rounds in runs.items() if other == name]
        width = 3 if name == SERVICE else 1.5
        axes.plot(*zip(*points, strict=True), marker=next(markers), linewidth=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({n for _, n in runs}), map(str, ticks))
    axes.set(xlabel="clients at once", ylabel="tokens/s of all clients together", ylim=0)
    _save(figure, axes, file)


def draw_costs(ours: Sequence[Run], article: Sequence[Run], file: Path) -> None:
    """Draw the time for one more token against the tokens so far, for this service and the article's loop."""
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for runs, name, style in ((article, ARTICLE, "s--"), (ours, SERVICE, "o-")):
        points = list(by_length(runs))
        axes.plot([n for n, _ in points], [1000 * seconds for _, seconds in points], style, label=name)
    axes.set(xlabel="tokens generated so far", ylabel="ms for one more token", ylim=0)
    _save(figure, axes, file)


def _save(figure: Figure, axes: Axes, file: Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120, bbox_inches="tight")
