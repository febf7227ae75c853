"""Show progress: a line in a terminal, a bar in a notebook, nothing elsewhere.

It also moves between reports. A notebook stores only the title, so that a stored output does not depend on time.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from .terminal import is_notebook, visible

_DRAW_INTERVAL = 0.2  # seconds


@contextlib.contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """Show `title`, and the seconds that have passed, until the block ends.

    ``with progress("Measuring", total=100) as show:`` and then ``show("with a cache", done=3)`` adds what is being
    done, and how much of `total` is done, in the same unit. Both are optional. `show` is cheap: call it often.
    """
    options = {
        "desc": title,
        "total": total,
        "bar_format": "{desc} ({elapsed})" if total is None else "{desc} |{bar}| {percentage:.0f} % ({elapsed})",
        "leave": False,
    }
    opened = _in_notebook(title, options) if is_notebook() else _in_terminal(options)
    width = shutil.get_terminal_size().columns - len(" (00:00) ")

    with opened as (bar, draw):

        def show(doing: str = "", done: float | None = None) -> None:
            bar.desc = visible(f"{title}: {doing}")[:width] if doing else title
            if done is not None:
                bar.n = done

        def draw_until_the_end() -> None:
            while not ended.wait(_DRAW_INTERVAL):
                draw()

        ended = threading.Event()
        # in the caller's context, which tells a kernel the cell that a message belongs to
        run = contextvars.copy_context().run
        drawing = threading.Thread(target=run, args=(draw_until_the_end,), daemon=True)
        drawing.start()
        try:
            yield show
        finally:
            ended.set()
            drawing.join()


@contextlib.contextmanager
def _in_terminal(options: dict[str, Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Yield a tqdm bar on stderr, which shows nothing if stderr is not a terminal, and the function that draws it."""
    with tqdm(disable=None if sys.stderr else True, **options) as bar:
        yield bar, bar.refresh


@contextlib.contextmanager
def _in_notebook(title: str, options: dict[str, Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Yield a tqdm bar in the cell's output, and the function that draws it. Without ipywidgets, it is text."""
    from IPython.display import Pretty, display

    if importlib.util.find_spec("ipywidgets") is None:
        with tqdm(file=io.StringIO(), ascii=False, **options) as bar:
            line = display(Pretty(title), display_id=True)
            try:
                yield bar, lambda: line.update(Pretty(str(bar)))
            finally:
                line.update(Pretty(title))
        return

    from tqdm.notebook import tqdm as tqdm_of_widgets

    with tqdm_of_widgets(display=False, **options) as bar:
        box = bar.container
        view = {"model_id": box.model_id, "version_major": 2, "version_minor": 0}
        bundle = {"text/plain": title, "application/vnd.jupyter.widget-view+json": view}
        shown = display(bundle, raw=True, display_id=True)

        def draw() -> None:
            if bar.total is None:
                bar.n = (bar.n + 0.2) % 1.2  # fills tqdm's small square again and again
            bar.refresh()

        try:
            yield bar, draw
        finally:
            shown.update(Pretty(title))
            for widget in (box, *box.children):
                widget.close()
