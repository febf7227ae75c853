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
from .memory import PRECISIONS, memory_needed

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
    """Return a white figure, in inches, and its axes."""
    figure, (axes,) = _panels(1, 1, width=width, height=height)
    return figure, axes


def _panels(rows: int, columns: int, *, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a white figure, in inches, and the axes of its panels. `options` are those of `Figure.subplots`.

    pyplot would keep the figure and show it a second time.
    """
    rim = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), facecolor="white", layout=rim)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


# --- 01 Access ------------------------------------------------------------------------------------

SIZES = {"7B": KNOWN_PARAMETERS[LLAMA2], "13B": 13_015_864_320, "70B": 68_976_648_192}
"""Sizes of Llama 2 → parameters, from the shapes that their ``config.json`` implies."""

CACHES = {"7B": 2 * 32 * 4096, "13B": 2 * 40 * 5120, "70B": 2 * 80 * 1024}
"""Sizes of Llama 2 → numbers in the KV cache for one token: a key and a value, the layers, and the length of a key.
In 70B, 8 of 64 heads have their own keys and values (``num_key_value_heads``), of 128 numbers each."""

GPUS = {"T4: 15 GB": 15, "L4, RTX 4090: 24 GB": 24, "A100, H100: 80 GB": 80}
"""GPUs → GB of memory. A T4 has 16 GB, of which about 15 are free."""


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


def memory() -> Picture:
    """Draw a bar for each size of Llama 2 at bf16, int8 and nf4, in GB, and lines at the memory of three GPUs.

    A bar has two parts: the weights, and a KV cache for 4,096 tokens in 16 bits with what the libraries need. 70B has a
    panel and a scale of its own.
    """
    figure, (small, large) = _panels(2, 1, width=8, height=5.2, height_ratios=(6, 3))
    labels = _memory_bars(small, ("7B", "13B"), gb=35) + _memory_bars(large, ("70B",), gb=150)
    small.set_title("At int8, Llama 2 7B fits on a T4. At bf16 it does not.", pad=22, weight="bold")
    large.set_title("70B, on a scale of its own: at int8 it just fits into 80 GB.", pad=22)
    large.set_xlabel("GB of memory")
    large.legend(loc="lower right", framealpha=1)
    return Picture(
        figure,
        f"Nine bars, the memory that Llama 2 needs: {', '.join(labels)}. Most of each bar is the weights, the rest is "
        f"a KV cache for 4,096 tokens and the libraries. Dashed lines mark the memory of GPUs ({'; '.join(GPUS)}).",
    )


def _memory_bars(axes: Axes, sizes: Sequence[str], *, gb: float) -> list[str]:
    """Draw the bars of `sizes`, and the lines below `gb`, where the axis ends. Return the labels."""
    labels: list[str] = []
    rows: list[float] = []
    for size in sizes:
        for precision in ("bf16", "int8", "nf4"):
            rows.append(len(labels) + 0.5 * (len(labels) // 3))  # with a gap between two sizes
            weights = SIZES[size] * PRECISIONS[precision] / 1e9
            rest = (4096 * CACHES[size] * 2 + memory_needed(0, precision)) / 1e9
            labels.append(f"{size} at {precision}: {weights + rest:.1f} GB")
            axes.barh(rows[-1], weights, color=BLUE, label=None if rows[1:] else "weights")
            axes.barh(
                rows[-1],
                rest,
                left=weights,
                facecolor="white",
                edgecolor=VERMILLION,
                hatch="////",
                label=None if rows[1:] else "KV cache and libraries",
            )
    for name, size_in_gb in GPUS.items():
        if gb / 8 < size_in_gb < gb:
            axes.axvline(size_in_gb, color=BLACK, linestyle="--")
            axes.annotate(
                name,
                (size_in_gb, 1),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                xycoords=("data", "axes fraction"),
            )
    axes.set_yticks(rows, labels)
    axes.set(xlim=(0, gb), ylim=(rows[-1] + 0.5, -0.5))
    axes.tick_params(left=False)
    return labels


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


def next_tokens(probabilities: Mapping[str, Mapping[str, float]], *, title: str) -> Picture:
    """Draw how likely each token is to be the next one, with a bar for each prompt.

    `probabilities`: prompt → token → probability. All prompts have the same tokens, the first one at the top.
    """
    looks: tuple[dict[str, Any], ...] = (
        {"facecolor": BLUE, "edgecolor": BLUE},
        {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "////"},
    )
    tokens = list(next(iter(probabilities.values())))
    thick = 0.8 / len(probabilities)
    figure, axes = _drawing(width=8, height=1.2 + 0.5 * len(tokens))
    for row, ((prompt, of), look) in enumerate(zip(probabilities.items(), looks, strict=False)):
        for place, token in enumerate(tokens, start=1):
            label = "" if place > 1 else prompt
            middle = place + (row - (len(probabilities) - 1) / 2) * thick
            axes.barh(middle, 100 * of[token], height=thick, label=label, **look)
            end = (100 * of[token], middle)
            axes.annotate(f"{of[token]:.1%}", end, xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(1, len(tokens) + 1), [repr(token) for token in tokens])
    axes.set(xlabel="probability of the token, in %", ylim=(len(tokens) + 0.6, 0.4))
    axes.set_title(title, weight="bold")
    axes.margins(x=0.1)
    axes.tick_params(left=False)
    axes.legend(loc="lower right", frameon=False)
    return Picture(
        figure,
        f"Bars, one for each prompt ({', '.join(probabilities)}): how likely the model finds each of the tokens that "
        "are most likely after the first prompt.",
    )


def dropped_turns(whole: Sequence[int], dropped: Sequence[int], *, sent: Sequence[int] | None = None) -> Picture:
    """Draw a row for each request of a conversation, with a block for each turn, as wide as it has tokens.

    Request n has n turns before its question. Its dialog takes `whole[n]` tokens, of which the oldest `dropped[n]`
    turns are not sent. So `whole[0]` are the tokens that are always sent: the system prompt and the question.
    `sent` are the tokens that are left. Give them if the questions differ in length, because they cannot be computed
    from `whole` then.
    """
    looks: dict[str, dict[str, Any]] = {
        "system prompt and new question": {"facecolor": "#EEEEEE", "edgecolor": BLACK, "hatch": ".."},
        "turns that are sent": {"facecolor": "#CFE8F7", "edgecolor": BLUE},
        "turns that are dropped": {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "////"},
    }
    always, kept, left_out = looks.values()
    turns = [after - before for before, after in itertools.pairwise(whole)]
    figure, axes = _drawing(width=8, height=1.6 + 0.32 * len(whole))
    for row, without in enumerate(dropped):
        axes.barh(row, whole[0], **always)
        for number, tokens in enumerate(turns[:row]):
            axes.barh(row, tokens, left=whole[number], **(left_out if number < without else kept))
            middle = (whole[number] + tokens / 2, row)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if number < without else None
            axes.annotate(str(number + 1), middle, ha="center", va="center", fontsize=9, bbox=box)
        left = sent[row] if sent else whole[row] - sum(turns[:without])
        axes.annotate(f"{left:,} sent", (whole[row], row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(whole)), [f"request {row + 1}" for row in range(len(whole))])
    axes.set(xlabel="tokens of the whole dialog", xlim=(0, 1.13 * max(whole)), ylim=(len(whole) - 0.4, -0.6))
    axes.set_title("The oldest turns go first, and only as many as needed", weight="bold", pad=28)
    axes.tick_params(left=False)
    legend = [Patch(**look, label=label) for label, look in looks.items()]
    axes.legend(handles=legend, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3, frameon=False, fontsize=9)
    return Picture(
        figure,
        "A row for each request and a numbered block for each turn. The system prompt and the new question are in "
        "every row. In the lower rows the first turns are hatched, which means that they are dropped. The hatched "
        "blocks are always the oldest turns of their row.",
    )


# --- 03 Streaming ---------------------------------------------------------------------------------

_SERIES = ((BLUE, "o"), (VERMILLION, "s"), (BLACK, "^"))


def timeline(
    moments: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    clock: str = "seconds since the question",
    until: float | None = None,
) -> Picture:
    """Draw a row for each client, with a mark at each of its `moments`, in seconds.

    `clock` says since when. The axis goes to `until`, or to the last mark. To compare two pictures, give both the same.
    """
    figure, axes = _drawing(width=8, height=0.9 + 0.6 * len(moments))
    for row, times in enumerate(moments.values()):
        colour, marker = _SERIES[row % len(_SERIES)]
        axes.plot([0, max(times)], [row, row], color="#999999", linewidth=1, zorder=1)
        axes.scatter(times, [row] * len(times), color=colour, marker=marker, s=24, zorder=2)
    axes.set_yticks(range(len(moments)), list(moments))
    axes.set(title=title, xlabel=clock, ylim=(len(moments) - 0.5, -0.5))
    axes.set_xlim(0, until and 1.02 * until)  # room for a mark at its end
    axes.tick_params(left=False)
    clients = ", ".join(moments)
    return Picture(
        figure,
        f"Timeline with a row for each client, from the top: {clients}. Each mark is a piece of an answer, or a reply.",
    )


def costs(moments: Mapping[str, Sequence[float]], *, title: str = "") -> Picture:
    """Draw for each service the time of each token after the first, in ms, and beside it the sum so far, in seconds.

    `moments` are in seconds since the request.
    """
    figure, (each, total) = _panels(1, 2, width=8, height=4)
    for (service, times), (colour, marker) in zip(moments.items(), _SERIES, strict=False):
        gaps = [1000 * (after - before) for before, after in itertools.pairwise(times)]
        each.plot(range(2, len(times) + 1), gaps, marker, color=colour, markersize=4, label=service)
        total.plot(range(1, len(times) + 1), times, marker, color=colour, markersize=4)
    each.set(xlabel="token of the answer", ylabel="ms for this token", ylim=(0, None))
    total.set(xlabel="token of the answer", ylabel="seconds until this token", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=len(moments), frameon=False)
    figure.suptitle(title)
    services = " and ".join(moments)
    return Picture(
        figure,
        f"Two panels, with a dot for each token of {services}. Left: the milliseconds that the token took. "
        "Right: the seconds until it came.",
    )


# --- 04 Conversation ------------------------------------------------------------------------------


def first_tokens(seconds: Mapping[str, Sequence[float]]) -> Picture:
    """Draw the time to the first token in each turn of a conversation, with a line for each way to send it."""
    figure, axes = _drawing(width=8, height=4)
    for (way, times), (colour, marker) in zip(seconds.items(), _SERIES, strict=False):
        turns = range(1, len(times) + 1)
        axes.plot(turns, times, marker=marker, color=colour, label=way)
        axes.set_xticks(turns)
    axes.set(xlabel="turn of the conversation", ylabel="seconds to the first token", ylim=(0, None))
    axes.set_title("The first token stays quick only if the prompt begins as before", weight="bold")
    axes.legend(loc="upper left", frameon=False)
    return Picture(
        figure, f"Lines over the turns of a conversation, the seconds to the first token: {'; '.join(seconds)}."
    )


# --- 05 Service -----------------------------------------------------------------------------------


def load(clients: Sequence[int], tokens_per_second: Sequence[float], first_tokens: Sequence[float]) -> Picture:
    """Draw, over the number of clients that ask at once, the tokens/s of all together and the TTFT in seconds.

    A dashed line is what the tokens/s would be if each client had the speed of the first.
    """
    figure, (together, first) = _panels(1, 2, width=8, height=3.8)
    for axes, values, (colour, marker), label in (
        (together, tokens_per_second, _SERIES[0], "tokens/s, all clients together"),
        (first, first_tokens, _SERIES[1], "median seconds to the first token"),
    ):
        axes.plot(clients, values, marker=marker, color=colour)
        axes.set(xlabel="clients at once", ylabel=label, ylim=(0, 1.15 * max(values)))
        axes.set_xticks(clients)
    alone = tokens_per_second[0] / clients[0]
    together.plot([0, max(clients)], [0, alone * max(clients)], "--", color="#999999", label="if clients cost nothing")
    together.legend(loc="lower right", frameon=False)
    figure.suptitle("More clients: more tokens per second, and a longer wait", weight="bold")
    return Picture(
        figure,
        "Two panels over the number of clients that ask at once. Left: the tokens per second of all clients together, "
        "and a dashed line for clients that cost nothing. Right: the median time to the first token.",
    )


def histogram(counts: Mapping[str, float], *, title: str, xlabel: str) -> Picture:
    """Draw a bar for each bucket: its upper bound → how many values it holds."""
    figure, axes = _drawing(width=8, height=3.2)
    bars = axes.bar(list(counts), list(counts.values()), color=BLUE, width=0.9)
    axes.bar_label(bars, [f"{count:.0f}" if count else "" for count in counts.values()])
    axes.set(xlabel=xlabel, ylabel="requests")
    axes.set_title(title, weight="bold")
    axes.margins(y=0.12)
    axes.tick_params(bottom=False)
    return Picture(figure, f"{title}: a bar for each bucket ({xlabel}), as high as it holds requests.")
