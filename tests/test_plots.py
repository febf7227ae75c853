"""The pictures, which colour-blind and blind users can understand too."""

from __future__ import annotations

import base64
import functools
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
from helpers.hardware import Gpu, Machine

GB = 10**9
MACHINES = {
    "a small laptop": Machine("3.11", 4 * GB, 1 * GB, None),
    "a laptop": Machine("3.11", 26 * GB, 24 * GB, None),
    "a T4": Machine("3.13", 13 * GB, 11 * GB, Gpu("Tesla T4", 16 * GB, 15 * GB, False)),
    "an H200": Machine("3.13", 128 * GB, 99 * GB, Gpu("NVIDIA H200", 150 * GB, 149 * GB, True)),
    "a large server": Machine("3.12", 2000 * GB, 1900 * GB, None),
}
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[request.param]


def bars(picture: plots.Picture) -> dict[str, Any]:
    """Return the bars by their labels."""
    (axes,) = picture.figure.axes
    return dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.patches, strict=True))


def free(machine: Machine) -> int:
    return machine.gpu.free if machine.gpu else machine.ram_available


def test_a_bar_shows_what_a_size_needs_and_whether_it_fits(machine: Machine) -> None:
    for label, bar in bars(plots.memory(machine)).items():
        size, precision = re.fullmatch(r"(\w+) at (\w+): .*", label).groups()  # type: ignore[union-attr]
        parameters = plots.SIZES[size]
        needed = memory.memory_needed(parameters, precision)
        assert bar.get_width() * GB == pytest.approx(needed)
        assert label.endswith(f": {needed / GB:.1f} GB")
        assert (bar.get_hatch() is None) == memory.fits(parameters, precision, free=free(machine))


def test_a_line_marks_the_free_memory(machine: Machine) -> None:
    (axes,) = plots.memory(machine).figure.axes
    (line,) = axes.lines
    assert line.get_xdata()[0] * GB == free(machine)
    assert f"{free(machine) / GB:.1f} GB" in line.get_label()
    assert ("GPU" in line.get_label()) == (machine.gpu is not None)
    left, right = axes.get_xlim()
    assert left < line.get_xdata()[0] < right


TIMES = [0.1 * n for n in range(1, 30)]
PICTURES: dict[str, Callable[[], plots.Picture]] = {
    **{f"memory of {name}": functools.partial(plots.memory, machine) for name, machine in MACHINES.items()},
    "window": lambda: plots.window([100, 200, 250], [100, 200, 300], window=300, kept_free=40),
    "timeline": lambda: plots.timeline({"alone": TIMES, "first of two": TIMES, "second of two": [9.0]}),
    "costs": lambda: plots.costs({"one service": TIMES, "another": [n * n for n in TIMES]}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_what_differs_in_colour_differs_in_hatch_or_marker_too(name: str) -> None:
    from matplotlib.colors import to_hex

    (axes,) = PICTURES[name]().figure.axes
    looks = {(to_hex(bar.get_edgecolor()), bar.get_hatch()) for bar in axes.patches}
    looks |= {(to_hex(line.get_color()), line.get_marker()) for line in axes.lines if line.get_marker() != "None"}
    looks |= {(to_hex(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes()) for dots in axes.collections}
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

    picture = plots.memory(MACHINES["a laptop"])
    data, metadata = DisplayFormatter().format(picture)
    assert base64.b64decode(data["image/png"]) == picture.png()
    assert data["text/plain"] == metadata["image/png"]["alt"] == picture.alt
    assert metadata["image/png"]["width"] == 800


def test_the_text_of_a_picture_names_every_bar_and_is_the_same_on_every_machine() -> None:
    (text,) = {plots.memory(machine).alt for machine in MACHINES.values()}
    assert all(label in text for label in bars(plots.memory(MACHINES["a T4"])))


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


def test_the_window_shows_what_is_sent_and_what_is_dropped() -> None:
    (axes,) = plots.window([100, 200, 250], [100, 200, 300], window=300, kept_free=40).figure.axes
    sent, dropped = axes.patches[:3], axes.patches[3:]
    assert [bar.get_height() for bar in sent] == [100, 200, 250]
    assert [(bar.get_y(), bar.get_height()) for bar in dropped] == [(250, 50)]
    assert [line.get_ydata()[0] for line in axes.lines] == [300, 260]


def test_a_timeline_has_a_mark_for_each_piece() -> None:
    (axes,) = plots.timeline({"waited for": [2.0], "streamed": [0.5, 1.0, 2.1]}).figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["waited for", "streamed"]
    marks = [dots.get_offsets().tolist() for dots in axes.collections]
    assert marks == [[[2.0, 0.0]], [[0.5, 1.0], [1.0, 1.0], [2.1, 1.0]]]


def test_costs_are_the_times_between_tokens() -> None:
    (axes,) = plots.costs({"a service": [1.0, 1.5, 2.5]}).figure.axes
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [2, 3]
    assert line.get_ydata() == pytest.approx([500, 1000])
