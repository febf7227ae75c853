"""The benchmark's two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from measurements import ARTICLE, BASELINE, SERVICE, Run, Runs, by_length


def draw_rates(runs: Runs, file: Path) -> None:
    """Draw tokens/s against the number of clients: a panel for each precision of this service, with a line for each
    backend, and the baseline in all of them."""
    rows = list(dict.fromkeys(row for row, _ in runs))
    precisions = [row.precision for row in rows if row.name == SERVICE]
    names = list(dict.fromkeys(row.name.split(",")[0] for row in rows))
    figure = Figure(figsize=(5.5 * len(precisions), 4.5))
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for precision, axes in zip(precisions, panels, strict=True):
        for row in rows:
            if row.precision != precision and row.name != BASELINE:
                continue
            points = [(n, median(run.rate for run in rounds)) for (other, n), rounds in runs.items() if other == row]
            number = names.index(row.name.split(",")[0])
            width = 3 if row.name == SERVICE else 1.5
            label = str(row) if row.name == BASELINE else row.name
            axes.plot(
                *zip(*points, strict=True),
                color=f"C{number}",
                marker="os^Dv*P"[number % 7],
                linewidth=width,
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({n for _, n in runs}), map(str, ticks))
        axes.set(title=precision, xlabel="clients at once", ylabel="tokens/s of all clients together")
        _finish(axes)
    axes.set_ylim(0)  # last, because all panels share it
    figure.savefig(file, dpi=120, bbox_inches="tight")


def draw_costs(ours: Sequence[Run], article: Sequence[Run], file: Path) -> None:
    """Draw the time for one more token against the tokens so far, for this service and the article's loop."""
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for runs, name, style in ((article, ARTICLE, "s--"), (ours, SERVICE, "o-")):
        points = list(by_length(runs))
        axes.plot([n for n, _ in points], [1000 * seconds for _, seconds in points], style, label=name)
    axes.set(xlabel="tokens generated so far", ylabel="ms for one more token", ylim=0)
    _finish(axes)
    figure.savefig(file, dpi=120, bbox_inches="tight")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))  # below, where no line is
