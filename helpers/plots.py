"""The notebooks' pictures, and the check of the machine as a table.

This module draws; it measures and decides nothing. Every picture has a white background, because a notebook may have a
dark theme. The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/). A hatch, a marker or a word repeats
their meaning, and an alternative text describes the picture.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from .catalog import KNOWN_PARAMETERS, LLAMA2
from .checks import CheckResult, format_table
from .hardware import Machine
from .memory import memory_needed

BLUE, VERMILLION, BLACK = "#0072B2", "#D55E00", "#000000"

_DOTS_PER_INCH = 100
_PIXELS_PER_DOT = 2  # for screens with more than 100 dots per inch


class Picture:
    """A drawing, as a notebook shows it.

    `alt` describes it in sentences, but without measured values, so that the text is the same in every run.
    """

    def __init__(self, figure: Figure, alt: str) -> None:
        self.figure = figure
        self.alt = alt

    def __repr__(self) -> str:
        return self.alt

    def png(self) -> bytes:
        """Return the drawing as the bytes of a PNG file."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=_DOTS_PER_INCH * _PIXELS_PER_DOT)
        return file.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        width = round(self.figure.get_figwidth() * _DOTS_PER_INCH)
        data = {"image/png": base64.b64encode(self.png()).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt, "width": width}}


def _drawing(*, width: float, height: float) -> tuple[Figure, Axes]:
    """Return a white figure, in inches, and its axes. pyplot would keep the figure and show it a second time."""
    rim = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), facecolor="white", layout=rim)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


# --- 01 Access ------------------------------------------------------------------------------------

SIZES = {"7B": KNOWN_PARAMETERS[LLAMA2], "13B": 13_015_864_320, "70B": 68_976_648_192}
"""Sizes of Llama 2 → parameters, from the shapes that their ``config.json`` implies."""


class CheckTable:
    """The results of `helpers.checks.check` as a table, with a fix for each that is not ok."""

    def __init__(self, results: Sequence[CheckResult]) -> None:
        self.results = list(results)

    def __repr__(self) -> str:
        return format_table(self.results)

    def _repr_markdown_(self) -> str:
        rows = ["| ok? | what | found | what to do |", "|:--|:--|:--|:--|"]
        for result in self.results:
            cells = [result.name, result.finding, "" if result.ok else result.fix]
            rows.append(f"| {'ok' if result.ok else '**no**'} | {' | '.join(map(_cell, cells))} |")
        return "\n".join(rows)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;")


