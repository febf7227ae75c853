"""The pictures, which colour-blind and blind users can understand too."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

from helpers.catalog import INSTALL_LAB

pytest.importorskip("matplotlib", reason=f"matplotlib is not installed: {INSTALL_LAB}")
from matplotlib import image

from helpers import memory, plots
from helpers.checks import CheckResult, format_table

GB = 10**9
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}


def bars(picture: plots.Picture) -> dict[str, list[Any]]:
    """Return the parts of each bar, from left to right, by the bar's label."""
    found = {}
    for axes in picture.figure.axes:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        parts = [axes.patches[n : n + 2] for n in range(0, len(axes.patches), 2)]
        found.update(zip(labels, parts, strict=True))
    return found


def test_a_bar_is_the_weights_and_what_is_needed_besides() -> None:
    found = bars(plots.memory())
    assert len(found) == 9
    for label, (weights, rest) in found.items():
        size, precision = re.fullmatch(r"(\w+) at (\w+): .*", label).groups()  # type: ignore[union-attr]
        assert weights.get_width() * GB == pytest.approx(plots.SIZES[size] * memory.PRECISIONS[precision])
        assert rest.get_width() * GB == pytest.approx(4096 * 2 * plots.CACHES[size] + 0.5 * GB)
        assert rest.get_x() == pytest.approx(weights.get_width())
        assert label.endswith(f": {weights.get_width() + rest.get_width():.1f} GB")


def test_the_memory_of_7b_is_the_memory_that_the_choice_counts() -> None:
    labels = " ".join(bars(plots.memory()))
    for precision in ("bf16", "int8", "nf4"):
        needed = memory.memory_needed(plots.SIZES["7B"], precision)
        assert f"7B at {precision}: {memory.format_gb(needed)}" in labels


def test_lines_mark_the_memory_of_gpus_inside_their_panel() -> None:
    small, large = plots.memory().figure.axes
    assert [line.get_xdata()[0] for line in small.lines] == [15, 24]
    assert [line.get_xdata()[0] for line in large.lines] == [24, 80]
    assert small.get_title() and large.get_title()


TIMES = [0.1 * n for n in range(1, 30)]
PICTURES: dict[str, Callable[[], plots.Picture]] = {
    "memory": plots.memory,
    "next tokens": lambda: plots.next_tokens({"one": {"a": 0.6, "b": 0.1}, "two": {"a": 0.2, "b": 0.3}}, title="Two"),
    "dropped turns": lambda: plots.dropped_turns([50, 150, 400, 500], [0, 0, 0, 2]),
    "timeline": lambda: plots.timeline({"alone": TIMES, "first of two": TIMES, "second of two": [9.0]}),
    "load": lambda: plots.load([1, 2, 4], [10.0, 18.0, 30.0], [0.1, 0.2, 0.3]),
    "histogram": lambda: plots.histogram({"0.1": 3, "+Inf": 2}, title="The wait", xlabel="seconds"),
    "costs": lambda: plots.costs({"one service": TIMES, "another": [n * n for n in TIMES]}),
    "first tokens": lambda: plots.first_tokens({"reused": [0.1, 0.1], "read again": [0.1, 0.5]}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_what_differs_in_colour_differs_in_hatch_or_marker_too(name: str) -> None:
    from matplotlib.colors import to_hex

    looks: set[tuple[str, Any]] = set()
    for axes in PICTURES[name]().figure.axes:
        looks |= {(to_hex(bar.get_edgecolor()), bar.get_hatch()) for bar in axes.patches}
        looks |= {(to_hex(line.get_color()), line.get_marker()) for line in axes.lines if line.get_marker() != "None"}
        looks |= {(to_hex(dot.get_facecolor()[0]), dot.get_paths()[0].vertices.tobytes()) for dot in axes.collections}
    assert looks and {colour for colour, _ in looks} <= OKABE_ITO
    assert len({shape for _, shape in looks}) == len(looks)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_opaque_and_white_at_its_rim(name: str) -> None:
    pixels = image.imread(io.BytesIO(PICTURES[name]().png()))
    assert (pixels[..., 3] == 1).all()
    rim = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == 1).all() for edge in rim), "something is cut off, or not on white"


def test_a_notebook_gets_a_picture_with_its_width_and_its_text() -> None:
    from IPython.core.formatters import DisplayFormatter

    picture = plots.memory()
    data, metadata = DisplayFormatter().format(picture)
    assert base64.b64decode(data["image/png"]) == picture.png()
    assert data["text/plain"] == metadata["image/png"]["alt"] == picture.alt
    assert metadata["image/png"]["width"] == 800


def test_the_text_of_a_picture_names_every_bar() -> None:
    picture = plots.memory()
    assert all(label in picture.alt for label in bars(picture))


def test_the_check_is_a_table_with_a_fix_for_each_problem() -> None:
    results = [
        CheckResult(True, "GPU", "A|B <i>100</i>, 15.0 GB free", "never shown"),
        CheckResult(False, "token", "none was found", "Create one: https://huggingface.co/settings/tokens."),
    ]
    header, rule, good, bad = plots.CheckTable(results)._repr_markdown_().splitlines()
    assert good == "| ok | GPU | A&#124;B &lt;i&gt;100&lt;/i&gt;, 15.0 GB free |  |"
    assert bad.startswith("| **no** | token | none was found | Create one: https")
    assert {row.count("|") for row in (header, rule, good, bad)} == {5}
    assert repr(plots.CheckTable(results)) == format_table(results)


