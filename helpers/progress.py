"""Show that something is under way: a line in a terminal, a bar in a notebook, nothing elsewhere.

It moves also while nobody reports anything. What a notebook stores of it is its title, so that a stored
output does not depend on the time that something took.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import io
import shutil
import sys
import threading
from typing import Any, Callable, Iterator

from tqdm import tqdm

_SECONDS_BETWEEN_LOOKS = 0.2


@contextlib.contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """Show `title`, and the seconds that have passed, until the block ends.

    ``with progress("Measuring", total=100) as show:`` and then ``show("with a cache", done=3)``: what is being
    done now, and how much of `total`, in whatever unit that counts, has been done. Either may be left out.
    `show` only takes note, so it may be called as often as you like.
    """
    options = {
        "desc": title,
        "total": total,
        "bar_format": "{desc} ({elapsed})" if total is None else "{desc} |{bar}| {percentage:.0f} % ({elapsed})",
        "leave": False,
    }
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and shell.has_trait("kernel"):
        opened = _in_notebook(title, options)
    else:
        opened = _in_terminal(options)

    width = shutil.get_terminal_size().columns - len(" (00:00) ")

    with opened as (bar, draw):

        def show(doing: str = "", done: float | None = None) -> None:
            bar.desc = f"{title}: {doing}"[:width] if doing else title
            if done is not None:
                bar.n = done

        def look() -> None:
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                draw()

        ended = threading.Event()
        # in the caller's context: by it a kernel knows which cell a message belongs to
        looking = threading.Thread(target=contextvars.copy_context().run, args=(look,), daemon=True)
        looking.start()
        try:
            yield show
        finally:
            ended.set()
            looking.join()


@contextlib.contextmanager
def _in_terminal(options: dict[str, Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A tqdm bar on stderr, where that is a terminal, and what draws it."""
    with tqdm(disable=None, **options) as bar:
        yield bar, bar.refresh


@contextlib.contextmanager
def _in_notebook(title: str, options: dict[str, Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A tqdm bar in the cell's output, made of widgets or else of text, and what draws it."""
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
                bar.n = (bar.n + 0.2) % 1.2  # tqdm's little square, which fills again and again
            bar.refresh()

        try:
            yield bar, draw
        finally:
            shown.update(Pretty(title))
            for widget in (box, *box.children):
                widget.close()