def memory(here: Machine) -> Picture:
    """Draw a bar for each size of Llama 2 at bf16, int8 and nf4, in GB, and a line at the memory that is free.

    The bars are for a GPU: on a CPU, int8 needs more, see `helpers.memory.memory_needed`. The line shows the memory of
    the GPU, or RAM if `here` has no GPU.
    """
    free = here.gpu.free if here.gpu else here.ram_available
    fits: dict[str, Any] = {"facecolor": BLUE, "edgecolor": BLUE}
    too_large: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "////"}
    needs = {
        f"{size} at {precision}": memory_needed(parameters, precision)
        for size, parameters in SIZES.items()
        for precision in ("bf16", "int8", "nf4")
    }
    labels = [f"{name}: {needed / 1e9:.1f} GB" for name, needed in needs.items()]
    places = [row + 0.6 * (row // 3) for row in range(len(needs))]  # with a gap between two sizes
    figure, axes = _drawing(width=8, height=4.5)
    for place, needed in zip(places, needs.values(), strict=True):
        axes.barh(place, needed / 1e9, **(fits if needed <= free else too_large))
    axes.set_yticks(places, labels)
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.set(xlabel="GB of memory", xlim=(0, max(165, 1.05 * free / 1e9)))
    found = f"{free / 1e9:.1f} GB are free here, {'on the GPU' if here.gpu else 'in RAM'}"
    line = axes.axvline(free / 1e9, color=BLACK, linestyle="--", label=found)
    legend = [Patch(**fits, label="fits"), Patch(**too_large, label="does not fit"), line]
    axes.legend(handles=legend, loc="upper right", framealpha=1)
    return Picture(
        figure,
        f"Nine bars, the memory that Llama 2 needs: {', '.join(labels)}. A dashed line marks the memory that is free "
        "on this machine. Bars that end before it are filled, and bars that cross it are hatched.",
    )


# --- 02 Prompting ---------------------------------------------------------------------------------

_TINTS = ("#CFE8F7", "#FBE3B5", "#CDEBDD", "#F6D5E6", "#F3EFB0")


class Tokens:
    """The pieces of text that `ids` stand for, side by side, each above its id.

    Neighbours differ in tint, and a special token has a frame.
    """

    def __init__(self, ids: Sequence[int], tokenizer: Any) -> None:
        self.ids = list(ids)
        self.pieces = tokenizer.convert_ids_to_tokens(self.ids)
        self._special = set(tokenizer.all_special_ids)

    def __repr__(self) -> str:
        return " ".join(f"{piece}·{token_id}" for piece, token_id in zip(self.pieces, self.ids, strict=True))

    def _repr_html_(self) -> str:
        return f'<div style="line-height: 1.3">{"".join(map(self._span, range(len(self.ids))))}</div>'

    def _span(self, n: int) -> str:
        frame = VERMILLION if self.ids[n] in self._special else "transparent"
        style = (
            f"display: inline-block; margin: 1px; padding: 1px 4px; border: 2px solid {frame}; border-radius: 3px; "
            f"color: {BLACK}; background: {_TINTS[n % len(_TINTS)]}; font-family: monospace; text-align: center"
        )
        return f'<span style="{style}">{html.escape(self.pieces[n])}<br><small>{self.ids[n]}</small></span>'


def window(sent: Sequence[int], whole: Sequence[int], *, window: int, kept_free: int) -> Picture:
    """Draw a bar for each request of a conversation that outgrows the context window.

    Request n sends `sent[n]` tokens of the `whole[n]` in the dialog. `kept_free` of the `window` tokens are reserved
    for the answer.
    """
    figure, axes = _drawing(width=8, height=4)
    requests = range(1, len(sent) + 1)
    dropped: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "///"}
    axes.bar(requests, sent, color=BLUE, label="sent to the model")
    for request, part, all_of_it in zip(requests, sent, whole, strict=True):
        if part < all_of_it:
            axes.bar(request, all_of_it - part, bottom=part, **dropped)
    axes.axhline(window, color=BLACK, linewidth=1.5)
    axes.axhline(window - kept_free, color=BLACK, linewidth=1, linestyle="--")
    near: dict[str, Any] = {"xycoords": "data", "textcoords": "offset points"}
    axes.annotate(f"window: {window:,} tokens", (0.4, window), xytext=(0, 4), va="bottom", **near)
    axes.annotate("room for the answer above this", (0.4, window - kept_free), xytext=(0, -4), va="top", **near)
    axes.set(xlabel="request", ylabel="tokens", xticks=requests)
    handles, _ = axes.get_legend_handles_labels()
    legend = [*handles, Patch(**dropped, label="dropped: the oldest turns")]
    axes.legend(handles=legend, loc="upper left", bbox_to_anchor=(0, 0.88), frameon=False)
    return Picture(
        figure,
        "Bars: the prompt grows with each request until it reaches the room for the answer, just below the window. "
        "From then on the oldest turns are dropped, and the prompt stays below that line.",
    )


# --- 03 Streaming ---------------------------------------------------------------------------------

_SERIES = ((BLUE, "o"), (VERMILLION, "s"), (BLACK, "^"))


def timeline(moments: Mapping[str, Sequence[float]]) -> Picture:
    """Draw a row for each client, with a mark at each of its `moments`, in seconds since its request."""
    figure, axes = _drawing(width=8, height=0.9 + 0.6 * len(moments))
    for row, times in enumerate(moments.values()):
        colour, marker = _SERIES[row % len(_SERIES)]
        axes.plot([0, max(times)], [row, row], color="#999999", linewidth=1, zorder=1)
        axes.scatter(times, [row] * len(times), color=colour, marker=marker, s=24, zorder=2)
    axes.set_yticks(range(len(moments)), list(moments))
    axes.set(xlabel="seconds since the question", ylim=(len(moments) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.tick_params(left=False)
    clients = ", ".join(moments)
    return Picture(
        figure,
        f"Timeline with a row for each client, from the top: {clients}. Each mark is a piece of the answer.",
    )


def costs(moments: Mapping[str, Sequence[float]]) -> Picture:
    """Draw the time of each token after the first, in ms, for each service. `moments` are in seconds."""
    figure, axes = _drawing(width=8, height=4)
    for (service, times), (colour, marker) in zip(moments.items(), _SERIES, strict=False):
        gaps = [1000 * (after - before) for before, after in itertools.pairwise(times)]
        axes.plot(range(2, len(times) + 1), gaps, marker, color=colour, markersize=4, label=service)
    axes.set(xlabel="token of the answer", ylabel="ms for this token", ylim=(0, None))
    axes.legend(loc="upper left", frameon=False)
    services = " and ".join(moments)
    return Picture(
        figure, f"Dots, one for each token: the milliseconds that it took {services}, from the first to the last."
    )