def test_tokens_show_each_piece_with_its_id(llama2_tokenizer: Any) -> None:
    ids = llama2_tokenizer.encode("<b> & 🦙")
    row = plots.Tokens(ids, llama2_tokenizer)
    html = row._repr_html_()
    assert [int(n) for n in re.findall(r"<small>(\d+)</small>", html)] == ids
    assert "&lt;0xF0&gt;" in html and "▁&amp;" in html
    spans = html.split("<span ")[1:]
    framed = [f"solid {plots.VERMILLION}" in span for span in spans]
    assert framed == [True] + [False] * (len(ids) - 1), "only the special token has a frame"
    assert all(a.split("background")[1][:9] != b.split("background")[1][:9] for a, b in itertools.pairwise(spans))
    assert repr(row).startswith(f"<s>·1 ▁<·{ids[1]}")


def test_the_next_tokens_of_two_prompts_have_bars_side_by_side() -> None:
    probabilities = {"one BOS": {"The": 0.5, " a": 0.25}, "two BOS": {"The": 0.25, " a": 0.5}}
    picture = plots.next_tokens(probabilities, title="Another token wins")
    (axes,) = picture.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["'The'", "' a'"]
    assert [bar.get_width() for bar in axes.patches] == [50, 25, 25, 50]
    first, second = axes.patches[0], axes.patches[2]
    assert first.get_y() + first.get_height() == pytest.approx(second.get_y()), "the bars of a token touch"
    assert axes.get_title() == "Another token wins"
    assert "one BOS, two BOS" in picture.alt and "The" not in picture.alt


def test_the_oldest_turns_are_the_hatched_ones() -> None:
    (axes,) = plots.dropped_turns([50, 150, 400, 500], [0, 0, 1, 2]).figure.axes
    drawn = [(round(bar.get_y() + 0.4), bar.get_x(), bar.get_width(), bar.get_hatch()) for bar in axes.patches]
    last_row = [(left, width, hatch) for row, left, width, hatch in drawn if row == 3]
    assert last_row == [(0, 50, ".."), (50, 100, "////"), (150, 250, "////"), (400, 100, None)]
    assert [row for row, *_, hatch in drawn if hatch == "////"] == [2, 3, 3]
    texts = [text.get_text() for text in axes.texts]
    assert "150 sent" in texts and "300 sent" in texts, "the tokens of the rest"
    (axes,) = plots.dropped_turns([50, 150, 400], [0, 0, 1], sent=[50, 150, 302]).figure.axes
    assert "302 sent" in [text.get_text() for text in axes.texts]


def test_a_timeline_has_a_mark_for_each_piece() -> None:
    (axes,) = plots.timeline({"waited for": [2.0], "streamed": [0.5, 1.0, 2.1]}).figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["waited for", "streamed"]
    marks = [dots.get_offsets().tolist() for dots in axes.collections]
    assert marks == [[[2.0, 0.0]], [[0.5, 1.0], [1.0, 1.0], [2.1, 1.0]]]


def test_timelines_to_compare_end_at_the_same_second_and_name_their_clock() -> None:
    (axes,) = plots.timeline({"a client": [0.5]}, until=4.0, clock="seconds since the first question").figure.axes
    assert axes.get_xlim() == pytest.approx((0, 4.08))
    assert axes.get_xlabel() == "seconds since the first question"


def test_costs_are_the_times_between_tokens_and_their_sum() -> None:
    picture = plots.costs({"a service": [1.0, 1.5, 2.5]}, title="It costs.")
    each, total = (axes.lines[0] for axes in picture.figure.axes)
    assert each.get_xdata().tolist() == [2, 3]
    assert each.get_ydata() == pytest.approx([500, 1000])
    assert (total.get_xdata().tolist(), list(total.get_ydata())) == ([1, 2, 3], [1.0, 1.5, 2.5])
    assert picture.figure.get_suptitle() == "It costs."


def test_first_tokens_has_a_line_for_each_way_on_one_axis() -> None:
    (axes,) = plots.first_tokens({"reused": [0.1, 0.2], "read again": [0.1, 0.5]}).figure.axes
    assert [(line.get_label(), line.get_ydata().tolist()) for line in axes.lines] == [
        ("reused", [0.1, 0.2]),
        ("read again", [0.1, 0.5]),
    ]
    assert axes.get_ylim()[0] == 0 and axes.get_title()


def test_the_load_has_a_line_for_the_speed_and_one_for_the_wait() -> None:
    picture = plots.load([1, 2, 8], [10.0, 18.0, 40.0], [0.1, 0.2, 0.9])
    together, first = picture.figure.axes
    measured, ideal = together.lines
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([1, 2, 8], [10, 18, 40])
    assert (list(ideal.get_xdata()), list(ideal.get_ydata())) == ([0, 8], [0, 80])
    assert list(first.lines[0].get_ydata()) == [0.1, 0.2, 0.9]
    assert together.get_ylim()[0] == first.get_ylim()[0] == 0
    assert "40" not in picture.alt


def test_a_histogram_has_a_bar_for_each_bucket() -> None:
    picture = plots.histogram({"0.1": 3, "0.5": 0, "+Inf": 2}, title="The wait", xlabel="seconds")
    (axes,) = picture.figure.axes
    assert [bar.get_height() for bar in axes.patches] == [3, 0, 2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.5", "+Inf"]
    assert [text.get_text() for text in axes.texts] == ["3", "", "2"]
    assert axes.get_title() == "The wait" and "3" not in picture.alt
